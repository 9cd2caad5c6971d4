"""Rules for CPUID registers: each gives the value that the firmware would allow for a claimed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from swsnp.abi.snp_launch import CpuidFunction

__all__ = [
    "ANY",
    "ANY_LEAF",
    "Leaf",
    "Limits",
    "Rule",
    "Rules",
    "ZERO",
    "compacted_size",
    "components",
    "exact",
    "fields",
    "fms",
    "limit",
    "mask",
    "number",
    "standard_size",
]

_REGISTER: Final = 0xFFFF_FFFF
_X87_AND_SSE: Final = 0x3
_LEGACY_AREA: Final = 0x240


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What of the part a table refers to: `fms` is its CPUID Fn1 EAX."""

    fms: int


Rule: TypeAlias = Callable[[CpuidFunction, int, Limits], int]
"""Entry, claimed value, part: the value that is allowed; equal to the claimed one when that is in order."""


def exact(value: int) -> Rule:
    """Nothing but this value."""
    return lambda _entry, _claimed, _limits: value


def mask(allowed: int) -> Rule:
    """No bit outside `allowed`."""
    return lambda _entry, claimed, _limits: claimed & allowed


def limit(largest: int) -> Rule:
    """Numerically at most `largest`."""
    return lambda _entry, claimed, _limits: min(claimed, largest)


def number(high: int, low: int, allow: Callable[[int], int]) -> tuple[int, int, Callable[[int], int]]:
    """One range of bits for `fields`: `allow` gives the allowed number for the claimed one."""
    return low, (1 << (high - low + 1)) - 1, allow


def fields(*numbers: tuple[int, int, Callable[[int], int]], other: int = 0) -> Rule:
    """Ranges of bits with a rule each; of the other bits only those in `other` may be set."""

    def allowed(_entry: CpuidFunction, claimed: int, _limits: Limits) -> int:
        value = claimed & other
        for low, width, allow in numbers:
            value |= (allow(claimed >> low & width) & width) << low
        return value

    return allowed


def fms(_entry: CpuidFunction, claimed: int, limits: Limits) -> int:
    """Family, model and stepping: numerically at most the part's own."""
    return min(claimed, limits.fms)


def components(allowed: int) -> Rule:
    """Leaf Dh EAX: components of XCR0, of which x87 and SSE are always there."""
    return lambda _entry, claimed, _limits: claimed & allowed | _X87_AND_SSE


def standard_size(ends: Mapping[int, int]) -> Rule:
    """Leaf Dh EBX: the standard format's size for XCR0_IN; `ends` of the components by their bit of XCR0."""

    def size(entry: CpuidFunction, _claimed: int, _limits: Limits) -> int:
        enabled = (end for bit, end in ends.items() if entry.xcr0_in >> bit & 1)
        return max(enabled, default=_LEGACY_AREA) & _REGISTER

    return size


def compacted_size(sizes: Mapping[int, int]) -> Rule:
    """Leaf Dh, subleaf 1, EBX: the compacted format's size; `sizes` by the bit of XCR0 or XSS."""

    def size(entry: CpuidFunction, _claimed: int, _limits: Limits) -> int:
        enabled = entry.xcr0_in | entry.xss_in
        needed = sum(size for bit, size in sizes.items() if enabled >> bit & 1)
        return (_LEGACY_AREA + needed) & _REGISTER

    return size


ANY: Final = mask(_REGISTER)
ZERO: Final = exact(0)


@dataclass(frozen=True, slots=True)
class Leaf:
    """The rules of one leaf and subleaf; registers without a rule are zero."""

    eax: Rule = ZERO
    ebx: Rule = ZERO
    ecx: Rule = ZERO
    edx: Rule = ZERO


ANY_LEAF: Final = Leaf(ANY, ANY, ANY, ANY)

Rules: TypeAlias = Mapping[tuple[int, int | None], Leaf]
"""By EAX_IN and ECX_IN; None: every ECX_IN without an own row."""
