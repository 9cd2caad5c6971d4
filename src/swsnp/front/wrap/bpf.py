"""The filter that sends a program's calls to the supervisor, and the small assembler it is written with.

Source: Linux, Documentation/userspace-api/seccomp_filter.rst, include/uapi/linux/{seccomp,filter}.h.

Calls are told apart by number and by arguments that are numbers; a filter cannot look at memory, so every
call that takes a path is notified. Calls on descriptors are notified for the reserved range only, into which
the supervisor puts the descriptors it hands out, and, for the three SNP requests, on any descriptor. A call
that no rule names runs at full speed: the kernel keeps a bitmap of numbers that are always allowed.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.sev_guest import SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT, SNP_GET_REPORT
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from swsnp.front.wrap.arch import Architecture

__all__ = [
    "ALLOW",
    "AT_EMPTY_PATH",
    "AT_FDCWD",
    "DESCRIPTOR_CALLS",
    "DUPLICATING_CALLS",
    "EXEC_CALLS",
    "NOTIFY",
    "PATH_CALLS",
    "Program",
    "argument",
    "build_filter",
    "refuse",
]

ALLOW: Final = 0x7FFF_0000
NOTIFY: Final = 0x7FC0_0000
_ERRNO: Final = 0x0005_0000

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000

# struct seccomp_data: s32 nr, u32 arch, u64 instruction_pointer, u64 args[6]
_NR: Final = 0
_ARCH: Final = 4
_ARGS: Final = 16

# struct sock_filter: u16 code, u8 jt, u8 jf, u32 k; the codes are class | size or operation | operand
_INSTRUCTION: Final = struct.Struct("<HBBI")
_LD_W_ABS: Final = 0x20
_JMP_JA: Final = 0x05
_JMP_JEQ_K: Final = 0x15
_JMP_JGE_K: Final = 0x35
_JMP_JSET_K: Final = 0x45
_RET_K: Final = 0x06
_FARTHEST: Final = 255

DESCRIPTOR_CALLS: Final = ("read", "write", "lseek", "pread64", "pwrite64", "readv", "writev", "fstat")
"""Notified when argument 0 is a reserved descriptor. The busiest come first: they pay for the tests above."""

DUPLICATING_CALLS: Final = ("fcntl", "dup2", "dup3", "dup")
"""Likewise: what is answered in the reserved range has to be made ready for leaving it."""

PATH_CALLS: Final = (
    "openat",
    "open",
    "stat",
    "lstat",
    "access",
    "readlink",
    "readlinkat",
    "faccessat",
    "faccessat2",
    "openat2",
    "creat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "unlink",
    "unlinkat",
    "chdir",
    "getxattr",
    "lgetxattr",
    "listxattr",
    "llistxattr",
)
"""Always notified. newfstatat and statx are too, unless they are asked about a descriptor."""

EXEC_CALLS: Final = ("execve", "execveat")
"""Always notified, never answered: they tell that what is kept about a program's memory is out of date."""


def refuse(number: int) -> int:
    """The filter's verdict that ends a call with an errno value."""
    return _ERRNO | number


def argument(index: int) -> int:
    """Offset of the low half of argument `index` (both architectures are little-endian)."""
    return _ARGS + 8 * index


class _Instruction(NamedTuple):
    code: int
    value: int
    then: str | None
    otherwise: str | None


class Program:
    """Classic BPF with labels. A target of None is the next instruction; jumps go forward only."""

    def __init__(self) -> None:
        self._items: list[_Instruction] = []
        self._labels: dict[str, int] = {}

    def load(self, offset: int) -> None:
        """Take the 32-bit word at `offset` of `seccomp_data`."""
        self._items.append(_Instruction(_LD_W_ABS, offset, None, None))

    def jump(self, label: str) -> None:
        """Go to a label."""
        self._items.append(_Instruction(_JMP_JA, 0, label, None))

    def equal(self, value: int, then: str | None = None, otherwise: str | None = None) -> None:
        """Compare the word for equality."""
        self._items.append(_Instruction(_JMP_JEQ_K, value, then, otherwise))

    def at_least(self, value: int, then: str | None = None, otherwise: str | None = None) -> None:
        """Compare the word, unsigned."""
        self._items.append(_Instruction(_JMP_JGE_K, value, then, otherwise))

    def any_bit(self, mask: int, then: str | None = None, otherwise: str | None = None) -> None:
        """Test whether the word has a bit of `mask`."""
        self._items.append(_Instruction(_JMP_JSET_K, mask, then, otherwise))

    def verdict(self, action: int) -> None:
        """End with a SECCOMP_RET value."""
        self._items.append(_Instruction(_RET_K, action, None, None))

    def label(self, name: str) -> None:
        """Name the next instruction.

        Raises:
            UsageError: the name is taken.
        """
        if name in self._labels:
            raise UsageError(f"label {name}: defined twice")
        self._labels[name] = len(self._items)

    def build(self) -> bytes:
        """The instructions, 8 bytes each.

        Raises:
            UsageError: a label that does not exist, lies behind or is farther away than a jump reaches.
        """
        return b"".join(self._encode(at, item) for at, item in enumerate(self._items))

    def _encode(self, at: int, item: _Instruction) -> bytes:
        code, value, then, otherwise = item
        if code == _JMP_JA:
            return _INSTRUCTION.pack(code, 0, 0, self._distance(at, then))
        return _INSTRUCTION.pack(
            code, self._distance(at, then), self._distance(at, otherwise), value & 0xFFFF_FFFF
        )

    def _distance(self, at: int, label: str | None) -> int:
        if label is None:
            return 0
        if label not in self._labels:
            raise UsageError(f"label {label}: not defined")
        distance = self._labels[label] - at - 1
        if not 0 <= distance <= _FARTHEST:
            raise UsageError(f"label {label}: {distance} instructions away, wanted 0 to {_FARTHEST}")
        return distance


def build_filter(arch: Architecture, reserved: range) -> bytes:
    """The filter for one architecture.

    Calls of other architectures and of x32 see the real system. io_uring_setup ends with ENOSYS: opens
    through a ring would pass the filter by.

    Args:
        arch: whose calls to notify.
        reserved: the descriptors that the supervisor hands out.

    Returns:
        Instructions for SECCOMP_SET_MODE_FILTER, 8 bytes each.
    """
    program = Program()
    program.load(_ARCH)
    program.equal(arch.audit, None, "allow")
    program.load(_NR)
    if arch.x32_bit is not None:
        program.at_least(arch.x32_bit, "allow")
    _select(program, arch)
    program.verdict(ALLOW)

    program.label("statx")
    program.load(argument(2))
    program.any_bit(AT_EMPTY_PATH, "empty path", "notify")
    program.label("newfstatat")
    program.load(argument(3))
    program.any_bit(AT_EMPTY_PATH, "empty path", "notify")
    # the flag only permits an empty path: with the current directory a path can still follow
    program.label("empty path")
    program.load(argument(0))
    program.equal(AT_FDCWD, "notify", "range")

    program.label("ioctl")
    program.load(argument(1))
    for command in (SNP_GET_REPORT, SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT):
        program.equal(command, "notify")
    program.jump("descriptor")
    program.label("mmap")
    program.load(argument(4))
    program.jump("range")
    program.label("epoll_ctl")
    program.load(argument(2))
    program.jump("range")
    program.label("descriptor")
    program.load(argument(0))
    program.label("range")
    program.at_least(reserved.start, None, "allow")
    program.at_least(reserved.stop, "allow", "notify")

    program.label("allow")
    program.verdict(ALLOW)
    program.label("no such call")
    program.verdict(refuse(errno.ENOSYS))
    program.label("notify")
    program.verdict(NOTIFY)
    return program.build()


def _select(program: Program, arch: Architecture) -> None:
    """Branch by the call's number, which is loaded."""
    targets = dict.fromkeys(DESCRIPTOR_CALLS, "descriptor")
    targets |= {
        "mmap": "mmap",
        "epoll_ctl": "epoll_ctl",
        "ioctl": "ioctl",
        "newfstatat": "newfstatat",
        "statx": "statx",
    }
    targets |= dict.fromkeys((*PATH_CALLS, *EXEC_CALLS), "notify")
    targets |= dict.fromkeys(DUPLICATING_CALLS, "descriptor")
    targets["io_uring_setup"] = "no such call"
    for name, target in targets.items():
        if name in arch.calls:
            program.equal(arch.calls[name], target)
