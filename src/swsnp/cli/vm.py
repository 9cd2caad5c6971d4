"""`swsnp vm …`: a VM with QEMU's options, whose guest asks for reports."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from swsnp.cli import BAD_VERDICT, GOOD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swsnp.machine import ExtendedReport
    from swsnp.trace import TraceEvent

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """The verb: exit code 0 when every report was answered."""
    from swsnp.cli.qemu_options import parse

    options = parse(arguments)
    from swsnp.machine import Machine
    from swsnp.trace import CertsWanted

    events: list[TraceEvent] = []
    machine = Machine(product=options.product, profile=options.profile, seed=options.seed)
    answers: list[ExtendedReport] = []
    with machine.create_vm(config=options.vm_config()) as vm:
        vm.boot()
        with machine.trace.listen(events.append):
            for number in range(options.count):
                nonce = hashlib.sha512(b"swsnp vm report %d" % number).digest()
                answers.append(vm.extended_report(nonce))
        vcpus = len(vm.vcpus)
    exits = [event.exit_reason for event in events if isinstance(event, CertsWanted)]
    shown: dict[str, Any] = {
        "profile": options.profile,
        "product": options.product.value,
        "vcpus": vcpus,
        "exit_reason": exits[0] if exits else None,
        "certs_sha256": _digest(answers[-1].certs) if answers else None,
        "reports": [_as_json(each) for each in answers],
    }
    if options.json:
        print(json.dumps(shown, indent=2))
    else:
        print("\n".join(_as_lines(shown)))
    return GOOD if all(each["status"] == 0 for each in shown["reports"]) else BAD_VERDICT


def _digest(certs: bytes) -> str | None:
    return hashlib.sha256(certs).hexdigest() if any(certs[:24]) else None


def _as_json(answer: ExtendedReport) -> dict[str, Any]:
    return {"status": answer.status, "certs_size": len(answer.certs), "report": answer.report.hex()}


def _as_lines(shown: dict[str, Any]) -> list[str]:
    exit_reason = shown["exit_reason"]
    asked = f"certificate exit {exit_reason}" if exit_reason else "no certificate exit"
    lines = [f"{shown['product']} on {shown['profile']}: {shown['vcpus']} vCPU(s), {asked}"]
    lines.append(
        f"certificates: {'sha256 ' + shown['certs_sha256'] if shown['certs_sha256'] else 'an empty table'}"
    )
    for number, each in enumerate(shown["reports"], 1):
        lines.append(
            f"report {number}: status {each['status']:#x}, {len(each['report']) // 2} bytes, {each['report'][:32]}…"
        )
    return lines
