"""SNP_ACTIVATE_EX."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Activate, ActivateEx, Command, GctxAddress, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_report import GuestPolicy
from swsnp.firmware.platform import AsidState
from swsnp.hardware.rmp import RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

SINGLE = GuestPolicy.of(smt=1, reserved_one=1, single_socket=1, migrate_ma=1)


def _activate(rig: Rig, gctx: int, asid: int, ids: tuple[int, ...] = (0,), **fields: Any) -> int:
    page = rig.page(RmpEntry(), struct.pack(f"<{len(ids)}I", *ids))
    record = ActivateEx(length=0x20, gctx_paddr=gctx, asid=asid, numids=len(ids), ids_paddr=page)
    return rig.command(Command.SNP_ACTIVATE_EX, record.but(**fields))


def _started(rig: Rig, policy: int = SINGLE, **fields: Any) -> int:
    gctx = rig.create()
    assert rig.start(gctx, policy=policy, **fields) == 0
    return gctx


def test_cores_may_be_added(make_rig: MakeRig) -> None:
    """AMD 56860: as SNP_ACTIVATE for the listed cores; repeated with the same ASID it adds cores."""
    rig = make_rig(sockets=2)
    gctx = _started(rig, 0x30000)
    assert _activate(rig, gctx, 5, (1, 2)) == S.SUCCESS
    context = rig.context(gctx)
    assert (context.asid, context.active, context.sockets) == (5, False, frozenset({0}))
    states = [rig.platform.asids[5]]
    rig.page(RmpEntry(assigned=True, asid=5, gpa=0x1000))  # pages are no hindrance once it is the guest's
    assert _activate(rig, gctx, 5, (256,)) == S.SUCCESS
    assert context.sockets == {0, 1}
    assert rig.finish(gctx) == 0
    assert _activate(rig, gctx, 5) == S.SUCCESS
    states.append(rig.platform.asids[5])
    assert states == [AsidState.ALLOCATED, AsidState.IN_USE]


def test_checks_in_order(make_rig: MakeRig) -> None:
    """AMD 56860: faults are taken away one by one, the next one shows."""
    rig = make_rig(sockets=2)
    other = rig.launching(1)
    gctx = rig.create()
    page = rig.page(RmpEntry(assigned=True, asid=2000, gpa=0x1000))
    rig.platform.state = PlatformState.UNINIT
    too_far: tuple[int, ...] = (0, 512)
    assert _activate(rig, gctx, 2000, too_far, length=0x1F) == S.INVALID_PARAM
    assert _activate(rig, gctx, 2000, too_far, reserved_04=1) == S.INVALID_PARAM
    assert _activate(rig, gctx + 1, 2000, too_far) == S.INVALID_PARAM
    assert _activate(rig, gctx, 2000, too_far) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert _activate(rig, page, 2000, too_far) == S.INVALID_GUEST
    assert _activate(rig, gctx, 2000, too_far) == S.INVALID_GUEST_STATE
    assert rig.start(gctx, policy=SINGLE) == 0
    assert _activate(rig, gctx, 2000, too_far) == S.INVALID_CONFIG
    rig.rmp[page] = RmpEntry()
    for asid in (0, 2000):
        assert _activate(rig, gctx, asid, too_far) == S.INVALID_ASID
    rig.platform.asids[3] = AsidState.DIRTY
    for bad in ({"numids": 0}, {"numids": 513}, {"ids_paddr": 0x7777_7777_7000}):
        assert _activate(rig, gctx, 1, (0, 256), **bad) == S.INVALID_PARAM
    assert _activate(rig, gctx, 1, too_far) == S.INVALID_PARAM
    assert _activate(rig, gctx, 1, (0, 256)) == S.POLICY_FAILURE
    assert _activate(rig, gctx, 1) == S.ASID_OWNED
    assert _activate(rig, gctx, 3) == S.DFFLUSH_REQUIRED
    assert rig.context(gctx).asid == 0
    assert _activate(rig, gctx, 4) == S.SUCCESS
    assert _activate(rig, gctx, 1) == S.ACTIVE
    assert _activate(rig, gctx, 4, (256,)) == S.POLICY_FAILURE
    assert rig.context(gctx).sockets == {0}
    assert rig.context(other).sockets == {0, 1}


def test_every_core_at_once(make_rig: MakeRig) -> None:
    """AMD 56860: NUMIDS may be as large as the number of cores; one more is too many."""
    rig = make_rig(sockets=2)
    gctx = _started(rig, 0x30000)
    assert _activate(rig, gctx, 1, tuple(range(512)), numids=513) == S.INVALID_PARAM
    assert _activate(rig, gctx, 1, tuple(range(512))) == S.SUCCESS
    assert rig.context(gctx).sockets == {0, 1}


def test_a_guest_stays_on_the_socket_of_its_agent(make_rig: MakeRig) -> None:
    """AMD 56860: SINGLE_SOCKET wants an active agent on the same socket."""
    rig = make_rig(sockets=2)
    agent = _started(rig)
    gctx = _started(rig, flags=1, ma_gctx_paddr=agent)
    assert _activate(rig, gctx, 2, (300,)) == S.POLICY_FAILURE
    assert _activate(rig, agent, 1, (300,)) == S.SUCCESS
    assert _activate(rig, gctx, 2, (300,)) == S.POLICY_FAILURE  # still pending
    assert rig.finish(agent) == 0
    assert _activate(rig, gctx, 2, (3,)) == S.POLICY_FAILURE
    assert _activate(rig, gctx, 2, (300,)) == S.SUCCESS


def test_an_agent_that_is_gone_has_no_socket(rig: Rig) -> None:
    """AMD 56860: SINGLE_SOCKET and the agent decommissioned: it is not active, POLICY_FAILURE."""
    agent = _started(rig)
    gctx = _started(rig, flags=1, ma_gctx_paddr=agent)
    assert rig.command(Command.SNP_DECOMMISSION, GctxAddress(gctx_paddr=agent)) == S.SUCCESS
    assert _activate(rig, gctx, 2) == S.POLICY_FAILURE


@pytest.mark.parametrize("sockets", [1, 2])
def test_activate_means_all_cores(make_rig: MakeRig, sockets: int) -> None:
    """AMD 56860: SNP_ACTIVATE installs the key on every socket, so SINGLE_SOCKET wants a host with one."""
    rig = make_rig(sockets=sockets)
    gctx = _started(rig, SINGLE if sockets == 1 else 0x30000)
    assert rig.command(Command.SNP_ACTIVATE, Activate(gctx_paddr=gctx, asid=1)) == S.SUCCESS
    assert rig.context(gctx).sockets == set(range(sockets))


def test_a_context_that_is_no_context(rig: Rig) -> None:
    """AMD 56860: the page must still be in state Context."""
    gctx = _started(rig)
    rig.rmp[gctx] = replace(rig.rmp[gctx], vmsa=False)
    assert _activate(rig, gctx, 1) == S.INVALID_GUEST
