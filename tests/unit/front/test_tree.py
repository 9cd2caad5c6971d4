"""The virtual files and the descriptors that stand for them."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest

from swsnp.errors import HostError
from swsnp.front.wrap.handles import NullDevice, fd_info, free_descriptor
from swsnp.front.wrap.status import FileStatus
from swsnp.front.wrap.transfer import Transfer
from swsnp.front.wrap.tree import DeviceNode, Node, Opened, VirtualTree, device_tree
from swsnp.guest.caller import BufferMemory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from swsnp.guest.caller import CallerMemory

DEVICE = b"/dev/sev-guest"
NOTHING = Transfer(BufferMemory(), ())


class NoDevice:
    """A device that nobody asks."""

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        raise NotImplementedError


class Folder(Node):
    """A directory of nodes, to show that the tree takes other kinds of nodes."""

    def __init__(self, **children: Node) -> None:
        self._children = children

    def child(self, name: bytes) -> Node:
        try:
            return self._children[name.decode()]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such node") from None

    def status(self) -> FileStatus:
        return FileStatus(mode=stat.S_IFDIR | 0o755, dev=1, ino=1)


@pytest.fixture
def device() -> DeviceNode:
    return DeviceNode(NoDevice())


@pytest.fixture
def opened(device: DeviceNode) -> Iterator[Opened]:
    handle = device.open(os.O_RDWR)
    yield handle
    os.close(handle.source)


def refusal(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.RaisesExc(OSError, check=lambda error: error.errno == code)


def test_status_of_the_device(device: DeviceNode) -> None:
    """drivers/char/misc.c: major 10, a dynamic minor from 256 on; devtmpfs: mode 0600."""
    status = device.status()
    assert status.mode == 0o020600
    assert (os.major(status.rdev), os.minor(status.rdev)) == (10, 260)
    assert status.size == 0
    assert (status.uid, status.gid) == (os.geteuid(), os.getegid())


@pytest.mark.parametrize(
    ("mode", "permitted"), [(0, True), (2, True), (4, True), (6, True), (1, False), (5, False)]
)
def test_access(device: DeviceNode, mode: int, permitted: bool) -> None:
    """access(2) over mode 0600: X_OK is refused even to root."""
    if permitted:
        device.access(mode)
    else:
        with refusal(errno.EACCES):
            device.access(mode)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_open_keeps_the_access_mode(device: DeviceNode, flags: int) -> None:
    """sev-guest does not look at the mode; clients open O_RDONLY and O_RDWR."""
    handle = device.open(flags | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK)
    try:
        info = fd_info("self", handle.source)
        assert info.flags & os.O_ACCMODE == flags
        assert info.flags & os.O_NONBLOCK
        assert handle.reserved
        assert device.behind(info)
        assert stat.S_ISCHR(os.fstat(handle.source).st_mode)
    finally:
        os.close(handle.source)


def test_the_device_is_no_directory(device: DeviceNode) -> None:
    """open(2), O_DIRECTORY; rmdir(2); chdir(2)."""
    for operation in (
        lambda: device.open(os.O_DIRECTORY),
        device.rmdir,
        device.chdir,
        lambda: device.child(b"x"),
        device.create,
        lambda: device.mkdir(b"x"),
    ):
        with refusal(errno.ENOTDIR):
            operation()
    with refusal(errno.EACCES):
        device.unlink()


def test_calls_that_the_driver_does_not_have(device: DeviceNode) -> None:
    """Linux, fs/read_write.c: EBADF before EINVAL; ESPIPE without an llseek operation."""
    for flags, reading, writing in (
        (os.O_RDWR, errno.EINVAL, errno.EINVAL),
        (os.O_RDONLY, errno.EINVAL, errno.EBADF),
        (os.O_WRONLY, errno.EBADF, errno.EINVAL),
    ):
        handle = device.open(flags)
        info = fd_info("self", handle.source)
        os.close(handle.source)
        with refusal(reading):
            device.read(info, NOTHING)
        with refusal(writing):
            device.write(info, NOTHING)
    with refusal(errno.ESPIPE):
        device.seek(0, os.SEEK_CUR)


def test_duplicates_are_recognised_and_others_are_not(device: DeviceNode, opened: Opened) -> None:
    """The marks belong to the open file description; fcntl cannot change them."""
    tree = VirtualTree({DEVICE: device})
    duplicate = os.dup(opened.source)
    os.set_blocking(duplicate, False)
    null = os.open("/dev/null", os.O_RDWR)
    similar = os.open("/dev/null", os.O_RDWR | os.O_DSYNC)
    zero = os.open("/dev/zero", os.O_RDWR | NullDevice.MARK)
    try:
        found = tree.behind(os.getpid(), duplicate)
        assert found is not None
        assert found[0] is device
        assert [tree.behind(os.getpid(), each) for each in (null, similar, zero)] == [None, None, None]
        assert tree.behind(os.getpid(), 10_000) is None
        assert tree.behind(os.getpid(), -1) is None
    finally:
        for each in (duplicate, null, similar, zero):
            os.close(each)


def test_find(device: DeviceNode) -> None:
    """path_resolution(7): ENOENT, and ENOTDIR behind a file or for a slash after it."""
    tree = VirtualTree({DEVICE: device, b"/virtual": Folder(inner=Folder(), file=device)})
    assert tree.find(DEVICE) is device
    assert tree.find(b"/virtual/file") is device
    assert isinstance(tree.find(b"/virtual/inner/"), Folder)
    for path, code in (
        (DEVICE + b"/", errno.ENOTDIR),
        (DEVICE + b"/x", errno.ENOTDIR),
        (b"/virtual/file/", errno.ENOTDIR),
        (b"/virtual/none", errno.ENOENT),
        (b"/virtual/none/x", errno.ENOENT),
        (b"/elsewhere", errno.ENOENT),
    ):
        with refusal(code):
            tree.find(path)


def test_covers(device: DeviceNode) -> None:
    """A longer name is another file."""
    tree = VirtualTree({DEVICE: device})
    assert tree.prefixes == (DEVICE,)
    assert [tree.covers(DEVICE + tail) for tail in (b"", b"/", b"/x", b"x", b"-2")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert not tree.covers(b"/dev")


def test_free_descriptor(opened: Opened) -> None:
    """The lowest number of the range that is not in use."""
    number = opened.source
    assert free_descriptor(os.getpid(), range(number, number + 1)) is None
    assert free_descriptor(os.getpid(), range(50_000, 50_003)) == 50_000


def test_host_without_a_null_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text names what is missing and the remedy."""
    monkeypatch.setattr(NullDevice, "PATH", str(tmp_path / "null"))
    with pytest.raises(HostError, match="No such file or directory; remedy: provide it"):
        device_tree(NoDevice())
    (tmp_path / "null").touch()
    with pytest.raises(HostError, match="not a character device; remedy: mknod"):
        device_tree(NoDevice())


def test_parent() -> None:
    """path_resolution(7): where something new would lie; a slash at the end means nothing for that."""
    inner = Folder()
    tree = VirtualTree({b"/virtual": Folder(inner=inner)})
    assert tree.parent(b"/virtual/inner/new") == (inner, b"new")
    assert tree.parent(b"/virtual/inner/new/") == (inner, b"new")
    with refusal(errno.ENOENT):
        tree.parent(b"/virtual/none/new")


def test_a_tree_of_the_device_alone_holds_nothing(device: DeviceNode) -> None:
    """Closing it is allowed; a duplicate of the device asks for nothing."""
    VirtualTree({DEVICE: device}).close()
    device.duplicate()
