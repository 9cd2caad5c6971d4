"""Certificates that we and `cryptography` or asn1crypto read: all that they say is the same, or we refuse."""

from __future__ import annotations

import warnings
from datetime import UTC
from typing import TYPE_CHECKING, Any

from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.certs.x509_reader import Certificate, EcKey, RsaKey, read_der
from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """A leaf, an intermediate and a root."""
    known = evidence()
    return [known.vcek, known.hierarchy.ask, known.hierarchy.ark]


def one(data: bytes) -> object:
    """Read with all three. A peer that refuses has no say; what is read by two has to be equal."""
    ours, refusal = attempt(lambda: read_der(data), LayoutError)
    if ours is None:
        return refusal
    return _as_asn1crypto(data, ours), _as_cryptography(data, ours)


def _read_by(peer: Callable[[], Any]) -> Any:
    """What the peer read; None where it refuses, in whatever way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # serial number 0, which every genuine leaf has
        try:
            return peer()
        except Exception:
            return None


def _as_asn1crypto(data: bytes, ours: Certificate) -> str:
    """Every part, by its bytes."""

    def parts() -> tuple[object, ...]:
        theirs = asn1_x509.Certificate.load(data, strict=True)
        tbs = theirs["tbs_certificate"]
        listed = tbs["extensions"] or ()
        return (
            tbs.dump(),
            tbs["serial_number"].native,
            tbs["issuer"].dump(),
            tbs["subject"].dump(),
            tbs["subject_public_key_info"].dump(),
            tbs["signature"].dump(),
            theirs["signature_algorithm"].dump(),
            bytes(theirs["signature_value"]),
            tbs["validity"]["not_before"].native.astimezone(UTC),
            tbs["validity"]["not_after"].native.astimezone(UTC),
            tuple((e["extn_id"].dotted, bool(e["critical"]), bytes(e["extn_value"])) for e in listed),
        )

    theirs = _read_by(parts)
    if theirs is None:
        return "not read by asn1crypto"
    assert theirs == (
        ours.tbs,
        ours.serial,
        ours.issuer,
        ours.subject,
        ours.spki,
        ours.inner_algorithm.der,
        ours.algorithm.der,
        ours.signature,
        ours.not_before,
        ours.not_after,
        tuple((each.oid, each.critical, each.value) for each in ours.extensions),
    )
    return "read by asn1crypto"


def _as_cryptography(data: bytes, ours: Certificate) -> str:
    """What that library shows without encoding it anew, and the numbers of the key."""

    def parts() -> tuple[object, ...]:
        theirs = x509.load_der_x509_certificate(data)
        return (
            theirs.tbs_certificate_bytes,
            theirs.serial_number,
            theirs.signature,
            theirs.not_valid_before_utc,
            theirs.not_valid_after_utc,
        )

    def key() -> object:
        public = x509.load_der_x509_certificate(data).public_key()
        if isinstance(public, rsa.RSAPublicKey):
            return RsaKey(size=public.key_size, exponent=public.public_numbers().e)
        if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP384R1):
            point = public.public_numbers()
            return point.x.to_bytes(48, "big"), point.y.to_bytes(48, "big")
        return None

    theirs = _read_by(parts)
    if theirs is None:
        return "not read by cryptography"
    assert theirs == (ours.tbs, ours.serial, ours.signature, ours.not_before, ours.not_after)
    read_key = _read_by(key)
    if isinstance(read_key, RsaKey):
        assert ours.key == read_key
    elif isinstance(read_key, tuple):
        assert isinstance(ours.key, EcKey)
        assert not ours.key.x or (ours.key.x, ours.key.y) == read_key
    return "read by cryptography"
