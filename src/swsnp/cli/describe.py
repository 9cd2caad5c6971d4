"""A report as people and programs read it: decoded fields and what they mean, no judgement.

Source: AMD 56860, ATTESTATION_REPORT, GUEST_POLICY, PLATFORM_INFO, TCB_VERSION.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.snp_report import (
    CHIP_ID_MARKER,
    AttestationReport,
    Product,
    SigningKey,
    TcbVersion,
    product_of_cpu,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TCB_FIELDS", "WORD_FIELDS", "as_dict", "as_lines", "product_of_report", "remarks"]

TCB_FIELDS: Final = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")
WORD_FIELDS: Final = ("policy", "platform_info", "signer_info")
_VECTORS: Final = ("launch_mit_vector", "current_mit_vector")
_HOST_ASKED: Final = 0xFFFFFFFF
_POLICY: Final = {
    "smt": "SMT allowed",
    "migrate_ma": "a migration agent is allowed, and can extract the guest's keys",
    "debug": "DEBUG: the host may read and change the guest's memory",
    "single_socket": "runs on one socket only",
    "cxl_allow": "CXL devices and memory allowed",
    "mem_aes_256_xts": "demands memory encryption by AES-256-XTS",
    "rapl_dis": "demands that RAPL is disabled",
    "ciphertext_hiding_dram": "demands ciphertext hiding for DRAM",
    "page_swap_disable": "page swap commands are refused",
}
_PLATFORM: Final = {
    "smt_en": "SMT is enabled",
    "tsme_en": "all memory is encrypted (TSME)",
    "ecc_en": "memory has ECC",
    "rapl_dis": "RAPL is disabled",
    "ciphertext_hiding_dram_en": "ciphertext hiding for DRAM is enabled",
    "alias_check_complete": "memory was checked for aliases since the last reset",
    "tio_en": "trusted I/O is enabled",
}
_TCB_MEANING: Final = {
    "current_tcb": "of the running firmware",
    "reported_tcb": "that the leaf certificate has to show",
    "committed_tcb": "below which the firmware cannot be rolled back",
    "launch_tcb": "committed when the guest was launched",
}


def product_of_report(report: AttestationReport) -> Product | None:
    """The product line that the report itself names.

    Version 3 and later carry the CPU's family and model; version 2 only shows Turin by its short chip id.
    None means that the report does not say.
    """
    if report.version >= 3:
        return product_of_cpu(report.cpuid_fam_id, report.cpuid_mod_id)
    if any(report.chip_id[:8]) and not any(report.chip_id[8:]):
        return Product.TURIN
    return None


def _tcb(raw: TcbVersion, product: Product | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"raw": raw.to_bytes(8, "little").hex()}
    if product is not None:
        shown.update(raw.decode(product))
        if any(raw.reserved(product)):
            shown["reserved"] = raw.reserved(product).hex()
    return shown


def as_dict(report: AttestationReport, product: Product | None = None) -> dict[str, Any]:
    """Every field, JSON-ready: byte strings as hex, words as number and named bits."""
    product = product or product_of_report(report)
    shown: dict[str, Any] = {"product": product.value if product else None}
    for field, _, _ in AttestationReport.layout():
        value = getattr(report, field)
        if field.startswith("reserved_"):
            if any(value) if isinstance(value, bytes) else value:
                shown[field] = value.hex() if isinstance(value, bytes) else value
        elif field in TCB_FIELDS:
            shown[field] = _tcb(value, product)
        elif field in WORD_FIELDS:
            shown[field] = {"raw": hex(value), **value.decoded()}
            if value.unnamed():
                shown[field]["unnamed_bits"] = hex(value.unnamed())
        elif field in _VECTORS:
            shown[field] = {"raw": hex(value), "bits": [bit for bit in range(64) if value >> bit & 1]}
        else:
            shown[field] = value.hex() if isinstance(value, bytes) else value
    shown["signing_key"] = _signing_key(report)
    shown["current_version"], shown["committed_version"] = _firmware(report)
    shown["emulated"] = _emulated(report)
    return shown


def _signing_key(report: AttestationReport) -> str:
    key = report.signer_info.signing_key
    return SigningKey(key).name if key in set(SigningKey) else f"reserved ({key})"


def _emulated(report: AttestationReport) -> bool:
    return report.chip_id.startswith(CHIP_ID_MARKER)


def _firmware(report: AttestationReport) -> tuple[str, str]:
    return (
        f"{report.current_major}.{report.current_minor}.{report.current_build}",
        f"{report.committed_major}.{report.committed_minor}.{report.committed_build}",
    )


def as_lines(report: AttestationReport, product: Product | None = None) -> Iterator[str]:
    """The same for people: a field a line with its offset, and below it what its value means."""
    product = product or product_of_report(report)
    shown = as_dict(report, product)
    yield f"     {'product':20} {product.value if product else 'not said by this report'}"
    for field, offset, _ in AttestationReport.layout():
        if field in shown:
            yield f"{offset:03x}h {field:20} {_value(shown[field])}".rstrip()
            for remark in remarks(report, field, product):
                yield f"{'':26}- {remark}"


def _value(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    parts = {name: level for name, level in value.items() if name not in {"raw", "bits"}}
    if "boot_loader" in parts:
        told = [f"{name}={level}" for name, level in parts.items()]
    else:
        told = [_flag(name, level) for name, level in parts.items() if level or "abi" in name]
    return f"{value['raw']}  {' '.join(told)}"


def _flag(name: str, level: Any) -> str:
    return name if level == 1 and "abi" not in name else f"{name}={level}"


def remarks(report: AttestationReport, field: str, product: Product | None) -> Iterator[str]:
    """What a field's value means, one sentence each; nothing where the value says it all."""
    if field == "policy":
        yield f"firmware interface {report.policy.abi_major}.{report.policy.abi_minor} or later"
        yield from _flags(_POLICY, report.policy.decoded())
        yield from _unnamed(report.policy.unnamed())
    elif field == "platform_info":
        yield from _flags(_PLATFORM, report.platform_info.decoded())
        yield from _unnamed(report.platform_info.unnamed())
    elif field == "signer_info":
        yield from _signer(report)
    elif field in TCB_FIELDS:
        yield from _about_tcb(report, field, product)
    elif field in _VECTORS:
        yield from _about_vector(report, field)
    else:
        yield from _about(report, field)


def _flags(texts: dict[str, str], values: dict[str, int]) -> Iterator[str]:
    yield from (text for name, text in texts.items() if values[name])


def _unnamed(bits: int) -> Iterator[str]:
    if bits:
        yield f"bits without a name here: {bits:#x}"


def _signer(report: AttestationReport) -> Iterator[str]:
    yield {
        SigningKey.VCEK: "signed by the chip's VCEK",
        SigningKey.VLEK: "signed by a provider's VLEK, which does not identify the chip",
        SigningKey.NONE: "not signed: proves nothing",
    }.get(report.signer_info.signing_key, "SIGNING_KEY has a reserved value")
    if report.signer_info.author_key_en:
        yield "the ID key was signed by an author key"
    if report.signer_info.mask_chip_key:
        yield "the host keeps the VCEK from signing (MASK_CHIP_KEY)"
    yield from _unnamed(report.signer_info.unnamed())


def _about_tcb(report: AttestationReport, field: str, product: Product | None) -> Iterator[str]:
    yield f"the TCB {_TCB_MEANING[field]}"
    if product is None or field == "current_tcb":
        return
    current = report.current_tcb.decode(product)
    for name, level in getattr(report, field).decode(product).items():
        if level != current[name]:
            side = "below" if level < current[name] else "above"
            yield f"{name} {level} is {side} the current {current[name]}"


def _about_vector(report: AttestationReport, field: str) -> Iterator[str]:
    value = getattr(report, field)
    if report.version < 5 and not value:
        yield "reports have it from version 5 on"
    elif value:
        bits = ", ".join(str(bit) for bit in range(64) if value >> bit & 1)
        when = "when the guest was launched" if field.startswith("launch") else "now"
        yield f"mitigations in effect {when}: bits {bits}"


def _about(report: AttestationReport, field: str) -> Iterator[str]:
    match field:
        case "version" if report.version not in range(2, 6):
            yield "known are 2 to 5: what follows may mean something else"
        case "vmpl":
            yield (
                "the host asked, not the guest"
                if report.vmpl == _HOST_ASKED
                else "the level that the guest asked for"
            )
        case "signature_algo":
            yield "ECDSA P-384 with SHA-384" if report.signature_algo == 1 else "not a known algorithm"
        case "report_id_ma":
            yield (
                "no migration agent"
                if report.report_id_ma == b"\xff" * 32
                else "the migration agent's report id"
            )
        case "cpuid_fam_id" if report.version < 3:
            yield "reports name the CPU from version 3 on"
        case "chip_id" if not any(report.chip_id):
            yield "masked by the host"
        case "chip_id" if _emulated(report):
            yield "an emulated chip: software keys, not AMD's"
        case "current_build":
            yield f"running firmware {_firmware(report)[0]}"
        case "committed_build":
            yield f"committed firmware {_firmware(report)[1]}"
        case "id_key_digest" | "author_key_digest" if not any(getattr(report, field)):
            yield "none: the guest was launched without one"
        case _ if field.startswith("reserved_"):
            yield "reserved, and not zero"
