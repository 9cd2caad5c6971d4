"""A reader of certificate revocation lists, as the key service serves them.

Source: RFC 5280, 5; AMD 57230.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.certs import der
from swsnp.certs.der import Der
from swsnp.certs.x509_reader import (
    Extension,
    SignatureAlgorithm,
    read_extensions,
    read_signature_algorithm,
    signed_parts,
    to_der,
)
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["Crl", "OID_AUTHORITY_KEY_ID", "OID_CRL_NUMBER", "read_crl"]

OID_CRL_NUMBER: Final = "2.5.29.20"
OID_AUTHORITY_KEY_ID: Final = "2.5.29.35"
_TIMES: Final = (der.UTC_TIME, der.GENERALIZED_TIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crl:
    """What `read_crl` found; `revoked` are serial numbers, `issuer` is raw DER."""

    der: bytes = field(repr=False)
    tbs: bytes = field(repr=False)
    issuer: bytes = field(repr=False)
    this_update: datetime
    next_update: datetime | None
    revoked: tuple[int, ...]
    inner_algorithm: SignatureAlgorithm = field(repr=False)
    algorithm: SignatureAlgorithm = field(repr=False)
    signature: bytes = field(repr=False)
    extensions: tuple[Extension, ...] = field(repr=False)


def read_crl(data: bytes) -> Crl:
    """Read one CRL, DER or PEM ("X509 CRL").

    Raises:
        InputError: the PEM text is broken or holds more than one CRL.
        LayoutError: the CRL is malformed, bytes follow it, or it is not version 2.
    """
    blocks = to_der(data, label=b"X509 CRL")
    if len(blocks) != 1:
        raise InputError(f"PEM: got {len(blocks)} CRLs, wanted one")
    where = "CRL"
    signed, algorithm, signature = signed_parts(blocks[0], where)
    tbs = Der(der.unwrap(signed, der.SEQUENCE, where), where)
    version = der.integer(tbs.value(der.INTEGER, "version"), f"{where}.version")
    if version != 1:
        raise LayoutError(f"CRL.version: got v{version + 1}, wanted v2 (RFC 5280, 5.1.2.1)")
    inner = read_signature_algorithm(tbs.raw(der.SEQUENCE, "signature"), where)
    issuer = tbs.raw(der.SEQUENCE, "issuer")
    this_update = der.time(tbs, "thisUpdate")
    next_update = der.time(tbs, "nextUpdate") if tbs.peek() in _TIMES else None
    revoked = _revoked(tbs) if tbs.peek() == der.SEQUENCE else ()
    extensions: tuple[Extension, ...] = ()
    if tbs.peek() is not None:
        tagged = tbs.inside(der.explicit(0), "crlExtensions")
        extensions = read_extensions(tagged, where)
        tagged.end()
    tbs.end()
    return Crl(
        der=blocks[0],
        tbs=signed,
        issuer=issuer,
        this_update=this_update,
        next_update=next_update,
        revoked=revoked,
        inner_algorithm=inner,
        algorithm=algorithm,
        signature=signature,
        extensions=extensions,
    )


def _revoked(tbs: Der) -> tuple[int, ...]:
    serials: list[int] = []
    listed = tbs.inside(der.SEQUENCE, "revokedCertificates")
    while listed.peek() is not None:
        entry = listed.inside(der.SEQUENCE, f"revokedCertificates[{len(serials)}]")
        serials.append(der.integer(entry.value(der.INTEGER, "userCertificate"), "CRL.userCertificate"))
        der.time(entry, "CRL.revocationDate")
        if entry.peek() is not None:
            read_extensions(entry, "CRL.crlEntryExtensions")
        entry.end()
    return tuple(serials)
