"""What a certificate of AMD's kind says: the values that `x509_reader` finds.

A certificate is its template, which it shares with those of other chips, and what it has of its own.
Source: RFC 5280; AMD 57230.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.kds import OID_HWID
from swsnp.certs import der
from swsnp.certs.der import Der
from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from datetime import datetime

__all__ = [
    "BasicConstraints",
    "Certificate",
    "EcKey",
    "Extension",
    "OID_BASIC_CONSTRAINTS",
    "OID_KEY_USAGE",
    "OID_P384",
    "PssParameters",
    "RsaKey",
    "SignatureAlgorithm",
    "Template",
    "split_hwid",
]

OID_P384: Final = "1.3.132.0.34"
OID_KEY_USAGE: Final = "2.5.29.15"
OID_BASIC_CONSTRAINTS: Final = "2.5.29.19"


class Extension(NamedTuple):
    """One extension: `value` is what its OCTET STRING holds."""

    oid: str
    critical: bool
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PssParameters:
    """RSASSA-PSS-params with defaults filled in; algorithms by asn1crypto's names."""

    hash: str
    mask: str
    mask_hash: str
    salt_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureAlgorithm:
    """An AlgorithmIdentifier: its own bytes, and the parameters when it is RSASSA-PSS."""

    der: bytes
    oid: str
    pss: PssParameters | None


class RsaKey(NamedTuple):
    """An RSA public key; `size` in bits."""

    size: int
    exponent: int


class EcKey(NamedTuple):
    """A public key on a named curve; x and y big-endian, 48 bytes each on P-384, empty for other curves."""

    curve: str
    x: bytes
    y: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BasicConstraints:
    """The extension of that name."""

    ca: bool
    path_length: int | None
    critical: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Template:
    """What a certificate has in common with those that one issuer made for other chips; names are raw DER.

    An extension HWID is listed here without its value. A template is equal to itself alone, so that what
    follows from it can be remembered by it.
    """

    issuer: bytes = field(repr=False)
    subject: bytes = field(repr=False)
    issuer_cn: str
    subject_cn: str
    inner_algorithm: SignatureAlgorithm = field(repr=False)
    algorithm: SignatureAlgorithm = field(repr=False)
    extensions: tuple[Extension, ...] = field(repr=False)

    def extension(self, oid: str) -> Extension | None:
        """The extension of that OID, if there is one."""
        for each in self.extensions:
            if each.oid == oid:
                return each
        return None

    def basic_constraints(self) -> BasicConstraints | None:
        """BasicConstraints, if there are any; LayoutError when they are malformed."""
        found = self.extension(OID_BASIC_CONSTRAINTS)
        return None if found is None else _basic_constraints(found)

    def key_usage(self) -> frozenset[int] | None:
        """Bit numbers of KeyUsage (5 keyCertSign, 6 cRLSign); None without it, LayoutError when malformed."""
        found = self.extension(OID_KEY_USAGE)
        return None if found is None else _key_usage(found.value)


class Certificate(NamedTuple):
    """What `x509_reader.read` found; equal to one of the same bytes.

    `key` is None for an algorithm other than RSA and EC; `hwid` is the value of that extension, if there is
    one.
    """

    der: bytes
    template: Template
    tbs: bytes
    serial: int
    not_before: datetime
    not_after: datetime
    spki: bytes
    key: RsaKey | EcKey | None
    signature: bytes
    hwid: bytes | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Certificate) and self.der == other.der

    def __hash__(self) -> int:
        return hash(self.der)

    def __repr__(self) -> str:
        return f"Certificate({self.subject_cn!r}, serial={self.serial:#x}, key={self.key!r})"

    @property
    def issuer(self) -> bytes:
        """The issuer's Name, raw DER."""
        return self.template.issuer

    @property
    def subject(self) -> bytes:
        """The subject's Name, raw DER."""
        return self.template.subject

    @property
    def issuer_cn(self) -> str:
        """The issuer's one common name; empty when there is none or more than one."""
        return self.template.issuer_cn

    @property
    def subject_cn(self) -> str:
        """The subject's one common name; empty likewise."""
        return self.template.subject_cn

    @property
    def inner_algorithm(self) -> SignatureAlgorithm:
        """The signature's algorithm, as it is signed."""
        return self.template.inner_algorithm

    @property
    def algorithm(self) -> SignatureAlgorithm:
        """The signature's algorithm, as it stands beside the signature."""
        return self.template.algorithm

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """All of them, with their values."""
        return tuple(map(self._own, self.template.extensions))

    def extension(self, oid: str) -> Extension | None:
        """The extension of that OID, if there is one."""
        found = self.template.extension(oid)
        return None if found is None else self._own(found)

    def _own(self, extension: Extension) -> Extension:
        return extension if extension.oid != OID_HWID else extension._replace(value=self.hwid or b"")

    def basic_constraints(self) -> BasicConstraints | None:
        """BasicConstraints, if there are any; LayoutError when they are malformed."""
        return self.template.basic_constraints()

    def key_usage(self) -> frozenset[int] | None:
        """Bit numbers of KeyUsage (5 keyCertSign, 6 cRLSign); None without it, LayoutError when malformed."""
        return self.template.key_usage()


def split_hwid(extensions: tuple[Extension, ...]) -> tuple[tuple[Extension, ...], bytes | None]:
    """Extensions as a template lists them, and the value of the HWID, if it is among them."""
    hwid = next((each.value for each in extensions if each.oid == OID_HWID), None)
    common = tuple(each if each.oid != OID_HWID else each._replace(value=b"") for each in extensions)
    return common, hwid


@lru_cache(maxsize=64)
def _basic_constraints(found: Extension) -> BasicConstraints:
    where = "certificate.basicConstraints"
    cursor = Der(der.unwrap(found.value, der.SEQUENCE, where), where)
    ca = cursor.peek() == der.BOOLEAN and der.boolean(cursor.value(der.BOOLEAN, "cA"), where)
    path_length = None
    if cursor.peek() is not None:
        path_length = der.integer(cursor.value(der.INTEGER, "pathLenConstraint"), where)
    cursor.end()
    return BasicConstraints(ca=ca, path_length=path_length, critical=found.critical)


@lru_cache(maxsize=64)
def _key_usage(value: bytes) -> frozenset[int]:
    # AMD's intermediates encode a trailing zero bit (03 02 01 04), which DER forbids: it is let pass
    where = "certificate.keyUsage"
    body = der.unwrap(value, der.BIT_STRING, where)
    if not 2 <= len(body) <= 3 or body[0] > 7:
        raise LayoutError(
            f"{where}: BIT STRING {body.hex() or 'empty'}, wanted 1..9 bits (RFC 5280, 4.2.1.3)"
        )
    count = 8 * (len(body) - 1) - body[0]
    return frozenset(n for n in range(count) if body[1 + n // 8] & 0x80 >> n % 8)
