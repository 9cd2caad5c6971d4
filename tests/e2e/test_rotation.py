"""Certificates and firmware that change while a guest asks, and keys of several providers on one chip."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp import HostError, LayoutError, Machine, Product, UsageError
from swsnp.abi.psp_sev import SEV_ISSUE_CMD, SevIssueCmd, SevUserCommand
from swsnp.abi.snp_command import Command, FirmwareStatus
from swsnp.abi.snp_message import KeySel
from swsnp.abi.snp_report import AttestationReport, SigningKey, TcbVersion
from swsnp.trace import CertsRead, FirmwareCommand, TraceEvent
from swsnp.verify import Policy, Roots, verify
from swsnp.vmm.certs import BlobFile, BytesSource, exclusive_lock
from swsnp.vmm.config import VmConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from swsnp.machine import ExtendedReport

NONCE = b"nonce".ljust(64, b"\0")
PROFILES = ("coco-v1", "coco-v1-revised", "linux-7.2")
CSP = "CN=provider-a.example"


@pytest.fixture
def machine(seeded_machine: Machine) -> Machine:
    """A chip of its own, under the root of the session's machine."""
    return certified(seeded_machine)


def certified(seeded_machine: Machine, **options: Any) -> Machine:
    return Machine(seed=b"rotation", same_root_as=seeded_machine, **options)


def key_sel(value: KeySel) -> bytes:
    return value.to_bytes(28, "little")


def failures(machine: Machine, answer: ExtendedReport, *csp_ids: str) -> list[str]:
    """The verifier's failed checks of a report against the table that came with it."""
    verdict = verify(
        answer.report,
        table=answer.certs,
        roots=Roots.of(machine.root_certificate),
        at=machine.now(),
        report_data=NONCE,
        policy=Policy(csp_ids=csp_ids),
    )
    return [each.check for each in verdict.failures]


def commit_newer_microcode(machine: Machine) -> None:
    """An update that is committed through /dev/sev."""
    levels = machine.chip.reported_tcb.decode(machine.product)
    levels["microcode"] += 1
    tcb = TcbVersion.encode(machine.product, **levels)
    machine.chip.update(current_tcb=tcb, current_version=machine.chip.variables.current_version)
    operator = machine.kernel.task("operator")
    command = bytearray(bytes(SevIssueCmd(cmd=SevUserCommand.SNP_COMMIT)))
    assert operator.ioctl(operator.open("/dev/sev"), SEV_ISSUE_CMD, command) == 0


def once_between_certificates_and_signature(action: Callable[[], None]) -> Callable[[TraceEvent], None]:
    """A trace listener that acts at the first answer to a certificate exit."""
    left = [action]

    def listen(event: TraceEvent) -> None:
        if isinstance(event, CertsRead) and left:
            left.pop()()

    return listen


# Update between certificate fetch and report


@pytest.mark.parametrize("profile", PROFILES)
def test_an_update_that_asks_nobody(seeded_machine: Machine, tmp_path: Path, profile: str) -> None:
    """The race of the review: old certificates, commit, signature by the new key. The verifier sees it."""
    machine = certified(seeded_machine, profile=profile)
    path = tmp_path / "certs.blob"
    path.write_bytes(machine.certificate_table())

    def careless_update() -> None:
        commit_newer_microcode(machine)
        path.write_bytes(machine.certificate_table())

    with machine.create_vm(certs=path) as vm:
        vm.boot()
        with machine.trace.listen(once_between_certificates_and_signature(careless_update)):
            during = vm.extended_report(NONCE)
        after = vm.extended_report(NONCE)
    assert AttestationReport.parse(during.report).reported_tcb == machine.chip.reported_tcb
    assert failures(machine, during) == ["R1", "R2"]
    assert failures(machine, after) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_an_update_under_the_lock(seeded_machine: Machine, tmp_path: Path, profile: str) -> None:
    """The same moment: the updater is refused, waits for the signature, and every report has its table."""
    machine = certified(seeded_machine, profile=profile)
    path = tmp_path / "certs.blob"
    path.write_bytes(machine.certificate_table())
    waited: list[str] = []

    def update(timeout_s: float) -> None:
        with exclusive_lock(path, timeout_s=timeout_s):
            commit_newer_microcode(machine)
            path.write_bytes(machine.certificate_table())

    def update_at_once() -> None:
        with pytest.raises(HostError, match="locked by others") as refused:
            update(0)
        waited.append(str(refused.value))

    with machine.create_vm(certs=BlobFile(path, timeout_s=10)) as vm:
        vm.boot()
        with machine.trace.listen(once_between_certificates_and_signature(update_at_once)):
            during = vm.extended_report(NONCE)
        update(10)
        after = vm.extended_report(NONCE)
    assert len(waited) == 1
    assert failures(machine, during) == failures(machine, after) == []
    tcbs = [AttestationReport.parse(each.report).reported_tcb for each in (during, after)]
    assert tcbs[0] != tcbs[1] == machine.chip.reported_tcb
    assert during.certs != after.certs


# Keys of providers


def test_a_vlek_for_another_tcb_is_not_loaded(machine: Machine) -> None:
    """AMD 56860, SNP_VLEK_LOAD: BAD_SVN unless its TCB is the reported one, exactly."""
    older = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x17, microcode=0xDB)
    vlek = machine.vlek(CSP, tcb=older)
    events: list[TraceEvent] = []
    with (
        machine.trace.listen(events.append),
        pytest.raises(UsageError, match="VLEK: got one for TCB 0xdb17.*wanted REPORTED_TCB 0xdb18"),
    ):
        machine.load_vlek(vlek)
    assert events == [FirmwareCommand(command=Command.SNP_VLEK_LOAD, status=FirmwareStatus.BAD_SVN)]
    assert machine.chip.variables.vlek is None


@pytest.mark.parametrize(("secret", "csp_id"), [(bytes(31), CSP), (bytes(33), CSP), (bytes(32), "CN=pröv")])
def test_impossible_providers(machine: Machine, secret: bytes, csp_id: str) -> None:
    """A secret has 32 bytes, a provider's name is an IA5String (AMD 57230)."""
    with pytest.raises(LayoutError):
        machine.vlek(csp_id, provider_secret=secret)


def test_a_guest_without_vcek_needs_a_vlek(machine: Machine) -> None:
    """VCEK_DIS: no signature by the chip's own key, so the report has a status until a VLEK is loaded."""
    vlek = machine.vlek(CSP)
    config = VmConfig(name="no-vcek", vcek_disabled=True, certs=BytesSource(vlek.table))
    with machine.create_vm(config=config) as vm:
        vm.boot()
        refused = [vm.extended_report(NONCE, rsvd=key_sel(each)) for each in KeySel]
        machine.load_vlek(vlek)
        answers = {each: vm.extended_report(NONCE, rsvd=key_sel(each)) for each in KeySel}
    assert [each.status for each in refused] == [FirmwareStatus.INVALID_KEY] * 3
    assert answers[KeySel.VCEK].status == FirmwareStatus.INVALID_KEY
    for each in (KeySel.VLEK_ELSE_VCEK, KeySel.VLEK):
        assert answers[each].status == 0
        assert failures(machine, answers[each], CSP) == []


def test_the_guest_chooses_while_a_vlek_is_loaded(machine: Machine) -> None:
    """KEY_SEL 0 and 2: the VLEK; 1: the VCEK (AMD 56860, MSG_REPORT_REQ)."""
    vlek = machine.vlek(CSP)
    machine.load_vlek(vlek)
    with machine.create_vm(certs=machine.certificate_table()) as vm:
        vm.boot()
        answers = [vm.extended_report(NONCE, rsvd=key_sel(each)) for each in KeySel]
    signers = [AttestationReport.parse(each.report).signer_info.signing_key for each in answers]
    assert signers == [SigningKey.VLEK, SigningKey.VCEK, SigningKey.VLEK]
    assert failures(machine, answers[1]) == []
    assert "R1" in failures(machine, answers[0])
    assert failures(machine, replace(answers[0], certs=vlek.table), CSP) == []
    assert failures(machine, replace(answers[0], certs=vlek.table), "CN=another.example") == ["R3"]


def test_a_vlek_is_the_providers_not_the_chips(seeded_machine: Machine, machine: Machine) -> None:
    """AMD 57230: one VLEK on many hosts; another provider, another TCB or another secret has another key."""
    secret, other = bytes(range(32)), bytes(32)
    tcb = machine.chip.reported_tcb
    here, there = (each.vlek(CSP, provider_secret=secret, tcb=tcb) for each in (machine, seeded_machine))
    assert here == there
    assert here.tcb == tcb
    keys = {
        here.key.scalar,
        machine.vlek("CN=provider-b.example", provider_secret=secret).key.scalar,
        machine.vlek(CSP, provider_secret=other).key.scalar,
        machine.vlek(CSP, provider_secret=secret, tcb=TcbVersion(1)).key.scalar,
        machine.vlek(CSP).key.scalar,
    }
    assert len(keys) == 5
    assert machine.vlek(CSP) == machine.vlek(CSP)
    assert str(here.key.scalar) not in repr(here)


def test_a_vlek_outlives_its_tcb(machine: Machine) -> None:
    """A change of the reported TCB does not unload it: its certificate then names another than reports do."""
    vlek = machine.vlek(CSP)
    machine.load_vlek(vlek)
    with machine.create_vm(certs=lambda: vlek.table) as vm:
        vm.boot()
        assert failures(machine, vm.extended_report(NONCE), CSP) == []
        commit_newer_microcode(machine)
        assert failures(machine, vm.extended_report(NONCE), CSP) == ["R2"]
        vlek = machine.vlek(CSP)
        machine.load_vlek(vlek)
        assert failures(machine, vm.extended_report(NONCE), CSP) == []
