"""The kernel objects behind open attributes of configfs-tsm.

An opening gets a number in the reserved range, and calls on that are answered from the model's own file
object. What leaves the range (a shell's redirection is a dup2) is on its own; there the object must serve:

- for reading, a memfd. It is empty until it is duplicated; the value is then made and put into it, from the
  position on, and the kernel serves it from there. An errno of that comes from the dup, not from a read.
- for writing, a pipe in packet mode. What arrives there is written as if by write calls, but nobody can be
  told an errno. Its end of file is exactly the moment of the last close, which commits a binary attribute.

Openings are recognised by inode, so that duplicates, forked and passed descriptors are the same opening.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import threading
from typing import TYPE_CHECKING, Final

from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from swsnp.front.wrap.tree import Node
    from swsnp.guest.tsm_file import TsmFile

__all__ = ["Openings", "Reader", "Writer"]

_logger = logging.getLogger(__name__)

_EVERYTHING: Final = 1 << 20
_PACKET: Final = 1 << 16
_SWEEP_FROM: Final = 32


class Reader:
    """An opening for reading, until the program has none of its descriptors any more."""

    def __init__(self, file: TsmFile, node: Node, mode: int) -> None:
        """Make the memfd.

        Args:
            file: the model's.
            node: what calls in the reserved range go to.
            mode: permission bits that fstat shows outside of it.
        """
        self.file, self.node = file, node
        made = os.memfd_create(file.kind.name, os.MFD_CLOEXEC)
        try:
            # an opening of its own: that of memfd_create is not counted by leases
            self._backing = os.open(f"/proc/self/fd/{made}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(made)
        os.fchmod(self._backing, mode)
        found = os.fstat(self._backing)
        self.key = (found.st_dev, found.st_ino)

    def source(self, flags: int) -> int:
        """A descriptor to hand over."""
        return os.open(f"/proc/self/fd/{self._backing}", os.O_RDONLY | os.O_CLOEXEC | flags & os.O_NONBLOCK)

    def fill(self) -> None:
        """Put what is left to read into the memfd; raises TsmError."""
        os.write(self._backing, self.file.pread(_EVERYTHING, self.file.position))

    def used(self) -> bool:
        """Whether a descriptor is left: a write lease is refused as long as others have the file open."""
        try:
            fcntl.fcntl(self._backing, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            return True
        fcntl.fcntl(self._backing, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False

    def close(self) -> None:
        """Let go of the memfd."""
        self.file.close()
        os.close(self._backing)


class Writer:
    """An opening for writing, until the last of the program's descriptors is closed."""

    def __init__(self, file: TsmFile, node: Node) -> None:
        self.file, self.node = file, node
        self.pipe, self._source = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(self.pipe)
        self.key = (found.st_dev, found.st_ino)

    def source(self, flags: int) -> int:
        """The descriptor to hand over; once."""
        fcntl.fcntl(self._source, fcntl.F_SETFL, os.O_DIRECT | flags & (os.O_NONBLOCK | os.O_APPEND))
        return self._source

    def pump(self) -> bool:
        """Take what was written past the supervisor; True when the last descriptor is closed."""
        while True:
            try:
                data = os.read(self.pipe, _PACKET)
            except BlockingIOError:
                return False
            if not data:
                return True
            try:
                self.file.write(data)
            except TsmError as error:
                _logger.warning(
                    "%s: a write of %d bytes through a duplicate descriptor was refused (%s); "
                    "the program was not told",
                    self.file.kind.name,
                    len(data),
                    os.strerror(error.errno),
                )

    def close(self) -> None:
        """The last descriptor is closed: what was written is committed."""
        self.file.close()
        os.close(self.pipe)


class Openings:
    """All of them. A thread of its own empties the pipes, so that no program waits for room in one."""

    def __init__(self) -> None:
        self._readers: dict[tuple[int, int], Reader] = {}
        self._writers: dict[tuple[int, int], Writer] = {}
        self._lock = threading.Lock()  # of the tables; never held while something is made or stored
        self._settling = threading.Lock()
        self._sweep_at = _SWEEP_FROM
        self._thread: threading.Thread | None = None
        self._epoll: select.epoll
        self._stop = -1

    def read(self, file: TsmFile, node: Node, *, mode: int, flags: int) -> int:
        """A descriptor to hand over for reading `file`."""
        reader = Reader(file, node, mode)
        with self._lock:
            self._sweep()
            self._readers[reader.key] = reader
        return reader.source(flags)

    def write(self, file: TsmFile, node: Node, *, flags: int) -> int:
        """A descriptor to hand over for writing `file`."""
        writer = Writer(file, node)
        with self._lock:
            self._start()
            self._writers[writer.key] = writer
            self._epoll.register(writer.pipe, select.EPOLLIN)
        return writer.source(flags)

    def _sweep(self) -> None:
        """Let go of readers whose descriptors are closed, now and then."""
        if len(self._readers) < self._sweep_at:
            return
        for key, reader in list(self._readers.items()):
            if not reader.used():
                del self._readers[key]
                reader.close()
        self._sweep_at = max(_SWEEP_FROM, 2 * len(self._readers))

    def find(self, tid: int, descriptor: int) -> Node | None:
        """What a thread's descriptor is an opening of."""
        if not self._readers and not self._writers:
            return None
        try:
            found = os.stat(f"/proc/{tid}/fd/{descriptor}")  # noqa: PTH116
        except OSError:
            return None
        key = (found.st_dev, found.st_ino)
        opening = self._readers.get(key) or self._writers.get(key)
        return None if opening is None else opening.node

    def settle(self) -> None:
        """Take what was written past the supervisor, and commit what was closed.

        A pipe's end of file is visible before the closing thread's next call, so whoever calls this first
        sees every write and close that came before.
        """
        with self._settling:
            with self._lock:
                writers = list(self._writers.items())
            for key, writer in writers:
                if writer.pump():
                    with self._lock:
                        del self._writers[key]
                    writer.close()

    def leave(self, file: TsmFile) -> None:
        """Make an opening serve outside of the reserved range, and from now on inside of it too.

        Raises:
            TsmError: the value could not be made.
        """
        with self._lock:
            found = [each for each in self._readers.values() if each.file is file]
        for reader in found:
            reader.fill()
            with self._lock:
                del self._readers[reader.key]
            reader.close()

    def _start(self) -> None:
        if self._thread is None:
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            self._epoll = select.epoll()
            self._epoll.register(self._stop, select.EPOLLIN)
            self._thread = threading.Thread(target=self._run, name="swsnp tsm pipes", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while all(descriptor != self._stop for descriptor, _ in self._epoll.poll()):
            self.settle()

    def close(self) -> None:
        """Commit what was written and let go of everything."""
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            self._thread = None
            self._epoll.close()
            os.close(self._stop)
        self.settle()
        for reader in self._readers.values():
            reader.close()
        for writer in self._writers.values():
            writer.close()
        self._readers.clear()
        self._writers.clear()
