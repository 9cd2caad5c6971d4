"""Replacing the instructions that only SNP hardware traps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.cpu.plain_kvm.rewrite import INSTRUCTIONS, Rewrites, Site, replacement

GPA = 0x8000


@pytest.mark.parametrize(
    ("site", "code", "port"),
    [
        (Site.VMGEXIT, "f3 0f 01 d9", 0xE8),
        (Site.PVALIDATE, "f2 0f 01 ff", 0xE9),
        (Site.RMPADJUST, "f3 0f 01 fe", 0xEA),
    ],
)
def test_each_instruction(site: Site, code: str, port: int) -> None:
    """AMD 24594: the three encodings; each becomes OUT imm8, AL and two NOPs of the same length."""
    memory = bytearray.fromhex(f"90 {code} c3")
    rewrites = Rewrites()
    assert rewrites.rewrite(memoryview(memory), GPA) == 1
    assert memory == bytes((0x90, 0xE6, port, 0x90, 0x90, 0xC3))
    assert rewrites.sites == {GPA + 1: site}


@pytest.mark.parametrize("code", ["0f 01 d9", "f3 0f 01 d8", "f2 0f 01 fe", "f3 0f 01 ff", "f3 0f 01"])
def test_neighbours_stay(code: str) -> None:
    """AMD 24594: VMMCALL, RMPUPDATE and PSMASH differ by a prefix or a bit; they and cut ones stay."""
    memory = bytearray.fromhex(code)
    assert Rewrites().rewrite(memoryview(memory), GPA) == 0
    assert memory == bytes.fromhex(code)


def test_second_time_finds_nothing() -> None:
    """Rewriting again is harmless: the table keeps what was found first."""
    memory = memoryview(bytearray(INSTRUCTIONS[Site.VMGEXIT] * 2))
    rewrites = Rewrites()
    assert (rewrites.rewrite(memory, GPA), rewrites.rewrite(memory, GPA)) == (2, 0)
    assert rewrites.sites == {GPA: Site.VMGEXIT, GPA + 4: Site.VMGEXIT}


def test_original_leaves_genuine_port_writes() -> None:
    """A port write that the guest's code had itself is not taken for a replaced instruction."""
    code = replacement(Site.VMGEXIT) + INSTRUCTIONS[Site.VMGEXIT]
    memory = bytearray(code)
    rewrites = Rewrites()
    rewrites.rewrite(memoryview(memory), GPA)
    assert memory == replacement(Site.VMGEXIT) * 2
    assert rewrites.original(bytes(memory), GPA) == code


PIECES = st.one_of(st.sampled_from(list(INSTRUCTIONS.values())), st.binary(max_size=5))


@given(st.lists(PIECES, max_size=12).map(b"".join))
def test_law(code: bytes) -> None:
    """Same length, no instruction left, and the original can be told from copy and table."""
    memory = bytearray(code)
    rewrites = Rewrites()
    assert rewrites.rewrite(memoryview(memory), GPA) == len(rewrites.sites)
    assert len(memory) == len(code)
    assert not any(instruction in memory for instruction in INSTRUCTIONS.values())
    assert rewrites.original(bytes(memory), GPA) == code
