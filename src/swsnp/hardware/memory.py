"""DRAM by system physical address: sparse, mapped host memory behind one address space."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from bisect import bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from swsnp.errors import SwsnpError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BusError", "MAP_NORESERVE", "PAGE", "SystemMemory", "passable_memory"]

PAGE: Final = 4096
_OFFSET: Final = PAGE - 1
_LARGE: Final = 2 << 20
MAP_NORESERVE: Final = 0x4000  # named by the mmap module only since Python 3.13
_MAP_FLAGS: Final = mmap.MAP_ANONYMOUS | MAP_NORESERVE
_FIRST: Final = 0x1_0000_0000


class BusError(SwsnpError):
    """No memory answers at this system physical address."""


def passable_memory(size: int) -> tuple[mmap.mmap, int]:
    """Map `size` bytes of zeros that another process can map too: the mapping, and the descriptor to pass.

    The descriptor is the caller's to close; no program that is started inherits it.
    """
    fd = os.memfd_create("guest memory")
    try:
        os.truncate(fd, size)
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED | MAP_NORESERVE), fd
    except BaseException:
        os.close(fd)
        raise


class SystemMemory:
    """The machine's memory. Regions never overlap and never move; addresses are not reused.

    Memory is anonymous and mapped on demand, so that a large region costs nothing until it is touched.

    Threads read, write and look at one place at a time without a lock, with or without the interpreter's:
    nothing slices a `memoryview` that another thread may slice, whose users 3.14 counts without one.

    Args:
        shareable: make it so that a processor of machine code can map the same pages at further addresses
            (MAP_SHARED); it costs a little more to touch. The host's kernel is asked for pages of 2 MiB,
            which it gives where `transparent_hugepage/shmem_enabled` says advise, or more.
    """

    def __init__(self, *, shareable: bool = False) -> None:
        self._shareable = shareable
        self._flags = _MAP_FLAGS | (mmap.MAP_SHARED if shareable else mmap.MAP_PRIVATE)
        self._discard = mmap.MADV_REMOVE if shareable else mmap.MADV_DONTNEED
        self._lock = threading.Lock()
        self._next = _FIRST
        self._bases: list[int] = []
        self._areas: dict[int, mmap.mmap] = {}
        self._descriptors: dict[int, int] = {}
        # nobody releases the memory of a machine that was simply dropped
        weakref.finalize(self, _close_all, self._descriptors.values())
        self._free: list[int] = []
        self._pages: dict[int, tuple[mmap.mmap, int]] = {}

    def allocate(self, size: int, *, passable: bool = False) -> int:
        """Map a new region of zeros.

        Args:
            size: bytes; rounded up to whole pages.
            passable: another process shall be able to map it: it has a `descriptor`.

        Returns:
            Its first system physical address, 2 MiB aligned.

        Raises:
            UsageError: `passable` of memory that is not shareable.
        """
        if passable and not self._shareable:
            raise UsageError("passable memory: wanted the memory to be shareable")
        size = -(-size // PAGE) * PAGE
        fd = None
        if passable:
            area, fd = passable_memory(size)
        else:
            area = mmap.mmap(-1, size, flags=self._flags)
        if self._shareable:
            with suppress(OSError):  # a kernel without them
                area.madvise(mmap.MADV_HUGEPAGE)
        with self._lock:
            base = self._next
            self._next += -(-size // _LARGE) * _LARGE
            self._areas[base] = area
            if fd is not None:
                self._descriptors[base] = fd
            self._bases = sorted([*self._bases, base])
        return base

    def allocate_page(self) -> int:
        """One zeroed page of the host kernel's own."""
        with self._lock:
            address = self._free.pop() if self._free else None
        if address is None:
            address = self.allocate(_LARGE)
            with self._lock:
                self._free.extend(range(address + _LARGE - PAGE, address, -PAGE))
        self.write(address, bytes(PAGE))
        # the kernel's own pages are the ones that requests travel in: found without a search
        self._pages[address >> 12] = self.place(address, PAGE)
        return address

    def free_page(self, address: int) -> None:
        """Give a page of `allocate_page` back."""
        self._pages.pop(address >> 12, None)
        with self._lock:
            self._free.append(address)

    def release(self, base: int) -> None:
        """Forget a region of `allocate`; its addresses answer no more."""
        with self._lock:
            self._bases = [each for each in self._bases if each != base]
            self._areas.pop(base, None)
            if (fd := self._descriptors.pop(base, None)) is not None:
                os.close(fd)

    def descriptor(self, base: int) -> int | None:
        """What passes a region of `allocate` to another process, until `release`; None: nothing does."""
        return self._descriptors.get(base)

    def regions(self) -> tuple[tuple[int, int], ...]:
        """First address and bytes of every region, by rising address."""
        with self._lock:
            return tuple((base, len(self._areas[base])) for base in self._bases)

    def place(self, address: int, size: int) -> tuple[mmap.mmap, int]:
        """The mapping that `size` bytes lie in, and where in it.

        Raises:
            BusError: the range is not wholly inside one region.
        """
        if (page := self._pages.get(address >> 12)) is not None:
            start = address & _OFFSET
            if start + size <= PAGE:
                return page[0], page[1] + start
        bases = self._bases
        at = bisect_right(bases, address) - 1
        if at >= 0:
            base = bases[at]
            area = self._areas.get(base)
            if area is not None and address - base + size <= len(area):
                return area, address - base
        raise BusError(f"system address {address:#x}: no memory for {size} bytes")

    def view(self, address: int, size: int) -> memoryview:
        """A writable window on `size` bytes; BusError as `place`."""
        area, at = self.place(address, size)
        return memoryview(area)[at : at + size]

    def has_page(self, address: int) -> bool:
        """Whether the whole page around an address is memory."""
        if address >> 12 in self._pages:
            return True
        try:
            self.place(address & ~_OFFSET, PAGE)
        except BusError:
            return False
        return True

    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes out; BusError as `place`."""
        area, at = self.place(address, size)
        return area[at : at + size]

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` in; BusError as `place`."""
        size = len(data)
        area, at = self.place(address, size)
        area[at : at + size] = data

    def discard(self, address: int, size: int) -> None:
        """Give whole pages back to the host; they read as zeros again (MADV_DONTNEED or MADV_REMOVE).

        BusError as `place`.
        """
        area, at = self.place(address, size)
        area.madvise(self._discard, at, size)


def _close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        os.close(fd)
