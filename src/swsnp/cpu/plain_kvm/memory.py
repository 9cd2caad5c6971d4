"""Guest memory as a real processor needs it: where its bytes lie in this process, and the checked way in."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.kvm import MemoryAttribute
from swsnp.cpu.plain_kvm.host import address_of, checked_ioctl
from swsnp.cpu.plain_kvm.ioctls import HostIoctl, KvmUserspaceMemoryRegion
from swsnp.hardware.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.cpu.plain_kvm.host import HostKvm

__all__ = ["AttributeRuns", "GuestPhysicalMemory", "MemorySlot", "Planes", "PlanesBase", "Window"]

_PRIVATE: Final = int(MemoryAttribute.PRIVATE)


class MemorySlot(Protocol):
    """A range of guest memory: `size` bytes from `gpa`, page aligned both."""

    @property
    def gpa(self) -> int:
        """First guest physical address."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def shared_view(self) -> memoryview | None:
        """The shared plane's bytes, over anonymous host memory; may end early, None: not there at all."""
        ...

    @property
    def private_view(self) -> memoryview | None:
        """The private plane's."""
        ...


class AttributeRuns(Protocol):
    """The memory attributes of guest frames."""

    def runs(self) -> tuple[list[int], list[int]]:
        """Every run's first frame, from 0 and rising, and its value."""
        ...


class GuestPhysicalMemory(Protocol):
    """The hypervisor's memory of one guest; refusals are `GuestAccessFault`."""

    @property
    def attributes(self) -> AttributeRuns:
        """Which plane each frame is in: `MemoryAttribute.PRIVATE` or not."""
        ...

    @property
    def generation(self) -> int:
        """Another number whenever slots or attributes may have changed."""
        ...

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        """Bytes of one plane."""
        ...

    def write(self, gpa: int, data: bytes, *, private: bool) -> None:
        """Put bytes into one plane."""
        ...

    def pvalidate(self, gpa: int, *, validate: bool, page_size: int = 0) -> tuple[int, bool]:
        """PVALIDATE of 4 KiB (0) or 2 MiB (1): EAX and the carry flag."""
        ...

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool, page_size: int = 0) -> int:
        """RMPADJUST, sizes as PVALIDATE: EAX."""
        ...

    def slots(self) -> tuple[MemorySlot, ...]:
        """All memory as it is mapped now."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """One memory slot of the host's KVM: `address` includes the C-bit for private memory."""

    address: int
    view: memoryview

    @property
    def key(self) -> tuple[int, int, int]:
        """What KVM is told; two windows with one key are the same to it."""
        return self.address, len(self.view), address_of(self.view)

    def part(self, address: int, size: int) -> tuple[int, memoryview] | None:
        """What of a range of addresses lies here: its first address and bytes; None: nothing."""
        start = max(address, self.address)
        end = min(address + size, self.address + len(self.view))
        return (start, self.view[start - self.address : end - self.address]) if start < end else None


class PlanesBase:
    """Private and shared memory as two planes of guest physical addresses.

    The C-bit is an address bit to the host's KVM: private memory lies at `gpa | 1 << c_bit`, shared memory
    at `gpa`. A page table entry with the C-bit thus reaches the private bytes without any change to the
    guest's page tables.
    """

    def __init__(self, host: HostKvm, vm: int, memory: GuestPhysicalMemory, c_bit: int) -> None:
        self._host, self._vm, self._memory = host, vm, memory
        self.private_bit: Final = 1 << c_bit
        self.generation = -1
        """Of the memory when KVM was last told of it."""

    def is_memory(self, gpa: int) -> bool:
        """Whether the hypervisor has a slot there."""
        return any(slot.gpa <= gpa < slot.gpa + slot.size for slot in self._memory.slots())

    def split(self, address: int) -> tuple[int, bool]:
        """An address as KVM reports it: GPA, and whether the access was private."""
        return address & ~self.private_bit, bool(address & self.private_bit)

    def runs(self, gpa: int, size: int) -> list[tuple[int, int, bool]]:
        """A range cut where its attributes change: first address, address behind the last, and if private."""
        starts, values = self._memory.attributes.runs()
        first, behind = bisect_right(starts, gpa // PAGE), bisect_left(starts, (gpa + size) // PAGE)
        edges = [gpa, *(each * PAGE for each in starts[first:behind]), gpa + size]
        return [
            (edges[number], edges[number + 1], bool(value & _PRIVATE))
            for number, value in enumerate(values[first - 1 : behind])
        ]

    def refresh(self) -> None:
        """Tell KVM what has changed since the last time."""
        raise NotImplementedError

    def windows(self, address: int, size: int) -> Iterator[tuple[int, memoryview]]:
        """The mapped parts of a range of addresses (C-bit included): each part's address and bytes."""
        raise NotImplementedError

    def _set(self, number: int, address: int, size: int, user_address: int) -> None:
        region = KvmUserspaceMemoryRegion(
            slot=number, guest_phys_addr=address, memory_size=size, userspace_addr=user_address
        )
        checked_ioctl(self._host, self._vm, HostIoctl.KVM_SET_USER_MEMORY_REGION, bytearray(bytes(region)))


class Planes(PlanesBase):
    """Memory in which every access is judged: each page is there in the plane of its attribute only.

    A page is not there at all if read-only. Any other access leaves KVM and is decided by
    `GuestPhysicalMemory.read` and `write`. For one vCPU: another would meet memory that is just being laid.
    """

    def __init__(self, host: HostKvm, vm: int, memory: GuestPhysicalMemory, c_bit: int) -> None:
        super().__init__(host, vm, memory, c_bit)
        self._windows: dict[tuple[int, int, int], tuple[int, Window]] = {}
        self._free: list[int] = []

    def refresh(self) -> None:
        """Tell KVM what has changed since the last time: slots that are gone, then new ones."""
        self.generation = self._memory.generation
        wanted = {window.key: window for slot in self._memory.slots() for window in self._of(slot)}
        for key in self._windows.keys() - wanted.keys():
            number, window = self._windows.pop(key)
            self._set(number, window.address, 0, 0)
            self._free.append(number)
        for key in wanted.keys() - self._windows.keys():
            number = self._free.pop() if self._free else len(self._windows)
            self._set(number, *key)
            self._windows[key] = number, wanted[key]

    def _of(self, slot: MemorySlot) -> Iterator[Window]:
        """One window for each run of pages with the same attribute."""
        for at, upto, private in self.runs(slot.gpa, slot.size):
            view = slot.private_view if private else slot.shared_view
            if view is not None and not view.readonly:
                part = view[at - slot.gpa : upto - slot.gpa]
                if part:
                    yield Window(at | (self.private_bit if private else 0), part)

    def windows(self, address: int, size: int) -> Iterator[tuple[int, memoryview]]:
        """As `PlanesBase`, by rising address."""
        for _, window in sorted(self._windows.values(), key=lambda each: each[1].address):
            if (part := window.part(address, size)) is not None:
                yield part
