"""A VM saved on one machine and restored on another: what goes along, what stays, and what is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp import Machine, Product, UsageError
from swsnp.abi.ghcb import PAGE
from swsnp.abi.sev_guest import SnpDerivedKeyReq
from swsnp.abi.snp_report import AttestationReport
from swsnp.firmware.settings import ApiVersion, preset
from swsnp.guest.driver import K_A, K_C
from swsnp.hardware.exits import GuestAccessFault
from swsnp.machine import GuestMoved, IoctlFailed
from swsnp.trace import CertsRead, GuestReplied, MessageSealed, TraceEvent
from swsnp.verify import Roots, verify
from swsnp.vmm.certs import BlobFile, exclusive_lock
from swsnp.vmm.launch import LaunchError
from swsnp.vmm.ram import Converted

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from swsnp import VirtualMachine
    from swsnp.machine import SavedVm

NONCE = b"nonce".ljust(64, b"\0")
PROFILES = ("coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2")
GUEST_PAGE = 0x30_0000
"""A page that the built-in guest does not use."""


def booted(machine: Machine, **options: Any) -> VirtualMachine:
    vm = machine.create_vm("g", **options)
    vm.boot()
    return vm


def attested(vm: VirtualMachine, nonce: bytes = NONCE) -> AttestationReport:
    report = AttestationReport.parse(vm.report(nonce).report)
    assert report.report_data == nonce
    return report


# Refusals


def test_a_vm_that_is_not_booted_is_not_saved() -> None:
    """There is no guest yet that could go on."""
    with Machine().create_vm(certs=None) as vm, pytest.raises(UsageError, match="not booted"):
        vm.save()


def test_a_guest_runs_once() -> None:
    """A guest restored twice would seal two messages under one key and one number (AMD 56860, MSG_SEQNO)."""
    source, destination = Machine(), Machine()
    vm = booted(source, certs=None)
    saved = vm.save()
    with pytest.raises(UsageError, match="saved already"):
        vm.save()
    with destination.restore_vm(saved, certs=None) as moved:
        assert attested(moved)
        for machine in (source, destination):
            with pytest.raises(UsageError, match="restored before"):
                machine.restore_vm(saved, name="again", certs=None)
    assert saved.restored


def test_what_left_answers_no_more() -> None:
    """A program that asks where the guest was is told so; nothing is sealed there."""
    machine = Machine()
    vm = booted(machine, certs=None, vcpus=2)
    vm.save()
    sealed: list[TraceEvent] = []
    with machine.trace.listen(sealed.append):
        for _ in range(3):
            with pytest.raises(GuestMoved, match="g: the guest was saved"):
                vm.report(NONCE)
    assert sealed == []
    vm.close()


def test_another_product_line() -> None:
    """TCB_VERSION has another form there (AMD 56860): refused by name, and the saved VM is not used up."""
    saved = booted(Machine(), certs=None).save()
    with pytest.raises(UsageError, match="got one of Milan, wanted Turin"):
        Machine(product=Product.TURIN).restore_vm(saved)
    assert not saved.restored


def test_a_refused_restore_can_be_tried_elsewhere() -> None:
    """A name that is taken, or firmware below the policy's ABI version: nothing is left behind or lost."""
    old = ApiVersion(major=1, minor=51, build=1)
    older = Machine(settings=replace(preset(Product.MILAN), current_version=old, committed_version=old))
    destination = Machine()
    saved = booted(Machine(), certs=None, policy=0x30000 | 1 << 8 | 55).save()
    with destination.create_vm("g", certs=None), pytest.raises(UsageError, match="'g' is taken"):
        destination.restore_vm(saved, certs=None)
    with pytest.raises(LaunchError, match="SNP_LAUNCH_START.*POLICY_FAILURE"):
        older.restore_vm(saved, certs=None)
    assert not saved.restored
    assert older.mailbox.platform.guests == {}
    with destination.restore_vm(saved, certs=None) as moved:
        assert attested(moved).policy == 0x30137


def test_a_guest_without_its_key_is_not_moved(tmp_path: Path) -> None:
    """A wiped VMPCK cannot come back; the VM stays as it is."""
    machine = Machine()
    vm = booted(machine, certs=tmp_path / "none")
    with pytest.raises(IoctlFailed):
        vm.extended_report(NONCE)
    with pytest.raises(UsageError, match="message key is wiped"):
        vm.save()
    with pytest.raises(IoctlFailed, match="ENOTTY"):
        vm.report(NONCE)
    vm.close()


def test_a_host_that_does_not_take_the_context() -> None:
    """A context of another form is refused by the firmware, and what was launched for it is gone again."""
    machine = Machine()
    saved = booted(machine, certs=None).save()
    saved.context = saved.context[:-1]
    with pytest.raises(ValueError, match="got 831"):
        machine.restore_vm(saved, certs=None)
    assert machine.mailbox.platform.guests == {}
    with machine.create_vm("g", certs=None) as vm:
        vm.boot()


# Requests around the move


class Slow:
    """A source of certificates that tells when it is asked, and answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.release = threading.Event(), threading.Event()

    def __call__(self) -> bytes:
        self.asked.set()
        assert self.release.wait(30)
        return b"source"


def test_a_pending_certificate_exit_is_completed_first() -> None:
    """Completion state is not visible to userspace and is lost with the VM, so the save waits for it."""
    source, destination, slow = Machine(), Machine(), Slow()
    vm = booted(source, certs=slow, vcpus=2)
    with ThreadPoolExecutor(2) as pool:
        request = pool.submit(vm.extended_report, NONCE)
        assert slow.asked.wait(30)
        save = pool.submit(vm.save)
        assert not save.done()
        slow.release.set()
        answer, saved = request.result(30), save.result(30)
    assert answer.certs.startswith(b"source\0")
    assert AttestationReport.parse(answer.report).chip_id == source.chip.chip_id
    with destination.restore_vm(saved, certs=b"destination") as moved:
        assert moved.extended_report(NONCE).certs.startswith(b"destination\0")


def test_a_guest_that_is_told_to_come_back_comes_back_first(tmp_path: Path) -> None:
    """An updater has the source's blob: the guest retries there, is answered there, and moves then."""
    path = tmp_path / "certs.blob"
    path.write_bytes(b"source")
    paused, go_on = threading.Event(), threading.Event()

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds
            paused.set()
            assert go_on.wait(30)

    source, destination = Machine(clock=Clock()), Machine()
    blob = BlobFile(path, timeout_s=0, sleep=lambda _: None, monotonic=lambda: 0.0)
    vm = booted(source, certs=blob)
    replies: list[int] = []

    def note(event: TraceEvent) -> None:
        if isinstance(event, GuestReplied):
            replies.append(event.info2)

    with source.trace.listen(note), ThreadPoolExecutor(2) as pool:
        with exclusive_lock(path):
            request = pool.submit(vm.extended_report, NONCE)
            assert paused.wait(30)
            save = pool.submit(vm.save)
        go_on.set()
        assert request.result(30).certs.startswith(b"source\0")
        saved = save.result(30)
    assert replies == [2 << 32, 0]
    with destination.restore_vm(saved, certs=None) as moved:
        assert attested(moved)


def test_requests_that_wait_for_a_vcpu_are_not_begun() -> None:
    """One vCPU is busy when the save begins: whoever queues behind it retries at the destination."""
    source, destination, slow = Machine(), Machine(), Slow()
    vm = booted(source, certs=slow)
    moved: list[VirtualMachine] = []
    there = threading.Event()

    def program(number: int) -> bytes:
        nonce = number.to_bytes(64, "little")
        try:
            return vm.extended_report(nonce).certs[:11]
        except GuestMoved:
            assert there.wait(30)
            return moved[0].extended_report(nonce).certs[:11]

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(program, 0)
        assert slow.asked.wait(30)
        save = pool.submit(vm.save)
        others = [pool.submit(program, number) for number in range(1, 6)]
        slow.release.set()
        moved.append(destination.restore_vm(save.result(30), certs=b"destination"))
        there.set()
        answers = [each.result(30) for each in (first, *others)]
    assert answers[0] == b"source\0\0\0\0\0"
    assert set(answers) <= {b"source\0\0\0\0\0", b"destination"}
    assert moved[0].extended_report(NONCE).certs.startswith(b"destination\0")
    moved[0].close()


# What goes along, and what does not


@pytest.mark.parametrize("destination_profile", PROFILES)
@pytest.mark.parametrize("source_profile", PROFILES)
def test_between_every_two_kernels(source_profile: str, destination_profile: str) -> None:
    """The certificate exit, or its absence, is the host's business: the guest attests through whichever."""
    source, destination = Machine(profile=source_profile), Machine(profile=destination_profile)
    vm = booted(source, certs=b"source", vcpus=3)
    before = AttestationReport.parse(vm.extended_report(NONCE).report)
    reads: list[str] = []

    def note(event: TraceEvent) -> None:
        if isinstance(event, CertsRead):
            reads.append(event.vm)

    with (
        source.trace.listen(note),
        destination.trace.listen(note),
        destination.restore_vm(vm.save(), name="moved", certs=b"destination") as moved,
    ):
        answer = moved.extended_report(NONCE)
    after = AttestationReport.parse(answer.report)
    served = b"" if destination_profile == "linux-6.12" else b"destination"
    assert answer.certs == served.ljust(0x4000, b"\0")
    assert reads == (["moved"] if served else [])
    assert (before.chip_id, after.chip_id) == (source.chip.chip_id, destination.chip.chip_id)
    same = ("measurement", "report_id", "policy", "host_data", "launch_tcb", "report_data", "vmpl")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]


def test_table_and_report_belong_to_the_destination(seeded_machine: Machine) -> None:
    """The guest's evidence is the destination's alone: the source's table does not fit its report."""
    source, destination = seeded_machine, Machine(seed=b"other", same_root_as=seeded_machine)
    roots = Roots.of(seeded_machine.root_certificate)
    assert destination.root_certificate == seeded_machine.root_certificate
    vm = source.create_vm("leaves")
    vm.boot()
    assert vm.extended_report(NONCE).certs.startswith(source.certificate_table())
    with destination.restore_vm(vm.save()) as moved:
        answer = moved.extended_report(NONCE)

    def failed(table: bytes) -> list[str]:
        verdict = verify(answer.report, table=table, roots=roots, at=destination.now(), report_data=NONCE)
        return [each.check for each in verdict.failures]

    assert answer.certs.startswith(destination.certificate_table())
    assert failed(answer.certs) == []
    assert failed(source.certificate_table()) == ["R1", "R3"]


def test_message_numbers_go_on() -> None:
    """The guest's counter is in its secrets page, the firmware's in the context: both move with the VM."""
    seqnos: list[int] = []

    def note(event: TraceEvent) -> None:
        if isinstance(event, MessageSealed):
            seqnos.append(event.seqno)

    hosts = [Machine() for _ in range(3)]
    vm = booted(hosts[0], certs=None)
    for host, after in zip(hosts, (*hosts[1:], hosts[0]), strict=True):
        with host.trace.listen(note):
            vm.report(NONCE)
            vm.derived_key(SnpDerivedKeyReq())
        vm = after.restore_vm(vm.save(), certs=None)
    with hosts[0].trace.listen(note):
        vm.report(NONCE)
    vm.close()
    assert seqnos == list(range(1, 15))
    assert [host.mailbox.platform.guests for host in hosts] == [{}, {}, {}]
    assert [host.kernel.driver.leaked for host in hosts] == [[], [], []]


def test_the_guest_keeps_its_driver() -> None:
    """Generation and vmpck_id are the guest kernel's; the destination's default does not replace them."""
    source, destination = Machine(generation=K_A), Machine(generation=K_C)
    vm = source.create_vm("g", certs=None, vmpck_id=2)
    vm.boot()
    used: list[int] = []

    def note(event: TraceEvent) -> None:
        if isinstance(event, MessageSealed):
            used.append(event.vmpck)

    saved = vm.save()
    assert saved.generation is K_A
    with destination.restore_vm(saved, certs=None) as moved, destination.trace.listen(note):
        assert moved.driver is not None
        assert moved.driver.vmpck_id == 2
        moved.report(NONCE, vmpl=2)
    assert used == [2, 2]


def test_keys_of_the_guest_move_and_keys_of_the_chip_do_not() -> None:
    """AMD 56860, MSG_KEY_REQ: a key from the VMRK is the guest's, one from the VCEK is bound to the chip."""
    vmrk, vcek = SnpDerivedKeyReq(root_key_select=1), SnpDerivedKeyReq(root_key_select=0)
    vm = booted(Machine(), certs=None)
    before = [vm.derived_key(each).derived_key for each in (vmrk, vcek)]
    with Machine().restore_vm(vm.save(), certs=None) as moved:
        after = [moved.derived_key(each).derived_key for each in (vmrk, vcek)]
    assert after[0] == before[0] != bytes(32)
    assert after[1] != before[1]


def test_every_vcpu_goes_on() -> None:
    """Four vCPUs, four threads: each registered its own GHCB with the new host."""
    vm = booted(Machine(), certs=b"s", vcpus=4)
    with Machine().restore_vm(vm.save(), certs=b"d") as moved, ThreadPoolExecutor(8) as pool:
        nonces = [number.to_bytes(64, "little") for number in range(40)]
        answers = list(pool.map(moved.extended_report, nonces))
        assert sorted(moved.vcpus) == [0, 1, 2, 3]
        for vcpu in moved.vcpus:
            assert moved.execute(vcpu, ask_on_this_vcpu(moved, vcpu)) == 0
    assert [AttestationReport.parse(each.report).report_data for each in answers] == nonces


def ask_on_this_vcpu(vm: VirtualMachine, vcpu: int) -> Generator[None, None, int]:
    assert vm.driver is not None
    ghcb = vm._guest.ghcb_of(vm.vcpus[vcpu])
    assert ghcb is not None
    ghcb.ask(0x8000_FFFD, 0, 0)  # hypervisor features
    yield
    info1, info2 = ghcb.reply()
    assert info2 & 1
    return info1


def test_both_planes_of_memory() -> None:
    """Private pages that the guest accepted and shared pages that it wrote come along; nothing else does."""
    vm = booted(Machine(), certs=None)
    vm.execute(0, fill(vm, GUEST_PAGE))
    saved = vm.save()
    assert sorted(set(saved.memory.private) - image_of(saved)) == [GUEST_PAGE]
    with Machine().restore_vm(saved, certs=None) as moved:
        private, certs, fault = moved.execute(0, look(moved, GUEST_PAGE))
    assert private == b"private".ljust(PAGE, b"\1")
    assert certs == b"shared"
    assert isinstance(fault, GuestAccessFault)


def test_pages_that_the_guest_shares() -> None:
    """They are shared at the destination, also if the guest left them validated and the host their bytes."""
    vm = booted(Machine(), certs=None)
    pages = [GUEST_PAGE + number * PAGE for number in range(3)]
    for page in pages:
        vm.execute(0, fill(vm, page))
    for page in pages:  # in a row: the VMM throws the private sides away together, later
        assert vm._running.convert(page, 1, private=False) == Converted()
    saved = vm.save()
    assert set(saved.memory.private) == image_of(saved)
    with Machine().restore_vm(saved, certs=None) as moved:
        assert [moved.execute(0, first_byte(moved, page)) for page in pages] == [b"\0"] * 3


def first_byte(vm: VirtualMachine, gpa: int) -> Generator[None, None, bytes]:
    yield from ()
    return vm.vcpus[0].memory.read(gpa, 1, private=False)


def fill(vm: VirtualMachine, gpa: int) -> Generator[None, None, None]:
    memory = vm.vcpus[0].memory
    memory.pvalidate(gpa, validate=True)
    memory.write(gpa, b"private".ljust(PAGE, b"\1"), private=True)
    memory.write(vm.layout.certs_buffer + PAGE, b"shared", private=False)
    yield from ()


def look(vm: VirtualMachine, gpa: int) -> Generator[None, None, tuple[bytes, bytes, Exception | None]]:
    memory = vm.vcpus[0].memory
    fault: Exception | None = None
    private = memory.read(gpa, PAGE, private=True)
    shared = memory.read(vm.layout.certs_buffer + PAGE, 6, private=False)
    try:
        memory.read(gpa + PAGE, 1, private=True)
    except GuestAccessFault as caught:
        fault = caught
    yield from ()
    return private, shared, fault


def image_of(saved: SavedVm) -> set[int]:
    first = 0x10_0000
    return {first + page * PAGE for page in (6, 7, 8)}  # secrets, CPUID, the measured page


def test_the_destinations_host_does_not_see_the_guests_keys() -> None:
    """A launch reads private pages out of shared memory; a restored guest's secrets page is wiped there."""
    vm = booted(Machine(), certs=None)
    saved = vm.save()
    secrets = saved.memory.private[vm.layout.secrets_page]
    with Machine().restore_vm(saved, certs=None) as moved:
        assert moved._running.read(moved.layout.secrets_page, PAGE) == bytes(PAGE)
    assert secrets[0x20:0x40] not in repr(saved).encode()
    assert "vmpck0" not in repr(saved)


def test_a_root_for_another_product_line() -> None:
    """AMD has one hierarchy for each product line."""
    with pytest.raises(UsageError, match="same_root_as: got a Milan, wanted a Genoa"):
        Machine(product=Product.GENOA, same_root_as=Machine())
