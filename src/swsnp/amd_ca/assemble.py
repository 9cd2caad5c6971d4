"""DER of certificates and CRLs in the key service's shape: names, times, algorithms, extensions.

Source: AMD 57230 for the profile; RFC 5280 and 4055 for the encoding; genuine certificates for the order of
fields and the types of strings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asn1crypto import core
from asn1crypto.parser import emit

from swsnp.abi.kds import (
    OID_CSP_ID,
    OID_HWID,
    OID_PRODUCT_NAME,
    OID_STRUCT_VERSION,
    SPL_OIDS,
    SPL_RESERVED_OIDS,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from swsnp.abi.snp_report import Product, TcbVersion

__all__ = [
    "PSS",
    "PSS_EXPLICIT",
    "Tbs",
    "authority_key_id",
    "ca_extensions",
    "crl_tbs",
    "ec_spki",
    "leaf_extensions",
    "name",
    "root_extensions",
    "rsa_spki",
    "signed",
    "tbs_certificate",
]

_UNIVERSAL: Final = 0
_CONTEXT: Final = 2
_PRIMITIVE: Final = 0
_CONSTRUCTED: Final = 1
_SEQUENCE: Final = 16
_SET: Final = 17
_YEAR_OF_GENERALIZED_TIME: Final = 2050
_SHA384: Final = "2.16.840.1.101.3.4.2.2"
_MGF1: Final = "1.2.840.113549.1.1.8"
_RSASSA_PSS: Final = "1.2.840.113549.1.1.10"
_RSA: Final = "1.2.840.113549.1.1.1"
_EC: Final = "1.2.840.10045.2.1"
_P384: Final = "1.3.132.0.34"
_SALT_LENGTH: Final = 48
_RDN: Final = (
    ("2.5.4.11", "Engineering"),
    ("2.5.4.6", "US"),
    ("2.5.4.7", "Santa Clara"),
    ("2.5.4.8", "CA"),
)
_COUNTRY: Final = "2.5.4.6"
_ORGANIZATION: Final = "2.5.4.10"
_COMMON_NAME: Final = "2.5.4.3"
_SUBJECT_KEY_ID: Final = "2.5.29.14"
_KEY_USAGE: Final = "2.5.29.15"
_BASIC_CONSTRAINTS: Final = "2.5.29.19"
_CRL_NUMBER: Final = "2.5.29.20"
_CRL_DISTRIBUTION_POINTS: Final = "2.5.29.31"
_AUTHORITY_KEY_ID: Final = "2.5.29.35"
_CERT_SIGN_CRL_SIGN: Final = bytes.fromhex("03020106")
_CERT_SIGN: Final = bytes.fromhex("03020104")
"""With a trailing zero bit that DER would leave out: so do the genuine intermediates."""
_MILAN_ORDER: Final = "boot_loader tee 4 5 6 7 snp microcode"
_TURIN_ORDER: Final = "fmc boot_loader tee snp 5 6 7 microcode"
_CA: Final = bytes.fromhex("30030101ff")
_CA_PATHLEN_0: Final = bytes.fromhex("30060101ff020100")


def _sequence(*parts: bytes) -> bytes:
    return bytes(emit(_UNIVERSAL, _CONSTRUCTED, _SEQUENCE, b"".join(parts)))


def _set(*parts: bytes) -> bytes:
    return bytes(emit(_UNIVERSAL, _CONSTRUCTED, _SET, b"".join(parts)))


def _tagged(number: int, *parts: bytes) -> bytes:
    return bytes(emit(_CONTEXT, _CONSTRUCTED, number, b"".join(parts)))


def _oid(dotted: str) -> bytes:
    return bytes(core.ObjectIdentifier(dotted).dump())


def _integer(value: int) -> bytes:
    return bytes(core.Integer(value).dump())


def _octets(value: bytes) -> bytes:
    return bytes(core.OctetString(value).dump())


def _bits(value: bytes) -> bytes:
    return bytes(core.OctetBitString(value).dump())


def _ia5(text: str) -> bytes:
    return bytes(core.IA5String(text).dump())


_NULL: Final = bytes(core.Null().dump())
_SHA384_ID: Final = _sequence(_oid(_SHA384), _NULL)
_PSS_FIELDS: Final = (
    _tagged(0, _SHA384_ID),
    _tagged(1, _sequence(_oid(_MGF1), _SHA384_ID)),
    _tagged(2, _integer(_SALT_LENGTH)),
)
PSS: Final = _sequence(_oid(_RSASSA_PSS), _sequence(*_PSS_FIELDS))
"""RSASSA-PSS, SHA-384, salt 48: as in CRLs, and in leaves since about November 2024."""
PSS_EXPLICIT: Final = _sequence(_oid(_RSASSA_PSS), _sequence(*_PSS_FIELDS, _tagged(3, _integer(1))))
"""The same with trailerField 1 spelled out, although it is the default: as in CA certificates."""


def name(common_name: str, organization: str) -> bytes:
    """A Name in the genuine order: OU, C, L, ST, O, CN; C is a PrintableString, the others UTF8String."""
    pairs = (*_RDN, (_ORGANIZATION, organization), (_COMMON_NAME, common_name))
    return _sequence(*(_set(_sequence(_oid(oid), _directory_string(oid, text))) for oid, text in pairs))


def _directory_string(oid: str, text: str) -> bytes:
    kind = core.PrintableString if oid == _COUNTRY else core.UTF8String
    return bytes(kind(text).dump())


def _time(moment: datetime) -> bytes:
    kind = core.GeneralizedTime if moment.year >= _YEAR_OF_GENERALIZED_TIME else core.UTCTime
    return bytes(kind(moment).dump())


def rsa_spki(modulus: int, exponent: int) -> tuple[bytes, bytes]:
    """SubjectPublicKeyInfo of an RSA key, and the RSAPublicKey inside (whose SHA-1 is the key identifier)."""
    key = _sequence(_integer(modulus), _integer(exponent))
    return _sequence(_sequence(_oid(_RSA), _NULL), _bits(key)), key


def ec_spki(x: bytes, y: bytes) -> bytes:
    """SubjectPublicKeyInfo of a P-384 point, uncompressed; x and y big-endian, 48 bytes each."""
    return _sequence(_sequence(_oid(_EC), _oid(_P384)), _bits(b"\x04" + x + y))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tbs:
    """What goes into a certificate; names, keys, algorithm and extensions are DER."""

    serial: int
    algorithm: bytes
    issuer: bytes
    subject: bytes
    not_before: datetime
    not_after: datetime
    spki: bytes
    extensions: tuple[bytes, ...]


def tbs_certificate(tbs: Tbs) -> bytes:
    """TBSCertificate, version 3."""
    return _sequence(
        _tagged(0, _integer(2)),
        _integer(tbs.serial),
        tbs.algorithm,
        tbs.issuer,
        _sequence(_time(tbs.not_before), _time(tbs.not_after)),
        tbs.subject,
        tbs.spki,
        _tagged(3, _sequence(*tbs.extensions)),
    )


def signed(to_be_signed: bytes, algorithm: bytes, signature: bytes) -> bytes:
    """A certificate or CRL from its three parts."""
    return _sequence(to_be_signed, algorithm, _bits(signature))


def _extension(oid: str, value: bytes, *, critical: bool = False) -> bytes:
    flag = bytes(core.Boolean(True).dump()) if critical else b""
    return _sequence(_oid(oid), flag, _octets(value))


def authority_key_id(key_id: bytes) -> bytes:
    """The extension AuthorityKeyIdentifier with a key identifier alone."""
    return _extension(_AUTHORITY_KEY_ID, _sequence(bytes(emit(_CONTEXT, _PRIMITIVE, 0, key_id))))


def _crl_distribution_point(url: str) -> bytes:
    uri = bytes(emit(_CONTEXT, _PRIMITIVE, 6, url.encode("ascii")))
    return _extension(_CRL_DISTRIBUTION_POINTS, _sequence(_sequence(_tagged(0, _tagged(0, uri)))))


def root_extensions(key_id: bytes, crl_url: str) -> tuple[bytes, ...]:
    """Extensions of an ARK, in the genuine order."""
    return (
        _extension(_KEY_USAGE, _CERT_SIGN_CRL_SIGN, critical=True),
        _extension(_SUBJECT_KEY_ID, _octets(key_id)),
        _extension(_BASIC_CONSTRAINTS, _CA, critical=True),
        _crl_distribution_point(crl_url),
    )


def ca_extensions(key_id: bytes, issuer_key_id: bytes, crl_url: str) -> tuple[bytes, ...]:
    """Extensions of an ASK or ASVK, in the genuine order."""
    return (
        _extension(_SUBJECT_KEY_ID, _octets(key_id)),
        authority_key_id(issuer_key_id),
        _extension(_BASIC_CONSTRAINTS, _CA_PATHLEN_0, critical=True),
        _extension(_KEY_USAGE, _CERT_SIGN, critical=True),
        _crl_distribution_point(crl_url),
    )


def leaf_extensions(
    product: Product, product_name: str, tcb: TcbVersion, *, hwid: bytes | None, csp_id: str | None
) -> tuple[bytes, ...]:
    """Extensions of a VCEK (`hwid`) or VLEK (`csp_id`), in the product's genuine order.

    Args:
        product: Turin has structVersion 1, fmcSPL and no spl4, and its levels in another order.
        product_name: value of the extension productName.
        tcb: patch levels, in the product's layout.
        hwid: the chip id, stored without an inner tag.
        csp_id: the provider's name.
    """
    levels = tcb.decode(product)
    parts = [
        _extension(OID_STRUCT_VERSION, _integer(1 if product.is_fam_1a else 0)),
        _extension(OID_PRODUCT_NAME, _ia5(product_name)),
    ]
    parts += [
        _extension(each, _integer(levels[component] if component else 0))
        for component, each in _level_order(product)
    ]
    if hwid is not None:
        parts.append(_extension(OID_HWID, hwid))
    if csp_id is not None:
        parts.append(_extension(OID_CSP_ID, _ia5(csp_id)))
    return tuple(parts)


def _level_order(product: Product) -> list[tuple[str, str]]:
    """TCB component ("" for a reserved level) and OID, in the order of genuine certificates."""
    fixed = {str(number): oid for number, oid in SPL_RESERVED_OIDS.items()}
    order = _TURIN_ORDER if product.is_fam_1a else _MILAN_ORDER
    return [("", fixed[each]) if each in fixed else (each, SPL_OIDS[each]) for each in order.split()]


def crl_tbs(
    issuer: bytes,
    issuer_key_id: bytes,
    *,
    number: int,
    this_update: datetime,
    next_update: datetime,
    revoked: Iterable[int],
) -> bytes:
    """TBSCertList, version 2; entries carry `this_update` as their date, and no entry leaves the list out."""
    entries = [_sequence(_integer(serial), _time(this_update)) for serial in revoked]
    return _sequence(
        _integer(1),
        PSS,
        issuer,
        _time(this_update),
        _time(next_update),
        _sequence(*entries) if entries else b"",
        _tagged(0, _sequence(authority_key_id(issuer_key_id), _extension(_CRL_NUMBER, _integer(number)))),
    )
