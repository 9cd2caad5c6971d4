"""What the stat family of calls tells about a file, and the layouts that the kernel writes it in.

Source: Linux, arch/x86/include/uapi/asm/stat.h, include/uapi/asm-generic/stat.h, include/uapi/linux/stat.h.
Plain structs rather than records, whose making would take a tenth of a wrapped program's start.
"""

from __future__ import annotations

import os
import struct
from functools import lru_cache
from typing import Final, NamedTuple

__all__ = ["FileStatus", "pack_stat_generic", "pack_stat_x86", "pack_statx"]

STATX_BASIC_STATS: Final = 0x7FF
_SECOND: Final = 1_000_000_000

# 0 dev, 8 ino, 16 nlink, 24 mode, 28 uid, 32 gid, 40 rdev, 48 size, 56 blksize, 64 blocks,
# 72 atime, 88 mtime, 104 ctime: u64 seconds and u64 nanoseconds each; 144 bytes
_STAT_X86: Final = struct.Struct("<QQQIII4xQQQQ6Q24x")
# 0 dev, 8 ino, 16 mode, 20 nlink, 24 uid, 28 gid, 32 rdev, 48 size, 56 blksize (u32), 64 blocks,
# then as above; 128 bytes
_STAT_GENERIC: Final = struct.Struct("<QQIIIIQ8xQI4xQ6Q8x")
# 0 mask, 4 blksize, 8 attributes, 16 nlink, 20 uid, 24 gid, 28 mode (u16), 32 ino, 40 size, 48 blocks,
# 56 attributes_mask, 64 atime, 80 btime (not given), 96 ctime, 112 mtime: u64 seconds and u32 nanoseconds,
# 128 rdev_major, 132 rdev_minor, 136 dev_major, 140 dev_minor, 144 mnt_id and the rest; 256 bytes
_STATX: Final = struct.Struct("<IIQIIIH2xQQQQQI4x16xQI4xQI4xIIII112x")


class FileStatus(NamedTuple):
    """One file.

    `mode` includes the type; `dev` and `rdev` are numbers as `os.makedev` makes them; times are nanoseconds
    since 1970, not negative; `blocks` are of 512 bytes.
    """

    mode: int
    dev: int
    ino: int
    rdev: int = 0
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    size: int = 0
    blksize: int = 4096
    blocks: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0


def _times(status: FileStatus) -> tuple[int, ...]:
    """Access, modification and change, as seconds and nanoseconds."""
    times = (status.atime_ns, status.mtime_ns, status.ctime_ns)
    return tuple(part for each in times for part in divmod(each, _SECOND))


@lru_cache(maxsize=64)
def pack_stat_x86(status: FileStatus) -> bytes:
    """`struct stat` of stat, lstat, fstat and newfstatat on x86-64: 144 bytes."""
    return _STAT_X86.pack(
        status.dev,
        status.ino,
        status.nlink,
        status.mode,
        status.uid,
        status.gid,
        status.rdev,
        status.size,
        status.blksize,
        status.blocks,
        *_times(status),
    )


@lru_cache(maxsize=64)
def pack_stat_generic(status: FileStatus) -> bytes:
    """`struct stat` of fstat and newfstatat on aarch64: 128 bytes."""
    return _STAT_GENERIC.pack(
        status.dev,
        status.ino,
        status.mode,
        status.nlink,
        status.uid,
        status.gid,
        status.rdev,
        status.size,
        status.blksize,
        status.blocks,
        *_times(status),
    )


@lru_cache(maxsize=64)
def pack_statx(status: FileStatus) -> bytes:
    """`struct statx`, 256 bytes: STATX_BASIC_STATS, whatever the caller's mask asked for."""
    atime, atime_nsec, mtime, mtime_nsec, ctime, ctime_nsec = _times(status)
    return _STATX.pack(
        STATX_BASIC_STATS,
        status.blksize,
        0,  # attributes
        status.nlink,
        status.uid,
        status.gid,
        status.mode,
        status.ino,
        status.size,
        status.blocks,
        0,  # attributes_mask
        atime,
        atime_nsec,
        ctime,
        ctime_nsec,
        mtime,
        mtime_nsec,
        os.major(status.rdev),
        os.minor(status.rdev),
        os.major(status.dev),
        os.minor(status.dev),
    )
