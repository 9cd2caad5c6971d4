"""Starting a program under a filter, and saying why that is not possible."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from swsnp.errors import HostError, UsageError
from swsnp.front import wrap
from swsnp.front.wrap import doctor, seccomp
from swsnp.front.wrap.arch import X86_64, this_architecture
from swsnp.front.wrap.bpf import build_filter
from swsnp.front.wrap.launch import candidates, fork_under_filter, reserved_descriptors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from tests.conftest import Skip

    from swsnp.guest.caller import CallerMemory


class NoDevice:
    """A device that nobody asks."""

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        raise NotImplementedError


@pytest.fixture
def usable(cannot_run: Skip) -> None:
    verdict = doctor.examine()
    if not verdict.usable:
        cannot_run(verdict.reason, verdict.remedy, avoidable=False)


@pytest.mark.parametrize(
    ("soft_limit", "numbers"),
    [
        (1024, range(960, 1024)),
        (1_048_576, range(960, 1024)),
        (-1, range(960, 1024)),
        (1023, range(959, 1023)),
        (512, range(448, 512)),
        (256, range(224, 256)),
        (16, range(14, 16)),
        (4, range(3, 4)),
    ],
)
def test_reserved_descriptors(soft_limit: int, numbers: range) -> None:
    """Below RLIMIT_NOFILE, which a descriptor's number must not reach, and below select's 1024."""
    assert reserved_descriptors(soft_limit) == numbers


@pytest.mark.parametrize(
    ("program", "path", "paths"),
    [
        ("prog", "/a:/b", ("/a/prog", "/b/prog")),
        ("./prog", "/a:/b", ("./prog",)),
        ("/x/prog", "/a", ("/x/prog",)),
        ("prog", "/a::", ("/a/prog", "./prog", "./prog")),
        ("prog", None, ("/bin/prog", "/usr/bin/prog")),
    ],
)
def test_candidates(program: str, path: str | None, paths: tuple[str, ...]) -> None:
    """execvp(3): a slash means no search; an empty entry is the working directory."""
    assert candidates(program, {} if path is None else {"PATH": path}) == paths


def test_no_program() -> None:
    """An empty command line is a mistake of the caller."""
    with pytest.raises(UsageError, match="got no program"):
        wrap.run([], NoDevice())


def test_only_the_main_thread_may_run_programs() -> None:
    """signal(7): Python delivers signals to the main thread."""
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            wrap.run(["true"], NoDevice())
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "wanted the main thread" in str(caught[0])


def children() -> set[int]:
    """The children of this process, ended ones included; tests before may have left some that live on."""
    mine = f"PPid:\t{os.getpid()}\n"
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has gone meanwhile
            if mine in status.read_text():
                found.add(int(status.parent.name))
    return found


@pytest.fixture
def no_child_left() -> Iterator[None]:
    """What was forked is reaped."""
    before = children()
    yield
    assert not children() - before


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EBUSY, "a listener already"),
        (errno.EINVAL, "no seccomp user notification; remedy: use Linux 5.9"),
        (errno.ENOSYS, "CONFIG_SECCOMP_FILTER"),
        (errno.EPERM, "a container profile that permits seccomp"),
        (errno.EACCES, "a container profile that permits seccomp"),
        (errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_every_refusal_of_the_kernel_is_explained(code: int, text: str) -> None:
    """seccomp(2), ERRORS; gVisor answers EINVAL."""
    refusal = str(seccomp.explain(code))
    assert text in refusal
    assert "; remedy: " in refusal


@pytest.mark.usefixtures("usable", "no_child_left")
def test_a_filter_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child reports the errno and is reaped."""
    arch = this_architecture() or X86_64
    with pytest.raises(HostError, match="no seccomp user notification"):
        fork_under_filter(arch, struct.pack("<HBBI", 0x20, 0, 0, 0), killable=False, act=_never)


@pytest.mark.usefixtures("usable", "no_child_left")
def test_memory_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux, Documentation/admin-guide/LSM/Yama.rst: scope 2 and 3 refuse it; the child does not survive."""
    arch = this_architecture() or X86_64
    real = os.open

    def refused(path: str, flags: int) -> int:
        if path.endswith("/mem"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(path, flags)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(HostError, match=r"Operation not permitted.*kernel\.yama\.ptrace_scope"):
        fork_under_filter(arch, build_filter(arch, range(960, 1024)), killable=False, act=_wait)


def _never() -> NoReturn:
    os._exit(1)


def _wait() -> NoReturn:
    os.open("/", os.O_RDONLY)  # waits for an answer that nobody gives
    os._exit(1)


@pytest.mark.usefixtures("usable", "no_child_left")
def test_examine_says_what_the_kernel_has() -> None:
    """The trial leaves nothing behind."""
    verdict = doctor.examine()
    assert verdict.backend == "seccomp"
    assert verdict.usable
    assert verdict.features is not None
    assert verdict.features.listener
    assert verdict.features.notif_size >= 80
    doctor.require()


@pytest.mark.parametrize(
    ("platform", "machine", "text"),
    [
        ("darwin", "arm64", "this is darwin; remedy: use Linux"),
        ("linux", "riscv64", "this is riscv64 with 64-bit Python"),
    ],
)
def test_examine_on_other_systems(
    monkeypatch: pytest.MonkeyPatch, platform: str, machine: str, text: str
) -> None:
    """Reason and remedy instead of an exception."""
    uname = os.uname()
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*uname[:4], machine)))
    verdict = doctor.examine()
    assert not verdict.usable
    assert f"{verdict.reason}; remedy: {verdict.remedy}".startswith(text)
    with pytest.raises(HostError, match=text):
        doctor.require()


def test_kernel_without_user_notification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.0 SECCOMP_GET_ACTION_AVAIL refuses the action; gVisor refuses the flag with EINVAL."""

    class Kernel:
        def __init__(self, refusing: int) -> None:
            self.refusing = refusing

        def syscall(self, number: int, operation: int, flags: int, address: int) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1 if operation == self.refusing else 0

    if this_architecture() is None:
        pytest.skip("no table for this architecture; remedy: run on x86-64 or aarch64")
    for refusing in (1, 2, 3):
        monkeypatch.setattr(seccomp, "_libc", Kernel(refusing))
        assert seccomp.probe(X86_64) == seccomp.Features(listener=False, killable=False)
        verdict = doctor.examine()
        assert not verdict.usable
        assert "user notification" in verdict.reason
        with pytest.raises(HostError, match="user notification"):
            wrap.run(["true"], NoDevice())
