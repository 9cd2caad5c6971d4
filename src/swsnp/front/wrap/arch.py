"""System call numbers and file status layouts of the architectures that programs can be wrapped on.

Numbers as in Linux, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
A name that an architecture does not have is left out: its programs cannot make that call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.front.wrap.status import pack_stat_generic, pack_stat_x86

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from swsnp.front.wrap.status import FileStatus

__all__ = ["AARCH64", "ARCHITECTURES", "X86_64", "Architecture", "this_architecture"]

X32_BIT: Final = 0x4000_0000


class Architecture(NamedTuple):
    """What differs between architectures.

    Attributes:
        machine: as `uname -m` prints it.
        audit: AUDIT_ARCH_*, what a filter finds in `seccomp_data.arch`.
        x32_bit: numbers from here on belong to another ABI of the same `audit` value; None when there is
            none.
        calls: numbers by name.
        pack_stat: makes this architecture's `struct stat`.
    """

    machine: str
    audit: int
    x32_bit: int | None
    calls: Mapping[str, int]
    pack_stat: Callable[[FileStatus], bytes]


X86_64: Final = Architecture(
    machine="x86_64",
    audit=0xC000_003E,
    x32_bit=X32_BIT,
    calls={
        "read": 0,
        "write": 1,
        "open": 2,
        "stat": 4,
        "fstat": 5,
        "lstat": 6,
        "lseek": 8,
        "mmap": 9,
        "ioctl": 16,
        "pread64": 17,
        "pwrite64": 18,
        "readv": 19,
        "writev": 20,
        "access": 21,
        "dup": 32,
        "dup2": 33,
        "execve": 59,
        "fcntl": 72,
        "chdir": 80,
        "mkdir": 83,
        "rmdir": 84,
        "creat": 85,
        "unlink": 87,
        "readlink": 89,
        "getxattr": 191,
        "lgetxattr": 192,
        "listxattr": 194,
        "llistxattr": 195,
        "epoll_ctl": 233,
        "openat": 257,
        "mkdirat": 258,
        "newfstatat": 262,
        "unlinkat": 263,
        "readlinkat": 267,
        "faccessat": 269,
        "dup3": 292,
        "seccomp": 317,
        "execveat": 322,
        "statx": 332,
        "io_uring_setup": 425,
        "openat2": 437,
        "faccessat2": 439,
    },
    pack_stat=pack_stat_x86,
)

# UNVERIFIED: no program was run here; numbers and layout are compared with the kernel's headers.
AARCH64: Final = Architecture(
    machine="aarch64",
    audit=0xC000_00B7,
    x32_bit=None,
    calls={
        "getxattr": 8,
        "lgetxattr": 9,
        "listxattr": 11,
        "llistxattr": 12,
        "epoll_ctl": 21,
        "dup": 23,
        "dup3": 24,
        "fcntl": 25,
        "ioctl": 29,
        "mkdirat": 34,
        "unlinkat": 35,
        "faccessat": 48,
        "chdir": 49,
        "openat": 56,
        "lseek": 62,
        "read": 63,
        "write": 64,
        "readv": 65,
        "writev": 66,
        "pread64": 67,
        "pwrite64": 68,
        "readlinkat": 78,
        "newfstatat": 79,
        "fstat": 80,
        "execve": 221,
        "mmap": 222,
        "seccomp": 277,
        "execveat": 281,
        "statx": 291,
        "io_uring_setup": 425,
        "openat2": 437,
        "faccessat2": 439,
    },
    pack_stat=pack_stat_generic,
)

ARCHITECTURES: Final = {each.machine: each for each in (X86_64, AARCH64)}


def this_architecture() -> Architecture | None:
    """The architecture that this process runs on; None when there is no table for it."""
    return ARCHITECTURES.get(os.uname().machine)
