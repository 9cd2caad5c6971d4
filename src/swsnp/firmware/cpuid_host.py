"""CPUID limits taken from a host: no guest may be told more than its CPU shows.

For parts whose table is not known. Own rule: the kinds of checks are those of firmware 1.55 for Genoa, with
the host's values in place of the table's. What the host's CPU shows comes from `cpuid -r`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_launch import CpuidFunction
from swsnp.errors import LayoutError
from swsnp.firmware.cpuid_rules import (
    ANY,
    ANY_LEAF,
    ZERO,
    Leaf,
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from swsnp.firmware.cpuid_rules import Rules

__all__ = ["host_rules", "parse_dump"]

_HEX: Final = "0x([0-9a-f]{1,8})"
_LINE: Final = re.compile(rf"{_HEX} {_HEX}: eax={_HEX} ebx={_HEX} ecx={_HEX} edx={_HEX}", re.IGNORECASE)
_NEXT_CPU: Final = re.compile(r"CPU [1-9][0-9]*:")
_OSPKE: Final = 1 << 4
_OSXSAVE_AND_HYPERVISOR: Final = 1 << 27 | 1 << 31
_XSTATE: Final = 0xD
_FIRST_COMPONENT: Final = 2
_IN_XSS: Final = 1
_INDEXED: Final = frozenset({0x7, 0xB, _XSTATE, 0xF, 0x10, 0x8000_0020, 0x8000_0024, 0x8000_0026})
"""Leaves whose subleaves differ; of others any ECX_IN gives the same."""
_UNCHECKED: Final = frozenset(
    {0x2, 0x4, 0x5, 0xB, 0xF, 0x10, *range(0x8000_0002, 0x8000_0007)}
    | {0x8000_0019, 0x8000_001A, 0x8000_001D, 0x8000_001E, 0x8000_0020, 0x8000_0026}
)
"""Names, caches and topology: the hypervisor's own business."""


def parse_dump(text: str) -> tuple[CpuidFunction, ...]:
    """What `cpuid -r` printed about the first CPU: leaf, subleaf and four registers a line.

    Lines of another form are passed over, so the whole output may be given.

    Raises:
        LayoutError: no such line, or one leaf and subleaf twice.
    """
    found: dict[tuple[int, int], CpuidFunction] = {}
    for line in map(str.strip, text.splitlines()):
        if found and _NEXT_CPU.fullmatch(line):
            break
        matched = _LINE.fullmatch(line)
        if matched is None:
            continue
        leaf, sub, eax, ebx, ecx, edx = (int(each, 16) for each in matched.groups())
        if (leaf, sub) in found:
            raise LayoutError(f"CPUID dump: leaf {leaf:#x}, subleaf {sub:#x} twice, wanted one CPU's output")
        found[leaf, sub] = CpuidFunction(eax_in=leaf, ecx_in=sub, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
    if not found:
        raise LayoutError("CPUID dump: got no line like '0x00000001 0x00: eax=0x00a00f11 ebx=…' (cpuid -r)")
    return tuple(found.values())


def host_rules(shown: Sequence[CpuidFunction]) -> Rules:
    """The table of a part of which is known only what its CPU shows."""
    rules: dict[tuple[int, int | None], Leaf] = {}
    for host in shown:
        sub = host.ecx_in if host.eax_in in _INDEXED else None
        rules.setdefault((host.eax_in, sub), _leaf(host, shown))
    return rules


def _leaf(host: CpuidFunction, shown: Sequence[CpuidFunction]) -> Leaf:
    if host.eax_in in _UNCHECKED:
        return ANY_LEAF
    if host.eax_in == _XSTATE:
        return _xstate(host, shown)
    special = _SPECIAL.get((host.eax_in, host.ecx_in if host.eax_in in _INDEXED else 0))
    return _within(host) if special is None else special(host)


def _within(host: CpuidFunction) -> Leaf:
    """No bit that the host's CPU does not have."""
    return Leaf(mask(host.eax), mask(host.ebx), mask(host.ecx), mask(host.edx))


def _xstate(host: CpuidFunction, shown: Iterable[CpuidFunction]) -> Leaf:
    """Leaf Dh: components and their sizes."""
    parts = [each for each in shown if each.eax_in == _XSTATE and each.ecx_in >= _FIRST_COMPONENT]
    if host.ecx_in == 0:
        ends = {each.ecx_in: each.ebx + each.eax for each in parts if not each.ecx & _IN_XSS}
        return Leaf(components(host.eax), standard_size(ends), ANY, ZERO)
    if host.ecx_in == 1:
        sizes = {each.ecx_in: each.eax for each in parts}
        return Leaf(mask(host.eax), compacted_size(sizes), mask(host.ecx), ZERO)
    return Leaf(exact(host.eax), exact(host.ebx), mask(host.ecx))


def _vendor(host: CpuidFunction) -> Leaf:
    return Leaf(limit(host.eax), ANY, ANY, ANY)


def _features(host: CpuidFunction) -> Leaf:
    line_size = host.ebx >> 8 & 0xFF
    return Leaf(
        fms,
        fields(number(15, 8, lambda _: line_size), other=0xFFFF_00FF),
        mask(host.ecx | _OSXSAVE_AND_HYPERVISOR),
        mask(host.edx),
    )


def _structured_features(host: CpuidFunction) -> Leaf:
    return Leaf(limit(host.eax), mask(host.ebx), mask(host.ecx | _OSPKE), mask(host.edx))


def _extended_features(host: CpuidFunction) -> Leaf:
    return Leaf(fms, ANY, mask(host.ecx), mask(host.edx))


def _power(host: CpuidFunction) -> Leaf:
    return Leaf(mask(host.eax), mask(host.ebx), ANY, mask(host.edx))


def _sizes(host: CpuidFunction) -> Leaf:
    physical, linear = host.eax & 0xFF, host.eax >> 8 & 0xFF
    pages, last = host.edx & 0xFFFF, host.edx >> 16
    return Leaf(
        fields(
            number(7, 0, lambda bits: min(bits, physical)),
            number(15, 8, lambda bits: min(bits, linear)),
            number(23, 16, lambda bits: bits),
        ),
        mask(host.ebx),
        ANY,
        fields(number(15, 0, lambda n: min(n, pages)), number(31, 16, lambda n: min(n, last))),
    )


def _nested(host: CpuidFunction) -> Leaf:
    return Leaf(mask(0xFF), ANY, mask(host.ecx), mask(host.edx))


def _encryption(host: CpuidFunction) -> Leaf:
    cbit, most = host.ebx & 0x3F, host.ebx >> 12 & 0xF
    vmpls = number(15, 12, lambda claimed: min(claimed, most))
    return Leaf(mask(host.eax), fields(number(5, 0, lambda _: cbit), vmpls, other=0xFC0), ANY, ANY)


def _counters(host: CpuidFunction) -> Leaf:
    core, stack = host.ebx & 0xF, host.ebx >> 4 & 0x3F
    core_counters = number(3, 0, lambda claimed: min(claimed, core))
    branches = number(9, 4, lambda claimed: min(claimed, stack))
    return Leaf(mask(host.eax), fields(core_counters, branches, other=0xFFFF_FC00), ANY, ZERO)


def _keys(host: CpuidFunction) -> Leaf:
    return Leaf(mask(host.eax), ANY, mask(host.ecx), mask(host.edx))


_SPECIAL: Final[Mapping[tuple[int, int], Callable[[CpuidFunction], Leaf]]] = {
    (0x0, 0): _vendor,
    (0x1, 0): _features,
    (0x7, 0): _structured_features,
    (0x8000_0000, 0): _vendor,
    (0x8000_0001, 0): _extended_features,
    (0x8000_0007, 0): _power,
    (0x8000_0008, 0): _sizes,
    (0x8000_000A, 0): _nested,
    (0x8000_001F, 0): _encryption,
    (0x8000_0022, 0): _counters,
    (0x8000_0023, 0): _keys,
}
"""Leaves with fields that are numbers; of all others each bit is a feature."""
