"""What certificates of a chain share with every other chip's: judged once for each combination.

Source: AMD 57230; see docs/adr/0014.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from swsnp.abi.kds import ark_name, ask_name, asvk_name
from swsnp.certs.crl import OID_AUTHORITY_KEY_ID
from swsnp.certs.kds_extensions import LEAF_OIDS, issuing_product, leaf_kind
from swsnp.certs.signature import AMD_PSS
from swsnp.certs.x509 import OID_BASIC_CONSTRAINTS, OID_KEY_USAGE
from swsnp.errors import LayoutError
from swsnp.verify.result import Findings

if TYPE_CHECKING:
    from swsnp.abi.snp_report import Product
    from swsnp.certs.x509 import SignatureAlgorithm, Template
    from swsnp.verify.result import Finding

__all__ = ["check_algorithm", "check_shared", "known_shared"]

_CERT_SIGN: Final = 5
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


def check_shared(
    leaf: Template, intermediate: Template, root: Template, product: Product | None
) -> tuple[Finding, ...]:
    """C2, C4, C7, and C9 but for the profile: nothing in them is the chip's own, see docs/adr/0014."""
    findings = Findings()
    _check_names(leaf, intermediate, root, product, findings)
    for each in (root, intermediate, leaf):
        check_algorithm("C4", each.subject_cn, each.inner_algorithm, each.algorithm, findings)
    _check_usage(leaf, intermediate, root, findings)
    for each in (root, intermediate, leaf):
        for extension in each.extensions:
            if extension.critical and extension.oid not in _UNDERSTOOD:
                name = f"extension of {each.subject_cn}"
                findings.fail("C9", name, f"{extension.oid}, critical", "a known one")
    return tuple(findings.noted)


known_shared = lru_cache(maxsize=256)(check_shared)
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


def check_algorithm(
    check: str, name: str, inner: SignatureAlgorithm, outer: SignatureAlgorithm, findings: Findings
) -> None:
    """AMD's algorithm, and the same inside and outside of what is signed."""
    if inner.der != outer.der:
        findings.fail(check, f"algorithms of {name}", outer.der.hex(), inner.der.hex())
    if outer.pss != AMD_PSS:
        findings.fail(check, f"algorithm of {name}", outer.pss or outer.oid, AMD_PSS)


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
