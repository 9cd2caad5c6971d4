"""The tables of system calls against the kernel's own headers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from swsnp.front.wrap import bpf
from swsnp.front.wrap.arch import AARCH64, ARCHITECTURES, X86_64
from swsnp.front.wrap.calls import ON_DESCRIPTOR, ON_PATH

if TYPE_CHECKING:
    from tests.conftest import Skip

HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h")
GENERIC = Path("/usr/include/asm-generic/unistd.h")


def numbers(text: str) -> dict[str, int]:
    """Names and numbers; the generic header marks calls whose name depends on the word size."""
    found = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\s*$", text, re.MULTILINE)
    }
    return found | ({"newfstatat": found["fstatat"]} if "fstatat" in found else {})


def test_x86_64_numbers(cannot_run: Skip) -> None:
    """arch/x86/entry/syscalls/syscall_64.tbl, as installed in asm/unistd_64.h."""
    header = next((each for each in map(Path, HEADERS) if each.is_file()), None)
    if header is None:
        cannot_run("no asm/unistd_64.h", "install linux-libc-dev on x86-64", avoidable=False)
    real = numbers(header.read_text())
    assert X86_64.calls == {name: real[name] for name in X86_64.calls}


def test_aarch64_numbers(cannot_run: Skip) -> None:
    """include/uapi/asm-generic/unistd.h."""
    if not GENERIC.is_file():
        cannot_run("no asm-generic/unistd.h", "install linux-libc-dev")
    real = numbers(GENERIC.read_text())
    assert AARCH64.calls == {name: real[name] for name in AARCH64.calls}


def test_every_architecture_covers_the_same_ground() -> None:
    """aarch64 lacks dup2 and the calls of x86-64 whose path always starts at the working directory."""
    missing = set(X86_64.calls) - set(AARCH64.calls)
    from_here = {"open", "stat", "lstat", "access", "mkdir", "rmdir", "creat", "unlink", "readlink"}
    assert missing == from_here | {"dup2"}
    assert set(AARCH64.calls) < set(X86_64.calls)
    assert set(ARCHITECTURES) == {"x86_64", "aarch64"}


def test_whatever_is_notified_has_a_handler() -> None:
    """A notified call that nobody answers would hang the program."""
    notified = {*bpf.PATH_CALLS, "newfstatat", "statx"}
    assert notified == set(ON_PATH)
    on_descriptor = {*bpf.DESCRIPTOR_CALLS, *bpf.DUPLICATING_CALLS, "mmap", "epoll_ctl"}
    assert {*on_descriptor, "newfstatat", "statx"} == set(ON_DESCRIPTOR)
    known = {*notified, *on_descriptor, *bpf.EXEC_CALLS, "ioctl", "io_uring_setup", "seccomp"}
    assert set(X86_64.calls) == known
