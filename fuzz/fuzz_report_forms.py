"""A file as `swsnp report` reads it: 1,184 bytes that can be shown, or InputError, nothing else."""

from __future__ import annotations

import json
from functools import partial

from fuzz import fuzz_envelopes
from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.abi.snp_report import REPORT_SIZE, AttestationReport
from swsnp.cli.describe import as_dict, as_lines
from swsnp.cli.inputs import report_in
from swsnp.errors import InputError

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """The report alone, in its envelopes, and as text."""
    report = evidence().report
    return [report, *fuzz_envelopes.seeds(), report.hex().encode(), report.hex(" ", 16).encode()]


def one(data: bytes) -> object:
    """The report in the file, decoded and explained."""
    found, refusal = attempt(partial(report_in, data, "file"), InputError)
    if not refusal:
        assert len(found) == REPORT_SIZE
        report = AttestationReport.parse(found)
        json.dumps(as_dict(report))
        assert sum(len(line) for line in as_lines(report)) < 20_000
    return refusal
