"""Checks C1 to C10: from the leaf to a root that the caller chose. Source: AMD 57230; RFC 5280.

Certificates are told apart by what is in them, never by their place in a file or table.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.kds import ark_name, ask_name, asvk_name
from swsnp.abi.snp_report import Product, SigningKey
from swsnp.certs.crl import OID_AUTHORITY_KEY_ID, OID_CRL_NUMBER
from swsnp.certs.kds_extensions import LEAF_OIDS, LeafProfile, issuing_product, leaf_kind, leaf_profile
from swsnp.certs.signature import AMD_PSS, pss_signed
from swsnp.certs.x509 import (
    OID_BASIC_CONSTRAINTS,
    OID_KEY_USAGE,
    OID_P384,
    Certificate,
    EcKey,
    RsaKey,
    SignatureAlgorithm,
    Template,
)
from swsnp.errors import LayoutError
from swsnp.verify.memory import Memory
from swsnp.verify.result import Findings, mask
from swsnp.verify.roots import spki_sha256

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
_CERT_SIGN: Final = 5
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
_OID_SUBJECT_KEY_ID: Final = "2.5.29.14"
_OID_CRL_DISTRIBUTION_POINTS: Final = "2.5.29.31"
_UNDERSTOOD: Final = frozenset(
    (
        OID_KEY_USAGE,
        OID_BASIC_CONSTRAINTS,
        _OID_SUBJECT_KEY_ID,
        OID_AUTHORITY_KEY_ID,
        _OID_CRL_DISTRIBUTION_POINTS,
        *LEAF_OIDS,
    )
)
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
    shared = (_known_shared if small else _check_shared)(
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


def _check_shared(
    leaf: Template, intermediate: Template, root: Template, product: Product | None
) -> tuple[Finding, ...]:
    """C2, C4, C7, and C9 but for the profile: nothing in them is the chip's own, see docs/adr/0014."""
    findings = Findings()
    _check_names(leaf, intermediate, root, product, findings)
    for each in (root, intermediate, leaf):
        _check_algorithm("C4", each.subject_cn, each.inner_algorithm, each.algorithm, findings)
    _check_usage(leaf, intermediate, root, findings)
    for each in (root, intermediate, leaf):
        for extension in each.extensions:
            if extension.critical and extension.oid not in _UNDERSTOOD:
                name = f"extension of {each.subject_cn}"
                findings.fail("C9", name, f"{extension.oid}, critical", "a known one")
    return tuple(findings.noted)


_known_shared = lru_cache(maxsize=256)(_check_shared)
"""The same, remembered: the chips of a line share their templates."""


def _check_names(
    leaf: Template, intermediate: Template, root: Template, product: Product | None, findings: Findings
) -> None:
    for below, above in ((leaf, intermediate), (intermediate, root), (root, root)):
        if below.issuer != above.subject:
            name = f"issuer of {below.subject_cn}"
            findings.fail("C2", name, below.issuer.hex(), above.subject.hex())
    named = issuing_product(leaf)
    if named is None:
        findings.fail("C2", "issuer of the leaf", leaf.issuer_cn, "SEV-{P}, for a VLEK SEV-VLEK-{P}")
        return
    issuer = ask_name(named) if leaf_kind(leaf) == "vcek" else asvk_name(named)
    findings.holds("C2", intermediate.subject_cn == issuer, "CA", intermediate.subject_cn, issuer)
    findings.holds("C2", root.subject_cn == ark_name(named), "root", root.subject_cn, ark_name(named))
    told = "unknown" if product is None else product.value
    findings.holds("C2", named is product, "product of the chain", named.value, f"{told}, as the report's")


def _check_keys(chain: Chain, findings: Findings) -> None:
    for each in (chain.root, chain.intermediate):
        if each.key != _RSA:
            findings.fail("C3", f"key of {each.subject_cn}", each.key, _RSA)
    key = chain.leaf.key
    if not (isinstance(key, EcKey) and key.curve == OID_P384 and key.x):
        findings.fail("C3", f"key of {chain.leaf.subject_cn}", key, "an uncompressed point of P-384")


def _check_algorithm(
    check: str, name: str, inner: SignatureAlgorithm, outer: SignatureAlgorithm, findings: Findings
) -> None:
    if inner.der != outer.der:
        findings.fail(check, f"algorithms of {name}", outer.der.hex(), inner.der.hex())
    if outer.pss != AMD_PSS:
        findings.fail(check, f"algorithm of {name}", outer.pss or outer.oid, AMD_PSS)


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


def _check_usage(leaf: Template, intermediate: Template, root: Template, findings: Findings) -> None:
    try:
        for below, each in ((1, root), (0, intermediate)):
            name = each.subject_cn
            basic, usage = each.basic_constraints(), each.key_usage()
            deep = basic is None or basic.path_length is None or basic.path_length >= below
            if basic is None or not (basic.ca and basic.critical and deep):
                findings.fail("C7", f"BasicConstraints of {name}", basic, "critical, CA")
            if usage is None or _CERT_SIGN not in usage:
                findings.fail("C7", f"KeyUsage of {name}", sorted(usage or ()), "keyCertSign (5)")
        basic, usage = leaf.basic_constraints(), leaf.key_usage()
        if basic is not None and basic.ca:
            findings.fail("C7", "BasicConstraints of the leaf", basic, "no CA")
        if usage is not None and _CERT_SIGN in usage:
            findings.fail("C7", "KeyUsage of the leaf", sorted(usage), "no keyCertSign (5)")
    except LayoutError as error:
        findings.fail("C7", "extension", error, "BasicConstraints and KeyUsage in form")


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
    _check_algorithm("C10", "the CRL", crl.inner_algorithm, crl.algorithm, findings)
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
