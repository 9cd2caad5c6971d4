"""Checks P1 to P6, P9, P10: form, before anything is believed.

Source: AMD 56860, ATTESTATION_REPORT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import (
    REPORT_SIZE,
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    Product,
    SignatureAlgo,
    SignerInfo,
    SigningKey,
    product_of_cpu,
)
from swsnp.certs.kds_extensions import issuing_product
from swsnp.verify.result import mask

if TYPE_CHECKING:
    from swsnp.certs.x509_reader import Certificate
    from swsnp.verify.result import Findings

__all__ = [
    "check_form",
    "check_product",
    "check_size",
]


_VERSIONS: Final = range(2, 6)
_SIZE: Final = mask("P1")
_FORM: Final = mask("P2", "P3", "P4", "P5", "P6")
_BY_ISSUER: Final = mask("P10")
_BY_CPU: Final = mask("P9")
_ALWAYS_RESERVED: Final = ((0x04C, 0x050), (0x18B, 0x1A0), (0x1EB, 0x1EC), (0x1EF, 0x1F0), (0x208, 0x2A0))
_BEFORE_3: Final = ((0x188, 0x18B),)
_BEFORE_5: Final = ((0x1F8, 0x208),)
_RESERVED_ONE: Final = GuestPolicy.reserved_one.mask
_POLICY_UNNAMED: Final = ~GuestPolicy.named()
_PLATFORM_UNNAMED: Final = ~PlatformInfo.named()
_SIGNER_UNNAMED: Final = ~SignerInfo.named()
_SIGNING_KEYS: Final = (SigningKey.VCEK, SigningKey.VLEK)
_FMS: Final = "CPUID_FAM_ID, CPUID_MOD_ID"
_LAX_MODELS: Final = ((0x19, 0x01), (0x19, 0x11), (0x1A, 0x02))
"""Family and model of the only processors that go-sev-guest knows."""


def check_size(data: bytes, findings: Findings) -> bool:
    """P1. Exactly one report; False when it is not."""
    if len(data) != REPORT_SIZE:
        findings.fail("P1", "report", f"{len(data)} bytes", f"{REPORT_SIZE} bytes")
        return False
    findings.made |= _SIZE
    return True


def check_form(data: bytes, report: AttestationReport, findings: Findings) -> None:
    """Fields that the document fixes, one by one; `data` is what the report was read from.

    P2. VERSION is 2 to 5.
    P3. What the version reserves is zero. Unknown bits of PLATFORM_INFO are told, not refused: they are not
        reserved as zero, and genuine firmware sets one that no document here names.
    P4. POLICY bit 17 is one, bits 63:26 are zero.
    P5. SIGNATURE_ALGO is ECDSA P-384 with SHA-384.
    P6. SIGNING_KEY is VCEK or VLEK; 7 is an unsigned report.
    """
    if report.version not in _VERSIONS:
        findings.fail("P2", "VERSION", report.version, "2 to 5", offset=0)
    _check_reserved(data, report, findings)
    policy = report.policy
    if not policy & _RESERVED_ONE:
        findings.fail("P4", "POLICY bit 17", 0, 1, offset=0x08)
    if policy & _POLICY_UNNAMED:
        findings.fail("P4", "POLICY bits 63:26", f"{policy.unnamed():#x}", 0, offset=0x08)
    if report.signature_algo != SignatureAlgo.ECDSA_P384_SHA384:
        findings.fail("P5", "SIGNATURE_ALGO", report.signature_algo, 1, offset=0x34)
    if report.signer_info.signing_key not in _SIGNING_KEYS:
        got = report.signer_info.signing_key
        findings.fail("P6", "SIGNING_KEY", got, "0 (VCEK) or 1 (VLEK)", offset=0x48)
    findings.made |= _FORM


def _zeros(*ranges: tuple[int, int]) -> tuple[tuple[int, int, bytes], ...]:
    return tuple((start, end, bytes(end - start)) for start, end in ranges)


_RESERVED_IN_2: Final = _zeros(*_ALWAYS_RESERVED, *_BEFORE_3, *_BEFORE_5)
_RESERVED_IN_3: Final = _zeros(*_ALWAYS_RESERVED, *_BEFORE_5)
_RESERVED_IN_5: Final = _zeros(*_ALWAYS_RESERVED)


def _check_reserved(data: bytes, report: AttestationReport, findings: Findings) -> None:
    unknown = report.platform_info & _PLATFORM_UNNAMED
    if unknown:
        text = f"PLATFORM_INFO has bits that are not known here: {unknown:#x}"
        findings.warn("P3", text, field="PLATFORM_INFO", got=f"{unknown:#x}")
    broken = report.signer_info & _SIGNER_UNNAMED
    if broken:
        findings.fail("P3", "dword 48h, bits 31:5", f"{broken:#x}", 0, offset=0x48)
    later = _RESERVED_IN_5 if report.version >= 5 else _RESERVED_IN_3
    for start, end, zeros in _RESERVED_IN_2 if report.version < 3 else later:
        if data[start:end] != zeros:
            at = next(at for at in range(start, end) if data[at])
            got = f"{data[at]:#04x} at {at:#x}"
            lax = (start, end) in _BEFORE_5 and report.version >= 3
            findings.fail("P3", f"bytes {start:#x}..{end - 1:#x}", got, 0, offset=at, lax=lax)


def check_product(
    report: AttestationReport,
    chip_id: bytes,
    product: Product | None,
    leaf: Certificate | None,
    findings: Findings,
) -> Product | None:
    """Which product line the report belongs to. Only a claim until the signature has been verified.

    P9. From version 3 on, CPUID family and model name it; the caller's `product` must be the same, and
        decides alone where they name none.
    P10. In version 2 the caller names it, or else the leaf's issuer, or else CHIP_ID: 8 bytes and zeros are
        Turin's. productName is not asked: it does not tell the truth about steppings and models.
    """
    if report.version < 3:
        found = _product_of_version_2(chip_id, product, leaf, findings)
        findings.made |= _BY_ISSUER
    else:
        found = _product_by_cpu(report, product, leaf, findings)
        findings.made |= _BY_CPU
    return found


def _product_by_cpu(
    report: AttestationReport, product: Product | None, leaf: Certificate | None, findings: Findings
) -> Product | None:
    family, model = report.cpuid_fam_id, report.cpuid_mod_id
    told = product_of_cpu(family, model)
    if told is not None and product in (None, told):
        if findings.lax and (family, model) not in _LAX_MODELS:
            findings.fail("P9", _FMS, _named(family, model), "a model that go-sev-guest knows", offset=0x188)
        return told
    fms = _named(family, model)
    if told is not None:
        findings.fail("P9", _FMS, fms, f"{product and product.value}", offset=0x188)
        return told
    if findings.lax and not family | model | report.cpuid_step:
        product = product or (None if leaf is None else issuing_product(leaf))
    if product is None:
        findings.fail("P9", _FMS, fms, "a known product line", offset=0x188)
    else:
        findings.warn("P9", f"{fms} names no product line; taken as {product.value}", field=_FMS, got=fms)
    return product


def _named(family: int, model: int) -> str:
    return f"family {family:#x}, model {model:#x}"


def _product_of_version_2(
    chip_id: bytes, product: Product | None, leaf: Certificate | None, findings: Findings
) -> Product | None:
    found = product or (None if leaf is None else issuing_product(leaf))
    if found is None and any(chip_id[:8]) and not any(chip_id[8:]):
        found = Product.TURIN
    if found is None:
        findings.fail("P10", "product", "none named", "one from the caller, the issuer or CHIP_ID")
    return found
