"""Checking the CPUID page of a launch. Source: AMD 56860, CPUID page; rules as observed in firmware 1.55.

On every product COUNT and the reserved fields are checked. The values of leaves are held against what the
host's CPU shows, if the settings say that (`cpuid_host.py`), else against a table of the part
(`cpuid_genoa.py`). Milan and Turin have no table here: without the host's CPU their leaves pass unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_launch import CPUID_COUNT_MAX, CpuidFunction, CpuidPage
from swsnp.abi.snp_report import Product
from swsnp.firmware.cpuid_genoa import GENOA_RULES
from swsnp.firmware.cpuid_host import host_rules
from swsnp.firmware.cpuid_rules import Leaf, Limits, Rules

if TYPE_CHECKING:
    from swsnp.firmware.chip import Chip

__all__ = ["CheckedPage", "check_page", "corrected"]

_RANGES: Final = (range(0x1_0000), range(0x8000_0000, 0x8001_0000))
_TABLES: Final[dict[Product, Rules]] = {Product.GENOA: GENOA_RULES}
_UNKNOWN: Final = Leaf()


@dataclass(frozen=True, slots=True)
class CheckedPage:
    """The verdict on a CPUID page, and the page as the firmware would have it."""

    accepted: bool
    page: CpuidPage


def check_page(page: CpuidPage, chip: Chip) -> CheckedPage:
    """Check a CPUID page.

    1. COUNT above 64 or reserved fields not zero: refused, nothing is corrected.
    2. Leaves outside 0..FFFFh and 8000_0000h..8000_FFFFh are not looked at.
    3. A leaf that the table does not have is all zero.
    4. Every register of a known leaf follows its rule.

    All entries are walked and corrected; one correction refuses the page.
    """
    if page.count > CPUID_COUNT_MAX or any(page.reserved_004):
        return CheckedPage(False, page)
    entries = [
        CpuidFunction.parse_at(page.functions, number * CpuidFunction.SIZE) for number in range(page.count)
    ]
    if any(entry.reserved_28 for entry in entries):
        return CheckedPage(False, page)
    rules = _rules(chip.settings.host_cpuid, chip.product)
    if rules is None:
        return CheckedPage(True, page)
    fixed = [corrected(entry, rules, Limits(fms=chip.fms)) for entry in entries]
    if fixed == entries:
        return CheckedPage(True, page)
    functions = b"".join(map(bytes, fixed)).ljust(len(page.functions), b"\0")
    rest = page.functions[len(fixed) * CpuidFunction.SIZE :]
    return CheckedPage(False, page.but(functions=functions[: len(functions) - len(rest)] + rest))


@lru_cache(maxsize=4)
def _rules(host_cpuid: tuple[CpuidFunction, ...], product: Product) -> Rules | None:
    return host_rules(host_cpuid) if host_cpuid else _TABLES.get(product)


def corrected(entry: CpuidFunction, rules: Rules, limits: Limits) -> CpuidFunction:
    """The entry as the part allows it; the same when it is in order.

    Args:
        entry: what the hypervisor claims.
        rules: the part's table.
        limits: what of the part the table refers to.
    """
    if not any(entry.eax_in in each for each in _RANGES):
        return entry
    leaf = rules.get((entry.eax_in, entry.ecx_in)) or rules.get((entry.eax_in, None)) or _UNKNOWN
    return entry.but(
        eax=leaf.eax(entry, entry.eax, limits),
        ebx=leaf.ebx(entry, entry.ebx, limits),
        ecx=leaf.ecx(entry, entry.ecx, limits),
        edx=leaf.edx(entry, entry.edx, limits),
    )
