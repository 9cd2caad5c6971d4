"""SNP_HV_REPORT_REQ, firmware 1.56 and later."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, HvReportReq, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import AttestationReport
from swsnp.crypto.ecdsa import verify
from swsnp.firmware.platform import Platform
from swsnp.firmware.settings import ApiVersion
from swsnp.hardware.rmp import RmpEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.firmware.conftest import MakeRig, Rig

V1_56 = ApiVersion(major=1, minor=56, build=1)


@pytest.fixture
def later(make_rig: MakeRig) -> Rig:
    """A part that has the command."""
    return make_rig(current_version=V1_56)


def _ask(rig: Rig, gctx: int, page: int, **fields: Any) -> int:
    record = HvReportReq(length=0x18, gctx_paddr=gctx, hv_report_paddr=page).but(**fields)
    return rig.command(Command.SNP_HV_REPORT_REQ, record)


def test_a_report_that_no_guest_asked_for(later: Rig) -> None:
    """VMPL FFFFFFFFh and no REPORT_DATA tell it from a guest's own; no message counter moves."""
    guest = later.running()
    page = later.page()
    assert _ask(later, guest.gctx, page, key_sel=1) == S.SUCCESS
    raw = later.memory.read(page, 0x4C0)
    assert MsgReportRspHeader.parse(raw[:0x20]) == MsgReportRspHeader(report_size=0x4A0)
    report = AttestationReport.parse(raw[0x20:])
    assert (report.vmpl, report.report_data) == (0xFFFF_FFFF, bytes(64))
    assert report.report_id == later.context(guest).report_id
    x, y = later.chip.vcek_public_point(later.chip.reported_tcb)
    assert verify(raw[0x20:0x2C0], raw[0x2C0:], x=x, y=y)
    assert later.context(guest).message_counts == [0, 0, 0, 0]


@pytest.mark.parametrize("key_sel", [2, 3])
def test_an_unusable_key_is_a_status_in_the_response(later: Rig, key_sel: int) -> None:
    """As MSG_REPORT_REQ: INVALID_KEY inside, the command succeeds."""
    guest, page = later.running(), later.page()
    assert _ask(later, guest.gctx, page, key_sel=key_sel) == S.SUCCESS
    raw = later.memory.read(page, 0x4C0)
    assert raw == bytes(MsgReportRspHeader(status=S.INVALID_KEY, report_size=0x4A0)) + bytes(0x4A0)


def test_checks_in_order(later: Rig) -> None:
    """Faults are taken away one by one, the next one shows."""
    gctx, page = later.launching(), later.page(RmpEntry())
    later.platform.state = PlatformState.UNINIT
    for bad in ({"length": 0x17}, {"key_sel": 4}, {"gctx_paddr": gctx + 1}, {"hv_report_paddr": page + 16}):
        assert _ask(later, gctx, page, **bad) == S.INVALID_PARAM
    assert _ask(later, gctx, 0x7777_7777_7000) == S.INVALID_PLATFORM_STATE
    later.platform.state = PlatformState.INIT
    assert _ask(later, gctx, 0x7777_7777_7000) == S.INVALID_ADDRESS
    assert _ask(later, page, page) == S.INVALID_GUEST
    assert _ask(later, gctx, page) == S.INVALID_PAGE_STATE
    later.rmp[page] = RmpEntry(assigned=True, immutable=True, page_size=1)
    assert _ask(later, gctx, page) == S.INVALID_PAGE_SIZE
    later.rmp[page] = RmpEntry(assigned=True, immutable=True)
    assert _ask(later, gctx, page) == S.INVALID_GUEST_STATE
    assert later.finish(gctx) == 0
    assert _ask(later, gctx, page) == S.SUCCESS


def _taken_back(rig: Rig, gctx: int, page: int) -> S:
    rig.rmp[page] = RmpEntry()
    return S.INVALID_PAGE_STATE


def _ended(rig: Rig, gctx: int, page: int) -> S:
    del rig.platform.guests[gctx]
    return S.INVALID_GUEST


def _configured(rig: Rig, gctx: int, page: int) -> S:
    rig.chip.configure(mask_chip_id=True)
    return S.SUCCESS


@pytest.mark.parametrize("meanwhile", [_taken_back, _ended, _configured])
def test_other_commands_may_run_while_it_is_signed(
    later: Rig, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Rig, int, int], S]
) -> None:
    """It is as if done in one piece at its end: page, guest and platform variables are looked at again."""
    guest, page = later.running(), later.page()
    wanted: list[S] = []

    @contextmanager
    def aside() -> Iterator[None]:
        yield
        if not wanted:
            wanted.append(meanwhile(later, guest.gctx, page))

    monkeypatch.setattr(Platform, "aside", property(lambda _: aside()), raising=False)
    assert [_ask(later, guest.gctx, page)] == wanted
    if wanted == [S.SUCCESS]:
        assert not any(AttestationReport.parse(later.memory.read(page, 0x4C0)[0x20:]).chip_id)
    else:
        assert not any(later.memory.read(page, 0x4C0))


def test_older_firmware_does_not_have_it(rig: Rig) -> None:
    """Firmware 1.55: INVALID_COMMAND; an update brings the command."""
    guest, page = rig.running(), rig.page()
    assert _ask(rig, guest.gctx, page) == S.INVALID_COMMAND
    variables = rig.chip.variables
    rig.chip.variables = replace(variables, current_version=V1_56)
    assert _ask(rig, guest.gctx, page) == S.SUCCESS
