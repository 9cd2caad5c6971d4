"""A guest moves to a host with other certificate data: what is served always belongs to who signed.

Reason 2 of the series for asking userspace: source and destination of a migration differ in their
certificates, and a VMM asks its own host. The two hosts here have another chip, TCB and table, and
another certificate exit; both chips are certified by one root, as AMD's are.

An attestation spans the move: the guest has asked how much room the table needs, and is moved before it asks
for the table. At the destination the answer is "too little room" again, with the size that counts there.

Exit status: 0 when everything held, 1 when something did not.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from swsnp import Machine, Product
from swsnp.abi.ghcb import PAGE
from swsnp.abi.snp_report import AttestationReport, TcbVersion
from swsnp.certs.table import TableEntry, pack, parse
from swsnp.firmware.settings import preset
from swsnp.machine import ExtendedReport, IoctlFailed
from swsnp.trace import MessageSealed, TraceEvent
from swsnp.verify import Roots, verify

if TYPE_CHECKING:
    from swsnp import VirtualMachine

NOTES = UUID("4f6b1d1e-3a0c-4b55-9a0e-6d2f0a7c5e11")
"""A provider may put entries of its own into the table; this one makes the destination's larger."""
TOO_SMALL = 1 << 32


@dataclass
class Host:
    """A machine, its table, and what it saw guests seal."""

    machine: Machine
    table: bytes
    seqnos: list[int]

    @classmethod
    def of(cls, machine: Machine, *extra: TableEntry) -> Host:
        """Provision a machine."""
        entries = parse(machine.certificate_table())
        return cls(machine, pack([*entries, *extra]), [])

    def note(self, event: TraceEvent) -> None:
        """A trace listener."""
        if isinstance(event, MessageSealed) and event.by == "guest":
            self.seqnos.append(event.seqno)

    def signed(self, report: AttestationReport) -> bool:
        """Whether a report names this host's chip and TCB."""
        chip = self.machine.chip
        return (report.chip_id, report.reported_tcb) == (chip.chip_id, chip.reported_tcb)

    def shown(self) -> dict[str, Any]:
        """For people."""
        chip = self.machine.chip
        return {
            "profile": self.machine.profile.name,
            "chip_id": chip.chip_id.hex()[:16],
            "reported_tcb": f"{chip.reported_tcb:#018x}",
            "table_bytes": len(self.table),
            "message_numbers": self.seqnos,
        }


class Program:
    """What runs in the guest: it knows a device, and not which host is below it."""

    def __init__(self) -> None:
        self.room = 0
        self.too_small: list[int] = []

    def attest(self, device: VirtualMachine, nonce: bytes) -> ExtendedReport:
        """Ask, and ask with more room as long as the host wants that."""
        while (answer := self.ask(device, nonce)) is None:
            pass
        return answer

    def ask(self, device: VirtualMachine, nonce: bytes) -> ExtendedReport | None:
        """One ioctl; None when the host wants more room."""
        try:
            return device.extended_report(nonce, certs_size=self.room)
        except IoctlFailed as refused:
            if refused.exitinfo2 != TOO_SMALL:
                raise
        self.too_small.append(self.room)
        self.room += PAGE
        return None


@dataclass(frozen=True)
class Journey:
    """The guest's two reports, each with its nonce, and whether the move made it ask again."""

    before: ExtendedReport
    after: ExtendedReport
    retried: bool


NONCES = b"at the source".ljust(64, b"\0"), b"across the move".ljust(64, b"\0")


def travel(source: Host, destination: Host) -> Journey:
    """Attest at the source, begin again, move, and end the second attestation at the destination."""
    program = Program()
    with source.machine.trace.listen(source.note), destination.machine.trace.listen(destination.note):
        vm = source.machine.create_vm("guest", certs=source.table, vcpus=2)
        vm.boot()
        before = program.attest(vm, NONCES[0])
        enough, program.room = program.room, 0
        while program.room < enough:  # a client that learns the size anew for each report
            program.ask(vm, NONCES[1])
        asked = len(program.too_small)
        with destination.machine.restore_vm(vm.save(), certs=destination.table) as moved:
            after = program.attest(moved, NONCES[1])
    return Journey(before, after, retried=len(program.too_small) > asked)


def judge(journey: Journey, source: Host, destination: Host) -> dict[str, bool]:
    """What has to hold."""
    roots, at = Roots.of(source.machine.root_certificate), destination.machine.now()
    old = AttestationReport.parse(journey.before.report)
    new = AttestationReport.parse(journey.after.report)

    def authentic(report: bytes, served: bytes, nonce: bytes) -> bool:
        return verify(report, table=served, roots=roots, at=at, report_data=nonce).passed

    return {
        "before the move: the source's table": journey.before.certs.startswith(source.table),
        "before the move: the source's chip and TCB": source.signed(old),
        "before the move: report and table match": authentic(
            journey.before.report, journey.before.certs, NONCES[0]
        ),
        "the attestation that spanned the move was retried": journey.retried,
        "after the move: the destination's table": journey.after.certs.startswith(destination.table),
        "after the move: the destination's chip and TCB": destination.signed(new),
        "after the move: report and table match": authentic(
            journey.after.report, journey.after.certs, NONCES[1]
        ),
        "the source's table would not have matched": not authentic(
            journey.after.report, source.table, NONCES[1]
        ),
        "the guest is the same": (old.measurement, old.report_id) == (new.measurement, new.report_id),
        "message numbers go on": _rising(source.seqnos, destination.seqnos),
        "the source has forgotten the guest": not source.machine.mailbox.platform.guests,
    }


def run(source_profile: str, destination_profile: str) -> dict[str, Any]:
    """Provision two hosts and move a guest; what held and what did not."""
    newer = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x1C, microcode=0xDE)
    settings = replace(preset(Product.MILAN), current_tcb=newer, committed_tcb=newer)
    source = Host.of(Machine(profile=source_profile))
    destination = Host.of(
        Machine(profile=destination_profile, settings=settings, same_root_as=source.machine),
        TableEntry(guid=NOTES, data=b"issued for the destination ".ljust(2 * PAGE, b".")),
    )
    checks = judge(travel(source, destination), source, destination)
    return {
        "held": all(checks.values()),
        "checks": checks,
        "source": source.shown(),
        "destination": destination.shown(),
    }


def _rising(before: list[int], after: list[int]) -> bool:
    """Each request takes the next odd number; the even one after it is the response's."""
    seqnos = before + after
    return bool(before and after) and seqnos == list(range(1, 2 * len(seqnos), 2))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", default="coco-v1", help="KVM of the source (default: %(default)s)")
    parser.add_argument(
        "--destination", default="linux-7.2", help="KVM of the destination (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    options = parser.parse_args()
    result = run(options.source, options.destination)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for side in ("source", "destination"):
            print(f"{side}: " + ", ".join(f"{name} {value}" for name, value in result[side].items()))
        for check, held in result["checks"].items():
            print("ok  " if held else "FAIL", check)
        print("held" if result["held"] else "did not hold")
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
