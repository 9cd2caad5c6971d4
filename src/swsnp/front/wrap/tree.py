"""The files that a wrapped program sees and the system does not have.

A `VirtualTree` puts nodes at absolute paths. Nodes know nothing of system calls: they open, describe
themselves and raise OSError with the errno that Linux gives. `Node` itself refuses everything, as a file that
is no directory does.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.sev_guest import DEVICE
from swsnp.front.wrap.handles import FdInfo, NullDevice, fd_info
from swsnp.front.wrap.status import FileStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swsnp.front.device import SevGuestDevice

__all__ = ["DeviceNode", "Node", "Opened", "VirtualTree", "device_tree"]

_X_OK: Final = 1


class Opened(NamedTuple):
    """An opening made for a program.

    Attributes:
        source: our descriptor of it; whoever gets this closes it.
        reserved: put it into the reserved range, because calls on it are answered here.
    """

    source: int
    reserved: bool


def _refusal(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Node:
    """A file. Every operation raises OSError unless the kind of file has it."""

    device: SevGuestDevice | None = None
    """Where ioctls on an opening of this node go."""

    def child(self, name: bytes) -> Node:
        """The node of that name in this directory."""
        raise _refusal(errno.ENOTDIR)

    def status(self) -> FileStatus:
        """What stat tells."""
        raise NotImplementedError

    def open(self, flags: int) -> Opened:
        """Open with the program's flags; O_CREAT and O_EXCL have been dealt with."""
        raise NotImplementedError

    def access(self, mode: int) -> None:
        """Return when the program may do what `mode` asks: R_OK, W_OK, X_OK or F_OK."""
        permitted = self.status().mode >> 6 & 7
        if mode & ~permitted:
            raise _refusal(errno.EACCES)

    def chdir(self) -> None:
        """Make it the working directory."""
        raise _refusal(errno.ENOTDIR)

    def rmdir(self) -> None:
        """Remove this directory."""
        raise _refusal(errno.ENOTDIR)

    def unlink(self) -> None:
        """Remove this file."""
        raise _refusal(errno.EACCES)  # /dev is root's

    def behind(self, info: FdInfo) -> bool:
        """Whether a descriptor is an opening of this node."""
        return False

    # calls on an opening of this node

    def status_of(self, info: FdInfo) -> FileStatus:
        """What fstat tells."""
        return self.status()

    def read(self, info: FdInfo) -> int:
        """The result of read, readv or pread."""
        raise _refusal(errno.EINVAL)

    def write(self, info: FdInfo) -> int:
        """The result of write, writev or pwrite."""
        raise _refusal(errno.EINVAL)

    def seek(self) -> int:
        """The result of lseek."""
        raise _refusal(errno.ESPIPE)


class DeviceNode(Node):
    """`/dev/sev-guest`: a character device whose driver has an ioctl operation and nothing else.

    Source: Linux, drivers/virt/coco/sev-guest (file operations), drivers/char/misc.c (major 10, dynamic
        minor).
    """

    MAJOR: Final = 10
    _INO: Final = 0x5E7  # any number that the other files of /dev do not have

    def __init__(self, device: SevGuestDevice, *, minor: int = 260) -> None:
        """The node of one device.

        Args:
            device: what its ioctls are handed to.
            minor: dynamic minors of current kernels start at 256.

        Raises:
            HostError: /dev/null is missing.
        """
        self.device = device
        self._null = NullDevice()
        pattern = os.stat(NullDevice.PATH)  # noqa: PTH116
        self._status = FileStatus(
            mode=stat.S_IFCHR | 0o600,
            dev=pattern.st_dev,
            ino=pattern.st_ino ^ self._INO << 32,
            rdev=os.makedev(self.MAJOR, minor),
            # whoever runs the supervisor may use the device, so it is shown as the owner
            uid=os.geteuid(),
            gid=os.getegid(),
            blksize=pattern.st_blksize,
            atime_ns=pattern.st_ctime_ns,
            mtime_ns=pattern.st_ctime_ns,
            ctime_ns=pattern.st_ctime_ns,
        )

    def status(self) -> FileStatus:
        """A character device 10:minor, mode 0600."""
        return self._status

    def open(self, flags: int) -> Opened:
        """Any access mode will do: the driver does not look at it."""
        if flags & os.O_DIRECTORY:
            raise _refusal(errno.ENOTDIR)
        return Opened(self._null.open(flags), reserved=True)

    def behind(self, info: FdInfo) -> bool:
        """Whether a descriptor is an opening of this device, duplicates included."""
        return self._null.recognises(info)

    def read(self, info: FdInfo) -> int:
        """EINVAL, as of every file without a read operation; EBADF when not opened for it."""
        raise _refusal(errno.EBADF if info.flags & os.O_ACCMODE == os.O_WRONLY else errno.EINVAL)

    def write(self, info: FdInfo) -> int:
        """EINVAL, as of every file without a write operation; EBADF when not opened for it."""
        raise _refusal(errno.EBADF if info.flags & os.O_ACCMODE == os.O_RDONLY else errno.EINVAL)


class VirtualTree:
    """Nodes at absolute paths. A node that is a directory answers for everything below its path."""

    def __init__(self, mounts: Mapping[bytes, Node]) -> None:
        self._mounts = dict(mounts)
        self.prefixes: Final = tuple(self._mounts)
        """What every path that `covers` accepts starts with."""

    def covers(self, path: bytes) -> bool:
        """Whether a path of the resolver's form is one of ours, existing or not."""
        return self._mount(path) is not None

    def _mount(self, path: bytes) -> bytes | None:
        for mount in self._mounts:
            if path.startswith(mount) and path[len(mount) : len(mount) + 1] in (b"", b"/"):
                return mount
        return None

    def find(self, path: bytes) -> Node:
        """The node at a path of the resolver's form.

        Raises:
            OSError: ENOENT; ENOTDIR when something on the way is no directory.
        """
        mount = self._mount(path)
        if mount is None:
            raise _refusal(errno.ENOENT)
        node = self._mounts[mount]
        for name in path[len(mount) :].split(b"/"):
            if name:
                node = node.child(name)
        if path.endswith(b"/") and not stat.S_ISDIR(node.status().mode):
            raise _refusal(errno.ENOTDIR)
        return node

    def behind(self, tid: int, descriptor: int) -> tuple[Node, FdInfo] | None:
        """The node that a thread's descriptor is an opening of; None for files of the system."""
        try:
            info = fd_info(tid, descriptor)
        except OSError:
            return None  # not open, or out of reach: the kernel answers
        for node in self._mounts.values():
            if node.behind(info):
                return node, info
        return None


def device_tree(device: SevGuestDevice) -> VirtualTree:
    """The tree with `/dev/sev-guest`.

    Raises:
        HostError: /dev/null is missing.
    """
    return VirtualTree({DEVICE.encode(): DeviceNode(device)})
