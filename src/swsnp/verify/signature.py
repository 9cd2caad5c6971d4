"""Checks P7, P8 and R1: the report's own signature. Source: AMD 56860, ATTESTATION_REPORT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import SIGNATURE_OFFSET, SIGNED_SIZE, AttestationReport
from swsnp.crypto.derive import P384_ORDER
from swsnp.verify.result import mask

if TYPE_CHECKING:
    from swsnp.certs.x509_reader import Certificate
    from swsnp.crypto import ecdsa
    from swsnp.verify.result import Findings
    from swsnp.verify.shared_report import Own

__all__ = ["check_report_signature", "check_signature_form", "signed_by"]

_NUMBER: Final = 48
_HIGH: Final = bytes(24)
_TAIL: Final = bytes(368)
_TAIL_OFFSET: Final = AttestationReport.offset_of("reserved_330")
_FORM: Final = mask("P7", "P8")
_SIGNED: Final = mask("R1")


def check_signature_form(data: bytes, own: Own, findings: Findings) -> None:
    """The signature field, before any key is known.

    P7. Bytes 48 to 71 of R and S are zero, and 1 <= R, S < n. Without the first, one signature would have
        many encodings. (R, S) and (R, n-S) both verify: signature bytes are never an identifier.
    P8. The bytes after S are zero.
    """
    _check_number("R", own.signature_r, 0x2A0, findings)
    _check_number("S", own.signature_s, 0x2E8, findings)
    if not data.endswith(_TAIL):
        tail = data[_TAIL_OFFSET:]
        findings.fail("P8", "bytes 330h..49Fh", tail.hex().rstrip("0"), 0, offset=0x330)
    findings.made |= _FORM


def _check_number(name: str, number: bytes, offset: int, findings: Findings) -> None:
    if number[_NUMBER:] != _HIGH:
        got = number[_NUMBER:].hex()
        findings.fail("P7", f"{name}, bytes 48..71", got, 0, offset=offset + _NUMBER, lax=True)
    value = int.from_bytes(number[:_NUMBER], "little")
    if not 0 < value < P384_ORDER:
        findings.fail("P7", name, f"{value:#x}", "1 to n-1", offset=offset)


def signed_by(data: bytes, key: ecdsa.VerifyingKey | None) -> bool:
    """Whether the key signed the report; nothing is signed by no key."""
    return key is not None and key.verify(data[:SIGNED_SIZE], data[SIGNATURE_OFFSET:])


def check_report_signature(signed: bool, leaf: Certificate | None, findings: Findings) -> None:
    """R1. ECDSA over bytes 0 to 29Fh as they came in, by the leaf's key.

    Args:
        signed: what `signed_by` said of the leaf's key.
        leaf: the leaf, if there is one.
        findings: where to write.
    """
    if leaf is None:
        findings.fail("R1", "signature", "no leaf to check it with", "a VCEK or VLEK")
    elif not signed:
        findings.fail("R1", "signature", "another's", f"one by the key in {leaf.subject_cn}", offset=0x2A0)
    findings.made |= _SIGNED
