"""Saving and restoring guests at model level."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_command import Command, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_launch import INITIAL_DIGEST
from swsnp.abi.snp_message import MsgReportReq
from swsnp.abi.snp_report import AttestationReport, GuestPolicy
from swsnp.errors import LayoutError, UsageError
from swsnp.firmware.context import GuestState
from swsnp.firmware.migration import SavedGuest
from swsnp.firmware.platform import AsidState
from swsnp.hardware.rmp import PageState, RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig, RigGuest

MIGRATABLE = GuestPolicy.of(smt=1, reserved_one=1, migrate_ma=1)


def _report(rig: Rig, guest: RigGuest) -> AttestationReport:
    answer = rig.request(guest, bytes(MsgReportReq(report_data=b"\x5a" * 64)))
    assert answer.status == S.SUCCESS
    return AttestationReport.parse(answer.payload[0x20:])


def test_a_restored_guest_goes_on(make_rig: MakeRig) -> None:
    """REPORT_ID, launch TCB, VMPCKs and counters are kept: the guest notices nothing but time."""
    before = make_rig()
    guest = before.running(3, host_data=b"h" * 32)
    reports = [_report(before, guest)]
    saved = before.mailbox.save_guest(guest.gctx)
    after = make_rig(seed=b"another run")
    gctx = after.page()
    after.mailbox.restore_guest(gctx, saved, asid=7)
    assert after.mailbox.save_guest(gctx) == saved
    source, guest.gctx = guest.gctx, gctx
    reports.append(_report(after, guest))
    assert guest.seqno == [5, 1, 1, 1]
    assert reports[0] == reports[1]
    assert after.state(gctx) is PageState.CONTEXT
    assert after.platform.asids[7] is AsidState.IN_USE
    assert after.context(gctx).vek != before.context(source).vek


def test_a_guest_in_launch_goes_on(make_rig: MakeRig) -> None:
    """A launch that was interrupted is finished on the other side; its activation is still pending."""
    before, after = make_rig(), make_rig()
    gctx = before.launching(2)
    assert before.update(gctx, before.guest_page(2, 0x1000, b"code")) == 0
    ld = before.context(gctx).ld
    target = after.page()
    after.mailbox.restore_guest(target, before.mailbox.save_guest(gctx), asid=2)
    context = after.context(target)
    assert (context.state, context.active, context.ld) == (GuestState.LAUNCH, False, ld)
    assert after.platform.asids[2] is AsidState.ALLOCATED
    assert after.update(target, after.guest_page(2, 0x2000, b"more")) == 0
    assert after.finish(target) == S.SUCCESS


def test_a_guest_in_init_has_no_keys_yet(make_rig: MakeRig) -> None:
    """Before LAUNCH_START there are neither keys nor an ASID; the saved form has zeros for them."""
    before, after = make_rig(), make_rig()
    saved = before.mailbox.save_guest(before.create())
    context = SavedGuest.parse(saved).context
    assert (context.oek, context.vmpck3, context.vmrk, context.ld) == (bytes(32),) * 3 + (INITIAL_DIGEST,)
    target = after.page()
    after.mailbox.restore_guest(target, saved, asid=0)
    restored = after.context(target)
    assert (restored.asid, restored.message_keys, restored.active) == (0, (), False)
    assert after.start(target) == S.SUCCESS


def test_migration_agents_come_first(make_rig: MakeRig) -> None:
    """A guest finds its agent by REPORT_ID, wherever the agent's page lies now."""
    before, after = make_rig(), make_rig()
    agent = before.running(1)
    gctx = before.create()
    assert before.start(gctx, policy=MIGRATABLE, flags=1, ma_gctx_paddr=agent.gctx) == 0
    saved = before.mailbox.save_guest(gctx)
    after.page()
    pages = after.page(), after.page()
    with pytest.raises(UsageError, match="no guest has its migration agent's REPORT_ID"):
        after.mailbox.restore_guest(pages[1], saved, asid=0)
    assert after.create() not in pages
    after.mailbox.restore_guest(pages[0], before.mailbox.save_guest(agent.gctx), asid=1)
    after.mailbox.restore_guest(pages[1], saved, asid=0)
    restored = after.context(pages[1])
    assert restored.ma_paddr == pages[0] != agent.gctx
    assert restored.report_id_ma == after.context(pages[0]).report_id


def test_what_is_refused(rig: Rig) -> None:
    """Nothing changes when a guest cannot be restored; the message says field, got and wanted."""
    guest = rig.running(1)
    saved = rig.mailbox.save_guest(guest.gctx)
    with pytest.raises(UsageError, match="wanted the page of a guest context"):
        rig.mailbox.save_guest(guest.gctx + 4096)
    page = rig.page()
    with pytest.raises(LayoutError, match="got 831 bytes, wanted 832"):
        rig.mailbox.restore_guest(page, saved[:-1], asid=2)
    parsed = SavedGuest.parse(saved)
    bad = [
        (page, bytes(parsed.but(version=2)), 2, "VERSION: got 2, wanted 1"),
        (page, bytes(parsed.but(context=parsed.context.but(state=3))), 2, "STATE: got 3, wanted 0..2"),
        (0x7777_7777_7000, saved, 2, "no memory"),
        (rig.page(RmpEntry()), saved, 2, "got state Hypervisor"),
        (rig.page(RmpEntry(assigned=True, immutable=True, page_size=1)), saved, 2, "4 KiB Firmware page"),
        (page + 16, saved, 2, "4 KiB Firmware page"),
        (page, saved, 1, "got in use, wanted clean"),
        (page, saved, 5000, "got unusable, wanted clean"),
    ]
    for gctx, data, asid, message in bad:
        with pytest.raises(UsageError, match=message):
            rig.mailbox.restore_guest(gctx, data, asid=asid)
    rig.platform.state = PlatformState.UNINIT
    with pytest.raises(UsageError, match="SNP is not initialised"):
        rig.mailbox.restore_guest(page, saved, asid=2)
    assert list(rig.platform.guests) == [guest.gctx]
    assert rig.state(page) is PageState.FIRMWARE


def test_saved_guests_do_not_show_their_keys(rig: Rig) -> None:
    """A saved guest contains keys; its text does not."""
    guest = rig.running(1)
    saved = SavedGuest.parse(rig.mailbox.save_guest(guest.gctx))
    assert repr(rig.context(guest).vmpcks[0])[2:20] not in repr(saved)
    assert "withheld" in repr(saved)
    assert rig.command(Command.NOP) == S.SUCCESS
