"""Certificates, CRLs and tables as people and programs read them: decoded fields, no judgement."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from swsnp.certs.classify import Form, classify
from swsnp.certs.crl import Crl, read_crl
from swsnp.certs.kds_extensions import leaf_profile
from swsnp.certs.role import name_text, printable, role_of
from swsnp.certs.table import TableEntry, entry_name, is_mixed_endian, npages, parse
from swsnp.certs.x509 import OID_P384, Certificate, EcKey, RsaKey
from swsnp.certs.x509_reader import read
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from swsnp.abi.snp_report import Product
    from swsnp.certs.classify import Classified
    from swsnp.certs.x509_reader import SignatureAlgorithm

__all__ = ["as_dict", "as_lines"]


def as_dict(found: Classified, size: int) -> dict[str, Any]:
    """What was found, JSON-ready.

    Args:
        found: a certificate table, certificates or CRLs.
        size: bytes of the whole file.

    Raises:
        LayoutError: the table or a certificate is malformed; for entries of a table that is told in place.
    """
    shown: dict[str, Any] = {"form": found.form.value, "size": size}
    if found.table is not None:
        entries = parse(found.table)
        shown["npages"] = npages(size)
        shown["entries"] = [_entry(number, each) for number, each in enumerate(entries)]
    else:
        shown.update(_objects(found))
    return shown


def _objects(found: Classified) -> dict[str, Any]:
    return {
        "certificates": [_certificate(read(each)) for each in found.certificates],
        "crls": [_crl(read_crl(each)) for each in found.crls],
    }


def _entry(number: int, entry: TableEntry) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "entry": number,
        "guid": str(entry.guid),
        "name": entry_name(entry.guid),
        "guid_byte_order": "mixed-endian" if is_mixed_endian(entry.guid) else "textual",
        "offset": entry.offset,
        "length": len(entry.data),
    }
    try:
        found = classify(entry.data, f"entry {number}")
        if found.form not in (Form.CERTIFICATE, Form.CRL, Form.PEM):
            raise InputError(f"entry {number}: {found.form}, no certificate or CRL")
        shown["encoding"] = "PEM" if found.form is Form.PEM else "DER"
        shown.update(_objects(found))
    except (InputError, LayoutError) as error:
        shown["sha256"] = hashlib.sha256(entry.data).hexdigest()
        if shown["name"] is not None:
            shown["trouble"] = str(error)
    return shown


def _certificate(certificate: Certificate) -> dict[str, Any]:
    found = role_of(certificate)
    role, product = found or (None, None)
    shown: dict[str, Any] = {
        "role": None if role is None else role.value,
        "product": None if product is None else product.value,
        "subject": name_text(certificate.subject),
        "issuer": name_text(certificate.issuer),
        "serial": f"{certificate.serial:#x}",
        "not_before": _time(certificate.not_before),
        "not_after": _time(certificate.not_after),
        "key": _key(certificate.key),
        "signature": _algorithm(certificate.algorithm),
    }
    if role is not None and role.is_leaf and product is not None:
        shown["leaf"] = _leaf(certificate, product)
    shown["size"] = len(certificate.der)
    shown["sha256"] = hashlib.sha256(certificate.der).hexdigest()
    shown["spki_sha256"] = hashlib.sha256(certificate.spki).hexdigest()
    return shown


def _leaf(certificate: Certificate, product: Product) -> dict[str, Any]:
    try:
        profile = leaf_profile(certificate, product)
    except LayoutError as error:
        return {"trouble": str(error)}
    shown: dict[str, Any] = {
        "struct_version": profile.struct_version,
        "product_name": profile.product_name,
        "tcb": {"raw": profile.tcb_version.to_bytes(8, "little").hex(), **profile.tcb},
    }
    if profile.hwid is not None:
        shown["hwid"] = profile.hwid.hex()
    if profile.csp_id is not None:
        shown["csp_id"] = profile.csp_id
    if profile.unknown:
        shown["unknown_extensions"] = list(profile.unknown)
    return shown


def _crl(crl: Crl) -> dict[str, Any]:
    return {
        "issuer": name_text(crl.issuer),
        "this_update": _time(crl.this_update),
        "next_update": None if crl.next_update is None else _time(crl.next_update),
        "revoked": [f"{serial:#x}" for serial in crl.revoked],
        "signature": _algorithm(crl.algorithm),
        "size": len(crl.der),
        "sha256": hashlib.sha256(crl.der).hexdigest(),
    }


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _key(key: RsaKey | EcKey | None) -> str:
    match key:
        case RsaKey(size=size, exponent=exponent):
            return f"RSA {size}, exponent {exponent}"
        case EcKey(curve=curve):
            return "EC P-384" if curve == OID_P384 else f"EC {curve}"
        case None:
            return "another algorithm"


def _algorithm(algorithm: SignatureAlgorithm) -> str:
    if algorithm.pss is None:
        return algorithm.oid
    pss = algorithm.pss
    return f"RSASSA-PSS {pss.hash}, {pss.mask} {pss.mask_hash}, salt {pss.salt_length}"


def as_lines(shown: dict[str, Any]) -> Iterator[str]:
    """What `as_dict` made, for people."""
    yield f"{shown['form']}: {shown['size']} bytes{_pages(shown)}"
    for entry in shown.get("entries", ()):
        name = entry["name"] or "not known here"
        order = ", GUID in mixed-endian order" if entry["guid_byte_order"] == "mixed-endian" else ""
        yield ""
        yield f"entry {entry['entry']}: {name}, {entry['guid']}{order}"
        yield f"  at {entry['offset']:#x}, {entry['length']} bytes{_encoding(entry)}"
        yield from _content(entry)
    yield from _content(shown)


def _pages(shown: dict[str, Any]) -> str:
    return f", {shown['npages']} page(s), {len(shown['entries'])} entries" if "entries" in shown else ""


def _encoding(entry: dict[str, Any]) -> str:
    return f", {entry['encoding']}" if "encoding" in entry else f", SHA-256 {entry['sha256']}"


def _content(holder: dict[str, Any]) -> Iterator[str]:
    if "trouble" in holder:
        yield f"  cannot be read: {printable(holder['trouble'])}"
    for each in (*holder.get("certificates", ()), *holder.get("crls", ())):
        for field, value in each.items():
            if isinstance(value, dict):
                yield from (f"  {name:16}{_text(one)}" for name, one in value.items())
            else:
                yield f"  {field:16}{_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(each) if name == "raw" else f"{name}={each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not said" if value is None else printable(str(value))
