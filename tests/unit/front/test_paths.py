"""From what a program passes to the path it means."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.front.wrap.paths import Resolver, signed

FDCWD = -100
LINKS = {
    "/proc/7/cwd": "/dev",
    "/proc/7/fd/3": "/dev",
    "/proc/7/fd/4": "/home/user",
    "/proc/7/fd/5": "pipe:[123]",
    "/proc/8/cwd": "/",
}


def readlink(path: str) -> str:
    if path not in LINKS:
        raise FileNotFoundError(path)
    return LINKS[path]


def never(path: str) -> str:
    pytest.fail(f"{path} was looked at")


@pytest.fixture
def resolver() -> Resolver:
    return Resolver((b"/dev/sev-guest",), readlink=readlink)


@pytest.mark.parametrize(
    ("dirfd", "path", "meant"),
    [
        (FDCWD, b"/dev/sev-guest", b"/dev/sev-guest"),
        (FDCWD, b"//dev//sev-guest", b"/dev/sev-guest"),
        (FDCWD, b"///dev/sev-guest", b"/dev/sev-guest"),
        (FDCWD, b"/dev/./sev-guest", b"/dev/sev-guest"),
        (FDCWD, b"/usr/../dev/sev-guest", b"/dev/sev-guest"),
        (FDCWD, b"/../dev/sev-guest", b"/dev/sev-guest"),
        (FDCWD, b"/dev/sev-guest/", b"/dev/sev-guest/"),
        (FDCWD, b"/dev/sev-guest/.", b"/dev/sev-guest/"),
        (FDCWD, b"/dev/sev-guest/x", b"/dev/sev-guest/x"),
        (FDCWD, b"sev-guest", b"/dev/sev-guest"),
        (FDCWD, b"./sev-guest", b"/dev/sev-guest"),
        (FDCWD, b"../dev/sev-guest", b"/dev/sev-guest"),
        (3, b"sev-guest", b"/dev/sev-guest"),
        (4, b"../../dev/sev-guest", b"/dev/sev-guest"),
        (4, b"/dev/sev-guest", b"/dev/sev-guest"),
        (4, b"sev-guest", None),
        (5, b"sev-guest", None),
        (6, b"sev-guest", None),
        (FDCWD, b"", None),
        (FDCWD, b"/", None),
        (FDCWD, b"/dev/null", None),
        (FDCWD, b"/dev/sev-guest/..", None),
        (FDCWD, b"null", None),
    ],
)
def test_resolve(resolver: Resolver, dirfd: int, path: bytes, meant: bytes | None) -> None:
    """path_resolution(7): from the root, the working directory or the directory of the descriptor."""
    assert resolver.resolve(7, dirfd, path) == meant


def test_root_as_working_directory(resolver: Resolver) -> None:
    """The root's own link ends in the slash that others do not have."""
    assert resolver.resolve(8, FDCWD, b"dev/sev-guest") == b"/dev/sev-guest"


def test_absolute_paths_are_settled_without_a_look_at_the_thread() -> None:
    """openat(2): the descriptor is ignored when the path is absolute."""
    resolver = Resolver((b"/dev/sev-guest",), readlink=never)
    assert resolver.resolve(7, 3, b"/etc/passwd") is None
    assert resolver.resolve(7, 3, b"/dev/sev-guest") == b"/dev/sev-guest"
    assert resolver.resolve(7, 3, b"") is None


@settings(max_examples=300, derandomize=True)
@given(st.lists(st.sampled_from([b"", b".", b"..", b"dev", b"sev-guest", b"etc"]), max_size=6))
def test_the_quick_way_out_loses_nothing(parts: list[bytes]) -> None:
    """A path that the kernel would take to the device must not be dismissed: compared with a walk by hand."""
    path = b"/" + b"/".join(parts)
    walked: list[bytes] = []
    for part in parts:
        if part == b"..":
            walked = walked[:-1]
        elif part not in (b"", b"."):
            walked.append(part)
    resolved = Resolver((b"/dev/sev-guest",)).resolve(1, FDCWD, path)
    if walked[:2] == [b"dev", b"sev-guest"]:
        assert resolved is not None
        assert resolved.rstrip(b"/") == b"/" + b"/".join(walked)
    else:
        assert resolved is None


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (3, 3),
        (0xFFFF_FF9C, -100),
        (0xFFFF_FFFF_FFFF_FF9C, -100),
        (0xABCD_0000_0003, 3),
        (0x7FFF_FFFF, 0x7FFF_FFFF),
    ],
)
def test_signed(register: int, value: int) -> None:
    """A C int takes the low half of its register, with its sign."""
    assert signed(register) == value
