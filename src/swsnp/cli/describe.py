"""A report as people and programs read it: decoded fields, no judgement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from swsnp.abi.snp_report import AttestationReport, Product, SigningKey, TcbVersion, product_of_cpu

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["as_dict", "as_lines", "product_of_report"]

_TCBS = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")
_ONE_WORD = {"version", "guest_svn", "vmpl", "signature_algo"}


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
    return shown


def as_dict(report: AttestationReport, product: Product | None = None) -> dict[str, Any]:
    """Every field, JSON-ready: byte strings as hex, words as number and named bits."""
    product = product or product_of_report(report)
    key = report.signer_info.signing_key
    name = SigningKey(key).name if key in set(SigningKey) else f"reserved ({key})"
    shown: dict[str, Any] = {"product": product.value if product else None}
    for field, _, _ in AttestationReport.layout():
        value = getattr(report, field)
        if field.startswith("reserved_"):
            if any(value) if isinstance(value, bytes) else value:
                shown[field] = value.hex() if isinstance(value, bytes) else value
        elif field in _TCBS:
            shown[field] = _tcb(value, product)
        elif field in {"policy", "platform_info", "signer_info"}:
            shown[field] = {"raw": hex(value), **value.decoded()}
            if value.unnamed():
                shown[field]["unnamed_bits"] = hex(value.unnamed())
        else:
            shown[field] = value.hex() if isinstance(value, bytes) else value
    shown["signing_key"] = name
    return shown


def as_lines(report: AttestationReport, product: Product | None = None) -> Iterator[str]:
    """The same for people: one field a line, flags by name."""
    for field, value in as_dict(report, product).items():
        if isinstance(value, dict):
            raw = value.pop("raw")
            if field in _TCBS:
                detail = " ".join(f"{name}={level}" for name, level in value.items())
            else:
                detail = " ".join(
                    name if flag == 1 else f"{name}={flag}"
                    for name, flag in value.items()
                    if flag or "abi" in name
                )
            yield f"{field:20} {raw}  {detail}".rstrip()
        else:
            yield f"{field:20} {value if value is not None else 'not said by this report'}"
