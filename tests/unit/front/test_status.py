"""The stat layouts: against the kernel's own answers here, and field by field where it cannot be asked."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from swsnp.front.wrap.arch import X86_64
from swsnp.front.wrap.status import FileStatus, pack_stat_generic, pack_stat_x86, pack_statx

if TYPE_CHECKING:
    from tests.conftest import Skip

STATX = {"x86_64": 332, "aarch64": 291}
ALL = FileStatus(
    mode=0o20600,
    dev=os.makedev(0x12, 0x345),
    ino=0x1122334455667788,
    rdev=os.makedev(10, 260),
    nlink=3,
    uid=1000,
    gid=1001,
    size=0x123456789A,
    blksize=512,
    blocks=77,
    atime_ns=1_700_000_001_000_000_002,
    mtime_ns=1_700_000_003_000_000_004,
    ctime_ns=1_700_000_005_000_000_006,
)


def status_of(path: str) -> FileStatus:
    found = Path(path).stat()
    return FileStatus(
        mode=found.st_mode,
        dev=found.st_dev,
        ino=found.st_ino,
        rdev=found.st_rdev,
        nlink=found.st_nlink,
        uid=found.st_uid,
        gid=found.st_gid,
        size=found.st_size,
        blksize=found.st_blksize,
        blocks=found.st_blocks,
        atime_ns=found.st_atime_ns,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def kernel_says(number: int, *args: object) -> bytes:
    """Make a system call with a 256-byte buffer in the place of `...`; returns the buffer."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    given = [ctypes.c_long(each) if isinstance(each, int) else each for each in args]
    given = [buffer if each is Ellipsis else each for each in given]
    assert libc.syscall(ctypes.c_long(number), *given) == 0
    return buffer.raw


def files(tmp_path: Path) -> list[str]:
    (tmp_path / "file").write_bytes(b"x" * 5000)
    (tmp_path / "link").hardlink_to(tmp_path / "file")
    return [str(tmp_path / "file"), str(tmp_path), "/dev/null", "/dev/zero", "/proc/self/exe"]


def test_stat_of_x86_64_is_what_the_kernel_writes(tmp_path: Path, cannot_run: Skip) -> None:
    """`struct stat`: every byte of the kernel's answer, for files of several kinds."""
    if platform.machine() != "x86_64":
        cannot_run("not x86-64", "run on x86-64", avoidable=False)
    for path in files(tmp_path):
        status = status_of(path)
        real = kernel_says(X86_64.calls["newfstatat"], -100, os.fsencode(path), ..., 0)
        assert pack_stat_x86(status) == real[:144], path


def test_statx_is_what_the_kernel_writes(tmp_path: Path, cannot_run: Skip) -> None:
    """`struct statx`: the fields of STATX_BASIC_STATS; our mask claims no others."""
    number = STATX.get(platform.machine())
    if number is None:
        cannot_run("no statx number for this machine", "run on x86-64 or aarch64", avoidable=False)
    for path in files(tmp_path):
        status = status_of(path)
        real = bytearray(kernel_says(number, -100, os.fsencode(path), 0, 0x7FF, ...))
        packed = pack_statx(status)
        for start, stop in ((0, 8), (16, 30), (32, 56), (64, 76), (96, 108), (112, 124), (128, 144)):
            if start == 0:
                real[0:4] = struct.pack("<I", struct.unpack_from("<I", real)[0] & 0x7FF)
            assert packed[start:stop] == real[start:stop], (path, start)
        assert len(packed) == 256
        assert packed[80:92] == bytes(12)  # no birth time


def test_stat_of_aarch64_has_its_fields_at_the_offsets_of_the_header() -> None:
    """include/uapi/asm-generic/stat.h with 64-bit longs: 128 bytes."""
    packed = pack_stat_generic(ALL)
    assert len(packed) == 128
    fields = {
        (0, "Q"): ALL.dev,
        (8, "Q"): ALL.ino,
        (16, "I"): ALL.mode,
        (20, "I"): ALL.nlink,
        (24, "I"): ALL.uid,
        (28, "I"): ALL.gid,
        (32, "Q"): ALL.rdev,
        (40, "Q"): 0,
        (48, "Q"): ALL.size,
        (56, "I"): ALL.blksize,
        (60, "I"): 0,
        (64, "Q"): ALL.blocks,
        (72, "Q"): 1_700_000_001,
        (80, "Q"): 2,
        (88, "Q"): 1_700_000_003,
        (96, "Q"): 4,
        (104, "Q"): 1_700_000_005,
        (112, "Q"): 6,
        (120, "Q"): 0,
    }
    assert {key: struct.unpack_from("<" + key[1], packed, key[0])[0] for key in fields} == fields


def test_device_numbers_above_255_survive() -> None:
    """linux/kdev_t.h: a minor number has 20 bits, the upper 12 above the major number's."""
    assert struct.unpack_from("<Q", pack_stat_x86(ALL), 40)[0] == 0x10_0A04
    assert struct.unpack_from("<IIII", pack_statx(ALL), 128) == (10, 260, 0x12, 0x345)
