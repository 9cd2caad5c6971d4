"""Revocation lists: read whole, or LayoutError (InputError where it looks like PEM), nothing else."""

from __future__ import annotations

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.certs.crl import read_crl
from swsnp.certs.x509_reader import to_pem
from swsnp.errors import InputError, LayoutError

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """DER and PEM."""
    crl = evidence().crl
    return [crl, to_pem(crl, label="X509 CRL")]


def one(data: bytes) -> object:
    """Read."""
    found, refusal = attempt(lambda: read_crl(data), LayoutError, InputError)
    if refusal:
        return refusal
    assert found.tbs in found.der
    assert found.this_update.tzinfo is not None
    return len(found.revoked), len(found.extensions)
