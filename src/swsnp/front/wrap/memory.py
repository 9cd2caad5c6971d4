"""The memory of a program that waits for an answer.

Two ways lead there, with the same permission check (ptrace access):

- process_vm_readv and process_vm_writev honour page protection, so a bad pointer is EFAULT exactly where the
  kernel would say so. Some container profiles refuse them.
- /proc/TID/mem is faster to read when kept open, but ignores page protection. It serves for paths, where the
  difference cannot be seen, and for everything where the first way is refused; /proc/TID/maps is then asked
  first.

A kept descriptor belongs to the memory that the thread had when it was opened. `Targets` therefore lets go of
all of them at every exec, and now and then, since a thread's number may come back as another thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING, Final

from swsnp.guest.caller import CallerFault

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Caller", "TargetMemory", "Targets", "process_vm_works"]

_PAGE: Final = 4096
PATH_MAX: Final = 4096
_FIRST_READ: Final = 256
_IOVECS: Final = struct.Struct("<QQQQ")  # local address and size, remote address and size

_libc: Final = ctypes.CDLL(None, use_errno=True)
for _function in (_libc.process_vm_readv, _libc.process_vm_writev):
    _function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]
    _function.restype = ctypes.c_ssize_t


def _fault(address: int, size: int) -> CallerFault:
    return CallerFault(f"caller memory: {size} bytes at {address:#x} are out of reach")


def _transfer(
    function: Callable[..., int], tid: int, buffer: ctypes.Array[ctypes.c_char], address: int
) -> int:
    """Move `len(buffer)` bytes; returns how many were moved, or -errno."""
    size = len(buffer)
    iovecs = ctypes.create_string_buffer(_IOVECS.pack(ctypes.addressof(buffer), size, address, size))
    local = ctypes.addressof(iovecs)
    moved = function(tid, local, 1, local + 16, 1, 0)
    return moved if moved >= 0 else -ctypes.get_errno()


def process_vm_works() -> bool:
    """Whether process_vm_readv may be called here at all; tried on our own memory."""
    buffer = ctypes.create_string_buffer(1)
    return _transfer(_libc.process_vm_readv, os.getpid(), buffer, ctypes.addressof(buffer)) == 1


class TargetMemory:
    """One thread's memory. Meant for use while the thread waits; addresses are the thread's own."""

    def __init__(self, tid: int, *, process_vm: bool) -> None:
        self.tid = tid
        self._process_vm = process_vm
        self._mem = -1

    def __del__(self) -> None:
        # the one place: a worker may still use a memory that `Targets` has let go of
        if self._mem >= 0:
            os.close(self._mem)

    def open(self) -> None:
        """Open /proc/TID/mem, anew if it was open.

        Raises:
            OSError: EACCES or EPERM when the memory is out of reach, ENOENT when the thread is gone.
        """
        fresh = os.open(f"/proc/{self.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        stale, self._mem = self._mem, fresh
        if stale >= 0:
            os.close(stale)

    def _read_some(self, address: int, size: int) -> bytes:
        """At least one byte from `address`.

        Raises:
            CallerFault: nothing is mapped there.
            OSError: see `open`.
        """
        try:
            if self._mem >= 0:
                data = self._pread(address, size)
                if data:
                    return data
            self.open()  # an exec gave the thread another memory
            data = self._pread(address, size)
        except OverflowError:
            data = b""
        if not data:
            raise _fault(address, size)
        return data

    def _pread(self, address: int, size: int) -> bytes:
        try:
            return os.pread(self._mem, size, address)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return b""

    def read_path(self, address: int) -> bytes:
        """The string at `address`, without its NUL.

        Raises:
            CallerFault: it leaves mapped memory, or has no end within PATH_MAX.
            OSError: see `open`.
        """
        # never over a page boundary before the string is known to go on there
        path = self._read_some(address, min(_FIRST_READ, _PAGE - address % _PAGE))
        end = path.find(b"\0")
        while end < 0:
            if len(path) >= PATH_MAX:
                raise _fault(address, PATH_MAX)
            at = address + len(path)
            path += self._read_some(at, _PAGE - at % _PAGE)
            end = path.find(b"\0")
        return path[:end]

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes.

        Raises:
            CallerFault: some of them cannot be read by the program itself.
        """
        if not 0 <= address < 1 << 64:
            raise _fault(address, size)
        if self._process_vm:
            buffer = ctypes.create_string_buffer(size)
            if _transfer(_libc.process_vm_readv, self.tid, buffer, address) != size:
                raise _fault(address, size)
            return buffer.raw
        self._require(address, size, b"r")
        try:
            data = self._read_some(address, size)
        except OSError as error:
            raise _fault(address, size) from error
        if len(data) != size:
            raise _fault(address, size)
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write all of `data`.

        Raises:
            CallerFault: some of it lies where the program itself cannot write; what came before is written.
        """
        size = len(data)
        if not 0 <= address < 1 << 64:
            raise _fault(address, size)
        if self._process_vm:
            buffer = ctypes.create_string_buffer(data, size)
            if _transfer(_libc.process_vm_writev, self.tid, buffer, address) != size:
                raise _fault(address, size)
            return
        self._require(address, size, b"w")
        try:
            self.open()
            written = os.pwrite(self._mem, data, address)
        except (OSError, OverflowError) as error:
            raise _fault(address, size) from error
        if written != size:
            raise _fault(address, size)

    def _require(self, address: int, size: int, right: bytes) -> None:
        """Check page protection as the kernel would: every byte must lie in mappings that have `right`."""
        end = address
        try:
            with open(f"/proc/{self.tid}/maps", "rb") as maps:  # noqa: PTH123
                for line in maps:
                    span, rights = line.split(maxsplit=2)[:2]
                    start, stop = (int(each, 16) for each in span.split(b"-"))
                    if start <= end < stop and right in rights:
                        end = stop
        except OSError as error:
            raise _fault(address, size) from error
        if end < address + size:
            raise _fault(address, size)


class Targets:
    """The threads whose memory is kept open, by number."""

    _MOST_KEPT = 64
    _MOST_USES = 1024

    def __init__(self, *, process_vm: bool) -> None:
        self._process_vm = process_vm
        self._kept: dict[int, TargetMemory] = {}
        self._uses = 0

    def get(self, tid: int) -> TargetMemory:
        """The memory of one thread."""
        self._uses += 1
        kept = self._kept.get(tid)
        if kept is not None and self._uses < self._MOST_USES:
            return kept
        if self._uses >= self._MOST_USES or len(self._kept) >= self._MOST_KEPT:
            self.forget()
        memory = self._kept[tid] = TargetMemory(tid, process_vm=self._process_vm)
        return memory

    def forget(self) -> None:
        """Let go of every memory, because some may be another's by now."""
        self._kept.clear()
        self._uses = 0


class Caller:
    """`CallerMemory` of one call: the thread's memory as long as the thread waits for the answer."""

    __slots__ = ("_memory", "_waits")

    def __init__(self, memory: TargetMemory, waits: Callable[[], bool]) -> None:
        self._memory = memory
        self._waits = waits

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes; raises CallerFault."""
        return self._memory.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        """Write all of `data`.

        Raises:
            CallerFault: as `TargetMemory.write`; also when the thread is gone, whose number may be another's.
        """
        if not self._waits():
            raise _fault(address, len(data))
        self._memory.write(address, data)
