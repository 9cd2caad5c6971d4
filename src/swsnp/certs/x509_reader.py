"""A small reader of X.509 certificates, made for AMD's.

It reads what general libraries refuse or warn about: serial number 0, and an explicitly encoded default
(trailerField) in the signature's algorithm. TBS, SPKI and name bytes are slices of what came in.
It judges form only; what a certificate is good for is `verify`'s to say.
Source: RFC 5280; RFC 4055 for RSASSA-PSS; AMD 57230.
"""

from __future__ import annotations

import base64
import binascii
import re
from functools import lru_cache
from typing import Final

from asn1crypto import algos

from swsnp.certs import der
from swsnp.certs.der import Der
from swsnp.certs.x509 import (
    OID_P384,
    BasicConstraints,
    Certificate,
    EcKey,
    Extension,
    PssParameters,
    RsaKey,
    SignatureAlgorithm,
    Template,
    split_hwid,
)
from swsnp.certs.x509_siblings import learn, read_sibling
from swsnp.errors import InputError, LayoutError

__all__ = [
    "BasicConstraints",
    "Certificate",
    "EcKey",
    "Extension",
    "PssParameters",
    "RsaKey",
    "SignatureAlgorithm",
    "Template",
    "common_name",
    "read",
    "read_all",
    "read_anew",
    "read_der",
    "read_extensions",
    "read_signature_algorithm",
    "signed_parts",
    "to_der",
    "to_pem",
]

OID_RSASSA_PSS: Final = "1.2.840.113549.1.1.10"
OID_RSA: Final = "1.2.840.113549.1.1.1"
OID_EC: Final = "1.2.840.10045.2.1"
OID_COMMON_NAME: Final = "2.5.4.3"
_LONG_SEQUENCE: Final = bytes((der.SEQUENCE, 0x82))
"""How a DER value of 256 to 65,535 bytes begins: a length of two bytes follows."""
_PEM_MARK: Final = b"-----BEGIN"
_PEM_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s(.*?)-----END \1-----", re.DOTALL)
_EXTENSION_TAGS: Final = (
    (der.OID, der.OCTET_STRING),
    (der.OID, der.BOOLEAN, der.OCTET_STRING),
)
_VERSION_3: Final = bytes.fromhex("a003020102")  # [0] INTEGER 2: DER has no other form
_TEXT_TAGS: Final = {0x0C: "utf-8", 0x13: "ascii", 0x16: "ascii"}
# AttributeError: its classes for ObjectDescriptor, InstanceOf and Real have no value
_ASN1CRYPTO_FAULTS: Final = (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError)


def to_der(data: bytes, *, label: bytes = b"CERTIFICATE") -> tuple[bytes, ...]:
    """The DER objects in a file: all PEM blocks with that label, or the one DER value that is all of it.

    Text around PEM blocks is allowed, as OpenSSL prints it; blocks with other labels are passed over.
    What is one DER value by its header is that, whatever text stands in it.

    Raises:
        InputError: empty, a PEM block that is cut off or not base64, or no block of this kind.
    """
    if not data:
        raise InputError("certificate: got 0 bytes, wanted PEM or DER")
    if data[:2] == _LONG_SEQUENCE and int.from_bytes(data[2:4], "big") == len(data) - 4:
        return (data,)  # told without a look at all of it
    if _PEM_MARK not in data:
        return (data,)
    blocks = _PEM_BLOCK.findall(data)
    if len(blocks) != data.count(_PEM_MARK):
        raise InputError(f"PEM: {data.count(_PEM_MARK)} blocks begin, {len(blocks)} are whole (RFC 7468)")
    found = tuple(_base64(number, text) for number, (kind, text) in enumerate(blocks) if kind == label)
    if not found:
        kinds = ", ".join(sorted({kind.decode() for kind, _ in blocks}))
        raise InputError(f"PEM: got {kinds}, wanted {label.decode()}")
    return found


def to_pem(certificate: bytes, *, label: str = "CERTIFICATE") -> bytes:
    """One DER object as a PEM block with lines of 64 characters."""
    text = base64.b64encode(certificate).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join((f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", "")).encode()


def read_all(data: bytes) -> tuple[Certificate, ...]:
    """Every certificate of a PEM file in its order, or the one of a DER file; errors as `read`."""
    data = bytes(data)
    known = read_sibling(data)  # in form up to its last byte: no need to ask what kind of file it is
    return tuple(map(read_der, to_der(data))) if known is None else (known,)


def read(data: bytes) -> Certificate:
    """Read one certificate, DER or PEM.

    Raises:
        InputError: the PEM text is broken or holds more than one certificate.
        LayoutError: the certificate is malformed, bytes follow it, it is not version 3, or an extension's OID
            stands twice.
    """
    found = to_der(data)
    if len(found) != 1:
        raise InputError(f"PEM: got {len(found)} certificates, wanted one")
    return read_der(found[0])


def signed_parts(data: bytes, where: str) -> tuple[bytes, SignatureAlgorithm, bytes]:
    """What certificates and CRLs have in common: the signed part, the algorithm and the signature."""
    outer = Der(der.unwrap(data, der.SEQUENCE, where), where)
    signed = outer.raw(der.SEQUENCE, "tbs")
    algorithm = read_signature_algorithm(outer.raw(der.SEQUENCE, "signatureAlgorithm"), where)
    signature = der.bit_string(outer.value(der.BIT_STRING, "signature"), f"{where}.signature")
    outer.end()
    return signed, algorithm, signature


@lru_cache(maxsize=64)
def read_signature_algorithm(raw: bytes, where: str) -> SignatureAlgorithm:
    """An AlgorithmIdentifier; for RSASSA-PSS with its parameters.

    Raises:
        LayoutError: malformed, or a trailerField other than 1 (RFC 4055).
    """
    where = f"{where}.signatureAlgorithm"
    cursor = Der(der.unwrap(raw, der.SEQUENCE, where), where)
    oid = der.oid(cursor.value(der.OID, "algorithm"), where)
    pss = None
    if oid == OID_RSASSA_PSS:
        pss = _pss_parameters(cursor.raw(der.SEQUENCE, "parameters"), where)
        cursor.end()
    return SignatureAlgorithm(der=raw, oid=oid, pss=pss)


def read_extensions(cursor: Der, where: str) -> tuple[Extension, ...]:
    """A SEQUENCE OF Extension.

    Raises:
        LayoutError: malformed, or an OID that stands twice (RFC 5280, 4.2).
    """
    found: dict[str, Extension] = {}
    listed = cursor.value(der.SEQUENCE, "extensions")
    for tag, _, start, end in der.spans(listed, f"{where}.extensions"):
        if tag != der.SEQUENCE:
            raise LayoutError(
                f"{where}.extensions: got tag {tag:#04x}, wanted {der.SEQUENCE:#04x} (RFC 5280)"
            )
        one = _extension(listed[start:end], where)
        if one.oid in found:
            raise LayoutError(f"{where}.extensions: {one.oid} stands twice, wanted once (RFC 5280, 4.2)")
        found[one.oid] = one
    return tuple(found.values())


def _extension(one: bytes, where: str) -> Extension:
    parts = der.spans(one, f"{where}.extension")
    tags = tuple([part[0] for part in parts])
    if tags not in _EXTENSION_TAGS:
        shown = " ".join(f"{tag:#04x}" for tag in tags) or "nothing"
        raise LayoutError(
            f"{where}.extension: got {shown}, wanted extnID, critical, extnValue (RFC 5280, 4.1)"
        )
    oid, value = (one[part[2] : part[3]] for part in (parts[0], parts[-1]))
    critical = len(parts) == 3 and der.boolean(one[parts[1][2] : parts[1][3]], where)
    return Extension(oid=der.oid(oid, where), critical=critical, value=value)


def _base64(number: int, text: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise InputError(f"PEM block {number}: not base64: {error}") from None


def read_der(data: bytes) -> Certificate:
    """Read one certificate in DER; LayoutError as `read`."""
    data = bytes(data)
    found = read_sibling(data)
    if found is None:
        found = read_anew(data)
        learn(found)
    return found


def read_anew(data: bytes) -> Certificate:
    """The same, whatever was read before."""
    where = "certificate"
    signed, algorithm, signature = signed_parts(data, where)
    tbs = Der(der.unwrap(signed, der.SEQUENCE, where), where)
    version = tbs.raw(der.explicit(0), "version")
    if version != _VERSION_3:
        raise _another_version(version)
    serial = der.integer(tbs.value(der.INTEGER, "serialNumber"), f"{where}.serialNumber")
    inner = read_signature_algorithm(tbs.raw(der.SEQUENCE, "signature"), where)
    issuer = tbs.raw(der.SEQUENCE, "issuer")
    validity = tbs.inside(der.SEQUENCE, "validity")
    not_before, not_after = der.time(validity, "notBefore"), der.time(validity, "notAfter")
    validity.end()
    subject = tbs.raw(der.SEQUENCE, "subject")
    spki = tbs.raw(der.SEQUENCE, "subjectPublicKeyInfo")
    extensions: tuple[Extension, ...] = ()
    if tbs.peek() is not None:
        tagged = tbs.inside(der.explicit(3), "extensions")
        extensions = read_extensions(tagged, where)
        tagged.end()
    tbs.end()
    common, hwid = split_hwid(extensions)
    template = Template(
        issuer=issuer,
        subject=subject,
        issuer_cn=common_name(issuer, "issuer"),
        subject_cn=common_name(subject, "subject"),
        inner_algorithm=inner,
        algorithm=algorithm,
        extensions=common,
    )
    return Certificate(
        der=data,
        template=template,
        tbs=signed,
        serial=serial,
        not_before=not_before,
        not_after=not_after,
        spki=spki,
        key=_public_key(spki),
        signature=signature,
        hwid=hwid,
    )


def _another_version(raw: bytes) -> LayoutError:
    """What is wrong with it; raised, too, when it is not even an INTEGER in form."""
    where = "certificate.version"
    number = der.integer(der.unwrap(der.unwrap(raw, der.explicit(0), where), der.INTEGER, where), where)
    return LayoutError(f"{where}: got v{number + 1}, wanted v3 (RFC 5280)")


@lru_cache(maxsize=256)
def common_name(name: bytes, field: str) -> str:
    """The one commonName of a Name; empty when there is none or more than one."""
    where = f"certificate.{field}"
    found = []
    relative = Der(der.unwrap(name, der.SEQUENCE, where), where)
    while relative.peek() is not None:
        pairs = relative.inside(der.SET, "rdn")
        while pairs.peek() is not None:
            pair = pairs.inside(der.SEQUENCE, "attribute")
            kind = der.oid(pair.value(der.OID, "type"), where)
            text = _text(pair, where)
            pair.end()
            if kind == OID_COMMON_NAME:
                found.append(text)
    return found[0] if len(found) == 1 else ""


def _text(pair: Der, where: str) -> str:
    tag = pair.peek()
    if tag not in _TEXT_TAGS:
        raise LayoutError(f"{where}: string type {tag}, wanted UTF8, Printable or IA5String (AMD 57230)")
    try:
        return pair.value(tag, "value").decode(_TEXT_TAGS[tag])
    except UnicodeDecodeError as error:
        raise LayoutError(f"{where}: {error.reason} in a string of type {tag:#04x} (X.690)") from None


def _public_key(spki: bytes) -> RsaKey | EcKey | None:
    where = "certificate.subjectPublicKeyInfo"
    info = Der(der.unwrap(spki, der.SEQUENCE, where), where)
    algorithm = info.inside(der.SEQUENCE, "algorithm")
    key = der.bit_string(info.value(der.BIT_STRING, "subjectPublicKey"), where)
    info.end()
    kind = der.oid(algorithm.value(der.OID, "algorithm"), where)
    if kind == OID_RSA:
        algorithm.value(der.NULL, "parameters")
        algorithm.end()
        return _rsa_key(key, where)
    if kind == OID_EC:
        curve = der.oid(algorithm.value(der.OID, "parameters"), where)
        algorithm.end()
        plain = curve == OID_P384 and len(key) == 97 and key[0] == 4
        return EcKey(curve=curve, x=key[1:49] if plain else b"", y=key[49:] if plain else b"")
    return None


def _rsa_key(key: bytes, where: str) -> RsaKey:
    numbers = Der(der.unwrap(key, der.SEQUENCE, where), where)
    modulus = der.integer(numbers.value(der.INTEGER, "modulus"), where)
    exponent = der.integer(numbers.value(der.INTEGER, "publicExponent"), where)
    numbers.end()
    return RsaKey(size=modulus.bit_length(), exponent=exponent)


@lru_cache(maxsize=16)
def _pss_parameters(raw: bytes, where: str) -> PssParameters:
    try:
        native = algos.RSASSAPSSParams.load(raw, strict=True).native
        trailer = native["trailer_field"]
        found = PssParameters(
            hash=str(native["hash_algorithm"]["algorithm"]),
            mask=str(native["mask_gen_algorithm"]["algorithm"]),
            mask_hash=str(native["mask_gen_algorithm"]["parameters"]["algorithm"]),
            salt_length=int(native["salt_length"]),
        )
    except _ASN1CRYPTO_FAULTS as error:
        why = " ".join(str(error).split())  # the library's text has lines of its own
        raise LayoutError(f"{where}: RSASSA-PSS parameters: {why} (RFC 4055)") from None
    if trailer not in ("trailer_field_bc", 1):
        raise LayoutError(f"{where}: trailerField {trailer}, wanted 1 or absent (RFC 4055)")
    return found
