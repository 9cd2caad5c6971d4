"""One process of the host as its kernel keeps it: a descriptor table and an address space.

It is all that a VMM uses; see "The host kernel as a process sees it" in docs/architecture.md.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.errors import UsageError
from swsnp.hardware.memory import PAGE, BusError
from swsnp.hypervisor.guest_memfd import GuestMemfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.hardware.memory import SystemMemory
    from swsnp.hardware.rmp import Rmp

__all__ = ["Descriptor", "HostTask"]

_FIRST_FD: Final = 3
_FIRST_ADDRESS: Final = 0x7F00_0000_0000
_LARGE: Final = 2 << 20


class Descriptor(Protocol):
    """An open file."""

    def ioctl(self, request: int, arg: int | bytearray | memoryview) -> int:
        """The ioctl's result, errors as -errno."""
        ...

    def release(self) -> None:
        """The last descriptor was closed."""
        ...


class HostTask:
    """A process. Its results are what the system calls return, with errors as -errno."""

    def __init__(
        self,
        name: str,
        *,
        memory: SystemMemory,
        rmp: Rmp,
        open_device: Callable[[HostTask, str], Descriptor | None],
    ) -> None:
        """`open_device` makes the open file of a path, or None where there is no such device."""
        self.name = name
        self.signal_pending = False
        """A signal waits: a long launch command ends early."""
        self._memory = memory
        self._rmp = rmp
        self._open_device = open_device
        self._lock = threading.Lock()
        self._files: dict[int, Descriptor] = {}
        self._next_address = _FIRST_ADDRESS
        self._starts: list[int] = []
        self._mappings: dict[int, tuple[int, int]] = {}  # user address: system address, bytes
        self._unmap_listeners: list[Callable[[int, int], None]] = []

    # Descriptors

    def open(self, path: str) -> int:
        """Open /dev/kvm or /dev/sev: a descriptor, or -ENOENT."""
        file = self._open_device(self, path)
        return -errno.ENOENT if file is None else self.install(file)

    def install(self, file: Descriptor) -> int:
        """Put an open file under the lowest free number from 3 on."""
        with self._lock:
            fd = _FIRST_FD
            while fd in self._files:
                fd += 1
            self._files[fd] = file
            return fd

    def descriptor(self, fd: int) -> Descriptor | None:
        """The open file under a number."""
        return self._files.get(fd)

    def close(self, fd: int) -> int:
        """0, or -EBADF."""
        file = self._files.pop(fd, None)
        if file is None:
            return -errno.EBADF
        file.release()
        return 0

    def exit(self) -> None:
        """End the process: close every file, then unmap its memory."""
        for fd in list(self._files):
            self.close(fd)
        for address in list(self._starts):
            self.free(address)

    def ioctl(self, fd: int, request: int, arg: int | bytearray | memoryview = 0) -> int:
        """The result of the open file's ioctl, or -EBADF.

        Args:
            fd: descriptor.
            request: KVM's or the driver's request number.
            arg: a number, or a structure of exactly its size, which is written back where the kernel does so.
        """
        file = self._files.get(fd)
        return -errno.EBADF if file is None else file.ioctl(request, arg)

    def map_vcpu(self, fd: int) -> memoryview:
        """The 12,288 bytes of a vCPU that `struct kvm_run` starts.

        Raises:
            UsageError: the descriptor is not a vCPU (mmap says -ENODEV or -EBADF).
        """
        area = getattr(self._files.get(fd), "run_area", None)
        if not isinstance(area, memoryview):
            raise UsageError(f"mmap of descriptor {fd}: wanted a vCPU")
        return area

    def interrupt_vcpu(self, fd: int) -> None:
        """A signal to the thread that runs a vCPU: its KVM_RUN, this one or the next, ends with -EINTR."""
        interrupt = getattr(self._files.get(fd), "interrupt", None)
        if interrupt is not None:
            interrupt()

    def discard_memfd(self, fd: int, offset: int, size: int) -> int:
        """fallocate(PUNCH_HOLE) on a guest_memfd: 0, -EBADF, -EINVAL; -EOPNOTSUPP for another file."""
        file = self._files.get(fd)
        if file is None:
            return -errno.EBADF
        return file.punch(offset, size) if isinstance(file, GuestMemfd) else -errno.EOPNOTSUPP

    # Address space

    def allocate(self, size: int, *, passable: bool = False) -> int:
        """Map memory of zeros; its user address, page aligned (2 MiB aligned when that large).

        Args:
            size: bytes.
            passable: of a memfd rather than anonymous: `memfd_of` passes it to another process.

        Raises:
            UsageError: a size that is not positive, or a machine whose memory cannot be passed.
        """
        if size <= 0:
            raise UsageError(f"mmap: got {size} bytes, wanted a positive size")
        size = -(-size // PAGE) * PAGE
        unit = _LARGE if size >= _LARGE else PAGE
        spa = self._memory.allocate(size, passable=passable)
        with self._lock:
            address = -(-self._next_address // unit) * unit
            self._next_address = address + size + PAGE  # one page stays free, so that mappings never touch
            self._mappings[address] = (spa, size)
            self._starts = [*self._starts, address]
        return address

    def free(self, address: int) -> None:
        """Unmap a whole mapping of `allocate`.

        Raises:
            UsageError: no mapping starts there.
        """
        with self._lock:
            mapping = self._mappings.pop(address, None)
            if mapping is None:
                raise UsageError(f"munmap of {address:#x}: no mapping starts there")
            self._starts = [each for each in self._starts if each != address]
        spa, size = mapping
        for listener in self._unmap_listeners:
            listener(address, size)
        self._memory.release(spa)

    def memfd_of(self, address: int) -> int | None:
        """The real host's descriptor of a mapping of `allocate`, until `free`; None for anonymous memory."""
        mapping = self._mappings.get(address)
        return None if mapping is None else self._memory.descriptor(mapping[0])

    def extent(self, address: int) -> tuple[int, int] | None:
        """System address of a user address and the bytes mapped from there on; None when it is unmapped."""
        starts = self._starts
        at = bisect_right(starts, address) - 1
        if at < 0 or (mapping := self._mappings.get(starts[at])) is None:
            return None
        spa, size = mapping
        offset = address - starts[at]
        return (spa + offset, size - offset) if offset < size else None

    def translate(self, address: int, size: int = 1) -> int:
        """System address of `size` mapped bytes.

        Raises:
            BusError: some of them are not mapped.
        """
        found = self.extent(address)
        if found is None or size > found[1]:
            raise BusError(f"user address {address:#x}: {size} bytes are not mapped")
        return found[0]

    def read(self, address: int, size: int) -> bytes:
        """The process's own memory; BusError as `translate`."""
        return self._memory.read(self.translate(address, size), size)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store to the process's own memory.

        Raises:
            BusError: as `translate`; a page that the RMP assigns to guest or firmware.
        """
        size = len(data)
        spa = self.translate(address, size)
        page = self._rmp.first_assigned(range(spa & -PAGE, spa + size, PAGE))
        if page is not None:
            state = self._rmp.state(page).value
            raise BusError(f"user address {address:#x}: host write to a page in state {state}")
        self._memory.write(spa, data)

    def discard(self, address: int, size: int) -> int:
        """MADV_DONTNEED on whole pages: 0, -EINVAL when the address is not aligned, -ENOMEM when unmapped."""
        size = -(-size // PAGE) * PAGE
        if address % PAGE or size < 0:
            return -errno.EINVAL
        found = self.extent(address)
        if found is None or size > found[1]:
            return -errno.ENOMEM
        if size:
            self._memory.discard(found[0], size)
        return 0

    def on_unmap(self, listener: Callable[[int, int], None]) -> Callable[[], None]:
        """Call `listener` with address and size of what is unmapped, until the result is called."""
        self._unmap_listeners = [*self._unmap_listeners, listener]

        def end() -> None:
            self._unmap_listeners = [each for each in self._unmap_listeners if each != listener]

        return end
