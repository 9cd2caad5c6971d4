"""Checks P7, P8 and R1: the report's own signature. Source: AMD 56860, ATTESTATION_REPORT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import SIGNATURE_OFFSET, SIGNED_SIZE
from swsnp.certs.x509_reader import EcKey
from swsnp.crypto import ecdsa
from swsnp.crypto.derive import P384_ORDER

if TYPE_CHECKING:
    from swsnp.abi.snp_report import AttestationReport
    from swsnp.certs.x509_reader import Certificate
    from swsnp.verify.result import Findings

__all__ = ["check_report_signature", "check_signature_form", "signed_by"]

_NUMBER: Final = 48


def check_signature_form(report: AttestationReport, findings: Findings) -> None:
    """The signature field, before any key is known.

    P7. Bytes 48 to 71 of R and S are zero, and 1 <= R, S < n. Without the first, one signature would have
        many encodings. (R, S) and (R, n-S) both verify: signature bytes are never an identifier.
    P8. The bytes after S are zero.
    """
    for name, number, offset in (("R", report.signature_r, 0x2A0), ("S", report.signature_s, 0x2E8)):
        high = number[_NUMBER:]
        findings.holds("P7", not any(high), f"{name}, bytes 48..71", high.hex(), 0, offset=offset + _NUMBER)
        value = int.from_bytes(number[:_NUMBER], "little")
        findings.holds("P7", 0 < value < P384_ORDER, name, f"{value:#x}", "1 to n-1", offset=offset)
    findings.conclude("P7")
    tail = report.reserved_330
    findings.holds("P8", not any(tail), "bytes 330h..49Fh", tail.hex().rstrip("0"), 0, offset=0x330)
    findings.conclude("P8")


def signed_by(data: bytes, certificate: Certificate) -> bool:
    """Whether the certificate's P-384 key signed the report; False for any other kind of key."""
    key = certificate.key
    if not isinstance(key, EcKey) or not key.x:
        return False
    return ecdsa.verify(data[:SIGNED_SIZE], data[SIGNATURE_OFFSET:], x=key.x, y=key.y)


def check_report_signature(data: bytes, leaf: Certificate | None, findings: Findings) -> None:
    """R1. ECDSA over bytes 0 to 29Fh as they came in, by the leaf's key."""
    if leaf is None:
        findings.fail("R1", "signature", "no leaf to check it with", "a VCEK or VLEK")
    elif signed_by(data, leaf):
        findings.ok("R1")
    else:
        findings.fail("R1", "signature", "another's", f"one by the key in {leaf.subject_cn}", offset=0x2A0)
