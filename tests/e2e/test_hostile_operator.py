"""Every hostile operator against every KVM: documented ret and errno, the key's fate, nothing left open."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swsnp.machine import Machine
from swsnp.testing import (
    HOSTILE_OPERATOR,
    BlockingCertificates,
    FakeClock,
    OperatorCase,
    ask_report,
    play_operator,
    served,
)
from swsnp.trace import CertsRead, TraceEvent
from swsnp.vmm.certs import BlobFile, exclusive_lock

PROFILES = ("coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2")
RETS = {  # profile, what the program sees in the upper half of exitinfo2: ret of the exit
    "coco-v1": {None: 0, 1: 1, 0x8000_0000: 1 << 31},
    "linux-7.2": {None: 0, 1: 28, 2: 11, 0xFFFF_FFFF: 5},
}


def _open_files() -> int:
    gc.collect()  # what earlier tests left for the collector is not counted here
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("case", HOSTILE_OPERATOR, ids=str)
@pytest.mark.parametrize("profile", PROFILES)
def test_hostile_operator(case: OperatorCase, profile: str, tmp_path: Path) -> None:
    """What KVM's documentation asks of a VMM, and what Linux's driver makes of it; see `case.rule`."""
    machine = Machine(profile=profile, clock=FakeClock())
    before = _open_files()
    assert play_operator(case, machine, tmp_path) == case.expected[profile]
    assert _open_files() == before


@pytest.mark.parametrize("case", HOSTILE_OPERATOR, ids=str)
@pytest.mark.parametrize("profile", sorted(RETS))
def test_ret(case: OperatorCase, profile: str, tmp_path: Path) -> None:
    """`ret` of the exit: 0, ENOSPC, EAGAIN, EIO; in the series 0, 1, 1 << 31. The last one decides."""
    machine = Machine(profile=profile, clock=FakeClock())
    rets: list[int] = []

    def note(event: TraceEvent) -> None:
        if isinstance(event, CertsRead):
            rets.append(event.ret)

    with machine.trace.listen(note):
        saw = play_operator(case, machine, tmp_path)
    told = None if saw.exitinfo2 is None else saw.exitinfo2 >> 32
    assert rets[-1] == RETS[profile][told]
    assert len(rets) == (32 if told == 2 else 1)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_lock_is_dropped(profile: str, tmp_path: Path) -> None:
    """After a request that was served, and one that was too large, an updater gets the lock at once."""
    path = tmp_path / "certs.blob"
    machine = Machine(profile=profile)
    with machine.create_vm(certs=path) as vm:
        vm.boot()
        for content in (b"fits", b"c" * 20_000):
            path.write_bytes(content)
            ask_report(vm, certs_size=0x4000)
            with exclusive_lock(path, timeout_s=0):
                pass


def test_a_callable_that_blocks() -> None:
    """A callable that waits holds up its own request and nobody else's; released, it serves."""
    machine = Machine()
    certs = BlockingCertificates(b"late")
    with machine.create_vm(certs=certs) as vm, machine.create_vm(certs=b"quick") as other:
        vm.boot()
        other.boot()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(ask_report, vm, certs_size=0x1000)
            assert certs.entered.wait(30)
            assert ask_report(other, certs_size=0x1000) == served(b"quick", size=0x1000)
            assert not future.done()
            certs.release.set()
            assert future.result(30) == served(b"late", size=0x1000)


def test_a_callable_that_nobody_releases() -> None:
    """The time limit of the test's own callable is a failure as any other: generic, and the key is gone."""
    certs = BlockingCertificates(b"never", timeout_s=0)
    with Machine().create_vm(certs=certs) as vm:
        vm.boot()
        saw = ask_report(vm, certs_size=0x1000)
    assert (saw.result, saw.exitinfo2, saw.key_kept) == (-5, 0xFFFF_FFFF << 32, False)


def test_cases_name_their_path(tmp_path: Path) -> None:
    """A VMM of one's own gets the path: every case but the callables has one."""
    for number, case in enumerate(HOSTILE_OPERATOR):
        folder = tmp_path / str(number)
        folder.mkdir()
        with case.arrange(folder) as source:
            assert isinstance(source, BlobFile) != case.name.startswith("callable")


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    """Opening a FIFO that nobody writes to must not wait, whatever the time limit."""
    path = tmp_path / "certs.blob"
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool, Machine().create_vm(certs=path) as vm:
        vm.boot()
        assert pool.submit(ask_report, vm, certs_size=0x1000).result(30).result == -5
