"""A disk's bytes in a file of the host's, locked against every other virtual machine that would write it.

Source: Linux, fcntl(2), F_OFD_SETLK; QEMU, docs/system/qemu-block-drivers, "Disk image file locking".

The locks are QEMU's: shared locks on single bytes of the file say what this process does with it and what it
wants nobody else to do, and whether somebody's are in the way is asked for afterwards.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING, Final, Self

from swsnp.abi.virtio import SECTOR
from swsnp.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RawFile"]

_DONE_AT: Final = 100
"""Locked from there on, a byte per permission: what the holder does."""
_DENIED_AT: Final = 200
"""What the holder wants nobody to do."""
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_DENIED: Final = (_WRITE, _RESIZE)
# struct flock of a 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid, padded to 32 bytes
_FLOCK: Final = struct.Struct("@hhqqi0q")
_QCOW: Final = b"QFI\xfb"


class RawFile:
    """An open file of whole sectors; `close` gives it back, and its locks.

    Args:
        path: a regular file or a block device.
        read_only: nothing is ever written, and others may read it as well.
        format_given: the user said that it is raw, so it is not looked at.

    Raises:
        InputError: it cannot be opened, is no such file, has no or half a sector, is an image of another
            format, or somebody else uses it.

    Attributes:
        size: bytes.
        read_only: as given.
    """

    def __init__(self, path: Path, *, read_only: bool = False, format_given: bool = True) -> None:
        self.read_only = read_only
        self._path = path
        try:
            self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(f"{path}: cannot be opened: {error.strerror or error}") from None
        try:
            self.size = self._judged_size()
            if not format_given and self.read(0, len(_QCOW)) == _QCOW:
                raise InputError(f"{path}: is a qcow2 image; wanted a raw one (or say format=raw)")
            self._lock()
        except OSError as error:
            self.close()
            raise InputError(f"{path}: cannot be used: {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give file and locks back. Again is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, at: int, size: int) -> bytes:
        """Exactly so many bytes; OSError, also where the file has become shorter."""
        parts = []
        while size:
            part = os.pread(self._fd, size, at)
            if not part:
                raise OSError(errno.EIO, "the file has become shorter")
            parts.append(part)
            at, size = at + len(part), size - len(part)
        return b"".join(parts)

    def write(self, at: int, data: bytes | memoryview) -> None:
        """All of it; OSError."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, at)
            at, view = at + done, view[done:]

    def flush(self) -> None:
        """What was written stays, whatever happens to the host; OSError."""
        os.fdatasync(self._fd)

    def _judged_size(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise InputError(f"{self._path}: wanted a regular file or a block device")
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if not size or size % SECTOR:
            raise InputError(f"{self._path}: got {size} bytes, wanted whole sectors of {SECTOR}")
        return size

    def _lock(self) -> None:
        done = (_CONSISTENT_READ,) if self.read_only else (_CONSISTENT_READ, _WRITE)
        for at in (*(_DONE_AT + each for each in done), *(_DENIED_AT + each for each in _DENIED)):
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, at, 1, 0))
        # a lock on the opposite side of somebody else's is in the way
        for at in (*(_DENIED_AT + each for each in done), *(_DONE_AT + each for each in _DENIED)):
            wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
            found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, wanted)
            if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
                raise InputError(f"{self._path}: is in use by another virtual machine, which holds its lock")
