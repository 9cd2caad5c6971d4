"""The memory of the program that calls the driver."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final, Protocol

from swsnp.errors import SwsnpError, UsageError

__all__ = ["BufferMemory", "CallerFault", "CallerMemory"]

_PAGE: Final = 4096
_FIRST: Final = 0x10_0000


class CallerFault(SwsnpError):
    """The caller's memory cannot be read or written there; the driver answers with EFAULT."""


class CallerMemory(Protocol):
    """What copy_from_user and copy_to_user reach: another process, a socket peer, or ourselves."""

    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes out; raises CallerFault."""

    def write(self, address: int, data: bytes) -> None:
        """Copy `data` in; raises CallerFault."""


class BufferMemory:
    """A caller inside this process: buffers at made-up addresses.

    An access has to lie within one buffer and is done wholly or not at all.
    """

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._buffers: dict[int, memoryview] = {}
        self._next = _FIRST

    def map(self, address: int, buffer: bytearray, *, writable: bool = True) -> None:
        """Make `buffer` itself visible at `address`; its size is fixed from now on.

        Raises:
            UsageError: another buffer lies there.
        """
        end = address + len(buffer)
        for base in self._bases:
            if address < base + len(self._buffers[base]) and base < end:
                raise UsageError(f"caller memory: {address:#x}..{end:#x} overlaps the buffer at {base:#x}")
        self._bases = sorted([*self._bases, address])
        view = memoryview(buffer)
        self._buffers[address] = view if writable else view.toreadonly()
        self._next = max(self._next, (end // _PAGE + 2) * _PAGE)

    def unmap(self, address: int) -> None:
        """Forget the buffer at exactly this address.

        Raises:
            UsageError: none is.
        """
        if address not in self._buffers:
            raise UsageError(f"caller memory: no buffer at {address:#x}")
        self._bases.remove(address)
        self._buffers.pop(address).release()

    def place(self, data: bytes | bytearray, *, writable: bool = True) -> int:
        """Put data at a free, page-aligned address with nothing mapped behind it.

        Args:
            data: a bytearray is mapped itself, so that what the driver writes is seen in it; bytes are
                copied.
            writable: whether the driver may write there.

        Returns:
            The address.
        """
        address = self._next
        self.map(address, data if isinstance(data, bytearray) else bytearray(data), writable=writable)
        return address

    def read(self, address: int, size: int) -> bytes:
        """Copy `size` bytes out.

        Raises:
            CallerFault: not within one buffer.
        """
        return self._window(address, size).tobytes()

    def write(self, address: int, data: bytes) -> None:
        """Copy `data` in.

        Raises:
            CallerFault: not within one writable buffer.
        """
        window = self._window(address, len(data))
        if window.readonly:
            raise CallerFault(f"caller memory: {address:#x} is read-only")
        window[:] = data

    def _window(self, address: int, size: int) -> memoryview:
        at = bisect_right(self._bases, address) - 1
        if at >= 0:
            base = self._bases[at]
            buffer = self._buffers[base]
            if address - base + size <= len(buffer):
                return buffer[address - base : address - base + size]
        raise CallerFault(f"caller memory: {size} bytes at {address:#x} are not mapped")
