"""configfs-tsm, and the driver's place in sysfs, as nodes of the virtual tree.

What a program can tell from a real guest:

- none of these directories can be made the working directory, except by fchdir, and getcwd then shows a
  private one; `..` of a mount point is not found where the system has no such directory;
- on duplicates outside of the reserved range (a shell's redirection) no write is ever refused, and what a
  read would have ended with ends the dup;
- a descriptor that is passed to another process, or opened again through /proc, before it was read is empty;
- chmod, chown, rename, link, truncate and utimensat by path see the real system: ENOENT.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from swsnp.front.wrap.tree import Node, Opened, refusal
from swsnp.front.wrap.tsm_mirror import Mirror, status_of
from swsnp.front.wrap.tsm_openings import Openings
from swsnp.guest.tsm import Attribute, ConfigfsTsm, Directory
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.front.wrap.handles import FdInfo
    from swsnp.front.wrap.status import FileStatus
    from swsnp.front.wrap.transfer import Transfer
    from swsnp.guest.tsm import TsmNode
    from swsnp.guest.tsm_file import TsmFile

__all__ = ["CONFIGFS", "PLATFORM_DEVICE", "AttributeNode", "DirectoryNode", "OpenAttribute", "TsmMount"]

CONFIGFS: Final = "/sys/kernel/config"
PLATFORM_DEVICE: Final = "/sys/devices/platform/sev-guest"
_O_TMPFILE: Final = os.O_TMPFILE
_WRITE_MOST: Final = 4096
"""More than any attribute takes at once."""


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except TsmError as error:
        raise refusal(error.errno) from None


class _TsmFileNode(Node):
    """What files and directories of configfs have in common."""

    xattr_error = errno.EOPNOTSUPP

    def access(self, mode: int) -> None:
        """As the mode says for the owner; root may read and write whatever the mode says."""
        if os.geteuid() == 0:
            mode &= ~(os.R_OK | os.W_OK)
        super().access(mode)


class DirectoryNode(_TsmFileNode):
    """A directory: the model's for what is in it, the mirror's for what the kernel serves."""

    def __init__(self, mount: TsmMount, directory: Directory, above: Directory | None, *where: str) -> None:
        """The node of one look-up.

        Args:
            mount: what belongs to the whole tree.
            directory: the model's.
            above: the directory that it is in; None for a mount point.
            where: its place in the mirror.
        """
        self._mount, self._directory, self._above, self._where = mount, directory, above, where

    def child(self, name: bytes) -> Node:
        """Raises OSError: ENOENT, ENAMETOOLONG."""
        text = os.fsdecode(name)
        with _as_os_error():
            return self._node(text, self._directory.child(text))

    def _node(self, name: str, found: TsmNode) -> DirectoryNode | AttributeNode:
        if isinstance(found, Attribute):
            return AttributeNode(self._mount, found, *self._where, name)
        return DirectoryNode(self._mount, found, self._directory, *self._where, name)

    def mirrored(self) -> str:
        """The path of its copy in the mirror."""
        return self._mount.mirror.directory(*self._where)

    def status(self) -> FileStatus:
        """The copy's: descriptors of it tell the same."""
        return status_of(os.stat(self.mirrored()))  # noqa: PTH116

    def open(self, flags: int) -> Opened:
        """An opening of the copy, with everything in it."""
        if flags & _O_TMPFILE == _O_TMPFILE:
            raise refusal(errno.EOPNOTSUPP)
        with _as_os_error():
            Directory.check_open(flags & ~os.O_ACCMODE if flags & os.O_PATH else flags)
        for name, each in self._directory.children().items():
            self._node(name, each).mirrored()
        return Opened(os.open(self.mirrored(), os.O_DIRECTORY | os.O_CLOEXEC | flags & os.O_PATH), False)

    def chdir(self) -> None:
        """Nothing against it."""

    def create(self) -> None:
        """Files cannot be made: EACCES."""
        raise refusal(errno.EACCES)

    def mkdir(self, name: bytes) -> None:
        """A new entry; its copy is made at once, for those who have the directory open."""
        text = os.fsdecode(name)
        with _as_os_error():
            self._directory.mkdir(text)
        self._mount.mirror.directory(*self._where, text)

    def rmdir(self) -> None:
        """EBUSY for a mount point, else as the model says."""
        if self._above is None:
            raise refusal(errno.EBUSY)
        with _as_os_error():
            self._above.rmdir(self._where[-1])
        self._mount.mirror.remove(*self._where)

    def unlink(self) -> None:
        """EISDIR."""
        raise refusal(errno.EISDIR)


class AttributeNode(_TsmFileNode):
    """A file of an entry."""

    def __init__(self, mount: TsmMount, attribute: Attribute, *where: str) -> None:
        self._mount, self._attribute, self._where = mount, attribute, where

    def mirrored(self) -> str:
        """The path of its copy in the mirror, which has its mode and size."""
        kind = self._attribute.kind
        return self._mount.mirror.file(*self._where, mode=kind.mode, size=kind.st_size)

    def status(self) -> FileStatus:
        """A regular file of the attribute's mode and size."""
        return status_of(os.stat(self.mirrored()))  # noqa: PTH116

    def open(self, flags: int) -> Opened:
        """An opening of the model's file."""
        if flags & os.O_PATH and not flags & os.O_DIRECTORY:
            return Opened(os.open(self.mirrored(), os.O_PATH | os.O_CLOEXEC), False)
        with _as_os_error():
            file = self._attribute.open(flags)
        if flags & os.O_DIRECT:
            raise refusal(errno.EINVAL)
        openings = self._mount.openings
        opened = OpenAttribute(file, self.status(), openings)
        if file.writable:
            return Opened(openings.write(file, opened, flags=flags), True)
        mode = self._attribute.kind.mode
        return Opened(openings.read(file, opened, mode=mode, flags=flags), True, opened.duplicate)

    def unlink(self) -> None:
        """EPERM."""
        raise refusal(errno.EPERM)


class OpenAttribute(Node):
    """An open attribute: what calls on descriptors in the reserved range get."""

    waits = True

    def __init__(self, file: TsmFile, status: FileStatus, openings: Openings) -> None:
        self._file, self._status, self._openings = file, status, openings
        self._lock = threading.Lock()

    def status(self) -> FileStatus:
        """As it was opened."""
        return self._status

    def read(self, info: FdInfo, transfer: Transfer) -> int:
        """How many bytes the program got."""
        if not self._file.readable:
            raise refusal(errno.EBADF)
        return self._move(transfer, lambda at: transfer.put(self._file.pread(transfer.size, at)))

    def write(self, info: FdInfo, transfer: Transfer) -> int:
        """How many bytes were taken."""
        if not self._file.writable:
            raise refusal(errno.EBADF)

        def store(at: int) -> int:
            data = transfer.take(min(transfer.size, _WRITE_MOST))
            return self._file.pwrite(data, at, lost=transfer.size - len(data))

        return self._move(transfer, store)

    def _move(self, transfer: Transfer, some: Callable[[int], int]) -> int:
        """Move some bytes at the transfer's own offset, or at the position, which goes along."""
        if transfer.nothing:
            return 0
        self._openings.settle()
        with self._lock, _as_os_error():
            at = self._file.position if transfer.offset is None else transfer.offset
            done = some(at)
            if transfer.offset is None:
                self._file.position = at + done
            return done

    def seek(self, offset: int, whence: int) -> int:
        """The new position."""
        with self._lock, _as_os_error():
            return self._file.seek(offset, whence)

    def duplicate(self) -> None:
        """What the program reads outside of the reserved range is made now."""
        self._openings.settle()
        with self._lock, _as_os_error():
            self._openings.leave(self._file)


class TsmMount:
    """What belongs to one mounted tree: nodes, mirror and openings."""

    def __init__(self, tsm: ConfigfsTsm) -> None:
        """Make the mirror.

        Raises:
            HostError: there is no place for it.
        """
        self._tsm = tsm
        self.mirror = Mirror()
        self.openings = Openings()

    def nodes(self) -> dict[bytes, Node]:
        """By path. A configfs that is in use here keeps its other directories; `tsm` is put into it."""
        configfs = DirectoryNode(self, self._tsm.root, None, "config")
        device = Directory({})
        platform = DirectoryNode(self, device, Directory({"sev-guest": device}), "platform", "sev-guest")
        root = os.fsencode(self.mirror.root)
        nodes: dict[bytes, Node] = {root + b"/config": configfs, root + b"/platform/sev-guest": platform}
        nodes[PLATFORM_DEVICE.encode()] = platform
        if _has_entries(CONFIGFS):
            nodes[CONFIGFS.encode() + b"/tsm"] = configfs.child(b"tsm")
        else:
            nodes[CONFIGFS.encode()] = configfs
        return nodes

    def close(self) -> None:
        """Let go of everything."""
        self.openings.close()
        self.mirror.close()


def _has_entries(path: str) -> bool:
    try:
        return bool(os.listdir(path))  # noqa: PTH208
    except OSError:
        return False
