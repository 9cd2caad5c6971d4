"""Verify with a bench's evidence; keywords that name fields of the policy make the policy."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from swsnp.verify.policy import Policy
from swsnp.verify.verifier import verify

if TYPE_CHECKING:
    from tests.unit.verify.conftest import Bench

    from swsnp.verify.result import Verification

POLICY_FIELDS = {each.name for each in fields(Policy)} - {"report_data"}


def judge(report: bytes, **options: Any) -> Verification:
    """`verify`, with fields of the policy as keywords of their own; its report data under another name."""
    demands = {name: options.pop(name) for name in tuple(options) if name in POLICY_FIELDS}
    if "policy_report_data" in options:
        demands["report_data"] = options.pop("policy_report_data")
    return verify(report, policy=Policy(**demands), **options)


def check(bench: Bench, report: bytes | None = None, **options: Any) -> Verification:
    """Judge a report, the bench's good one unless given, by the bench's certificates and root."""
    wanted: dict[str, Any] = {"certificates": bench.certificates, "roots": bench.roots, "at": bench.at}
    return judge(bench.report() if report is None else report, **{**wanted, **options})


def failed(result: Verification) -> list[str]:
    """Ids of the checks that failed, each once."""
    assert result.passed is not bool(result.failures)
    assert result.authenticated is not any(each.check[0] in "PCR" for each in result.failures)
    return list(dict.fromkeys(each.check for each in result.failures))
