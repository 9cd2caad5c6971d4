"""Guest memory as the VMM holds it: a shared mapping and a guest_memfd behind every slot."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from swsnp.abi.kvm import (
    GUEST_MEMFD_SLOT,
    Ioctl,
    KvmMemoryAttributes,
    KvmUserspaceMemoryRegion2,
    MemoryAttribute,
)
from swsnp.errors import UsageError
from swsnp.hardware.memory import BusError
from swsnp.trace import PageStateChange
from swsnp.vmm.host import PAGE

if TYPE_CHECKING:
    from swsnp.trace import Trace
    from swsnp.vmm.host import HostKernel

__all__ = ["Broken", "Conversion", "Converted", "GuestRam", "RamSlot", "Refused", "SharedRanges"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RamSlot:
    """One slot: `size` bytes at `gpa`; shared at user address `address`, private in `memfd` from offset 0."""

    gpa: int
    size: int
    address: int
    memfd: int

    @property
    def end(self) -> int:
        """First GPA after the slot."""
        return self.gpa + self.size

    def region(self, number: int) -> KvmUserspaceMemoryRegion2:
        """The slot as KVM_SET_USER_MEMORY_REGION2 wants it."""
        return KvmUserspaceMemoryRegion2(
            slot=number,
            flags=GUEST_MEMFD_SLOT,
            guest_phys_addr=self.gpa,
            memory_size=self.size,
            userspace_addr=self.address,
            guest_memfd=self.memfd,
        )


@dataclass(frozen=True, slots=True)
class Converted:
    """The range now has the wanted state; `in_memory` is False when there was nothing to convert."""

    in_memory: bool = True


@dataclass(frozen=True, slots=True)
class Refused:
    """A range that a guest must not ask for, or may ask for again: `errno` is EINVAL or EAGAIN, positive."""

    errno: int


@dataclass(frozen=True, slots=True)
class Broken:
    """The host could not do it; the VM cannot go on. `errno` is positive."""

    errno: int
    step: str


Conversion: TypeAlias = Converted | Refused | Broken

_LIMIT: Final = 1 << 64
_MOST_WAITING: Final = 2 << 20
_DISCARDING: Final = "discarding the side that the range no longer uses"
_PRIVATE: Final = int(MemoryAttribute.PRIVATE)
_SET_ATTRIBUTES: Final = int(Ioctl.KVM_SET_MEMORY_ATTRIBUTES)
_ATTRIBUTES: Final = KvmMemoryAttributes.packing()


class SharedRanges:
    """Which addresses the guest shares: the places, rising, where that changes."""

    def __init__(self) -> None:
        self._edges: list[int] = []
        self._lock = threading.Lock()

    def set(self, start: int, end: int, *, shared: bool) -> None:
        """Make a range shared or not."""
        with self._lock:
            edges = self._edges
            first, last = bisect_left(edges, start), bisect_right(edges, end)
            # an even number of edges before a place: it is not shared
            before, after = first % 2 == 1, last % 2 == 1
            edges[first:last] = [start] * (before != shared) + [end] * (after != shared)

    def hold(self, start: int, end: int) -> bool:
        """Whether all of a range is shared; an empty one is not."""
        with self._lock:
            at = bisect_right(self._edges, start)
            return at % 2 == 1 and start < end <= self._edges[at]


class GuestRam:
    """The slots of one VM. Reads and writes go to the shared side: private bytes are not the VMM's to see.

    Slots count as shared until `set_private` says otherwise, as KVM has it.
    """

    def __init__(
        self, host: HostKernel, vm_fd: int, slots: tuple[RamSlot, ...], vm: str, trace: Trace
    ) -> None:
        self.slots = slots
        self._host, self._vm_fd, self._vm, self._trace = host, vm_fd, vm, trace
        self._shared = SharedRanges()
        for slot in slots:
            self._shared.set(slot.gpa, slot.end, shared=True)
        self._converting = threading.Lock()
        """One conversion at a time, with what it throws away."""
        # from where to where pages have become shared whose private side is still there
        self._waiting = self._behind = 0

    def slot_of(self, gpa: int, size: int) -> RamSlot | None:
        """The slot that holds the whole range; None when no single one does."""
        for slot in self.slots:
            if slot.gpa <= gpa and gpa + size <= slot.gpa + slot.size:
                return slot
        return None

    def user_address(self, gpa: int, size: int) -> int:
        """Where the shared side of the range is mapped.

        Raises:
            BusError: the range is not wholly inside one slot.
        """
        if (slot := self.slot_of(gpa, size)) is None:
            raise BusError(f"gpa {gpa:#x}: no slot holds {size} bytes from there")
        return slot.address + gpa - slot.gpa

    def read(self, gpa: int, size: int) -> bytes:
        """Copy from the shared side; BusError as `user_address`."""
        return self._host.read(self.user_address(gpa, size), size)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy to the shared side, across adjacent slots if need be.

        Raises:
            BusError: memory ends before the data; nothing is written then.
        """
        if (whole := self.slot_of(gpa, len(data))) is not None:
            self._host.write(whole.address + gpa - whole.gpa, data)
            return
        targets: list[tuple[int, int, int]] = []
        done = 0
        while done < len(data):
            slot = self.slot_of(gpa + done, 1)
            if slot is None:
                raise BusError(f"gpa {gpa + done:#x}: no memory for {len(data) - done} of {len(data)} bytes")
            size = min(len(data) - done, slot.end - gpa - done)
            targets.append((slot.address + gpa + done - slot.gpa, done, size))
            done += size
        view = memoryview(data)
        for address, start, size in targets:
            self._host.write(address, view[start : start + size])

    def read_shared(self, gpa: int, size: int) -> bytes:
        """As `read`, for a device that a guest names memory to.

        Raises:
            BusError: the range is not wholly shared memory inside one slot.
        """
        self._must_be_shared(gpa, size)
        return self.read(gpa, size)

    def write_shared(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """As `write`, for a device; BusError as `read_shared`."""
        self._must_be_shared(gpa, len(data))
        self.write(gpa, data)

    def _must_be_shared(self, gpa: int, size: int) -> None:
        if self.slot_of(gpa, size) is None:
            raise BusError(f"gpa {gpa:#x}: no slot holds {size} bytes from there")
        if not self._shared.hold(gpa, gpa + size):
            raise BusError(f"gpa {gpa:#x}: {size} bytes from there are not all shared with the host")

    def passable(self) -> tuple[tuple[int, int, int], ...]:
        """GPA, bytes and descriptor of the shared side of each slot, for a process that is a device.

        Private memory has no descriptor that leaves this process.

        Raises:
            UsageError: the VM was not configured so (`VmConfig.passable_memory`).
        """
        found = []
        for slot in self.slots:
            if (fd := self._host.memfd_of(slot.address)) is None:
                raise UsageError(f"memory at {slot.gpa:#x}: wanted a VM with passable memory")
            found.append((slot.gpa, slot.size, fd))
        return tuple(found)

    def discard(self, gpa: int, size: int) -> None:
        """Throw the shared side of whole pages away; they read as zeros. BusError as `user_address`."""
        self._host.discard(self.user_address(gpa, size), size)

    def set_private(self, gpa: int, size: int, *, private: bool) -> int:
        """KVM_SET_MEMORY_ATTRIBUTES; 0 or -errno."""
        wanted = _ATTRIBUTES.pack(gpa, size, _PRIVATE if private else 0, 0)
        result = self._host.ioctl(self._vm_fd, _SET_ATTRIBUTES, bytearray(wanted))
        if result >= 0:
            self._shared.set(gpa, gpa + size, shared=not private)
        return result

    def convert(self, gpa: int, npages: int, *, private: bool) -> Conversion:
        """Make `npages` pages from `gpa` private or shared, and throw away the side that is no longer used.

        A range without memory may be made shared (it already is), not private. A range that lies only partly
        in a slot is refused, as QEMU does. Of a guest that shares page by page, as Linux does before it has a
        GHCB, the private sides are thrown away together: those of 2 MiB wait at most, and until the guest
        converts something else.
        """
        size = npages * PAGE
        if npages <= 0 or gpa % PAGE or gpa + size > _LIMIT:
            return Refused(errno.EINVAL)
        slot = self.slot_of(gpa, size)
        if slot is None:
            touched = any(gpa < each.end and each.gpa < gpa + size for each in self.slots)
            return Refused(errno.EINVAL) if private or touched else Converted(in_memory=False)
        with self._converting:
            if private and (result := self._discard_waiting()) < 0:
                return Broken(-result, _DISCARDING)
            result = self.set_private(gpa, size, private=private)
            if result in (-errno.EINVAL, -errno.EAGAIN):
                return Refused(-result)
            if result < 0:
                return Broken(-result, "KVM_SET_MEMORY_ATTRIBUTES")
            if private:
                result = self._host.discard(slot.address + gpa - slot.gpa, size)
            else:
                result = self._discard_private(slot, gpa, size)
            if result < 0:
                return Broken(-result, _DISCARDING)
        if (emit := self._trace.emit_exit) is not None:
            emit(PageStateChange(vm=self._vm, gpa=gpa, npages=npages, private=private))
        return Converted()

    def _discard_private(self, slot: RamSlot, gpa: int, size: int) -> int:
        """Throw the private side of what became shared away: at once, unless it is the next page of a row."""
        in_row = size == PAGE and gpa == self._behind and gpa > slot.gpa
        if in_row and gpa - self._waiting < _MOST_WAITING:
            self._behind = gpa + size
            return 0
        result = self._discard_waiting()
        self._waiting = self._behind = gpa + size
        return min(result, self._host.discard_memfd(slot.memfd, gpa - slot.gpa, size))

    def _discard_waiting(self) -> int:
        start, size = self._waiting, self._behind - self._waiting
        self._waiting = self._behind
        if not size or (slot := self.slot_of(start, size)) is None:
            return 0
        return self._host.discard_memfd(slot.memfd, start - slot.gpa, size)
