"""The memory side of read and write calls: one buffer or several, and an offset if the call names one."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Final, TypeVar

from swsnp.guest.caller import CallerFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.guest.caller import CallerMemory

__all__ = ["Transfer", "one_buffer", "vector"]

_T = TypeVar("_T")
_PAGE: Final = 4096
_COUNT_MAX: Final = 0x7FFF_F000  # MAX_RW_COUNT
_SSIZE_MAX: Final = (1 << 63) - 1
_IOV_MAX: Final = 1024
_IOVEC: Final = struct.Struct("<QQ")


class Transfer:
    """Where a call's bytes come from or go to.

    Attributes:
        size: of all buffers, in bytes.
        offset: the call's own, or None when it uses the descriptor's position.
        nothing: several buffers that are all empty: the call is over before the file is asked.
    """

    def __init__(
        self,
        caller: CallerMemory,
        buffers: tuple[tuple[int, int], ...],
        offset: int | None = None,
        *,
        several: bool = False,
    ) -> None:
        self._caller = caller
        self._buffers = buffers
        self.size = min(sum(size for _, size in buffers), _COUNT_MAX)
        self.offset = offset
        self.nothing = several and not self.size

    def take(self, limit: int) -> bytes:
        """Up to `limit` bytes from the buffers; fewer, or none, where the program cannot read itself."""
        taken = b""
        for address, size in self._buffers:
            wanted = min(size, limit - len(taken))
            data, whole = _as_far_as_possible(address, wanted, self._caller.read)
            taken += b"".join(data)
            if not whole:
                break
        return taken

    def put(self, data: bytes) -> int:
        """Write `data` into the buffers.

        Returns:
            How many bytes were written: fewer where the program cannot write itself.

        Raises:
            CallerFault: none were.
        """
        done = 0
        for address, size in self._buffers:

            def write(at: int, count: int, start: int = done - address) -> int:
                self._caller.write(at, data[start + at : start + at + count])
                return count

            counts, whole = _as_far_as_possible(address, min(size, len(data) - done), write)
            done += sum(counts)
            if not whole:
                break
        if data and not done:
            raise CallerFault(f"caller memory: nothing of {len(data)} bytes could be written")
        return done


def _as_far_as_possible(address: int, size: int, move: Callable[[int, int], _T]) -> tuple[list[_T], bool]:
    """Move `size` bytes at once, or if that fails page by page; returns the pieces, and whether all."""
    try:
        return ([move(address, size)] if size else []), True
    except CallerFault:
        pieces: list[_T] = []
        try:
            for at, count in _pages(address, size):
                pieces.append(move(at, count))  # what was moved before a fault counts
        except CallerFault:
            return pieces, False
        return pieces, True


def _pages(address: int, size: int) -> Iterator[tuple[int, int]]:
    end = address + size
    while address < end:
        count = min(end - address, _PAGE - address % _PAGE)
        yield address, count
        address += count


def one_buffer(caller: CallerMemory, address: int, size: int, offset: int | None = None) -> Transfer:
    """What read, write, pread64 and pwrite64 name.

    Args:
        caller: the program's memory.
        address: the buffer's.
        size: as the 64-bit register has it.
        offset: likewise; None for the calls without.

    Raises:
        OSError: EINVAL for a negative size or offset.
    """
    if size > _SSIZE_MAX or (offset is not None and offset > _SSIZE_MAX):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return Transfer(caller, ((address, size),), offset)


def vector(caller: CallerMemory, address: int, count: int) -> Transfer:
    """What readv and writev name.

    Args:
        caller: the program's memory.
        address: of the array of struct iovec.
        count: its length, an `int`.

    Raises:
        OSError: EINVAL for too many buffers or a negative size.
        CallerFault: the array cannot be read.
    """
    if count > _IOV_MAX:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    array = caller.read(address, count * _IOVEC.size) if count else b""
    buffers = tuple(_IOVEC.iter_unpack(array))
    if any(size > _SSIZE_MAX for _, size in buffers):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return Transfer(caller, buffers, several=True)
