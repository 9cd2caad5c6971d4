"""The filter, executed by a second implementation of classic BPF, against the rules written out plainly."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.errors import UsageError
from swsnp.front.wrap.arch import AARCH64, X86_64, Architecture
from swsnp.front.wrap.bpf import ALLOW, NOTIFY, Program, build_filter, refuse

RESERVED = range(960, 1024)
ENOSYS = 0x0005_0000 | 38
SNP_REQUESTS = (0xC020_5300, 0xC020_5301, 0xC020_5302)
I386 = 0x4000_0003
FDCWD = 0xFFFF_FF9C
EMPTY_PATH = 0x1000

PATHS = {
    *(
        "open",
        "openat",
        "openat2",
        "creat",
        "stat",
        "lstat",
        "access",
        "faccessat",
        "faccessat2",
        "mkdir",
        "mkdirat",
    ),
    *("rmdir", "unlink", "unlinkat", "readlink", "readlinkat", "chdir", "getxattr", "lgetxattr", "listxattr"),
    *("llistxattr", "execve", "execveat"),
}
DESCRIPTORS = {
    **dict.fromkeys(("read", "write", "lseek", "pread64", "pwrite64", "readv", "writev", "fstat"), 0),
    **dict.fromkeys(("dup", "dup2", "dup3", "fcntl"), 0),
    "mmap": 4,
    "epoll_ctl": 2,
}
"""And which argument the descriptor is."""


def execute(program: bytes, data: bytes) -> int:
    """Run a filter over `struct seccomp_data`, as linux/filter.h describes the instructions."""
    code = list(struct.iter_unpack("<HBBI", program))
    at, word = 0, 0
    while True:
        operation, then, otherwise, value = code[at]
        at += 1
        if operation == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            word = struct.unpack_from("<I", data, value)[0]
        elif operation == 0x05:  # BPF_JMP | BPF_JA
            at += value
        elif operation == 0x06:  # BPF_RET | BPF_K
            return int(value)
        else:
            holds = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[operation]
            at += then if holds else otherwise


def seccomp_data(nr: int, audit: int, args: tuple[int, ...]) -> bytes:
    return struct.pack("<IIQ6Q", nr, audit, 0x7F00_0000_1234, *args)


def expected(arch: Architecture, nr: int, audit: int, args: tuple[int, ...]) -> int:
    """The rules one after the other."""
    if audit != arch.audit or (arch is X86_64 and nr >= 0x4000_0000):
        return ALLOW
    name = {number: name for name, number in arch.calls.items()}.get(nr)
    low = [each & 0xFFFF_FFFF for each in args]
    reserved = low[0] in RESERVED
    if name == "io_uring_setup":
        return ENOSYS
    if name in PATHS:
        return NOTIFY
    if name == "ioctl":
        return NOTIFY if reserved or low[1] in SNP_REQUESTS else ALLOW
    if name in DESCRIPTORS:
        return NOTIFY if low[DESCRIPTORS[name]] in RESERVED else ALLOW
    if name in ("newfstatat", "statx"):
        flags = low[3 if name == "newfstatat" else 2]
        return NOTIFY if not flags & EMPTY_PATH or low[0] == FDCWD or reserved else ALLOW
    return ALLOW


FILTERS = {arch.machine: build_filter(arch, RESERVED) for arch in (X86_64, AARCH64)}
WORDS = st.one_of(
    st.sampled_from([0, 1, 959, 960, 1000, 1023, 1024, FDCWD, EMPTY_PATH, 0x1100, 0x100, *SNP_REQUESTS]),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from(SNP_REQUESTS).map(lambda each: each | 0xFFFF_FFFF_0000_0000),
    st.integers(900, 1100).map(lambda each: each | 0xABCD_0000_0000),
)


@pytest.mark.parametrize("arch", [X86_64, AARCH64], ids=lambda arch: arch.machine)
def test_every_known_call_gets_the_expected_verdict(arch: Architecture) -> None:
    """Every number from 0 to 511, with descriptors inside and outside of the reserved range."""
    for nr in range(512):
        for descriptor in (3, 959, 960, 1023, 1024, FDCWD):
            for second in (0, EMPTY_PATH, 0x5401, *SNP_REQUESTS):
                for args in (
                    (descriptor, second, second, second, 0, 0),
                    (3, second, descriptor, second, descriptor, 0),
                ):
                    got = execute(FILTERS[arch.machine], seccomp_data(nr, arch.audit, args))
                    assert got == expected(arch, nr, arch.audit, args), (nr, args)


@settings(max_examples=400, derandomize=True)
@given(
    arch=st.sampled_from([X86_64, AARCH64]),
    nr=st.one_of(st.sampled_from(sorted(X86_64.calls.values())), st.integers(0, (1 << 32) - 1)),
    audit=st.sampled_from([X86_64.audit, AARCH64.audit, I386]),
    args=st.tuples(WORDS, WORDS, WORDS, WORDS, WORDS, WORDS),
)
def test_any_call_gets_the_expected_verdict(
    arch: Architecture, nr: int, audit: int, args: tuple[int, ...]
) -> None:
    """Only the low half of an argument counts; other architectures and x32 see the real system."""
    got = execute(FILTERS[arch.machine], seccomp_data(nr, audit, args))
    assert got == expected(arch, nr, audit, args)


def test_the_filter_is_small() -> None:
    """Linux (BPF_MAXINSNS): at most 4096 instructions; ours run on every read and write."""
    assert all(len(each) // 8 <= 70 for each in FILTERS.values())


def test_jump_to_a_label_that_is_not_defined_is_refused() -> None:
    """A misspelt label shall fail when the program is built."""
    program = Program()
    program.equal(1, "nowhere")
    with pytest.raises(UsageError, match="nowhere: not defined"):
        program.build()


def test_jump_backwards_is_refused() -> None:
    """linux/filter.h: offsets are unsigned, so jumps go forward only."""
    program = Program()
    program.label("start")
    program.load(0)
    program.jump("start")
    with pytest.raises(UsageError, match="-2 instructions away"):
        program.build()


@pytest.mark.parametrize(("between", "reaches"), [(255, True), (256, False)])
def test_jump_farther_than_eight_bits_is_refused(between: int, reaches: bool) -> None:
    """linux/filter.h: jt and jf are one byte each."""
    program = Program()
    program.equal(1, "far")
    for _ in range(between):
        program.load(0)
    program.label("far")
    program.verdict(refuse(1))
    if reaches:
        assert program.build()[:8] == struct.pack("<HBBI", 0x15, 255, 0, 1)
    else:
        with pytest.raises(UsageError, match="256 instructions away, wanted 0 to 255"):
            program.build()


def test_label_defined_twice_is_refused() -> None:
    """Two places for one label would make jumps ambiguous."""
    program = Program()
    program.label("here")
    with pytest.raises(UsageError, match="here: defined twice"):
        program.label("here")
