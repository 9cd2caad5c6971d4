"""Whole machines: several VMs and threads, certificates per VM, locks, refusals that cross every party."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from swsnp import Machine, Product, UsageError
from swsnp.abi.ghcb import MsrCode
from swsnp.abi.sev_guest import SnpDerivedKeyReq
from swsnp.abi.snp_command import Command, FirmwareStatus
from swsnp.abi.snp_report import AttestationReport, SigningKey
from swsnp.certs.ofd_lock import try_lock, unlock_and_close
from swsnp.hardware.time_slices import TimeSlices
from swsnp.machine import GuestStopped, IoctlFailed
from swsnp.trace import CertsRead, CertsWanted, FirmwareCommand, GuestReplied, TraceEvent
from swsnp.verify import Roots, verify
from swsnp.vmm.certs import BlobFile, exclusive_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

NONCE = b"nonce".ljust(64, b"\0")
PROFILES = ("coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2")


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("product", list(Product))
def test_report_under_every_profile_and_product(profile: str, product: Product) -> None:
    """One request end to end: report data, marker, chip, launch measurement and version of the product."""
    machine = Machine(product=product, profile=profile, seed=b"x")
    with machine.create_vm(certs=None) as vm:
        vm.boot()
        answer = vm.report(NONCE)
    report = AttestationReport.parse(answer.report)
    assert answer.status == 0
    assert report.report_data == NONCE
    assert report.chip_id == machine.chip.chip_id
    assert report.chip_id[:4] == b"SWSN"
    assert report.measurement != bytes(48)
    assert report.signer_info.signing_key == SigningKey.VCEK
    assert report.policy == 0x30000


@pytest.mark.parametrize(("profile", "number"), [("coco-v1", 40), ("coco-v1-revised", 40), ("linux-7.2", 43)])
def test_the_exit_of_each_generation(profile: str, number: int) -> None:
    """The series leaves with exit 40 and a frame number, today's KVM with exit 43 and an address."""
    machine = Machine(profile=profile)
    events: list[TraceEvent] = []
    blob = b"certificates are opaque to the host" * 300
    with machine.create_vm(certs=blob) as vm:
        vm.boot()
        with machine.trace.listen(events.append):
            answer = vm.extended_report(NONCE)
        expected = vm.layout.certs_buffer >> (12 if number == 40 else 0)
    wanted = next(event for event in events if isinstance(event, CertsWanted))
    assert (wanted.exit_reason, wanted.address, wanted.npages) == (number, expected, 4)
    assert answer.certs == blob.ljust(0x4000, b"\0")


def test_no_certificate_exit_in_6_12() -> None:
    """Linux 6.12 asks nobody: the guest finds an empty table, whatever the VM was given."""
    machine = Machine(profile="linux-6.12")
    events: list[TraceEvent] = []
    with machine.create_vm(certs=b"never asked for") as vm:
        vm.boot()
        with machine.trace.listen(events.append):
            answer = vm.extended_report(NONCE)
    assert answer.status == 0
    assert answer.certs == bytes(0x4000)
    assert not [event for event in events if isinstance(event, CertsWanted | CertsRead)]


@pytest.mark.parametrize("profile", ["coco-v1", "linux-7.2"])
def test_too_small_then_large_enough(profile: str) -> None:
    """INVALID_LEN uses the message up as a plain request; the key survives, the next request is accepted."""
    machine = Machine(profile=profile)
    with machine.create_vm(certs=bytes(range(256)) * 33) as vm:  # 8,448 bytes: three pages
        vm.boot()
        for size in (0, 0x1000, 0x2000):
            with pytest.raises(IoctlFailed) as caught:
                vm.extended_report(NONCE, certs_size=size)
            assert (caught.value.errno, caught.value.exitinfo2) == (errno.EIO, 1 << 32)
        assert vm.extended_report(NONCE, certs_size=0x3000).certs[:8448] == bytes(range(256)) * 33
        assert vm.report(NONCE).status == 0


def test_each_vm_has_its_own_certificates(tmp_path: Path) -> None:
    """Reason 1 of the series: a blob belongs to a VM; a path, bytes and a callable, side by side."""
    machine = Machine()
    path = tmp_path / "a.blob"
    path.write_bytes(b"from a file")
    calls: list[int] = []

    def ask() -> bytes:
        calls.append(1)
        return b"call %d" % len(calls)

    with (
        machine.create_vm(certs=path) as a,
        machine.create_vm(certs=b"bytes") as b,
        machine.create_vm(certs=ask) as c,
    ):
        for vm in (a, b, c):
            vm.boot()
        found = [vm.extended_report(NONCE).certs.rstrip(b"\0") for vm in (a, b, c, c)]
    assert found == [b"from a file", b"bytes", b"call 1", b"call 2"]


def test_a_blob_that_changes_is_simply_served(tmp_path: Path) -> None:
    """Reason 2 of the series: another host's data after a move, read afresh for each request."""
    path = tmp_path / "certs.blob"
    path.write_bytes(b"source host")
    machine = Machine()
    with machine.create_vm(certs=path) as vm:
        vm.boot()
        assert vm.extended_report(NONCE).certs.startswith(b"source host\0")
        other = tmp_path / "new.blob"
        other.write_bytes(b"destination host")
        other.replace(path)
        assert vm.extended_report(NONCE).certs.startswith(b"destination host\0")


def test_certificates_and_key_change_together_under_the_lock(tmp_path: Path) -> None:
    """Reason 3 of the series: the blob's lock is held while the firmware signs; an updater has to wait."""
    path = tmp_path / "certs.blob"
    path.write_bytes(b"old certificates")
    machine = Machine()
    held: list[bool] = []

    def while_signing(event: TraceEvent) -> None:
        if isinstance(event, FirmwareCommand) and event.command == Command.SNP_GUEST_REQUEST:
            held.append(_writer_must_wait(path))

    with machine.create_vm(certs=path) as vm:
        vm.boot()
        with machine.trace.listen(while_signing):
            vm.extended_report(NONCE)
        assert held == [True]
        with exclusive_lock(path):
            path.write_bytes(b"new certificates")
        assert vm.extended_report(NONCE).certs.startswith(b"new certificates\0")


def _writer_must_wait(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR)
    locked = try_lock(fd, fcntl.F_WRLCK)
    unlock_and_close(fd)
    return not locked


def test_an_updater_in_the_way_is_waited_for_by_the_guest(tmp_path: Path) -> None:
    """A writer holds the lock: EAGAIN, the guest sees busy, waits 2 s, resends and succeeds."""
    path = tmp_path / "certs.blob"
    path.write_bytes(b"certificates")
    clock = FakeClock()
    machine = Machine(clock=clock)
    source = BlobFile(path, timeout_s=0.01, sleep=lambda _: None, monotonic=_ticks())
    replies: list[int] = []

    def note(event: TraceEvent) -> None:
        if isinstance(event, GuestReplied):
            replies.append(event.info2)
            updater.__exit__(None, None, None)

    updater = exclusive_lock(path)
    with machine.create_vm(certs=source) as vm:
        vm.boot()
        updater.__enter__()
        with machine.trace.listen(note):
            answer = vm.extended_report(NONCE)
    assert answer.certs.startswith(b"certificates\0")
    assert replies == [2 << 32, 0]
    assert clock.slept == [2.0]


def _ticks() -> Callable[[], float]:
    now = [0.0]

    def monotonic() -> float:
        now[0] += 0.005
        return now[0]

    return monotonic


def test_a_missing_blob_costs_the_guest_its_key(tmp_path: Path) -> None:
    """EIO from the VMM: the guest sees the generic error, wipes its key, and is silent from then on."""
    machine = Machine()
    with machine.create_vm(certs=tmp_path / "none") as vm:
        vm.boot()
        with pytest.raises(IoctlFailed) as caught:
            vm.extended_report(NONCE)
        assert (caught.value.errno, caught.value.exitinfo2) == (errno.EIO, 0xFFFFFFFF << 32)
        with pytest.raises(IoctlFailed) as again:
            vm.report(NONCE)
        assert again.value.errno == errno.ENOTTY
        assert vm.driver is not None
        assert not vm.driver.usable


def test_threads_on_vcpus_and_vms() -> None:
    """Four VMs of four vCPUs, sixteen threads: every request is answered with its own data, none is lost."""
    machine = Machine()
    vms = [machine.create_vm(certs=b"x", vcpus=4) for _ in range(4)]
    for vm in vms:
        vm.boot()

    def ask(number: int) -> bool:
        data = number.to_bytes(64, "little")
        vm = vms[number % 4]
        report = vm.extended_report(data).report if number % 3 else vm.report(data).report
        return AttestationReport.parse(report).report_data == data

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(160)))
    for vm in vms:
        vm.close()


def test_one_vms_lock_never_stalls_another() -> None:
    """A VM whose certificate source blocks holds up nobody else."""
    machine = Machine()
    entered, release = threading.Event(), threading.Event()

    def slow() -> bytes:
        entered.set()
        assert release.wait(30)
        return b"late"

    with machine.create_vm(certs=slow) as waiting, machine.create_vm(certs=b"quick") as other:
        waiting.boot()
        other.boot()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(waiting.extended_report, NONCE)
            assert entered.wait(30)
            assert other.extended_report(NONCE).certs.startswith(b"quick\0")
            assert not future.done()
            release.set()
            assert future.result(30).certs.startswith(b"late\0")


def test_one_processor_is_enough_for_all() -> None:
    """A vCPU has a processor while it runs: not in userspace, and not while it waits for its guest's mutex.

    One vCPU of the first VM is in userspace with the driver's mutex, the other waits for the mutex; there is
    one processor, and nobody is let in beside. The second VM attests meanwhile.
    """
    machine = Machine()
    machine.kernel.host_cpus = TimeSlices(1, patience_s=None)
    entered, release = threading.Event(), threading.Event()

    def slow() -> bytes:
        entered.set()
        assert release.wait(30)
        return b"late"

    with machine.create_vm(certs=slow, vcpus=2) as first, machine.create_vm(certs=b"quick") as second:
        first.boot()
        second.boot()
        with ThreadPoolExecutor(2) as pool:
            holder = pool.submit(first.extended_report, NONCE)
            assert entered.wait(30)
            waiter = pool.submit(first.extended_report, NONCE)
            assert second.extended_report(NONCE).certs.startswith(b"quick\0")
            assert not holder.done()
            assert not waiter.done()
            release.set()
            assert {each.result(30).certs[:5] for each in (holder, waiter)} == {b"late\0"}


def test_a_guest_that_waits_for_an_updater_takes_no_processor(tmp_path: Path) -> None:
    """The driver sleeps between two tries (guest.md 3.4): another VM may have its processor then."""
    path = tmp_path / "certs.blob"
    path.write_bytes(b"certificates")
    updater = exclusive_lock(path)
    free: list[int] = []

    class Clock(FakeClock):
        def sleep(self, seconds: float) -> None:
            free.append(len(cpus._places))
            updater.__exit__(None, None, None)
            super().sleep(seconds)

    machine = Machine(clock=Clock())
    machine.kernel.host_cpus = cpus = TimeSlices(1)
    source = BlobFile(path, timeout_s=0.01, sleep=lambda _: None, monotonic=_ticks())
    with machine.create_vm(certs=source) as vm:
        vm.boot()
        updater.__enter__()
        vm.extended_report(NONCE)
    assert free == [1]


def test_seeded_machines_repeat_each_other() -> None:
    """Equal seeds: ids, reports, signatures and derived keys are equal; another seed shares none."""

    def run(seed: bytes) -> tuple[bytes, ...]:
        machine = Machine(seed=seed)
        with machine.create_vm(certs=b"c") as vm:
            vm.boot()
            key = vm.derived_key(SnpDerivedKeyReq())
            return (
                machine.chip.chip_id,
                vm.extended_report(NONCE).report,
                vm.report(NONCE).report,
                key.derived_key,
            )

    first, again, other = run(b"a"), run(b"a"), run(b"b")
    assert first == again
    assert not set(first) & set(other)


def test_reports_are_authentic_under_the_machines_root_only(seeded_machine: Machine) -> None:
    """The verifier accepts with the machine's root given, and refuses under AMD's."""
    machine = seeded_machine
    with machine.create_vm("judged") as vm:
        vm.boot()
        answer = vm.extended_report(NONCE)
    own = Roots.of(machine.root_certificate)
    accepted = verify(answer.report, table=answer.certs, roots=own, at=machine.now(), report_data=NONCE)
    assert accepted.passed, [each for each in accepted.findings if each.outcome == "fail"]
    other = verify(answer.report, table=answer.certs, roots=own, at=machine.now(), report_data=bytes(64))
    assert not other.passed
    amd = verify(answer.report, table=answer.certs, roots=Roots.amd(), at=machine.now(), report_data=NONCE)
    assert not amd.authenticated
    assert [each.check for each in amd.findings if each.outcome == "fail"] == ["C5"]


@pytest.mark.parametrize(
    ("status", "errno_", "exitinfo2"),
    [(FirmwareStatus.INVALID_GUEST_STATE, errno.EIO, 2), (FirmwareStatus.AEAD_OFLOW, errno.EIO, 0x1D)],
)
def test_a_firmware_status_reaches_the_program(status: FirmwareStatus, errno_: int, exitinfo2: int) -> None:
    """A firmware error crosses KVM and GHCB unchanged and costs the guest its key."""
    machine = Machine()
    with machine.create_vm(certs=None) as vm:
        vm.boot()
        machine.mailbox.inject(Command.SNP_GUEST_REQUEST, status)
        with pytest.raises(IoctlFailed) as caught:
            vm.report(NONCE)
        assert (caught.value.errno, caught.value.exitinfo2) == (errno_, exitinfo2)


def test_firmware_errors_in_the_series() -> None:
    """The series hands a firmware error to the VMM; its replacement tells the guest, generically."""
    machine = Machine(profile="coco-v1")
    with machine.create_vm(certs=None) as vm:
        vm.boot()
        machine.mailbox.inject(Command.SNP_GUEST_REQUEST, FirmwareStatus.INVALID_PARAM)
        with pytest.raises(GuestStopped, match="EIO"):
            vm.report(NONCE)
        with pytest.raises(IoctlFailed) as cut_off:
            vm.report(NONCE)
        assert cut_off.value.errno == errno.ENOTTY
    revised = Machine(profile="coco-v1-revised")
    with revised.create_vm(certs=None) as vm:
        vm.boot()
        revised.mailbox.inject(Command.SNP_GUEST_REQUEST, FirmwareStatus.INVALID_PARAM)
        with pytest.raises(IoctlFailed) as caught:
            vm.report(NONCE)
        assert caught.value.exitinfo2 == 0x8000000000000016


def test_an_interrupted_request_lets_go_of_the_guest() -> None:
    """Whatever leaves the VMM (Ctrl-C, exit) cuts the exchange off: key wiped, nobody waits for ever."""
    machine = Machine()

    def leave() -> bytes:
        raise SystemExit(3)

    with machine.create_vm(certs=leave, vcpus=2) as vm:
        vm.boot()
        with pytest.raises(SystemExit):
            vm.extended_report(NONCE)
        for _ in range(2):
            with pytest.raises(IoctlFailed) as caught:
                vm.report(NONCE)
            assert caught.value.errno == errno.ENOTTY


def test_a_held_vcpu_is_a_stopped_guest() -> None:
    """A program that holds its vCPU (AP reset hold) gets no result, and the vCPU can be used again."""
    machine = Machine()

    def hold() -> Generator[None, None, None]:
        vm.vcpus[0].ghcb_msr = MsrCode.AP_RESET_HOLD_REQ
        yield

    def nothing() -> Generator[None, None, int]:
        yield from ()
        return 7

    with machine.create_vm(certs=None) as vm:
        vm.boot()
        with pytest.raises(GuestStopped):
            vm.execute(0, hold())
        assert vm.execute(0, nothing()) == 7


def test_usage() -> None:
    """What cannot be is refused by name: no boot, a taken name, too little memory, an unknown profile."""
    machine = Machine()
    with machine.create_vm("one", certs=None) as vm:
        with pytest.raises(UsageError, match="not booted"):
            vm.report(NONCE)
        with pytest.raises(UsageError, match="'one' is taken"):
            machine.create_vm("one")
    with machine.create_vm("one", certs=None):
        pass
    with pytest.raises(UsageError, match=r"memory size: got 0x.*wanted at least"):
        machine.create_vm(vcpus=200_000)
    with pytest.raises(UsageError, match="KVM profile"):
        Machine(profile="linux-9")
    with pytest.raises(UsageError, match="not this machine's"):
        machine.certificates_of(bytes(1184))
