"""Rules K1 to K9 and M1 to M5: what the certificates say of each other, of the time, and of one machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from swsnp.abi.snp_report import (
    SIGNATURE_OFFSET,
    SIGNED_SIZE,
    AttestationReport,
    Product,
    SigningKey,
    product_of_cpu,
)
from swsnp.certs.role import Role, name_text
from swsnp.certs.signature import AMD_PSS, rsa_signed
from swsnp.certs.x509_reader import EcKey
from swsnp.crypto import ecdsa

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from swsnp.certs.lint_content import Held, HeldCrl
    from swsnp.certs.lint_result import Findings

__all__ = ["Expected", "check_chains", "check_crls", "check_match"]

_KIND = {SigningKey.VCEK: Role.VCEK, SigningKey.VLEK: Role.VLEK}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a table has to fit. What is None is not looked at, and told as such.

    Attributes:
        roots: SHA-256 of SubjectPublicKeyInfo, in hexadecimal, of the roots that count, per product line.
        product: the machine's product line.
        chip_id: the chip's CHIP_ID, 64 bytes, or its HWID: 64 bytes, 8 on Turin.
        tcb: REPORTED_TCB's components by name; those left out are not compared.
        report: a report of the machine, 1,184 bytes; its own fields are used where the others are None.
    """

    roots: Mapping[Product, frozenset[str]] | None = None
    product: Product | None = None
    chip_id: bytes | None = None
    tcb: Mapping[str, int] | None = None
    report: bytes | None = None


def check_chains(
    held: list[Held], findings: Findings, *, at: datetime, expected: Expected
) -> list[list[Held]]:
    """K1 to K6, as `lint_result.RULES` has them.

    Returns:
        For each leaf the leaf and as many of its issuers as there are.
    """
    leaves = [each for each in held if each.role.is_leaf]
    names = ", ".join(each.certificate.subject_cn for each in held) or "no certificate"
    findings.holds("K1", bool(leaves), names, "SEV-VCEK or SEV-VLEK")
    chains = [_chain(leaf, held) for leaf in leaves]
    for chain in chains:
        _check_complete(chain, findings)
    # what several chains share is judged once
    links = {(id(below), id(above)): (below, above) for chain in chains for below, above in _links(chain)}
    for below, above in links.values():
        _check_link(below, above, findings)
    for each in held:
        certificate = each.certificate
        span = f"{certificate.not_before:%Y-%m-%d %H:%M:%S} to {certificate.not_after:%Y-%m-%d %H:%M:%S}"
        valid = certificate.not_before <= at <= certificate.not_after
        got = f"{at:%Y-%m-%d %H:%M:%S} for {certificate.subject_cn}"
        findings.holds("K5", valid, got, span, entry=each.entry)
    _check_roots((each for each in held if each.role is Role.ARK), expected, findings)
    return chains


def _chain(leaf: Held, held: list[Held]) -> list[Held]:
    """The leaf and its issuers up to the root; of several that could be it, the one with the right name."""
    chain = [leaf]
    while chain[-1].role is not Role.ARK:
        below = chain[-1]
        above = [each for each in held if each.role is below.role.issuer]
        above.sort(key=lambda each: each.certificate.subject != below.certificate.issuer)
        if not above:
            break
        chain.append(above[0])
    return chain


def _check_complete(chain: list[Held], findings: Findings) -> None:
    """K2."""
    top = chain[-1]
    found = ", ".join(each.certificate.subject_cn for each in chain)
    findings.holds(
        "K2", top.role is Role.ARK, f"{found} alone", f"{top.certificate.issuer_cn} too", entry=chain[0].entry
    )


def _links(chain: list[Held]) -> list[tuple[Held, Held]]:
    """Who is signed by whom; the root by itself."""
    links = list(pairwise(chain))
    return [*links, (chain[-1], chain[-1])] if chain[-1].role is Role.ARK else links


def _check_link(below: Held, above: Held, findings: Findings) -> None:
    """K3, K4."""
    named = below.certificate.issuer == above.certificate.subject
    issuer = name_text(below.certificate.issuer)
    findings.holds("K3", named, f"issuer {issuer}", name_text(above.certificate.subject), entry=below.entry)
    findings.holds(
        "K4",
        rsa_signed(below.certificate, above.certificate),
        f"{below.certificate.subject_cn} signed by another key",
        f"the key of {above.certificate.subject_cn} in entry {above.entry}",
        entry=below.entry,
    )


def _check_roots(roots: Iterable[Held], expected: Expected, findings: Findings) -> None:
    """K6."""
    if expected.roots is None:
        findings.skip("K6", "no roots were chosen")
        return
    for each in roots:
        got = hashlib.sha256(each.certificate.spki).hexdigest()
        wanted = () if each.product is None else expected.roots.get(each.product, ())
        shown = f"{each.certificate.subject_cn} with a key of SHA-256 {got}"
        findings.holds("K6", got in wanted, shown, ", ".join(wanted) or "no such root", entry=each.entry)


def check_crls(
    crls: list[HeldCrl], held: list[Held], chains: list[list[Held]], findings: Findings, *, at: datetime
) -> None:
    """K7 to K9, as `lint_result.RULES` has them."""
    if not crls:
        for rule in ("K7", "K8", "K9"):
            findings.skip(rule, "the table has no CRL")
    roots = [each.certificate for each in held if each.role is Role.ARK]
    issuers = {id(each): each for chain in chains for each in chain[1:]}
    for each in crls:
        crl = each.crl
        mine = any(
            crl.issuer == root.subject and crl.algorithm.pss == AMD_PSS and rsa_signed(crl, root)
            for root in roots
        )
        wanted = " or ".join(root.subject_cn for root in roots) or "a root in the table"
        findings.holds("K7", mine, f"a CRL of {name_text(crl.issuer)}", f"one by {wanted}", entry=each.entry)
        current = crl.next_update is not None and crl.this_update <= at <= crl.next_update
        span = f"{crl.this_update:%Y-%m-%d %H:%M:%S} to {crl.next_update or 'no nextUpdate'}"
        findings.holds("K8", current, f"{at:%Y-%m-%d %H:%M:%S}", span, entry=each.entry)
        for above in issuers.values():
            listed = above.certificate.serial in crl.revoked
            got = f"{above.certificate.subject_cn}, serial {above.certificate.serial:#x}, revoked"
            findings.holds(
                "K9", not listed, got, "a certificate that the CRL does not name", entry=above.entry
            )


def check_match(held: list[Held], findings: Findings, expected: Expected) -> None:
    """M1 to M5, as `lint_result.RULES` has them."""
    leaves = [each for each in held if each.role.is_leaf]
    report = None if expected.report is None else AttestationReport.parse(expected.report)
    if report is not None and expected.report is not None:
        leaves = _check_signer(leaves, report, expected.report, findings)
    else:
        for rule in ("M4", "M5"):
            findings.skip(rule, "no report was given")
    for leaf in leaves:
        _check_leaf(leaf, report, expected, findings)


def _check_signer(
    leaves: list[Held], report: AttestationReport, signed: bytes, findings: Findings
) -> list[Held]:
    """M4, M5. The leaves of the kind that the report asks for."""
    number = report.signer_info.signing_key
    kind = _KIND[SigningKey(number)] if number in (SigningKey.VCEK, SigningKey.VLEK) else None
    mine = [each for each in leaves if each.role is kind]
    found = ", ".join(each.role for each in leaves) or "no leaf"
    findings.holds("M4", bool(mine), found, kind or f"none: SIGNING_KEY is {number}")
    for each in mine:
        key = each.certificate.key
        good = isinstance(key, EcKey) and bool(key.x) and _signed(signed, key)
        findings.holds("M5", good, f"a report that this {kind} did not sign", "its own", entry=each.entry)
    return mine


def _signed(report: bytes, key: EcKey) -> bool:
    return ecdsa.verify(report[:SIGNED_SIZE], report[SIGNATURE_OFFSET:], x=key.x, y=key.y)


def _check_leaf(leaf: Held, report: AttestationReport | None, expected: Expected, findings: Findings) -> None:
    """M1 to M3 of one leaf."""
    profile = leaf.profile
    product = expected.product or (None if report is None else _product(report))
    if product is None:
        findings.skip("M3", "no product line was given")
    elif leaf.product is not None:
        findings.holds("M3", leaf.product is product, leaf.product.value, product.value, entry=leaf.entry)
    if profile is None:
        for rule in ("M1", "M2"):
            findings.skip(rule, "the leaf's extensions cannot be read (E5)")
        return
    tcb = expected.tcb
    if tcb is None and report is not None:
        tcb = report.reported_tcb.decode(product or profile.product)
    if tcb is None:
        findings.skip("M2", "no TCB was given")
    else:
        got, wanted = _levels(profile.tcb, tcb), _levels(tcb, tcb)
        findings.holds("M2", got == wanted, got, wanted, entry=leaf.entry)
    _check_chip(leaf, expected.chip_id or (None if report is None else report.chip_id), findings)


def _levels(tcb: Mapping[str, int], names: Iterable[str]) -> str:
    return " ".join(f"{name}={tcb.get(name, 'none')}" for name in names)


def _product(report: AttestationReport) -> Product | None:
    """Version 2 does not say; then the leaf is taken by its word."""
    return None if report.version < 3 else product_of_cpu(report.cpuid_fam_id, report.cpuid_mod_id)


def _check_chip(leaf: Held, chip_id: bytes | None, findings: Findings) -> None:
    """M1. The HWID is CHIP_ID's first bytes, the rest of which is zero."""
    hwid = None if leaf.profile is None else leaf.profile.hwid
    if chip_id is None:
        findings.skip("M1", "no chip id was given")
    elif not any(chip_id):
        findings.skip("M1", "the report's CHIP_ID is masked")
    elif hwid is None:
        findings.skip("M1", "a VLEK names no chip")
    else:
        same = chip_id.ljust(64, b"\0") == hwid.ljust(64, b"\0")
        findings.holds("M1", same, hwid.hex(), chip_id.hex(), entry=leaf.entry)
