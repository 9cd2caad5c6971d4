"""What firmware 1.55 for Genoa allows in a CPUID page, leaf by leaf: observed behaviour, representative.

UNVERIFIED: bits of custom fields that no rule names (NB and UMC counters of 80000022h EBX) pass unchecked.
"""

from __future__ import annotations

from typing import Final

from swsnp.firmware.cpuid_rules import (
    ANY,
    ANY_LEAF,
    ZERO,
    Leaf,
    Rules,
    compacted_size,
    components,
    exact,
    fields,
    fms,
    limit,
    mask,
    number,
    standard_size,
)

__all__ = ["GENOA_RULES"]

_XCR0_ALLOWED: Final = 0x2E7
# Bit of XCR0 to where its component ends in the standard format
_STANDARD_ENDS: Final = {2: 0x340, 5: 0x380, 6: 0x580, 7: 0x980, 9: 0x988}
# Bit of XCR0 or XSS to the size of its component in the compacted format
_COMPACT_SIZES: Final = {2: 0x100, 5: 0x40, 6: 0x200, 7: 0x400, 9: 0x8, 11: 0x10, 12: 0x18}

GENOA_RULES: Final[Rules] = {
    (0x0, None): Leaf(limit(0x10), ANY, ANY, ANY),
    (0x1, None): Leaf(
        fms,
        fields(number(15, 8, lambda _: 8), other=0xFFFF_00FF),
        mask(0x76FA320B | 1 << 27 | 1 << 31),
        mask(0x178BFBFF),
    ),
    (0x2, None): ANY_LEAF,
    (0x4, None): ANY_LEAF,
    (0x5, None): Leaf(mask(0xFFFF), mask(0xFFFF), mask(0x3), mask(0x11)),
    (0x6, None): Leaf(mask(0x4), ZERO, mask(0x1), ZERO),
    (0x7, 0): Leaf(limit(1), mask(0xF1BF97A9), mask(0x00415FCE | 1 << 4), mask(0x10000010)),
    (0x7, 1): Leaf(mask(0x20)),
    **{(0xB, sub): ANY_LEAF for sub in range(3)},
    (0xD, 0): Leaf(components(_XCR0_ALLOWED), standard_size(_STANDARD_ENDS), ANY, ZERO),
    (0xD, 1): Leaf(mask(0xF), compacted_size(_COMPACT_SIZES), mask(0x1800), ZERO),
    (0xD, 2): Leaf(exact(0x100), exact(0x240)),
    (0xD, 5): Leaf(exact(0x40), exact(0x340), mask(0x3)),
    (0xD, 6): Leaf(exact(0x200), exact(0x380), mask(0x3)),
    (0xD, 7): Leaf(exact(0x400), exact(0x580), mask(0x3)),
    (0xD, 9): Leaf(exact(0x8), exact(0x980)),
    (0xD, 0xB): Leaf(exact(0x10), ZERO, exact(0x1)),
    (0xD, 0xC): Leaf(exact(0x18), ZERO, exact(0x1)),
    (0xF, None): ANY_LEAF,
    (0x10, None): ANY_LEAF,
    (0x8000_0000, None): Leaf(limit(0x8000_0028), ANY, ANY, ANY),
    (0x8000_0001, None): Leaf(fms, ANY, mask(0x75C237FF), mask(0x2FD3FBFF)),
    **{(leaf, None): ANY_LEAF for leaf in range(0x8000_0002, 0x8000_0007)},
    (0x8000_0007, None): Leaf(ZERO, mask(0x3B), ANY, mask(0x6799)),
    (0x8000_0008, None): Leaf(
        fields(
            number(7, 0, lambda bits: min(bits, 0x34)),
            number(15, 8, lambda bits: min(bits, 0x39)),
            number(23, 16, lambda bits: bits),
        ),
        mask(0x79BEF35F),
        ANY,
        fields(number(15, 0, lambda pages: min(pages, 7)), number(31, 16, lambda last: min(last, 1))),
    ),
    (0x8000_000A, None): Leaf(mask(0x1), ANY, ZERO, mask(0x1FBFBCFF)),
    **{(leaf, None): ANY_LEAF for leaf in (0x8000_0019, 0x8000_001A, 0x8000_001D, 0x8000_001E)},
    (0x8000_001B, None): Leaf(mask(0xBFF)),
    (0x8000_001F, None): Leaf(
        mask(0x030FFFFF),
        fields(
            number(5, 0, lambda _: 0x33),
            number(15, 12, lambda vmpls: min(vmpls, 4)),
            other=0xFC0,
        ),
        ANY,
        ANY,
    ),
    (0x8000_0020, None): ANY_LEAF,
    (0x8000_0021, None): Leaf(mask(0x18062FCF), mask(0xFFF)),
    (0x8000_0022, None): Leaf(
        mask(0x7),
        fields(
            number(3, 0, lambda counters: min(counters, 6)),
            number(9, 4, lambda entries: min(entries, 0x10)),
            other=0xFFFF_FC00,
        ),
        ANY,
        ZERO,
    ),
    (0x8000_0023, None): Leaf(mask(0x1), ANY),
    (0x8000_0024, 0): Leaf(limit(1), mask(0x1), mask(0x3)),
    (0x8000_0024, 1): Leaf(mask(0x1FF)),
    (0x8000_0026, None): ANY_LEAF,
}
"""By leaf and subleaf."""
