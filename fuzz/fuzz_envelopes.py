"""Envelopes around reports: 1,184 bytes that stand in the envelope, or LayoutError, nothing else."""

from __future__ import annotations

import struct
from functools import partial

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.certs.classify import report_from_hcl, report_from_response
from swsnp.errors import LayoutError

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """MSG_REPORT_RSP as the driver hands it out, one with a status, and HCL."""
    report = evidence().report
    response = struct.pack("<II24x", 0, REPORT_SIZE) + report
    return [
        response,
        response.ljust(4000, b"\0"),
        struct.pack("<II24x", 0x16, REPORT_SIZE),
        b"HCLA".ljust(32, b"\0") + report + b"{}",
    ]


def one(data: bytes) -> object:
    """Both readers."""
    kinds = []
    for reader in (report_from_response, report_from_hcl):
        report, refusal = attempt(partial(reader, data), LayoutError)
        if not refusal:
            assert len(report) == REPORT_SIZE
            assert data[0x20 : 0x20 + REPORT_SIZE] == report
        kinds.append(refusal)
    return tuple(kinds)
