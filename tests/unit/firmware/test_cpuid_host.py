"""CPUID pages held against what the host's CPU shows. Own rule, for parts without a known table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_launch import CpuidFunction, CpuidPage
from swsnp.abi.snp_report import Product
from swsnp.errors import LayoutError
from swsnp.firmware.cpuid import corrected
from swsnp.firmware.cpuid_host import host_rules, parse_dump
from swsnp.firmware.cpuid_rules import Limits

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig

ALL = 0xFFFF_FFFF
LIMITS = Limits(fms=0xA00F11)

# the form of `cpuid -r`; numbers made up, of an order that EPYC parts have
DUMP = """
CPU 0:
   0x00000000 0x00: eax=0x00000010 ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65
   0x00000001 0x00: eax=0x00a00f11 ebx=0x02100800 ecx=0x76fa320b edx=0x178bfbff
   0x00000002 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x00000006 0x00: eax=0x00000004 ebx=0x00000000 ecx=0x00000001 edx=0x00000000
   0x00000007 0x00: eax=0x00000001 ebx=0x219c97a9 ecx=0x00400684 edx=0x00000010
   0x00000007 0x01: eax=0x00000000 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x00: eax=0x00000207 ebx=0x00000988 ecx=0x00000988 edx=0x00000000
   0x0000000d 0x01: eax=0x0000000f ebx=0x00000348 ecx=0x00001800 edx=0x00000000
   0x0000000d 0x02: eax=0x00000100 ebx=0x00000240 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x09: eax=0x00000008 ebx=0x00000980 ecx=0x00000000 edx=0x00000000
   0x0000000d 0x0b: eax=0x00000010 ebx=0x00000000 ecx=0x00000001 edx=0x00000000
   0x80000000 0x00: eax=0x80000023 ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65
   0x80000001 0x00: eax=0x00a00f11 ebx=0x40000000 ecx=0x75c237ff edx=0x2fd3fbff
   0x80000002 0x00: eax=0x20444d41 ebx=0x43595045 ecx=0x37373620 edx=0x34362033
   0x80000007 0x00: eax=0x00000000 ebx=0x0000003b ecx=0x00000000 edx=0x00006799
   0x80000008 0x00: eax=0x00003030 ebx=0x111ef657 ecx=0x0000707f edx=0x00010007
   0x8000000a 0x00: eax=0x00000001 ebx=0x00008000 ecx=0x00000000 edx=0x119b9cff
   0x8000001f 0x00: eax=0x0101fd3f ebx=0x00004173 ecx=0x000001fd edx=0x00000001
   0x80000021 0x00: eax=0x0000004d ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0x80000022 0x00: eax=0x00000000 ebx=0x00000046 ecx=0x00000000 edx=0x00000000
   0x80000023 0x00: eax=0x00000001 ebx=0x000001fd ecx=0x00000000 edx=0x00000000
CPU 1:
   0x00000000 0x00: eax=0x0000000d ebx=0x00000000 ecx=0x00000000 edx=0x00000000
"""
HOST = parse_dump(DUMP)
RULES = host_rules(HOST)


def test_the_first_cpu_of_a_dump() -> None:
    """`cpuid -r`: leaf, subleaf and four registers a line; other lines and other CPUs are passed over."""
    assert len(HOST) == 21
    assert HOST[0] == CpuidFunction(eax_in=0, eax=0x10, ebx=0x68747541, ecx=0x444D4163, edx=0x69746E65)
    assert parse_dump(DUMP.replace("CPU 0:", "").upper().replace("0X", "0x")[:200])[0] == HOST[0]


@pytest.mark.parametrize("text", ["", "CPU 0:\n", "0x1: eax=1", "0x00000001 0x00: eax=0x1 ebx=0x2 ecx=0x3"])
def test_no_dump(text: str) -> None:
    """Text without one line of that form is refused, with what was wanted."""
    with pytest.raises(LayoutError, match=r"got no line like .* \(cpuid -r\)"):
        parse_dump(text)


def test_two_dumps_in_one() -> None:
    """One leaf twice: of two hosts, or two CPUs without their headings."""
    line = "0x00000001 0x00: eax=0x1 ebx=0x2 ecx=0x3 edx=0x4\n"
    with pytest.raises(LayoutError, match="leaf 0x1, subleaf 0x0 twice, wanted one CPU's output"):
        parse_dump(line * 2)
    assert len(parse_dump(line + line.replace("0x00:", "0x01:"))) == 2


@pytest.mark.parametrize(
    ("entry", "allowed"),
    [
        # limits
        ({"eax_in": 0, "eax": 0x11}, {"eax": 0x10}),
        ({"eax_in": 0, "eax": 0xD, "ebx": ALL}, {}),
        ({"eax_in": 0x8000_0000, "eax": ALL, "edx": 7}, {"eax": 0x8000_0023}),
        # family, model, stepping; CLFLUSH size; bits that the operating system or the hypervisor sets
        ({"eax_in": 1, "ebx": 0x800, "eax": 0xA00F12}, {"eax": 0xA00F11}),
        ({"eax_in": 1, "ebx": 0xFF00_01FF}, {"ebx": 0xFF00_08FF}),
        ({"eax_in": 1, "ebx": 0x800, "ecx": ALL, "edx": ALL}, {"ecx": 0xFEFA320B, "edx": 0x178BFBFF}),
        ({"eax_in": 0x8000_0001, "eax": ALL, "ebx": ALL, "ecx": ALL}, {"eax": 0xA00F11, "ecx": 0x75C237FF}),
        ({"eax_in": 7, "eax": 2, "ebx": ALL, "ecx": ALL}, {"eax": 1, "ebx": 0x219C97A9, "ecx": 0x00400694}),
        # features bit by bit, and what the host does not have at all
        ({"eax_in": 6, "eax": ALL, "ecx": 3}, {"eax": 4, "ecx": 1}),
        ({"eax_in": 7, "ecx_in": 1, "eax": 0x20}, {"eax": 0}),
        ({"eax_in": 7, "ecx_in": 2, "eax": 1}, {"eax": 0}),
        ({"eax_in": 0x8000_0021, "eax": ALL, "ebx": 1}, {"eax": 0x4D, "ebx": 0}),
        ({"eax_in": 0x8000_0026, "eax": 1}, {"eax": 0}),
        ({"eax_in": 0x8000_0007, "ebx": ALL, "ecx": ALL, "edx": ALL}, {"ebx": 0x3B, "edx": 0x6799}),
        ({"eax_in": 0x8000_000A, "eax": ALL, "ebx": ALL, "edx": ALL}, {"eax": 0xFF, "edx": 0x119B9CFF}),
        # names and caches are the hypervisor's business
        ({"eax_in": 2, "eax": ALL, "edx": ALL}, {}),
        ({"eax_in": 0x8000_0002, "eax": ALL}, {}),
        # extended state: components, sizes of what is enabled
        ({"eax_in": 0xD, "eax": ALL, "ebx": 0x240}, {"eax": 0x207}),
        ({"eax_in": 0xD, "eax": 0, "ebx": 0x240, "edx": 1}, {"eax": 3, "edx": 0}),
        ({"eax_in": 0xD, "xcr0_in": 7, "eax": 7, "ebx": 0}, {"ebx": 0x340}),
        ({"eax_in": 0xD, "xcr0_in": 0x207, "eax": 7, "ebx": 0}, {"ebx": 0x988}),
        ({"eax_in": 0xD, "xcr0_in": 0x803, "eax": 7, "ebx": 0}, {"ebx": 0x240}),
        ({"eax_in": 0xD, "ecx_in": 1, "eax": ALL, "ecx": ALL}, {"eax": 0xF, "ebx": 0x240, "ecx": 0x1800}),
        ({"eax_in": 0xD, "ecx_in": 1, "xcr0_in": 0x207, "xss_in": 0x800}, {"ebx": 0x240 + 0x118}),
        ({"eax_in": 0xD, "ecx_in": 2}, {"eax": 0x100, "ebx": 0x240}),
        ({"eax_in": 0xD, "ecx_in": 5, "eax": 0x40}, {"eax": 0}),
        # numbers
        ({"eax_in": 0x8000_0008, "eax": ALL, "ebx": ALL}, {"eax": 0x00FF_3030, "ebx": 0x111EF657}),
        ({"eax_in": 0x8000_0008, "eax": 0x2F2F, "edx": 0x0002_0008}, {"edx": 0x0001_0007}),
        ({"eax_in": 0x8000_001F, "eax": ALL, "ebx": 0xF033}, {"eax": 0x0101FD3F, "ebx": 0x4033}),
        ({"eax_in": 0x8000_001F, "ebx": 0x1FFF}, {"ebx": 0x1FF3}),
        ({"eax_in": 0x8000_0022, "ebx": 0x3FF, "edx": 1}, {"ebx": 0x46, "edx": 0}),
        ({"eax_in": 0x8000_0023, "eax": 3, "ebx": ALL}, {"eax": 1}),
        # beyond the ranges
        ({"eax_in": 0x4000_0000, "eax": ALL}, {}),
    ],
    ids=str,
)
def test_rules(entry: dict[str, int], allowed: dict[str, int]) -> None:
    """Kinds of checks as in firmware 1.55 for Genoa, values of the host: what an entry is corrected to."""
    claimed = CpuidFunction(**entry)
    assert corrected(claimed, RULES, LIMITS) == claimed.but(**allowed)


@pytest.mark.parametrize("entry", HOST, ids=lambda entry: f"{entry.eax_in:x}.{entry.ecx_in}")
def test_what_the_host_shows_may_be_shown(entry: CpuidFunction) -> None:
    """A guest may be told what its host is told, sizes of state that it has enabled aside."""
    enabled = entry.but(xcr0_in=0x207 if entry.eax_in == 0xD else 0)
    if (entry.eax_in, entry.ecx_in) == (0xD, 1):
        enabled = enabled.but(xcr0_in=7).but(ebx=0x340)
    assert corrected(enabled, RULES, LIMITS) == enabled


def test_absurd_sizes_stay_in_their_registers() -> None:
    """A dump may say anything: what is computed from it fits into 32 bits."""
    huge = CpuidFunction(eax_in=0xD, ecx_in=2, eax=ALL, ebx=ALL)
    state = [CpuidFunction(eax_in=0xD, ecx_in=sub) for sub in (0, 1)]
    rules = host_rules([*state, huge, huge.but(ecx_in=3)])
    sizes = [corrected(each.but(xcr0_in=0xC), rules, LIMITS).ebx for each in state]
    assert sizes == [0xFFFF_FFFE, 0x23E]


@pytest.mark.parametrize("product", list(Product))
def test_the_setting_decides_on_every_product(make_rig: MakeRig, product: Product) -> None:
    """With a host's CPUID a page beyond it is refused and corrected, in place of the product's table."""
    rig = make_rig(product=product, host_cpuid=HOST)
    claimed = CpuidFunction(eax_in=0x8000_0021, eax=0x4F)
    page = CpuidPage(count=1, functions=bytes(claimed).ljust(64 * 48, b"\0"))
    gctx = rig.launching()
    at = rig.guest_page(1, 0x80E000, bytes(page))
    assert rig.update(gctx, at, PageType.CPUID) == S.INVALID_PARAM
    after = CpuidPage.parse(rig.memory.read(at, 4096))
    assert CpuidFunction.parse(after.functions[:48]) == claimed.but(eax=0x4D)
    assert rig.update(gctx, at, PageType.CPUID) == S.SUCCESS
