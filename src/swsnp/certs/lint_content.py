"""Rules E1 to E6: what the entries hold, each for itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import CertTableGuid
from swsnp.certs.classify import Form, classify
from swsnp.certs.crl import Crl, read_crl
from swsnp.certs.kds_extensions import LeafProfile, leaf_profile
from swsnp.certs.role import Role, role_of
from swsnp.certs.signature import AMD_PSS
from swsnp.certs.x509_reader import Certificate, EcKey, RsaKey, read
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from swsnp.abi.snp_report import Product
    from swsnp.certs.lint_layout import Slot
    from swsnp.certs.lint_result import Findings

__all__ = ["Held", "HeldCrl", "check_content"]

_ALLOWED: Final = {
    CertTableGuid.VCEK: (Role.VCEK,),
    CertTableGuid.VLEK: (Role.VLEK,),
    CertTableGuid.ASK: (Role.ASK, Role.ASVK),
    CertTableGuid.ARK: (Role.ARK,),
}
_CA_KEY: Final = RsaKey(size=4096, exponent=65537)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A certificate of the table, with the entry that holds it; `profile` where a leaf's can be read."""

    entry: int
    role: Role
    product: Product | None
    certificate: Certificate = field(repr=False)
    profile: LeafProfile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldCrl:
    """A CRL of the table, with the entry that holds it."""

    entry: int
    crl: Crl = field(repr=False)


def check_content(slots: tuple[Slot, ...], findings: Findings) -> tuple[list[Held], list[HeldCrl]]:
    """E1 to E6, as `lint_result.RULES` has them. Entries with other GUIDs are opaque.

    Returns:
        The certificates and CRLs that can be read, told by content.
    """
    held: list[Held] = []
    crls: list[HeldCrl] = []
    # of entries with one GUID the first alone: T9 tells of the others, and a blob may have thousands
    firsts = {each.meant: each for each in reversed(slots)}
    for slot in sorted(firsts.values(), key=lambda each: each.number):
        known = slot.meant in _ALLOWED or slot.meant == CertTableGuid.CRL
        if known and (data := slot.data):
            _check_entry(slot, data, held, crls, findings)
    return held, crls


def _check_entry(slot: Slot, data: bytes, held: list[Held], crls: list[HeldCrl], findings: Findings) -> None:
    """E1 to E4 of one entry."""
    certificates, lists = _objects(slot, data, findings)
    count = len(certificates) + len(lists)
    findings.holds("E3", count <= 1, f"{count} in one", "one", entry=slot.number, offset=slot.offset)
    for certificate in certificates:
        found = role_of(certificate)
        role = None if found is None else found[0]
        findings.holds(
            "E4",
            role in _ALLOWED.get(slot.meant, ()),
            role or f"a certificate of {certificate.subject_cn!r}",
            slot.shown,
            entry=slot.number,
            offset=slot.offset,
        )
        if found is not None:
            held.append(_held(slot, certificate, *found, findings))
    for crl in lists:
        findings.holds(
            "E4", slot.meant == CertTableGuid.CRL, "a CRL", slot.shown, entry=slot.number, offset=slot.offset
        )
        crls.append(HeldCrl(entry=slot.number, crl=crl))


def _objects(slot: Slot, data: bytes, findings: Findings) -> tuple[list[Certificate], list[Crl]]:
    """E1, E2."""
    try:
        found = classify(data, slot.shown)
        if found.form not in (Form.CERTIFICATE, Form.CRL, Form.PEM):
            raise InputError(f"{slot.shown}: {found.form}")
        certificates = [read(each) for each in found.certificates]
        lists = [read_crl(each) for each in found.crls]
    except (InputError, LayoutError) as error:
        wanted = "a CRL" if slot.meant == CertTableGuid.CRL else "a certificate"
        findings.fail("E1", error, wanted, entry=slot.number, offset=slot.offset)
        return [], []
    plain = found.form is not Form.PEM
    findings.holds("E2", plain, f"{slot.shown} in PEM", "DER", entry=slot.number, offset=slot.offset)
    return certificates, lists


def _held(
    slot: Slot, certificate: Certificate, role: Role, product: Product | None, findings: Findings
) -> Held:
    """E5, E6 of one certificate."""
    profile = None
    if role.is_leaf:
        try:
            if product is None:
                raise LayoutError(f"issuer {certificate.issuer_cn!r} names no product line")
            profile = leaf_profile(certificate, product)
        except LayoutError as error:
            wanted = "SEV-{P} and the extensions of its profile"
            findings.fail("E5", error, wanted, entry=slot.number, offset=slot.offset)
    key = certificate.key
    # the reader gives coordinates for uncompressed points of P-384 alone
    good_key = isinstance(key, EcKey) and bool(key.x) if role.is_leaf else key == _CA_KEY
    findings.holds(
        "E6", good_key, key, "P-384" if role.is_leaf else _CA_KEY, entry=slot.number, offset=slot.offset
    )
    inner, outer = certificate.inner_algorithm, certificate.algorithm
    findings.holds(
        "E6",
        outer.pss == AMD_PSS and inner.der == outer.der,
        outer.pss or outer.oid,
        f"{AMD_PSS}, inside and outside what is signed",
        entry=slot.number,
        offset=slot.offset,
    )
    return Held(entry=slot.number, role=role, product=product, certificate=certificate, profile=profile)
