"""Open files of configfs. Source: Linux, fs/configfs/file.c, fs/read_write.c.

Descriptors that are duplicates of each other share one of these objects; `close` is the last one's.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from swsnp.guest.tsm_entry import TEXT_SIZE
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from swsnp.guest.tsm_entry import AttributeKind, Entry

__all__ = ["BinaryFile", "TextFile", "TsmFile"]

_STORE_MAX: Final = 4095
_OFFSET_MAX: Final = 0x7FFF_FFFF
SEEK_DATA: Final = 3
SEEK_HOLE: Final = 4


class TsmFile:
    """An open attribute, with a position.

    `pread` and `pwrite` do not use the position. Methods may be called from several threads.
    """

    def __init__(self, entry: Entry, kind: AttributeKind, access: int) -> None:
        """Open; permission was checked before.

        Args:
            entry: whose attribute.
            kind: which attribute.
            access: O_RDONLY, O_WRONLY or O_RDWR.
        """
        self.entry, self.kind = entry, kind
        self.readable = access in (os.O_RDONLY, os.O_RDWR)
        self.writable = access in (os.O_WRONLY, os.O_RDWR)
        self.position = 0
        self._value: bytes | None = None
        self._mutex = threading.Lock()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes from the position, which moves; empty at the end. Raises TsmError."""
        data = self.pread(size, self.position)
        self.position += len(data)
        return data

    def write(self, data: bytes, *, lost: int = 0) -> int:
        """Write at the position, which moves; see `pwrite`."""
        written = self.pwrite(data, self.position, lost=lost)
        self.position += written
        return written

    def pread(self, size: int, at: int) -> bytes:
        """Up to `size` bytes from offset `at` of the value, which is made at the first read and kept.

        Raises:
            TsmError: EBADF when not open for reading; EFAULT for 0 bytes where there are some; what making
                the value ends with, and then the next read makes it again.
        """
        if not self.readable:
            raise TsmError(errno.EBADF)
        with self._mutex:
            value = self._take_value()
        if at >= len(value):
            return b""
        if not size:
            raise TsmError(errno.EFAULT)  # nothing was copied
        return value[at : at + size]

    def pwrite(self, data: bytes, at: int, *, lost: int = 0) -> int:
        """Write at offset `at`.

        Args:
            data: what could be copied from the caller's memory.
            at: offset; text does not look at it.
            lost: how many bytes after `data` could not be copied.

        Returns:
            How many bytes were taken.

        Raises:
            TsmError: EBADF when not open for writing; EFAULT when there was nothing to copy or nothing could
                be; the kind's own.
        """
        if not self.writable:
            raise TsmError(errno.EBADF)
        with self._mutex:
            return self._take(data, at, lost)

    def seek(self, offset: int, whence: int) -> int:
        """Move the position, as lseek(2); raises TsmError."""
        raise NotImplementedError

    def close(self) -> None:
        """The last descriptor is closed."""

    def _take_value(self) -> bytes:
        raise NotImplementedError

    def _take(self, data: bytes, at: int, lost: int) -> int:
        raise NotImplementedError


class TextFile(TsmFile):
    """An open text attribute: each write is one complete store."""

    def _take_value(self) -> bytes:
        if self._value is None:
            self._value = self.entry.show(self.kind)
        return self._value

    def _take(self, data: bytes, at: int, lost: int) -> int:
        text = data[:_STORE_MAX]
        if not text:
            raise TsmError(errno.EFAULT)
        self.entry.store(self.kind, text)
        return len(text)

    def seek(self, offset: int, whence: int) -> int:
        """The new position.

        Raises:
            TsmError: EINVAL, or ENXIO for data or hole beyond the 4,096 bytes that stat shows.
        """
        if whence in (SEEK_DATA, SEEK_HOLE):
            if not 0 <= offset < TEXT_SIZE:
                raise TsmError(errno.ENXIO)
            target = offset if whence == SEEK_DATA else TEXT_SIZE
        else:
            bases = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: TEXT_SIZE}
            if whence not in bases:
                raise TsmError(errno.EINVAL)
            target = bases[whence] + offset
        if not 0 <= target <= _OFFSET_MAX:
            raise TsmError(errno.EINVAL)
        self.position = target
        return target


class BinaryFile(TsmFile):
    """An open binary attribute: a snapshot from the first read on, or a buffer that is stored at the end."""

    def __init__(self, entry: Entry, kind: AttributeKind, access: int) -> None:
        super().__init__(entry, kind, access)
        self._reading = self._writing = False
        self._buffer = bytearray()

    @property
    def _max_size(self) -> int:
        return self.kind.max_size or 0

    def _take_value(self) -> bytes:
        if self._writing:
            raise TsmError(errno.ETXTBSY)
        self._reading = True
        if self._value is not None:
            return self._value
        value = self.entry.show(self.kind)
        if len(value) > self._max_size:
            raise TsmError(errno.EFBIG)
        if value:  # an empty value is not kept: the next read asks again
            self._value = value
        return value

    def _take(self, data: bytes, at: int, lost: int) -> int:
        if self._reading:
            raise TsmError(errno.ETXTBSY)
        self._writing = True  # from here on something is stored at the end, whatever becomes of this write
        end = at + len(data) + lost
        if end > len(self._buffer):
            if end > self._max_size:
                raise TsmError(errno.EFBIG)
            self._buffer.extend(bytes(end - len(self._buffer)))
        if not data:
            raise TsmError(errno.EFAULT)
        self._buffer[at : at + len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int) -> int:
        """Always ESPIPE."""
        raise TsmError(errno.ESPIPE)

    def close(self) -> None:
        """Store what was written, if anything was tried; nobody hears how that ended."""
        with self._mutex:
            if not self._writing:
                return
            self._writing = False
            with suppress(TsmError):
                self.entry.store(self.kind, bytes(self._buffer))
