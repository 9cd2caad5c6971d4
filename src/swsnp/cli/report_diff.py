"""`swsnp report diff A B`: which fields of two reports differ, decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.snp_report import AttestationReport, Product
from swsnp.cli.describe import TCB_FIELDS, WORD_FIELDS, as_dict, product_of_report, remarks

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["difference", "difference_lines"]

_NOT_SAID: Final = "not said by this report"


def difference(
    first: AttestationReport, second: AttestationReport, product: Product | None = None
) -> list[dict[str, Any]]:
    """Every field that differs, in the order of the layout; words and TCBs also name the parts that differ.

    Each report is decoded in the layout of its own product, which `product` decides for both where given.
    """
    shown = as_dict(first, product), as_dict(second, product)
    found = []
    for field, offset, size in AttestationReport.layout():
        if getattr(first, field) == getattr(second, field):
            continue
        row: dict[str, Any] = {"field": field, "offset": offset, "size": size}
        row["first"], row["second"] = (
            _shown(each, field, of) for each, of in zip((first, second), shown, strict=True)
        )
        if field in TCB_FIELDS or field in WORD_FIELDS:
            row["parts"] = _parts(row["first"], row["second"])
        found.append(row)
    return found


def _shown(report: AttestationReport, field: str, shown: dict[str, Any]) -> Any:
    """As `as_dict` has it; reserved fields that are zero are left out there and shown here."""
    value = getattr(report, field)
    return shown.get(field, value.hex() if isinstance(value, bytes) else value)


def _parts(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    names = [*first, *(name for name in second if name not in first)]
    return [name for name in names if name != "raw" and first.get(name) != second.get(name)]


def difference_lines(
    first: AttestationReport, second: AttestationReport, product: Product | None = None
) -> Iterator[str]:
    """The same for people: a field with its two values below it, and what each means where that differs."""
    products = [product or product_of_report(each) for each in (first, second)]
    names = [each.value if each else _NOT_SAID for each in products]
    if names[0] != names[1]:
        yield f"     {'product':20} {names[0]} | {names[1]}"
    for row in difference(first, second, product):
        parts = f"  ({', '.join(row['parts'])})" if row.get("parts") else ""
        yield f"{row['offset']:03x}h {row['field']}{parts}"
        told = [
            list(remarks(report, row["field"], of))
            for report, of in zip((first, second), products, strict=True)
        ]
        for mark, side, mine, other in (("-", "first", told[0], told[1]), ("+", "second", told[1], told[0])):
            yield f"     {mark} {_value(row[side], row.get('parts', ()))}"
            yield from (f"       {remark}" for remark in mine if remark not in other)


def _value(value: Any, parts: list[str]) -> str:
    if not isinstance(value, dict):
        return str(value)
    return f"{value['raw']}  {' '.join(f'{name}={value[name]}' for name in parts if name in value)}".rstrip()
