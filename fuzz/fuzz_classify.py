"""What some bytes are: one form whose content was inside them, or InputError, nothing else."""

from __future__ import annotations

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import REPORT_SIZE, AttestationReport
from swsnp.certs.classify import Form, classify, form_of
from swsnp.certs.table import TableEntry, pack
from swsnp.certs.x509_reader import to_pem
from swsnp.errors import InputError

__all__ = ["one", "seeds"]

REPORT = bytes(AttestationReport(version=3, report_data=b"\x55" * 64))


def seeds() -> list[bytes]:
    """One of every form."""
    leaf = evidence().vcek
    return [
        REPORT,
        bytes(MsgReportRspHeader(report_size=REPORT_SIZE)) + REPORT,
        b"HCLA".ljust(0x20, b"\0") + REPORT,
        REPORT.hex().encode(),
        leaf,
        to_pem(leaf),
        pack([TableEntry(guid=CertTableGuid.VCEK, data=leaf)]),
        bytes(24),
    ]


def one(data: bytes) -> object:
    """Tell it; what is taken out was inside, and telling it again says the same."""
    found, refusal = attempt(lambda: classify(data), InputError)
    if refusal:
        return refusal
    assert form_of(data) is found.form
    if found.report is not None:
        assert len(found.report) == REPORT_SIZE
        assert found.form is Form.REPORT_TEXT or found.report in data
    assert found.table in (None, data)
    assert (found.form in (Form.CERTIFICATE, Form.CRL)) <= (data in (*found.certificates, *found.crls))
    return found.form
