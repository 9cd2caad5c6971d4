"""The CPUID page of a launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_launch import CpuidFunction, CpuidPage
from swsnp.abi.snp_report import Product
from swsnp.firmware.cpuid import corrected
from swsnp.firmware.cpuid_genoa import GENOA_RULES
from swsnp.firmware.cpuid_rules import Limits
from swsnp.hardware.rmp import PageState

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

LIMITS = Limits(fms=0xA10F11)
ALL = 0xFFFF_FFFF


def _page(*entries: CpuidFunction, **changes: Any) -> CpuidPage:
    functions = b"".join(map(bytes, entries)).ljust(64 * 48, b"\0")
    return CpuidPage(count=len(entries), functions=functions).but(**changes)


def _load(rig: Rig, page: CpuidPage) -> tuple[int, CpuidPage, PageState, bytes]:
    gctx = rig.launching()
    address = rig.guest_page(1, 0x80E000, bytes(page))
    status = rig.update(gctx, address, PageType.CPUID)
    after = CpuidPage.parse(rig.memory.read(address, 4096))
    return status, after, rig.state(address), rig.context(gctx).ld


GOOD = CpuidFunction(eax_in=1, eax=0xA10F11, ebx=0x0800, ecx=0x0000_0001)
OUTSIDE = CpuidFunction(eax_in=0x4000_0000, eax=ALL, edx=ALL)
UNKNOWN = CpuidFunction(eax_in=0x3, ecx=1)
TOO_MUCH = CpuidFunction(eax_in=0x8000_001B, eax=0xFFFF)


def test_a_page_in_order(rig: Rig) -> None:
    """AMD 56860: accepted as it is; leaves outside the two ranges are not looked at."""
    page = _page(GOOD, OUTSIDE, CpuidFunction(eax_in=0x3))
    status, after, state, ld = _load(rig, page)
    assert (status, after, state) == (S.SUCCESS, page, PageState.GUEST_VALID)
    assert ld != bytes(48)


def test_a_page_that_is_corrected(rig: Rig) -> None:
    """AMD 56860: all entries are corrected and written back in plaintext; page state and digest stay."""
    page = _page(UNKNOWN, GOOD, TOO_MUCH, rest=b"r" * 0x3F0)
    status, after, state, ld = _load(rig, page)
    assert (status, state, ld) == (S.INVALID_PARAM, PageState.PRE_GUEST, bytes(48))
    assert after == _page(UNKNOWN.but(ecx=0), GOOD, TOO_MUCH.but(eax=0xBFF), rest=b"r" * 0x3F0)


@pytest.mark.parametrize(
    "page",
    [
        _page(GOOD, count=65),
        _page(GOOD, count=ALL),
        _page(GOOD, reserved_004=bytes(11) + b"\x01"),
        _page(GOOD, TOO_MUCH.but(reserved_28=1)),
    ],
)
@pytest.mark.parametrize("product", list(Product))
def test_forms_that_are_refused(make_rig: MakeRig, product: Product, page: CpuidPage) -> None:
    """AMD 56860: COUNT above 64 or reserved fields not zero, on every product; nothing is corrected."""
    status, after, state, _ = _load(make_rig(product=product), page)
    assert (status, after, state) == (S.INVALID_PARAM, page, PageState.PRE_GUEST)


@pytest.mark.parametrize("product", [Product.MILAN, Product.TURIN])
def test_products_without_a_table(make_rig: MakeRig, product: Product) -> None:
    """No table of Milan and Turin is known: without a host's CPUID their leaves pass unchanged."""
    assert _load(make_rig(product=product), _page(UNKNOWN, TOO_MUCH))[0] == S.SUCCESS


def test_sixty_four_entries(rig: Rig) -> None:
    """AMD 56860: COUNT 64 is allowed, and the last entry is checked."""
    assert _load(rig, _page(*[GOOD] * 64))[0] == S.SUCCESS


def test_the_last_of_sixty_four_entries(rig: Rig) -> None:
    """AMD 56860: entries are all walked."""
    status, after, _, _ = _load(rig, _page(*[GOOD] * 63, UNKNOWN))
    assert (status, after) == (S.INVALID_PARAM, _page(*[GOOD] * 63, UNKNOWN.but(ecx=0)))


@pytest.mark.parametrize(
    ("entry", "allowed"),
    [
        # limits
        ({"eax_in": 0, "eax": 0x11}, {"eax": 0x10}),
        ({"eax_in": 0, "eax": 0x10, "ebx": ALL}, {}),
        ({"eax_in": 0x8000_0000, "eax": ALL}, {"eax": 0x8000_0028}),
        # custom: family, model, stepping
        ({"eax_in": 1, "ebx": 0x800, "eax": 0xA10F12}, {"eax": 0xA10F11}),
        ({"eax_in": 1, "ebx": 0x800, "eax": 0xA00F11}, {}),
        ({"eax_in": 0x8000_0001, "eax": ALL}, {"eax": 0xA10F11}),
        # custom: CLFLUSH size
        ({"eax_in": 1, "ebx": 0xFF00_01FF}, {"ebx": 0xFF00_08FF}),
        # masks
        ({"eax_in": 1, "ebx": 0x800, "ecx": ALL, "edx": ALL}, {"ecx": 0xFEFA320B, "edx": 0x178BFBFF}),
        ({"eax_in": 7, "ecx_in": 0, "ecx": ALL}, {"ecx": 0x00415FDE}),
        ({"eax_in": 7, "ecx_in": 1, "eax": ALL, "ebx": 1}, {"eax": 0x20, "ebx": 0}),
        # a subleaf that the table does not have
        ({"eax_in": 7, "ecx_in": 2, "eax": 1}, {"eax": 0}),
        ({"eax_in": 0xD, "ecx_in": 3, "eax": 1}, {"eax": 0}),
        # XSAVE: components, sizes
        ({"eax_in": 0xD, "eax": 0, "ebx": 0x240}, {"eax": 3}),
        ({"eax_in": 0xD, "eax": ALL, "ebx": 0x240}, {"eax": 0x2E7}),
        ({"eax_in": 0xD, "xcr0_in": 7, "eax": 7, "ebx": 0x340}, {}),
        ({"eax_in": 0xD, "xcr0_in": 0xE7, "eax": 7, "ebx": 0}, {"ebx": 0x980}),
        ({"eax_in": 0xD, "xcr0_in": 0x2E7, "eax": 7, "ebx": 0}, {"ebx": 0x988}),
        ({"eax_in": 0xD, "xcr0_in": 0x67, "eax": 7, "ebx": 0}, {"ebx": 0x580}),
        ({"eax_in": 0xD, "xcr0_in": 0x27, "eax": 7, "ebx": 0}, {"ebx": 0x380}),
        ({"eax_in": 0xD, "ecx_in": 1, "ebx": 0x240}, {}),
        ({"eax_in": 0xD, "ecx_in": 1, "xcr0_in": 7, "xss_in": 0x1800}, {"ebx": 0x368}),
        ({"eax_in": 0xD, "ecx_in": 1, "xcr0_in": 0x2E7}, {"ebx": 0x240 + 0x100 + 0x40 + 0x200 + 0x400 + 8}),
        ({"eax_in": 0xD, "ecx_in": 2}, {"eax": 0x100, "ebx": 0x240}),
        ({"eax_in": 0xD, "ecx_in": 7, "eax": 0x400, "ebx": 0x580, "ecx": 7}, {"ecx": 3}),
        ({"eax_in": 0xD, "ecx_in": 0xC}, {"eax": 0x18, "ecx": 1}),
        # custom: address sizes, counters, C-bit
        ({"eax_in": 0x8000_0008, "eax": 0xFFFF_FFFF}, {"eax": 0x00FF_3934}),
        ({"eax_in": 0x8000_0008, "eax": 0x0000_3030, "edx": 0x0001_0007}, {}),
        ({"eax_in": 0x8000_0008, "edx": 0x0002_0008}, {"edx": 0x0001_0007}),
        ({"eax_in": 0x8000_001F, "ebx": 0x4FFF}, {"ebx": 0x4FF3}),
        ({"eax_in": 0x8000_001F, "ebx": 0xF033}, {"ebx": 0x4033}),
        ({"eax_in": 0x8000_0022, "ebx": 0x3FF}, {"ebx": 0x106}),
        ({"eax_in": 0x8000_0022, "edx": 1}, {"edx": 0}),
        # the edges of the ranges
        ({"eax_in": 0xFFFF, "eax": 1}, {"eax": 0}),
        ({"eax_in": 0x1_0000, "eax": 1}, {}),
        ({"eax_in": 0x7FFF_FFFF, "eax": 1}, {}),
        ({"eax_in": 0x8000_FFFF, "eax": 1}, {"eax": 0}),
        ({"eax_in": 0x8001_0000, "eax": 1}, {}),
    ],
    ids=str,
)
def test_genoa_rules(entry: dict[str, int], allowed: dict[str, int]) -> None:
    """Firmware 1.55 for Genoa as observed: one value per kind of rule; what it is corrected to."""
    claimed = CpuidFunction(**entry)
    assert corrected(claimed, GENOA_RULES, LIMITS) == claimed.but(**allowed)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    leaf=st.sampled_from([*sorted({leaf for leaf, _ in GENOA_RULES}), 3, 0x8000_0010]),
    sub=st.integers(0, 12),
    values=st.lists(st.integers(0, ALL), min_size=4, max_size=4),
    xcr0=st.sampled_from([0, 1, 3, 7, 0xE7, 0x2E7]),
)
def test_a_corrected_entry_is_in_order(leaf: int, sub: int, values: list[int], xcr0: int) -> None:
    """A hypervisor that takes the corrected page over is accepted the second time."""
    eax, ebx, ecx, edx = values
    entry = CpuidFunction(eax_in=leaf, ecx_in=sub, xcr0_in=xcr0, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
    once = corrected(entry, GENOA_RULES, LIMITS)
    assert corrected(once, GENOA_RULES, LIMITS) == once
    assert once.but(eax=eax, ebx=ebx, ecx=ecx, edx=edx) == entry
