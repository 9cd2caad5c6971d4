"""Look at a certificate table as guests, relying parties and other tools will, and say what is wrong with it.

1. Layout, rules T1 to T14: what AMD 56421 asks of the bytes, and what AMD's tools make of it.
2. Content, E1 to E6: each entry holds what its GUID says, in AMD's shape.
3. Chain, K1 to K9: the certificates belong together, are valid, and lead to a chosen root.
4. Machine, M1 to M5: they are this chip's, for this TCB, and made this report's signature.

All rules are looked at; those that could not be are listed with the reason. `RULES` has every rule's text.
Nothing here makes a table trusted: a relying party verifies (`swsnp.verify`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.certs.lint_chain import Expected, check_chains, check_crls, check_match
from swsnp.certs.lint_content import check_content
from swsnp.certs.lint_layout import check_layout
from swsnp.certs.lint_result import RULES, Finding, Findings, LintResult, Severity
from swsnp.errors import InputError, UsageError

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["RULES", "Expected", "Finding", "LintResult", "Severity", "lint_table"]

_NOTHING = Expected()


def lint_table(blob: bytes, *, at: datetime, expected: Expected = _NOTHING) -> LintResult:
    """Look at a table.

    Args:
        blob: the whole file.
        at: aware; when certificates and CRLs have to be valid.
        expected: what the table has to fit.

    Raises:
        UsageError: `at` has no time zone.
        InputError: the report is not 1,184 bytes.
    """
    if at.tzinfo is None:
        raise UsageError(f"at: got {at} without a time zone, wanted aware UTC")
    if expected.report is not None and len(expected.report) != REPORT_SIZE:
        raise InputError(f"report: got {len(expected.report)} bytes, wanted {REPORT_SIZE}")
    findings = Findings()
    slots = check_layout(blob, findings)
    held, crls = check_content(slots, findings)
    chains = check_chains(held, findings, at=at, expected=expected)
    check_crls(crls, held, chains, findings, at=at)
    check_match(held, findings, expected)
    order = {rule: place for place, rule in enumerate(RULES)}
    return LintResult(
        findings=tuple(sorted(findings.listed, key=lambda each: order[each.rule])),
        not_checked=dict(sorted(findings.not_checked.items(), key=lambda item: order[item[0]])),
    )
