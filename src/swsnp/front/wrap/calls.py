"""What each notified call means for the virtual files: where its path is, what is done, what is written back.

A handler returns what the call returns, an opening to hand over, or CARRY_ON; OSError is the call's errno.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from swsnp.front.wrap.bpf import AT_EMPTY_PATH, AT_FDCWD
from swsnp.front.wrap.paths import signed
from swsnp.front.wrap.status import pack_statx
from swsnp.front.wrap.transfer import one_buffer, vector

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.front.wrap.arch import Architecture
    from swsnp.front.wrap.handles import FdInfo
    from swsnp.front.wrap.status import FileStatus
    from swsnp.front.wrap.tree import Node, VirtualTree
    from swsnp.guest.caller import CallerMemory

__all__ = [
    "CARRY_ON",
    "ON_DESCRIPTOR",
    "ON_PATH",
    "Answer",
    "DescriptorCall",
    "DescriptorHandler",
    "HandOver",
    "PathCall",
    "PathHandler",
    "about_descriptor",
]

_AT_REMOVEDIR: Final = 0x200
_ACCESS_MODES: Final = os.R_OK | os.W_OK | os.X_OK
# struct open_how: u64 flags, mode, resolve
_OPEN_HOW: Final = struct.Struct("<QQQ")
_OPEN_HOW_MOST: Final = 4096
# RESOLVE_NO_XDEV, RESOLVE_BENEATH, RESOLVE_IN_ROOT: the path is not meant from the root of all
_RESOLVE_ELSEWHERE: Final = 0x01 | 0x08 | 0x10


class CarryOn(Enum):
    """The one value `CARRY_ON`: the kernel shall execute the call."""

    CARRY_ON = 0


CARRY_ON: Final = CarryOn.CARRY_ON


class HandOver(NamedTuple):
    """The call's result is a descriptor of `source`, which is ours and is closed afterwards.

    `reserved` and `outside` are those of `tree.Opened`.
    """

    source: int
    cloexec: bool
    reserved: bool
    outside: Callable[[], None] | None = None

    def placed_outside(self) -> HandOver:
        """The same after it was told that it lands outside of the reserved range; raises OSError."""
        try:
            if self.outside is not None:
                self.outside()
        except BaseException:
            os.close(self.source)
            raise
        return self._replace(reserved=False, outside=None)


Answer: TypeAlias = int | HandOver | CarryOn
Arguments: TypeAlias = tuple[int, int, int, int, int, int]


class PathCall(NamedTuple):
    """A call with a virtual path."""

    path: bytes
    args: Arguments
    tree: VirtualTree
    caller: CallerMemory
    arch: Architecture

    def node(self) -> Node:
        """What the path names; raises OSError."""
        return self.tree.find(self.path)

    def flags(self, index: int) -> int:
        """An `int` argument, unsigned."""
        return self.args[index] & 0xFFFF_FFFF


class DescriptorCall(NamedTuple):
    """A call on an opening of `node`."""

    node: Node
    info: FdInfo
    args: Arguments
    caller: CallerMemory
    arch: Architecture


def _open(call: PathCall, flags: int) -> Answer:
    try:
        node = call.node()
    except FileNotFoundError:
        if flags & os.O_CREAT:
            call.tree.parent(call.path)[0].create()
        raise
    if flags & os.O_CREAT and flags & os.O_EXCL:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    opened = node.open(flags)
    return HandOver(opened.source, bool(flags & os.O_CLOEXEC), opened.reserved, opened.outside)


def _openat2(call: PathCall) -> Answer:
    size = call.args[3]
    if not _OPEN_HOW.size <= size <= _OPEN_HOW_MOST:
        return CARRY_ON  # the kernel refuses it: EINVAL or E2BIG
    how = call.caller.read(call.args[2], size)
    flags, mode, resolve = _OPEN_HOW.unpack_from(how)
    if resolve & _RESOLVE_ELSEWHERE or any(how[_OPEN_HOW.size :]) or (mode and not flags & os.O_CREAT):
        return CARRY_ON
    return _open(call, flags)


def _creat(call: PathCall) -> Answer:
    return _open(call, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)


def _access(call: PathCall, mode: int) -> Answer:
    if mode & ~_ACCESS_MODES:
        return -errno.EINVAL
    call.node().access(mode)
    return 0


def _stat(call: PathCall, index: int) -> Answer:
    call.caller.write(call.args[index], call.arch.pack_stat(call.node().status()))
    return 0


def _statx(call: PathCall) -> Answer:
    call.caller.write(call.args[4], pack_statx(call.node().status()))
    return 0


def _readlink(call: PathCall) -> Answer:
    call.node()
    return -errno.EINVAL  # there are no links


def _getxattr(call: PathCall) -> Answer:
    return -call.node().xattr_error


def _listxattr(call: PathCall) -> Answer:
    call.node()
    return 0


def _mkdir(call: PathCall) -> Answer:
    try:
        call.node()
    except FileNotFoundError:
        parent, name = call.tree.parent(call.path)
        parent.mkdir(name)
        return 0
    return -errno.EEXIST


def _rmdir(call: PathCall) -> Answer:
    call.node().rmdir()
    return 0


def _unlink(call: PathCall) -> Answer:
    call.node().unlink()
    return 0


def _unlinkat(call: PathCall) -> Answer:
    return _rmdir(call) if call.flags(2) & _AT_REMOVEDIR else _unlink(call)


def _chdir(call: PathCall) -> Answer:
    call.node().chdir()
    return -errno.EACCES  # no process can be moved from outside


class PathHandler(NamedTuple):
    """Where a call has its path.

    Attributes:
        dirfd: index of the argument that relative paths start from; None is the working directory.
        path: index of the argument with the path's address.
        handle: called when the path is a virtual one.
        flags: index of the argument in which AT_EMPTY_PATH turns the call to the descriptor `dirfd`.
        once: what it does must not be done again when its answer is lost.
    """

    dirfd: int | None
    path: int
    handle: Callable[[PathCall], Answer]
    flags: int | None = None
    once: bool = False


ON_PATH: Final[dict[str, PathHandler]] = {
    "open": PathHandler(None, 0, lambda call: _open(call, call.flags(1))),
    "openat": PathHandler(0, 1, lambda call: _open(call, call.flags(2))),
    "openat2": PathHandler(0, 1, _openat2),
    "creat": PathHandler(None, 0, _creat),
    "stat": PathHandler(None, 0, lambda call: _stat(call, 1)),
    "lstat": PathHandler(None, 0, lambda call: _stat(call, 1)),
    "newfstatat": PathHandler(0, 1, lambda call: _stat(call, 2), flags=3),
    "statx": PathHandler(0, 1, _statx, flags=2),
    "access": PathHandler(None, 0, lambda call: _access(call, call.flags(1))),
    "faccessat": PathHandler(0, 1, lambda call: _access(call, call.flags(2))),
    "faccessat2": PathHandler(0, 1, lambda call: _access(call, call.flags(2))),
    "readlink": PathHandler(None, 0, _readlink),
    "readlinkat": PathHandler(0, 1, _readlink),
    "mkdir": PathHandler(None, 0, _mkdir, once=True),
    "mkdirat": PathHandler(0, 1, _mkdir, once=True),
    "rmdir": PathHandler(None, 0, _rmdir, once=True),
    "unlink": PathHandler(None, 0, _unlink),
    "unlinkat": PathHandler(0, 1, _unlinkat, once=True),
    "chdir": PathHandler(None, 0, _chdir),
    "getxattr": PathHandler(None, 0, _getxattr),
    "lgetxattr": PathHandler(None, 0, _getxattr),
    "listxattr": PathHandler(None, 0, _listxattr),
    "llistxattr": PathHandler(None, 0, _listxattr),
}


def about_descriptor(handler: PathHandler, args: Arguments, path: bytes) -> bool:
    """Whether a stat with an empty path asks about its descriptor argument."""
    return (
        handler.flags is not None
        and handler.dirfd is not None
        and not path
        and bool(args[handler.flags] & AT_EMPTY_PATH)
        and signed(args[handler.dirfd]) != AT_FDCWD
    )


def _status_of(call: DescriptorCall) -> FileStatus:
    return call.node.status_of(call.info)


def _fstat(call: DescriptorCall, index: int) -> Answer:
    call.caller.write(call.args[index], call.arch.pack_stat(_status_of(call)))
    return 0


def _fstatx(call: DescriptorCall) -> Answer:
    call.caller.write(call.args[4], pack_statx(_status_of(call)))
    return 0


def _read(call: DescriptorCall) -> Answer:
    return call.node.read(call.info, one_buffer(call.caller, *call.args[1:3]))


def _write(call: DescriptorCall) -> Answer:
    return call.node.write(call.info, one_buffer(call.caller, *call.args[1:3]))


def _pread(call: DescriptorCall) -> Answer:
    return call.node.read(call.info, one_buffer(call.caller, *call.args[1:4]))


def _pwrite(call: DescriptorCall) -> Answer:
    return call.node.write(call.info, one_buffer(call.caller, *call.args[1:4]))


def _readv(call: DescriptorCall) -> Answer:
    return call.node.read(call.info, vector(call.caller, call.args[1], call.args[2]))


def _writev(call: DescriptorCall) -> Answer:
    return call.node.write(call.info, vector(call.caller, call.args[1], call.args[2]))


def _seek(call: DescriptorCall) -> Answer:
    offset = call.args[1]
    return call.node.seek(offset - (1 << 64) if offset >> 63 else offset, call.args[2] & 0xFFFF_FFFF)


def _duplicate(call: DescriptorCall) -> Answer:
    call.node.duplicate()
    return CARRY_ON


def _fcntl(call: DescriptorCall) -> Answer:
    if call.args[1] & 0xFFFF_FFFF in (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC):
        call.node.duplicate()
    return CARRY_ON


def _mmap(call: DescriptorCall) -> Answer:
    return CARRY_ON if call.args[3] & mmap.MAP_ANONYMOUS else -errno.ENODEV


class DescriptorHandler(NamedTuple):
    """A call on a descriptor, which is argument `at`."""

    handle: Callable[[DescriptorCall], Answer]
    at: int = 0


ON_DESCRIPTOR: Final[dict[str, DescriptorHandler]] = {
    "read": DescriptorHandler(_read),
    "readv": DescriptorHandler(_readv),
    "pread64": DescriptorHandler(_pread),
    "write": DescriptorHandler(_write),
    "writev": DescriptorHandler(_writev),
    "pwrite64": DescriptorHandler(_pwrite),
    "lseek": DescriptorHandler(_seek),
    "fstat": DescriptorHandler(lambda call: _fstat(call, 1)),
    "newfstatat": DescriptorHandler(lambda call: _fstat(call, 2)),
    "statx": DescriptorHandler(_fstatx),
    "dup": DescriptorHandler(_duplicate),
    "dup2": DescriptorHandler(_duplicate),
    "dup3": DescriptorHandler(_duplicate),
    "fcntl": DescriptorHandler(_fcntl),
    "mmap": DescriptorHandler(_mmap, at=4),
    # what has no poll operation cannot be watched
    "epoll_ctl": DescriptorHandler(lambda _: -errno.EPERM, at=2),
}
"""Calls on a descriptor in the reserved range; ioctl goes to the device instead."""
