"""Checks C1 to C10: from the leaf to a root that the caller chose. Source: AMD 57230; RFC 5280.

Certificates are told apart by what is in them, never by their place in a file or table.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.snp_report import Product, SigningKey
from swsnp.certs.crl import OID_AUTHORITY_KEY_ID, OID_CRL_NUMBER
from swsnp.certs.kds_extensions import LeafProfile, issuing_product, leaf_profile
from swsnp.certs.signature import pss_signed
from swsnp.certs.x509 import (
    OID_P384,
    Certificate,
    EcKey,
    RsaKey,
)
from swsnp.errors import LayoutError
from swsnp.verify.memory import Memory
from swsnp.verify.result import Findings, mask
from swsnp.verify.roots import spki_sha256
from swsnp.verify.shared_checks import check_algorithm, check_shared, known_shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swsnp.certs.crl import Crl
    from swsnp.verify.policy import Policy
    from swsnp.verify.result import Finding
    from swsnp.verify.roots import Roots

__all__ = [
    "Chain",
    "Judged",
    "Signatures",
    "check_chain",
    "check_present",
    "check_revocation",
    "check_times",
    "judge",
    "select_chain",
]

_KIND: Final = {int(SigningKey.VCEK): "vcek", int(SigningKey.VLEK): "vlek"}
_RSA: Final = RsaKey(size=4096, exponent=65537)
_CRL_SIGN: Final = 6
_PRESENT: Final = mask("C1")
_CHAIN: Final = mask("C2", "C3", "C4", "C5", "C6", "C7", "C9")
_VALID: Final = mask("C8")
_REVOCATION: Final = mask("C10")
_LAX_LEVEL: Final = 127
_LARGEST_KEPT: Final = 16 * 1024
"""Bytes of three certificates that are worth remembering."""
_NEVER: Final = datetime.min.replace(tzinfo=UTC)
_STRUCT_VERSIONS: Final = (0, 1)
_CRL_UNDERSTOOD: Final = frozenset((OID_AUTHORITY_KEY_ID, OID_CRL_NUMBER))


class Chain(NamedTuple):
    """Leaf, intermediate (ASK or ASVK) and root (ARK)."""

    leaf: Certificate
    intermediate: Certificate
    root: Certificate

    def named(self) -> tuple[tuple[str, Certificate], ...]:
        """Name and certificate, root first."""
        return ((self.root.subject_cn, self.root), *self.below_root())

    def below_root(self) -> tuple[tuple[str, Certificate], ...]:
        """The same without the root."""
        return (self.intermediate.subject_cn, self.intermediate), (self.leaf.subject_cn, self.leaf)

    def validity(self) -> tuple[datetime, datetime]:
        """The first and the last moment at which all three are valid."""
        leaf, intermediate, root = self.leaf, self.intermediate, self.root
        return (
            max(leaf.not_before, intermediate.not_before, root.not_before),
            min(leaf.not_after, intermediate.not_after, root.not_after),
        )


class Judged(NamedTuple):
    """What was found of one leaf's chain, whatever the time and the report are.

    `since` and `until` bound the time at which all of it is valid; `crls` are those of the chain's root.
    """

    chain: Chain | None
    profile: LeafProfile | None
    noted: tuple[Finding, ...]
    made: int
    since: datetime
    until: datetime
    crls: tuple[Crl, ...]


class Signatures:
    """`certs.signature.rsa_signed` with a memory of the last `size` answers; safe for threads."""

    def __init__(self, size: int) -> None:
        self._known: Memory[tuple[bytes, bytes], bool] = Memory(size)

    def signed(self, signed: Certificate | Crl, issuer: Certificate) -> bool:
        """Whether the issuer's key made this signature."""
        key = (signed.der, issuer.der)
        found = self._known.get(key)
        if found is None:
            found = pss_signed(signed.tbs, signed.signature, issuer.spki)
            self._known.keep(key, found)
        return found


def select_chain(
    leaf: Certificate, candidates: Sequence[Certificate], roots: Roots | None, signatures: Signatures
) -> Chain | None:
    """Leaf, issuer and root by common name; of several, the one that signed, a chosen root first."""
    chosen = () if roots is None else roots.certificates
    intermediate = _issuer_of(leaf, candidates, signatures)
    if intermediate is None:
        return None
    root = _issuer_of(intermediate, (*chosen, *candidates), signatures)
    return None if root is None else Chain(leaf=leaf, intermediate=intermediate, root=root)


def _issuer_of(
    certificate: Certificate, candidates: Sequence[Certificate], signatures: Signatures
) -> Certificate | None:
    name = certificate.template.issuer_cn
    named = [each for each in candidates if each.template.subject_cn == name and each is not certificate]
    if len(named) > 1 and len({each.der for each in named}) > 1:
        return next((each for each in named if signatures.signed(certificate, each)), named[0])
    return named[0] if named else None


def judge(
    leaf: Certificate | None,
    candidates: Sequence[Certificate],
    crls: Sequence[Crl],
    *,
    signing_key: int,
    product: Product | None,
    roots: Roots | None,
    policy: Policy,
    signatures: Signatures,
    lax: bool,
) -> Judged:
    """All that does not depend on the time: C1 to C7, C9, and C10 but for its dates."""
    findings = Findings(lax=lax)
    chain = None if leaf is None else select_chain(leaf, candidates, roots, signatures)
    check_present(candidates, signing_key, leaf, chain, findings)
    profile = check_chain(chain, product, findings, roots=roots, signatures=signatures)
    mine = check_revocation(chain, crls, findings, policy=policy, signatures=signatures)
    since, until = (_NEVER, _NEVER) if chain is None else chain.validity()
    return Judged(
        chain=chain,
        profile=profile,
        noted=tuple(findings.noted),
        made=findings.made,
        since=since,
        until=until,
        crls=mine,
    )


def check_present(
    candidates: Sequence[Certificate],
    signing_key: int,
    leaf: Certificate | None,
    chain: Chain | None,
    findings: Findings,
) -> None:
    """C1. The evidence holds a leaf of the kind that SIGNING_KEY names, its issuer, and their root."""
    if leaf is None:
        kind = _KIND.get(signing_key)
        wanted = f"SEV-{kind.upper()}" if kind else "one that can sign reports"
        findings.fail("C1", "leaf", _listed(candidates), wanted)
    elif chain is None:
        wanted = f"{leaf.issuer_cn} and the root that signed it"
        findings.fail("C1", "issuers", _listed(candidates), wanted)
    findings.made |= _PRESENT


def _listed(candidates: Sequence[Certificate]) -> str:
    return ", ".join(each.subject_cn for each in candidates) or "no certificate"


def check_chain(
    chain: Chain | None,
    product: Product | None,
    findings: Findings,
    *,
    roots: Roots | None,
    signatures: Signatures,
) -> LeafProfile | None:
    """The chain's certificates and what they say of each other.

    C2. Issuer and subject names are equal byte for byte; common names are SEV-{P} (VLEK: SEV-VLEK-{P}) and
        ARK-{P}; P is the report's product.
    C3. RSA-4096 with exponent 65537 above, P-384 below.
    C4. RSASSA-PSS with SHA-384, MGF1-SHA-384 and 48 bytes of salt, inside and outside the signed part alike;
        trailerField absent or 1.
    C5. The root's key is one of `roots` for this product.
    C6. The root signed itself and the intermediate, which signed the leaf.
    C7. BasicConstraints and KeyUsage let the CAs sign certificates, and the leaf not.
    C9. No critical extension is unknown; the leaf's extensions are complete and in form.

    Returns:
        What the leaf says of itself; None when it cannot be read.
    """
    if chain is None:
        for check in ("C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9"):
            findings.skip(check, "no complete chain")
        return None
    leaf, intermediate, root = chain.leaf, chain.intermediate, chain.root
    small = len(leaf.der) + len(intermediate.der) + len(root.der) <= _LARGEST_KEPT
    shared = (known_shared if small else check_shared)(
        leaf.template, intermediate.template, root.template, product
    )
    findings.take(shared, 0)
    _check_keys(chain, findings)
    _check_root(chain, product, roots, findings)
    _check_signatures(chain, product, roots, signatures, findings)
    profile = _check_profile(leaf, findings)
    findings.made |= _CHAIN
    return profile


def check_times(judged: Judged, at: datetime, policy: Policy, findings: Findings) -> None:
    """What has to be looked at again for every report.

    C8. `at` is inside every validity; with `allow_expired_leaf`, the leaf may have expired.
    C10. `at` is inside the time of every CRL of the root, and no CRL is older than `maximum_crl_age_s`.
    """
    if judged.chain is None:
        return
    if not judged.since <= at <= judged.until:
        _check_validity(judged.chain, at, policy, findings)
    findings.made |= _VALID
    for crl in judged.crls:
        _check_crl_time(crl, at, policy, findings)


def _check_keys(chain: Chain, findings: Findings) -> None:
    for each in (chain.root, chain.intermediate):
        if each.key != _RSA:
            findings.fail("C3", f"key of {each.subject_cn}", each.key, _RSA)
    key = chain.leaf.key
    if not (isinstance(key, EcKey) and key.curve == OID_P384 and key.x):
        findings.fail("C3", f"key of {chain.leaf.subject_cn}", key, "an uncompressed point of P-384")


def _check_root(chain: Chain, product: Product | None, roots: Roots | None, findings: Findings) -> None:
    if roots is None:
        findings.fail("C5", "roots", "none", "Roots.amd() or Roots.of(...)")
    elif not roots.pinned(chain.root, product):
        name = f"SHA-256 of the key of {chain.root.subject_cn}"
        findings.fail("C5", name, spki_sha256(chain.root), "a chosen root's")


def _check_signatures(
    chain: Chain, product: Product | None, roots: Roots | None, signatures: Signatures, findings: Findings
) -> None:
    links = ((chain.root, chain.root), (chain.intermediate, chain.root), (chain.leaf, chain.intermediate))
    listed = roots if roots is not None and roots.known else None
    for signed, issuer in links:
        known = listed is not None and listed.vouches(signed, chain.root, product)
        good = known or signatures.signed(signed, issuer)
        if not good:
            wanted = f"one by {issuer.subject_cn}"
            findings.fail("C6", f"signature of {signed.subject_cn}", "another's", wanted)


def _check_validity(chain: Chain, at: datetime, policy: Policy, findings: Findings) -> None:
    for name, each in chain.named():
        span = f"{each.not_before:%Y-%m-%d %H:%M:%S}..{each.not_after:%Y-%m-%d %H:%M:%S}"
        if each.not_before <= at <= each.not_after:
            continue
        if each is chain.leaf and policy.allow_expired_leaf and at > each.not_after:
            findings.warn("C8", f"{name} has expired: {span}", field=name, got=at)
        else:
            findings.fail("C8", f"validity of {name}", f"{at:%Y-%m-%d %H:%M:%S}", span)


def _check_profile(leaf: Certificate, findings: Findings) -> LeafProfile | None:
    product = issuing_product(leaf)
    if product is None:
        findings.fail("C9", "extensions of the leaf", "no product", "an issuer that names one")
        return None
    try:
        profile = leaf_profile(leaf, product)
    except LayoutError as error:
        findings.fail("C9", "extensions of the leaf", error, f"the profile of {product.value}")
        return None
    if profile.struct_version not in _STRUCT_VERSIONS:
        findings.warn(
            "C9", f"structVersion {profile.struct_version} is not known here", field="structVersion"
        )
    for oid in profile.unknown:
        findings.warn("C9", f"extension {oid} is not known here", field=oid)
    if findings.lax:
        _check_as_go_does(profile, findings)
    return profile


def _check_as_go_does(profile: LeafProfile, findings: Findings) -> None:
    """What go-sev-guest cannot read: Turin's extensions, and levels above 127 but of microcode."""
    if profile.product.is_fam_1a:
        findings.fail("C9", "fmcSPL and HWID", "Turin's", "a profile that go-sev-guest knows")
    high = [name for name, level in profile.tcb.items() if level > _LAX_LEVEL and name != "microcode"]
    findings.holds("C9", not high, "levels of the leaf", ", ".join(high), f"at most {_LAX_LEVEL}")


def check_revocation(
    chain: Chain | None,
    crls: Sequence[Crl],
    findings: Findings,
    *,
    policy: Policy,
    signatures: Signatures,
) -> tuple[Crl, ...]:
    """C10. With a CRL of this root: signed by it, and not naming root or intermediate.

    Leaves all have serial number 0 and are never revoked one by one. CRLs of other issuers are passed over.
    `require_crl` and `maximum_crl_age_s` refuse a chain without any.

    Returns:
        The CRLs of this root, whose time `check_times` looks at.
    """
    mine = () if chain is None or not crls else _of_root(chain.root, crls)
    if chain is None or not mine:
        if policy.require_crl or policy.maximum_crl_age_s is not None:
            findings.fail("C10", "CRL", f"{len(crls)} of other issuers", "one by the chain's root")
        return ()
    for crl in mine:
        _check_crl(crl, chain, signatures, findings)
    findings.made |= _REVOCATION
    return mine


def _of_root(root: Certificate, crls: Sequence[Crl]) -> tuple[Crl, ...]:
    return tuple(each for each in crls if each.issuer == root.subject)


def _check_crl(crl: Crl, chain: Chain, signatures: Signatures, findings: Findings) -> None:
    check_algorithm("C10", "the CRL", crl.inner_algorithm, crl.algorithm, findings)
    signed = signatures.signed(crl, chain.root)
    findings.holds("C10", _signs_crls(chain.root), "KeyUsage of the root", "no cRLSign", "cRLSign (6)")
    findings.holds("C10", signed, "signature of the CRL", "another's", f"one by {chain.root.subject_cn}")
    strange = [each.oid for each in crl.extensions if each.critical and each.oid not in _CRL_UNDERSTOOD]
    findings.holds("C10", not strange, "critical extensions of the CRL", ", ".join(strange), "known ones")
    for name, each in chain.named()[:2]:
        listed = each.serial in crl.revoked
        findings.holds("C10", not listed, f"serial number of {name}", f"{each.serial:#x}, revoked", "another")


def _signs_crls(root: Certificate) -> bool:
    """RFC 5280, 6.3.3 (f): KeyUsage, where there is one, has cRLSign."""
    try:
        usage = root.key_usage()
    except LayoutError:
        return False  # C7 says what is wrong with it
    return usage is None or _CRL_SIGN in usage


def _check_crl_time(crl: Crl, at: datetime, policy: Policy, findings: Findings) -> None:
    if crl.next_update is None or not crl.this_update <= at <= crl.next_update:
        span = f"{crl.this_update:%Y-%m-%d}..{crl.next_update or 'never'}"
        findings.fail("C10", "time of the CRL", f"{at:%Y-%m-%d %H:%M:%S}", span)
    oldest = policy.maximum_crl_age_s
    if oldest is not None and (at - crl.this_update).total_seconds() > oldest:
        got = f"{(at - crl.this_update).total_seconds():.0f} s"
        findings.fail("C10", "age of the CRL", got, f"at most {oldest} s")
