"""The guest's side of the GHCB page."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import Ghcb
from swsnp.guest.ghcb_page import EsResult, GhcbPage, es_result

if TYPE_CHECKING:
    from tests.unit.guest.conftest import ScriptedHost

GPA = 0x3000


@pytest.fixture
def ghcb(host: ScriptedHost) -> GhcbPage:
    host.memory.shared_pages.add(GPA)
    page = GhcbPage(host.cpu, GPA, 2)
    page.clear()
    return page


def page_of(host: ScriptedHost) -> Ghcb:
    return Ghcb.parse(host.memory.shared[GPA : GPA + 4096])


def bitmap(**wanted: int) -> bytes:
    """byte_7=0x80 and the like; the rest is zero."""
    raw = bytearray(16)
    for name, value in wanted.items():
        raw[int(name.removeprefix("byte_"))] = value
    return bytes(raw)


def test_clear_zeroes_the_page(host: ScriptedHost, ghcb: GhcbPage) -> None:
    """Linux zeroes the page after it was shared; it held whatever the host had there."""
    assert bytes(page_of(host)) == bytes(4096)


def test_guest_request_fields_and_valid_bits(host: ScriptedHost, ghcb: GhcbPage) -> None:
    """GHCB 2.0: SNP guest request needs exit code, info 1 and info 2 valid: byte 14 is 1Ch, all others 0."""
    ghcb.ask(0x80000011, 0x5000, 0x6000)
    page = page_of(host)
    assert (page.sw_exit_code, page.sw_exit_info_1, page.sw_exit_info_2) == (0x80000011, 0x5000, 0x6000)
    assert page.valid_bitmap == bitmap(byte_14=0x1C)
    assert (page.protocol_version, page.ghcb_usage) == (2, 0)
    assert host.cpu.ghcb_msr == GPA


def test_extended_request_fields_and_valid_bits(host: ScriptedHost, ghcb: GhcbPage) -> None:
    """GHCB 2.0: extended guest request adds RAX (byte 7: 80h) and RBX (byte 12: 08h)."""
    ghcb.ask(0x80000012, 0x5000, 0x6000, rax=0x8000, rbx=4)
    page = page_of(host)
    assert (page.rax, page.rbx) == (0x8000, 4)
    assert page.valid_bitmap == bitmap(byte_7=0x80, byte_12=0x08, byte_14=0x1C)


def test_zero_is_a_value(host: ScriptedHost, ghcb: GhcbPage) -> None:
    """RBX 0 is valid and means "no certificates wanted"; it is not the same as RBX left out."""
    ghcb.ask(0x80000012, 0x5000, 0x6000, rax=0, rbx=0)
    assert page_of(host).valid_bitmap == bitmap(byte_7=0x80, byte_12=0x08, byte_14=0x1C)


def test_scratch_bit(host: ScriptedHost, ghcb: GhcbPage) -> None:
    """GHCB 2.0: page state change passes its buffer in SW_SCRATCH (index 117: byte 14, bit 5)."""
    ghcb.ask(0x80000010, 0, 0, scratch=GPA + 0x800)
    page = page_of(host)
    assert page.sw_scratch == GPA + 0x800
    assert page.valid_bitmap == bitmap(byte_14=0x3C)


def test_each_use_invalidates_the_one_before(host: ScriptedHost, ghcb: GhcbPage) -> None:
    """GHCB 2.0: all valid bits are cleared before each use; stale registers may stay."""
    ghcb.ask(0x80000012, 1 << 12, 2 << 12, rax=0x8000, rbx=4)
    host.memory.shared[GPA + 0x3F0 : GPA + 0x400] = b"\xff" * 16
    host.memory.shared[GPA + 0xFFC : GPA + 0x1000] = b"\x01\0\0\0"
    ghcb.ask(0x80000011, 3 << 12, 4 << 12)
    page = page_of(host)
    assert page.valid_bitmap == bitmap(byte_14=0x1C)
    assert page.rax == 0x8000
    assert page.ghcb_usage == 0


def test_reply_is_read_without_its_valid_bits(host: ScriptedHost, ghcb: GhcbPage) -> None:
    """Linux reads info 1, info 2 and RBX of a reply whatever the bitmap says."""
    struct.pack_into("<QQ", host.memory.shared, GPA + 0x398, 7, 8)
    struct.pack_into("<Q", host.memory.shared, GPA + 0x318, 9)
    assert ghcb.reply() == (7, 8)
    assert ghcb.rbx() == 9


def test_shared_buffer(host: ScriptedHost, ghcb: GhcbPage) -> None:
    """GHCB 2.0: the shared buffer starts at 800h."""
    ghcb.write_shared_buffer(b"abcd")
    assert page_of(host).shared_buffer[:5] == b"abcd\0"
    assert ghcb.read_shared_buffer(4) == b"abcd"


@pytest.mark.parametrize(
    ("info1", "info2", "result"),
    [
        (0, 0, EsResult.OK),
        (0, 0x16, EsResult.OK),
        (1 << 32, 0, EsResult.OK),
        (1, 0x8000030D, EsResult.EXCEPTION),
        (1, 0x80000306, EsResult.EXCEPTION),
        (1, 0xDEAD_8000030D, EsResult.EXCEPTION),
        (1, 0x8000030E, EsResult.VMM_ERROR),
        (1, 0x0000030D, EsResult.VMM_ERROR),
        (1, 0x8000020D, EsResult.VMM_ERROR),
        (1, 0, EsResult.VMM_ERROR),
        (2, 5, EsResult.VMM_ERROR),
        (2, 0x8000030D, EsResult.VMM_ERROR),
        (3, 0, EsResult.VMM_ERROR),
        (0xFFFFFFFF, 0, EsResult.VMM_ERROR),
    ],
)
def test_how_a_reply_is_judged(info1: int, info2: int, result: EsResult) -> None:
    """Linux, verify_exception_info: the low half of info 1; only #UD and #GP of type 3 with bit 31."""
    assert es_result(info1, info2) is result


def test_es_result_numbers() -> None:
    """Linux, enum es_result: these numbers reach the caller of the ioctl."""
    assert (EsResult.OK, EsResult.VMM_ERROR, EsResult.EXCEPTION) == (0, 2, 4)
