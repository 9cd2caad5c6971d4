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
    from collections.abc import Callable, Mapping

    from swsnp.front.device import SevGuestDevice
    from swsnp.front.wrap.transfer import Transfer
    from swsnp.front.wrap.tsm_openings import Openings
    from swsnp.guest.tsm import ConfigfsTsm

__all__ = ["DeviceNode", "Node", "Opened", "VirtualTree", "device_tree", "guest_tree", "refusal"]

_X_OK: Final = 1


class Opened(NamedTuple):
    """An opening made for a program.

    Attributes:
        source: our descriptor of it; whoever gets this closes it.
        reserved: put it into the reserved range, because calls on it are answered here.
        outside: to be called, in a worker, if it lands elsewhere; None when it need not know. Raises OSError.
    """

    source: int
    reserved: bool
    outside: Callable[[], None] | None = None


def refusal(code: int) -> OSError:
    """The error with this number."""
    return OSError(code, os.strerror(code))


class Node:
    """A file. Every operation raises OSError unless the kind of file has it."""

    device: SevGuestDevice | None = None
    """Where ioctls on an opening of this node go."""
    waits = False
    """Calls on an opening of this node may take their time, so a worker answers them."""
    xattr_error = errno.ENODATA
    """What getxattr ends with."""

    def child(self, name: bytes) -> Node:
        """The node of that name in this directory."""
        raise refusal(errno.ENOTDIR)

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
            raise refusal(errno.EACCES)

    def chdir(self) -> None:
        """Make it the working directory."""
        raise refusal(errno.ENOTDIR)

    def create(self) -> None:
        """Make a file in this directory: what open with O_CREAT of a new name does."""
        raise refusal(errno.ENOTDIR)

    def mkdir(self, name: bytes) -> None:
        """Make a directory in this directory."""
        raise refusal(errno.ENOTDIR)

    def rmdir(self) -> None:
        """Remove this directory."""
        raise refusal(errno.ENOTDIR)

    def unlink(self) -> None:
        """Remove this file."""
        raise refusal(errno.EACCES)  # /dev is root's

    def behind(self, info: FdInfo) -> bool:
        """Whether a descriptor is an opening of this node."""
        return False

    # calls on an opening of this node

    def status_of(self, info: FdInfo) -> FileStatus:
        """What fstat tells."""
        return self.status()

    def read(self, info: FdInfo, transfer: Transfer) -> int:
        """The result of read, readv or pread."""
        raise refusal(errno.EINVAL)

    def write(self, info: FdInfo, transfer: Transfer) -> int:
        """The result of write, writev or pwrite."""
        raise refusal(errno.EINVAL)

    def seek(self, offset: int, whence: int) -> int:
        """The result of lseek."""
        raise refusal(errno.ESPIPE)

    def duplicate(self) -> None:
        """A descriptor of this opening is about to be duplicated, perhaps to outside the reserved range."""


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
            raise refusal(errno.ENOTDIR)
        return Opened(self._null.open(flags), reserved=True)

    def behind(self, info: FdInfo) -> bool:
        """Whether a descriptor is an opening of this device, duplicates included."""
        return self._null.recognises(info)

    def read(self, info: FdInfo, transfer: Transfer) -> int:
        """EINVAL, as of every file without a read operation; EBADF when not opened for it."""
        raise refusal(errno.EBADF if info.flags & os.O_ACCMODE == os.O_WRONLY else errno.EINVAL)

    def write(self, info: FdInfo, transfer: Transfer) -> int:
        """EINVAL, as of every file without a write operation; EBADF when not opened for it."""
        raise refusal(errno.EBADF if info.flags & os.O_ACCMODE == os.O_RDONLY else errno.EINVAL)


class VirtualTree:
    """Nodes at absolute paths. A node that is a directory answers for everything below its path."""

    def __init__(
        self,
        mounts: Mapping[bytes, Node],
        *,
        openings: Openings | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        """A tree.

        Args:
            mounts: nodes by absolute path.
            openings: where openings are looked up that the nodes at `mounts` do not recognise themselves.
            close: what `close` calls.
        """
        self._mounts = dict(mounts)
        self._openings = openings
        self._close = close
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
            raise refusal(errno.ENOENT)
        node = self._mounts[mount]
        for name in path[len(mount) :].split(b"/"):
            if name:
                node = node.child(name)
        if path.endswith(b"/") and not stat.S_ISDIR(node.status().mode):
            raise refusal(errno.ENOTDIR)
        return node

    def parent(self, path: bytes) -> tuple[Node, bytes]:
        """The node of the directory that a path which `find` did not find would lie in, and the name there.

        Raises:
            OSError: as `find`.
        """
        above, _, name = path.rstrip(b"/").rpartition(b"/")
        return self.find(above), name

    def behind(self, tid: int, descriptor: int) -> tuple[Node, FdInfo] | None:
        """The node that a thread's descriptor is an opening of; None for files of the system."""
        try:
            info = fd_info(tid, descriptor)
        except OSError:
            return None  # not open, or out of reach: the kernel answers
        for node in self._mounts.values():
            if node.behind(info):
                return node, info
        opened = self._openings.find(tid, descriptor) if self._openings is not None else None
        return None if opened is None else (opened, info)

    def close(self) -> None:
        """Let go of what the nodes hold on this host."""
        if self._close is not None:
            self._close()


def device_tree(device: SevGuestDevice) -> VirtualTree:
    """The tree with `/dev/sev-guest`.

    Raises:
        HostError: /dev/null is missing.
    """
    return VirtualTree({DEVICE.encode(): DeviceNode(device)})


def guest_tree(device: SevGuestDevice, tsm: ConfigfsTsm) -> VirtualTree:
    """The tree with `/dev/sev-guest`, configfs-tsm and the driver's place in sysfs; `close` it.

    Raises:
        HostError: /dev/null is missing, or there is no place for private files.
    """
    from swsnp.front.wrap.tsm_nodes import TsmMount

    mount = TsmMount(tsm)
    nodes = {DEVICE.encode(): DeviceNode(device), **mount.nodes()}
    return VirtualTree(nodes, openings=mount.openings, close=mount.close)
