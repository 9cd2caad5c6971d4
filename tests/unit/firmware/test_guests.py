"""GCTX_CREATE, ACTIVATE, DECOMMISSION, GUEST_STATUS, PAGE_RECLAIM."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_command import (
    Activate,
    Command,
    GctxAddress,
    GuestStatus,
    GuestStatusBuffer,
    PageReclaim,
    PlatformState,
)
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_report import GuestPolicy
from swsnp.firmware.context import GuestState
from swsnp.firmware.platform import AsidState
from swsnp.hardware.rmp import PageState, RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

NOWHERE = 0x7777_7777_7000
SINGLE_SOCKET_POLICY = 0x130000
WITH_ONE_PAGE = (Command.SNP_GCTX_CREATE, Command.SNP_DECOMMISSION)


# --- GCTX_CREATE ----------------------------------------------------------------------------------


def _create(rig: Rig, address: int) -> int:
    return rig.command(Command.SNP_GCTX_CREATE, GctxAddress(gctx_paddr=address))


def test_gctx_create(rig: Rig) -> None:
    """AMD 56860: page zeroed, Firmware to Context, state INIT, LD zero, launch TCB := committed TCB."""
    page = rig.page(data=b"\xff" * 4096)
    assert _create(rig, page) == S.SUCCESS
    assert rig.state(page) is PageState.CONTEXT
    assert rig.memory.read(page, 4096) == bytes(4096)
    context = rig.context(page)
    assert (context.state, context.ld, context.asid) == (GuestState.INIT, bytes(48), 0)
    assert context.launch_tcb == rig.chip.variables.committed_tcb


@pytest.mark.parametrize(
    ("entry", "status"),
    [
        (RmpEntry(), S.INVALID_PAGE_STATE),
        (RmpEntry(assigned=True), S.INVALID_PAGE_STATE),
        (RmpEntry(assigned=True, immutable=True, vmsa=True), S.INVALID_PAGE_STATE),
        (RmpEntry(assigned=True, immutable=True, asid=1), S.INVALID_PAGE_STATE),
        (RmpEntry(assigned=False, page_size=1), S.INVALID_PAGE_STATE),  # the state comes first
        (RmpEntry(assigned=True, immutable=True, page_size=1), S.INVALID_PAGE_SIZE),
    ],
)
def test_gctx_create_wants_a_firmware_page(rig: Rig, entry: RmpEntry, status: S) -> None:
    """AMD 56860: page not Firmware, then not a 4 KiB entry."""
    page = rig.page(entry)
    assert _create(rig, page) == status
    assert rig.rmp[page] == entry
    assert rig.platform.guests == {}


@pytest.mark.parametrize("command", WITH_ONE_PAGE)
def test_common_checks_of_commands_with_one_page(rig: Rig, command: int) -> None:
    """AMD 56860: reserved bits, platform state, look-up, in this order."""
    assert rig.command(command, GctxAddress(gctx_paddr=NOWHERE)) == S.INVALID_ADDRESS
    rig.platform.state = PlatformState.UNINIT
    assert rig.command(command, GctxAddress(gctx_paddr=NOWHERE)) == S.INVALID_PLATFORM_STATE
    assert rig.command(command, GctxAddress(gctx_paddr=NOWHERE | 1)) == S.INVALID_PARAM


# --- ACTIVATE -------------------------------------------------------------------------------------


def test_activate_is_pending_until_the_guest_runs(rig: Rig) -> None:
    """AMD 56860: in LAUNCH an activation is pending and becomes active at LAUNCH_FINISH."""
    gctx = rig.create()
    assert rig.start(gctx) == 0
    assert rig.activate(gctx, 5) == S.SUCCESS
    context = rig.context(gctx)
    assert (context.asid, context.active) == (5, False)
    asids = [rig.platform.asids[5]]
    assert rig.finish(gctx) == 0
    assert context.active
    asids.append(rig.platform.asids[5])
    assert asids == [AsidState.ALLOCATED, AsidState.IN_USE]


def test_activate_of_a_running_guest_is_active_at_once(rig: Rig) -> None:
    """AMD 56860: a RUNNING guest (imported ones come without ASID) is active at once."""
    gctx = rig.create()
    assert rig.start(gctx) == 0
    rig.context(gctx).state = GuestState.RUNNING
    assert rig.activate(gctx, 5) == S.SUCCESS
    assert rig.context(gctx).active


def test_activate_checks_in_order(make_rig: MakeRig) -> None:
    """AMD 56860 and firmware 1.55 as observed: faults are taken away one by one, the next one shows."""
    rig = make_rig(sockets=2)
    gctx, other = rig.create(), rig.create()
    page = rig.page(RmpEntry(assigned=True, asid=2000, gpa=0x1000))
    rig.rmp[gctx] = replace(rig.rmp[gctx], vmsa=False)
    rig.platform.state = PlatformState.UNINIT

    def activate(asid: int, reserved: int = 0) -> int:
        record = Activate(gctx_paddr=gctx, asid=asid, reserved_0c=reserved)
        return rig.command(Command.SNP_ACTIVATE, record)

    assert activate(2000, reserved=1) == S.INVALID_PARAM
    assert activate(2000) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert activate(2000) == S.INVALID_GUEST
    rig.rmp[gctx] = replace(rig.rmp[gctx], vmsa=True)
    assert activate(2000) == S.INVALID_GUEST_STATE
    assert rig.start(gctx, policy=SINGLE_SOCKET_POLICY) == 0
    assert activate(2000) == S.INVALID_CONFIG
    rig.rmp[page] = RmpEntry()
    assert activate(2000) == S.POLICY_FAILURE
    rig.context(gctx).policy = GuestPolicy(0x30000)
    assert activate(2000) == S.INVALID_ASID
    assert activate(0) == S.INVALID_ASID
    assert rig.start(other) == 0
    assert rig.activate(other, 3) == 0
    rig.context(gctx).asid = 9
    assert activate(3) == S.ASID_OWNED
    rig.platform.asids[4] = AsidState.DIRTY
    assert activate(4) == S.ACTIVE
    rig.context(gctx).asid = 0
    assert activate(4) == S.DFFLUSH_REQUIRED
    assert rig.command(Command.SNP_DF_FLUSH) == 0
    assert activate(4) == S.SUCCESS


def test_activate_low_bits_and_look_up(rig: Rig) -> None:
    """AMD 56860: reserved address bits; a page that no memory answers for."""
    assert rig.activate(rig.create() | 4, 1) == S.INVALID_PARAM
    assert rig.activate(NOWHERE, 1) == S.INVALID_ADDRESS


@pytest.mark.parametrize(("asid", "status"), [(1006, S.SUCCESS), (1007, S.INVALID_ASID)])
def test_largest_asid(rig: Rig, asid: int, status: S) -> None:
    """Firmware 1.55 for Genoa: ASIDs 1..1006."""
    gctx = rig.create()
    assert rig.start(gctx) == 0
    assert rig.activate(gctx, asid) == status


# --- DECOMMISSION ---------------------------------------------------------------------------------


def _decommission(rig: Rig, gctx: int) -> int:
    return rig.command(Command.SNP_DECOMMISSION, GctxAddress(gctx_paddr=gctx))


def test_decommission_of_a_running_guest(rig: Rig) -> None:
    """AMD 56860: Context to Firmware, secrets erased, the ASID that was in use is dirty."""
    guest = rig.running(asid=7)
    context = rig.context(guest)
    assert _decommission(rig, guest.gctx) == S.SUCCESS
    assert rig.state(guest.gctx) is PageState.FIRMWARE
    assert rig.platform.guests == {}
    assert (context.vek, context.oek, context.vmrk, context.vmpcks) == (b"", b"", b"", ())
    assert rig.platform.asids[7] is AsidState.DIRTY
    assert _decommission(rig, guest.gctx) == S.INVALID_GUEST


def test_decommission_in_every_state(rig: Rig) -> None:
    """AMD 56860: allowed in INIT and LAUNCH too; an ASID that was only allocated is clean again."""
    created, launching = rig.create(), rig.launching(asid=8)
    assert _decommission(rig, created) == S.SUCCESS
    assert _decommission(rig, launching) == S.SUCCESS
    assert rig.platform.asids[8] is AsidState.CLEAN


def test_a_dirty_asid_is_usable_after_df_flush(rig: Rig) -> None:
    """AMD 56860: DECOMMISSION, DF_FLUSH, then another guest may have the ASID (its pages given back)."""
    guest = rig.running(asid=7)
    assert _decommission(rig, guest.gctx) == 0
    for page in [at << 12 for at, entry in rig.rmp._entries.items() if entry.asid == 7]:
        rig.rmp[page] = RmpEntry()
    gctx = rig.create()
    assert rig.start(gctx) == 0
    assert rig.activate(gctx, 7) == S.DFFLUSH_REQUIRED
    assert rig.command(Command.SNP_DF_FLUSH) == 0
    assert rig.activate(gctx, 7) == S.SUCCESS


# --- GUEST_STATUS ---------------------------------------------------------------------------------


def _guest_status(rig: Rig, gctx: int, page: int) -> int:
    return rig.command(Command.SNP_GUEST_STATUS, GuestStatus(gctx_paddr=gctx, status_paddr=page))


def test_guest_status(rig: Rig) -> None:
    """AMD 56860: POLICY, ASID (0 without), STATE, VCEK_DIS."""
    page = rig.page()
    created, guest = rig.create(), rig.running(asid=3, flags=4)
    assert _guest_status(rig, created, page) == S.SUCCESS
    assert GuestStatusBuffer.parse(rig.memory.read(page, 0x20)) == GuestStatusBuffer()
    assert _guest_status(rig, guest.gctx, page + 0xFE0) == S.SUCCESS
    wanted = GuestStatusBuffer(policy=GuestPolicy(0x30000), asid=3, state=2, vcek_dis=1)
    assert GuestStatusBuffer.parse(rig.memory.read(page + 0xFE0, 0x20)) == wanted
    assert rig.state(page) is PageState.FIRMWARE


def test_guest_status_checks_in_order(rig: Rig) -> None:
    """AMD 56860: reserved and crossing, platform state, look-up, context, page state."""
    gctx, page = rig.create(), rig.page(RmpEntry())
    rig.platform.state = PlatformState.UNINIT
    assert _guest_status(rig, gctx | 1, page) == S.INVALID_PARAM
    assert _guest_status(rig, gctx, page + 0xFE1) == S.INVALID_PARAM
    assert _guest_status(rig, gctx, page) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert _guest_status(rig, gctx, NOWHERE) == S.INVALID_ADDRESS
    assert _guest_status(rig, page, page) == S.INVALID_GUEST
    assert _guest_status(rig, gctx, page) == S.INVALID_PAGE_STATE


# --- PAGE_RECLAIM ---------------------------------------------------------------------------------


def _reclaim(rig: Rig, value: int) -> int:
    return rig.command(Command.SNP_PAGE_RECLAIM, PageReclaim(page_paddr=value))


FIRMWARE = RmpEntry(assigned=True, immutable=True)
PRE_GUEST = RmpEntry(assigned=True, immutable=True, asid=1, gpa=0x1000)


@pytest.mark.parametrize(
    ("entry", "after", "status"),
    [
        (FIRMWARE, PageState.RECLAIM, S.SUCCESS),
        (replace(FIRMWARE, gpa=0x5000), PageState.RECLAIM, S.SUCCESS),  # Metadata
        (PRE_GUEST, PageState.GUEST_INVALID, S.SUCCESS),
        (replace(PRE_GUEST, validated=True), PageState.GUEST_VALID, S.SUCCESS),  # Pre-Swap
        (RmpEntry(), PageState.HYPERVISOR, S.SUCCESS),
        (replace(PRE_GUEST, immutable=False), PageState.GUEST_INVALID, S.SUCCESS),
        (replace(FIRMWARE, vmsa=True), PageState.CONTEXT, S.INVALID_PAGE_STATE),
        (RmpEntry(immutable=True), PageState.HV_FIXED, S.INVALID_PAGE_STATE),
    ],
)
def test_page_reclaim(rig: Rig, entry: RmpEntry, after: PageState, status: S) -> None:
    """AMD 56860, page states: what PAGE_RECLAIM makes of each; nothing to do when not immutable."""
    page = rig.page(entry)
    assert _reclaim(rig, page) == status
    assert rig.state(page) is after
    if status is S.SUCCESS:
        assert rig.rmp[page] == replace(entry, immutable=False)


def test_page_reclaim_checks_in_order(rig: Rig) -> None:
    """AMD 56860: reserved, platform state, look-up, size, alignment, state."""
    page = rig.page(replace(FIRMWARE, vmsa=True, page_size=1))
    rig.page()
    page_off = rig.page(replace(FIRMWARE, vmsa=True, page_size=1))
    rig.platform.state = PlatformState.UNINIT
    assert _reclaim(rig, page | 2) == S.INVALID_PARAM
    assert _reclaim(rig, page) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert _reclaim(rig, NOWHERE) == S.INVALID_PARAM
    assert _reclaim(rig, page_off) == S.INVALID_PAGE_SIZE
    assert _reclaim(rig, page_off | 1) == S.INVALID_ADDRESS
    large = rig.memory.allocate(2 << 20)
    rig.rmp[large] = replace(FIRMWARE, vmsa=True, page_size=1)
    assert _reclaim(rig, large | 1) == S.INVALID_PAGE_STATE
    rig.rmp[large] = replace(FIRMWARE, page_size=1)
    assert _reclaim(rig, large | 1) == S.SUCCESS
