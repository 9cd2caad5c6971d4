"""`swsnp demo`: one extended request end to end, every hop shown, then the report judged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from swsnp.cli import BAD_VERDICT, GOOD, common

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from datetime import datetime

    from swsnp.machine import Machine
    from swsnp.trace import TraceEvent
    from swsnp.verify.result import Verification

__all__ = ["Attestation", "attest", "run"]

_COMPARED: Final = ("coco-v1", "linux-7.2")
_REPORT_DATA: Final = hashlib.sha512(b"swsnp demo").digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """What one demo run showed."""

    profile: str
    product: str
    events: tuple[TraceEvent, ...]
    exit_reason: int | None
    certs: bytes
    report: bytes
    verification: Verification


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    options = _options(arguments)
    profiles = _COMPARED if options.compare else (options.profile,)
    shown = [attest(options, profile) for profile in profiles]
    if options.json:
        documents = [_as_json(each) for each in shown]
        print(json.dumps(documents if options.compare else documents[0], indent=2))
    else:
        for each in shown:
            print("\n".join(_as_lines(each)), end="\n\n")
        if options.compare:
            print("\n".join(_differences(shown[0], shown[1])))
    return GOOD if all(each.verification.passed for each in shown) else BAD_VERDICT


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    command = common.parser("demo")
    common.add_machine(command)
    command.add_argument(
        "--compare", action="store_true", help="run coco-v1, then linux-7.2, then say what differs"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
    return command.parse_args(arguments)


def attest(options: argparse.Namespace, profile: str) -> Attestation:
    """Launch a VM, let its guest ask for a report with certificates, and judge the answer."""
    from swsnp.abi.snp_report import Product
    from swsnp.machine import Machine

    events: list[TraceEvent] = []
    machine = Machine(
        product=Product[options.product.upper()],
        profile=profile,
        seed=common.seed_of(options),
        amd_names=options.amd_names,
    )
    with machine.create_vm("demo") as vm:
        vm.boot()
        with machine.trace.listen(events.append):
            answer = vm.extended_report(_REPORT_DATA)
    return Attestation(
        profile=profile,
        product=machine.product.value,
        events=tuple(events),
        exit_reason=_exit_reason(events),
        certs=answer.certs,
        report=answer.report,
        verification=_judge(machine, answer.report, answer.certs, machine.now()),
    )


def _exit_reason(events: Sequence[TraceEvent]) -> int | None:
    from swsnp.trace import CertsWanted

    return next((event.exit_reason for event in events if isinstance(event, CertsWanted)), None)


def _judge(machine: Machine, report: bytes, certs: bytes, at: datetime) -> Verification:
    """Verify as a relying party would who chose to trust this machine's root.

    A host without a certificate exit gives the guest an empty table; the certificates then come from the
    machine's key service, as a relying party fetches AMD's.
    """
    from swsnp.verify import Roots, verify

    empty = not any(certs[:24])
    return verify(
        report,
        certificates=machine.certificates_of(report) if empty else (),
        table=None if empty else certs,
        roots=Roots.of(machine.root_certificate),
        product=machine.product,
        at=at,
        report_data=_REPORT_DATA,
    )


def _as_json(shown: Attestation) -> dict[str, Any]:
    from swsnp.abi.snp_report import AttestationReport, Product
    from swsnp.cli.describe import as_dict as report_as_dict
    from swsnp.cli.hops import as_dict as hop_as_dict

    report = AttestationReport.parse(shown.report)
    return {
        "profile": shown.profile,
        "product": shown.product,
        "exit_reason": shown.exit_reason,
        "hops": [hop_as_dict(event) for event in shown.events],
        "certs_sha256": hashlib.sha256(shown.certs).hexdigest() if any(shown.certs) else None,
        "report": report_as_dict(report, Product(shown.product)),
        "report_hex": shown.report.hex(),
        "verdict": {
            "authenticated": shown.verification.authenticated,
            "passed": shown.verification.passed,
            "findings": [
                {"check": each.check, "outcome": each.outcome, "text": each.text}
                for each in shown.verification.findings
            ],
        },
    }


def _as_lines(shown: Attestation) -> list[str]:
    from swsnp.abi.snp_report import AttestationReport, Product
    from swsnp.cli.describe import as_lines as report_as_lines
    from swsnp.cli.hops import describe

    lines = [
        f"== profile {shown.profile}, product {shown.product} (software keys, not AMD's) ==",
        "",
        "The path:",
    ]
    for number, event in enumerate(shown.events, 1):
        hop = describe(event)
        lines.append(f"{number:4}  {hop.party:13} {hop.text}")
    lines += [
        "",
        "The certificates the guest received:",
        f"      {_certs_text(shown.certs)}",
        "",
        "The report:",
    ]
    report = AttestationReport.parse(shown.report)
    lines += [f"      {line}" for line in report_as_lines(report, Product(shown.product))]
    lines += ["", "The verdict:"]
    lines += [
        f"      {each.check:4} {each.outcome:5} {each.text}"
        for each in shown.verification.findings
        if each.outcome != "skip"
    ]
    verdict = "authenticated" if shown.verification.passed else "REFUSED"
    return [*lines, f"      => {verdict}, under this machine's own root"]


def _certs_text(certs: bytes) -> str:
    from swsnp.abi.ghcb import CertTableGuid
    from swsnp.certs import table

    names = {guid: name for name, guid in vars(CertTableGuid).items() if not name.startswith("_")}
    entries = table.parse(certs) if any(certs) else ()
    if not entries:
        return "an empty table: this KVM asks nobody; fetched from the key service instead"
    return ", ".join(f"{names.get(each.guid, str(each.guid))} {len(each.data)} bytes" for each in entries)


def _differences(first: Attestation, second: Attestation) -> list[str]:
    """The hops that differ, side by side where one stands in for the other."""
    from difflib import SequenceMatcher

    from swsnp.cli.hops import describe

    ours, theirs = ([describe(event) for event in each.events] for each in (first, second))
    kinds = [[type(event).__name__ for event in each.events] for each in (first, second)]
    lines = [f"== what differs between {first.profile} and {second.profile} =="]
    for tag, a, a_end, b, b_end in SequenceMatcher(None, kinds[0], kinds[1], autojunk=False).get_opcodes():
        if tag == "equal":
            pairs = zip(ours[a:a_end], theirs[b:b_end], strict=True)
            for ours_hop, theirs_hop in ((x, y) for x, y in pairs if x != y):
                lines += [
                    f"  {ours_hop.party}",
                    f"    {first.profile:10} {ours_hop.text}",
                    f"    {second.profile:10} {theirs_hop.text}",
                ]
        else:
            lines += [f"  {hop.party}\n    only {first.profile}: {hop.text}" for hop in ours[a:a_end]]
            lines += [f"  {hop.party}\n    only {second.profile}: {hop.text}" for hop in theirs[b:b_end]]
    return lines
