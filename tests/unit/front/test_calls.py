"""The calls with paths, over a made-up memory."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.front.wrap.arch import X86_64
from swsnp.front.wrap.calls import CARRY_ON, ON_PATH, Answer, HandOver, PathCall, about_descriptor
from swsnp.front.wrap.tree import device_tree
from swsnp.guest.caller import BufferMemory, CallerFault

if TYPE_CHECKING:
    from swsnp.guest.caller import CallerMemory

PATH = b"/dev/sev-guest"
OUT = 0x5000


class NoDevice:
    """A device that nobody asks."""

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        raise NotImplementedError


def call(name: str, *args: int, path: bytes = PATH, memory: BufferMemory | None = None) -> Answer:
    given = (*args, 0, 0, 0, 0, 0, 0)[:6]
    caller = memory or BufferMemory()
    return ON_PATH[name].handle(PathCall(path, given, device_tree(NoDevice()), caller, X86_64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "args", "answer"),
    [
        ("readlink", (), -errno.EINVAL),
        ("readlinkat", (), -errno.EINVAL),
        ("getxattr", (), -errno.ENODATA),
        ("lgetxattr", (), -errno.ENODATA),
        ("listxattr", (), 0),
        ("llistxattr", (), 0),
        ("mkdir", (), -errno.EEXIST),
        ("mkdirat", (), -errno.EEXIST),
        ("access", (0, 0), 0),
        ("access", (0, 6), 0),
        ("access", (0, 8), -errno.EINVAL),
        ("faccessat", (0, 0, 4), 0),
        ("faccessat2", (0, 0, 4, 0x200), 0),
    ],
)
def test_results(name: str, args: tuple[int, ...], answer: int) -> None:
    """The manual page of each call, for a character device of mode 0600 in a directory of root's."""
    assert call(name, *args) == answer


@pytest.mark.parametrize(
    ("name", "args", "code"),
    [
        ("rmdir", (), errno.ENOTDIR),
        ("unlink", (), errno.EACCES),
        ("unlinkat", (0, 0, 0), errno.EACCES),
        ("unlinkat", (0, 0, 0x200), errno.ENOTDIR),
        ("chdir", (), errno.ENOTDIR),
        ("access", (0, 1), errno.EACCES),
        ("open", (0, os.O_CREAT | os.O_EXCL), errno.EEXIST),
        ("open", (0, os.O_DIRECTORY), errno.ENOTDIR),
        ("openat", (0, 0, os.O_CREAT | os.O_EXCL), errno.EEXIST),
    ],
)
def test_refusals(name: str, args: tuple[int, ...], code: int) -> None:
    """The manual page of each call."""
    with pytest.raises(OSError, check=lambda error: error.errno == code):
        call(name, *args)


@pytest.mark.parametrize("name", sorted(ON_PATH))
def test_every_call_refuses_a_path_behind_the_device(name: str) -> None:
    """path_resolution(7): ENOTDIR, whatever is done with the path."""
    memory = BufferMemory()
    memory.map(OUT, bytearray(256))
    args = () if "access" in name else (0, 0, OUT, 24, OUT)  # access looks at its mode first
    with pytest.raises(NotADirectoryError):
        call(name, *args, path=PATH + b"/x", memory=memory)


@pytest.mark.parametrize(
    ("name", "args", "cloexec"),
    [
        ("open", (0, os.O_RDONLY), False),
        ("open", (0, os.O_RDWR | os.O_CLOEXEC), True),
        ("openat", (0, 0, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), True),
        ("creat", (), False),
    ],
)
def test_openings(name: str, args: tuple[int, ...], cloexec: bool) -> None:
    """open(2): O_CREAT without O_EXCL opens what exists."""
    answer = call(name, *args)
    assert isinstance(answer, HandOver)
    os.close(answer.source)
    assert answer[1:] == (cloexec, True, None)


@pytest.mark.parametrize(
    ("how", "size", "opens"),
    [
        ((os.O_RDWR, 0, 0), 24, True),
        ((os.O_RDWR, 0, 0, 0), 32, True),
        ((os.O_RDWR | os.O_CREAT, 0o600, 0), 24, True),
        ((os.O_RDWR, 0, 0x02 | 0x04), 24, True),
        ((os.O_RDWR, 0, 0), 23, False),
        ((os.O_RDWR, 0, 0), 4097, False),
        ((os.O_RDWR, 0, 0, 1), 32, False),
        ((os.O_RDWR, 0o600, 0), 24, False),
        ((os.O_RDWR, 0, 0x01), 24, False),
        ((os.O_RDWR, 0, 0x08), 24, False),
        ((os.O_RDWR, 0, 0x10), 24, False),
    ],
)
def test_openat2(how: tuple[int, ...], size: int, opens: bool) -> None:
    """openat2(2): what it refuses, and paths that do not start at the root, are left to the kernel."""
    memory = BufferMemory()
    memory.map(OUT, bytearray(struct.pack(f"<{len(how)}Q", *how)))
    answer = call("openat2", 0, 0, OUT, size, memory=memory)
    if opens:
        assert isinstance(answer, HandOver)
        os.close(answer.source)
    else:
        assert answer is CARRY_ON


def test_openat2_without_a_readable_argument() -> None:
    """openat2(2): EFAULT."""
    with pytest.raises(CallerFault):
        call("openat2", 0, 0, OUT, 24)


@pytest.mark.parametrize(
    ("name", "at", "size"), [("stat", 1, 144), ("lstat", 1, 144), ("newfstatat", 2, 144), ("statx", 4, 256)]
)
def test_stat_family(name: str, at: int, size: int) -> None:
    """The buffer's address stands in another argument each time; a bad one is EFAULT."""
    args = [0] * 6
    args[at] = OUT
    buffer = bytearray(size)
    memory = BufferMemory()
    memory.map(OUT, buffer)
    assert call(name, *args, memory=memory) == 0
    mode = struct.unpack_from("<H", buffer, 28 if name == "statx" else 24)[0]
    assert mode == 0o20600
    with pytest.raises(CallerFault):
        call(name, *args)


@pytest.mark.parametrize(
    ("name", "args", "path", "asks"),
    [
        ("newfstatat", (960, 0, 0, 0x1000, 0, 0), b"", True),
        ("statx", (960, 0, 0x1000, 0, 0, 0), b"", True),
        ("newfstatat", (960, 0, 0, 0, 0, 0), b"", False),
        ("newfstatat", (960, 0, 0, 0x1000, 0, 0), b"x", False),
        ("newfstatat", (0xFFFF_FF9C, 0, 0, 0x1000, 0, 0), b"", False),
        ("faccessat2", (960, 0, 0, 0x1000, 0, 0), b"", False),
        ("stat", (960, 0, 0, 0x1000, 0, 0), b"", False),
    ],
)
def test_stat_of_a_descriptor(name: str, args: tuple[int, ...], path: bytes, asks: bool) -> None:
    """stat(2), AT_EMPTY_PATH: an empty path means the descriptor, unless that is the working directory."""
    assert about_descriptor(ON_PATH[name], args, path) is asks  # type: ignore[arg-type]
