"""Whether an issuer's RSA key made a signature of AMD's kind. Source: AMD 57230; RFC 8017, RSASSA-PSS."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from swsnp.certs.x509 import PssParameters

if TYPE_CHECKING:
    from swsnp.certs.crl import Crl
    from swsnp.certs.x509_reader import Certificate

__all__ = ["AMD_PSS", "pss_signed", "rsa_signed"]

AMD_PSS: Final = PssParameters(hash="sha384", mask="mgf1", mask_hash="sha384", salt_length=48)
"""The parameters of every signature of the key service."""
_PADDING: Final = padding.PSS(padding.MGF1(hashes.SHA384()), AMD_PSS.salt_length)
_SHA384: Final = hashes.SHA384()


def rsa_signed(signed: Certificate | Crl, issuer: Certificate) -> bool:
    """Whether the issuer's key made this signature: RSASSA-PSS, SHA-384, 48 bytes of salt.

    The parameters that `signed` states are not looked at: hold them against `AMD_PSS`.
    """
    return pss_signed(signed.tbs, signed.signature, issuer.spki)


def pss_signed(tbs: bytes, signature: bytes, spki: bytes) -> bool:
    """The same of bare bytes: what was signed, the signature, and the issuer's SubjectPublicKeyInfo."""
    key = _public_key(spki)
    if key is None:
        return False
    try:
        key.verify(signature, tbs, _PADDING, _SHA384)
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=64)
def _public_key(spki: bytes) -> rsa.RSAPublicKey | None:
    """The key, kept: making it anew costs a fifth of a verification."""
    try:
        key = load_der_public_key(spki)
    except (ValueError, UnsupportedAlgorithm):
        return None  # a key that the library cannot use signs nothing
    return key if isinstance(key, rsa.RSAPublicKey) else None
