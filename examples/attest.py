"""The shortest way to a verified report: one machine, one VM, one request, one verdict."""

from __future__ import annotations

import sys

from swsnp import Machine, Product
from swsnp.verify import Roots, verify


def main() -> int:
    """Attest and judge; 0 when the report is authentic under the machine's own root."""
    nonce = b"a nonce of the relying party".ljust(64, b"\0")
    machine = Machine(product=Product.MILAN)
    with machine.create_vm() as vm:
        vm.boot()
        answer = vm.extended_report(nonce)
    verdict = verify(
        answer.report,
        table=answer.certs,
        roots=Roots.of(machine.root_certificate),
        at=machine.now(),
        report_data=nonce,
    )
    for finding in verdict.findings:
        print(f"{finding.check:4} {finding.outcome:5} {finding.text}")
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
