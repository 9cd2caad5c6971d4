"""The result of `swsnp verify` for people, verdict first, and for programs."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.snp_report import CHIP_ID_MARKER, AttestationReport
from swsnp.cli.verify.evidence import given
from swsnp.verify import Outcome
from swsnp.verify.roots import spki_sha256

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from swsnp.cli.verify.evidence import Evidence
    from swsnp.verify import Finding, Verification

__all__ = ["as_dict", "as_lines", "word"]

_KDS: Final = "https://kdsintf.amd.com"
_CHIP_ID: Final = AttestationReport.offset_of("chip_id")
_WIDTH: Final = 98
_EITHER: Final = ("P9", "P10")
"""One of them applies, by the report's version."""
_OPTION_FOR: Final = {"report_data": "--report-data", "measurement": "--measurement"}


def word(verification: Verification) -> str:
    """The verdict in one word: accepted, authentic (genuine, nothing broken, something missing), refused."""
    if verification.accepted:
        return "accepted"
    return "authentic" if verification.passed else "refused"


def as_dict(
    verification: Verification, evidence: Evidence, options: argparse.Namespace, at: datetime
) -> dict[str, Any]:
    """`Verification.as_dict` with the verdict in one word, and what was judged and by what."""
    return {
        "verdict": word(verification),
        **verification.as_dict(),
        "at": at.isoformat(),
        "roots": _roots(evidence, options),
        "engine": options.engine,
        "like": options.like,
        "authentic_only": options.authentic_only,
        "fetch": _to_fetch(verification, evidence, options),
        "inputs": list(evidence.inputs),
    }


def _roots(evidence: Evidence, options: argparse.Namespace) -> dict[str, Any]:
    pins = {product.value: sorted(keys) for product, keys in evidence.roots.pins.items()}
    return {"chosen_by": "--roots" if options.roots else "swsnp: AMD's", "spki_sha256": pins}


def as_lines(
    verification: Verification, evidence: Evidence, options: argparse.Namespace, at: datetime
) -> Iterator[str]:
    """Verdict, why, what to know, what was not checked: what a person has to act on, in that order."""
    yield f"{word(verification).upper()}: {options.report}: {_sentence(verification, options)}"
    yield from _section("why", map(_finding, verification.failures))
    yield from _section("fetch", _fetch_lines(_to_fetch(verification, evidence, options)))
    yield from _section("missing", (_missing(each, options) for each in verification.missing))
    yield from _section("warnings", [*_private(evidence, options), *_warnings(verification, options)])
    if verification.authenticated:
        yield from _section("signed", _signed(verification, at))
    yield from _section("not checked", _not_checked(verification))


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        if number == 0:
            yield f"{title}:"
        yield f"  {line}"


def _sentence(verification: Verification, options: argparse.Namespace) -> str:
    if not verification.authenticated:
        return "not shown to be genuine"
    by = "a root given by --roots" if options.roots else "AMD's root"
    if not verification.passed:
        return f"genuine by {by}, but not as wanted"
    if verification.accepted:
        return f"genuine by {by}, and report data, measurement and policy are as wanted"
    return f"genuine by {by}; nothing was given to compare {' and '.join(verification.missing)} with"


def _finding(finding: Finding) -> str:
    where = "" if finding.offset is None else f" at {finding.offset:03x}h"
    return f"{finding.check}{where}: {finding.text} ({finding.source})"


def _missing(name: str, options: argparse.Namespace) -> str:
    less = "" if options.authentic_only else ", or ask for less by --authentic-only"
    return f"{name}: give {_OPTION_FOR[name]} or a policy{less}"


def _private(evidence: Evidence, options: argparse.Namespace) -> Iterator[str]:
    if options.roots:
        yield "roots are those of --roots, emulated or private: this says nothing about AMD's processors"
        yield from (
            f"root of {product.value}: public key SHA-256 {key}"
            for product, keys in evidence.roots.pins.items()
            for key in sorted(keys)
        )


def _warnings(verification: Verification, options: argparse.Namespace) -> Iterator[str]:
    if options.like:
        yield f"judged like {options.like}: what that verifier lets pass is told below, and refused otherwise"
    yield from (_finding(each) for each in verification.warnings)


def _signed(verification: Verification, at: datetime) -> Iterator[str]:
    report, leaf = verification.report, verification.leaf
    if report is None or leaf is None or verification.product is None:
        return
    yield f"by {leaf.subject_cn} of {verification.product.value}, public key SHA-256 {spki_sha256(leaf)}"
    yield f"measurement {report.measurement.hex()}"
    yield f"report data {report.report_data.hex()}"
    levels = " ".join(
        f"{name}={level}" for name, level in report.reported_tcb.decode(verification.product).items()
    )
    yield f"reported TCB {levels}; judged at {at.isoformat()}"


def _not_checked(verification: Verification) -> Iterator[str]:
    skipped: dict[str, list[str]] = {}
    for each in verification.findings:
        if each.outcome is Outcome.SKIP and each.check[0] != "Y" and each.check not in _EITHER:
            skipped.setdefault(each.text, []).append(each.check)
    yield from (f"{' '.join(checks)}: {why}" for why, checks in skipped.items())
    if verification.not_checked:
        yield from wrap(f"policy: {', '.join(verification.not_checked)}", _WIDTH, subsequent_indent="  ")


def _to_fetch(
    verification: Verification, evidence: Evidence, options: argparse.Namespace
) -> list[dict[str, str]]:
    """Where the certificates are that the evidence lacks, and by which option to give them.

    Nothing unless that is why AMD's roots refused it; AMD's service does not know emulated chips.
    """
    lacks = any(each.check == "C1" for each in verification.failures)
    if options.roots or not lacks or evidence.report[_CHIP_ID:].startswith(CHIP_ID_MARKER):
        return []
    from swsnp.certs.kds_evidence import missing_requests
    from swsnp.certs.kds_url import ChainRequest, url_of

    requests = missing_requests(evidence.report, given(evidence), product=options.product)
    return [
        {"url": url_of(each), "option": "--chain" if isinstance(each, ChainRequest) else "--vcek"}
        for each in requests
    ]


def _fetch_lines(found: list[dict[str, str]]) -> Iterator[str]:
    yield from (f"{each['url']} (then give it by {each['option']})" for each in found)
    if found:
        yield f"or let swsnp fetch what is missing: --kds {_KDS}"
