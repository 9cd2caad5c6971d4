"""Commands that give guests contexts, ASIDs and pages. Source: AMD 56860, commands 90h..93h and C7h."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import (
    Activate,
    FirmwareStatus,
    GctxAddress,
    GuestStatus,
    GuestStatusBuffer,
    PageReclaim,
)
from swsnp.firmware.context import GuestContext, GuestState
from swsnp.firmware.faults import require
from swsnp.firmware.platform import AsidState
from swsnp.hardware.memory import PAGE
from swsnp.hardware.rmp import PageState

if TYPE_CHECKING:
    from swsnp.firmware.platform import Platform
    from swsnp.hardware.rmp import Rmp

__all__ = ["activate", "decommission", "gctx_create", "guest_status", "page_reclaim", "reclaim"]

_PAGE_MASK: Final = PAGE - 1
_LARGE_MASK: Final = (2 << 20) - 1
_VEK_SIZE: Final = 32
_RECLAIMABLE: Final = {
    PageState.METADATA,
    PageState.FIRMWARE,
    PageState.PRE_GUEST,
    PageState.PRE_SWAP,
}


def gctx_create(platform: Platform, buffer: GctxAddress) -> None:
    """SNP_GCTX_CREATE: Firmware -> Context.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. Page not Firmware: INVALID_PAGE_STATE.
    4. Not a 4 KiB entry: INVALID_PAGE_SIZE.
    """
    gctx = buffer.gctx_paddr
    require(not gctx & _PAGE_MASK, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    entry = platform.look_up(gctx)
    require(entry.state is PageState.FIRMWARE, FirmwareStatus.INVALID_PAGE_STATE)
    require(entry.page_size == 0, FirmwareStatus.INVALID_PAGE_SIZE)
    chip = platform.chip
    platform.memory.write(gctx, bytes(PAGE))
    platform.rmp[gctx] = replace(entry, vmsa=True)
    platform.guests[gctx] = GuestContext(
        gctx_paddr=gctx,
        launch_tcb=chip.variables.committed_tcb,
        created_by=chip.variables.current_version,
        vek=chip.entropy(_VEK_SIZE),
    )


def activate(platform: Platform, buffer: Activate) -> None:
    """SNP_ACTIVATE: give a guest its ASID.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No guest context: INVALID_GUEST.
    4. Guest neither LAUNCH nor RUNNING: INVALID_GUEST_STATE.
    5. Pages of that ASID in the RMP: INVALID_CONFIG.
    6. SINGLE_SOCKET on more than one socket: POLICY_FAILURE.
    7. ASID 0 or too big: INVALID_ASID.
    8. ASID allocated or in use: ASID_OWNED.
    9. Guest active or pending already: ACTIVE.
    10. ASID dirty: DFFLUSH_REQUIRED.
    """
    asid = buffer.asid
    require(not (buffer.gctx_paddr & _PAGE_MASK or buffer.reserved_0c), FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    guest = platform.guest(buffer.gctx_paddr)
    require(guest.state is not GuestState.INIT, FirmwareStatus.INVALID_GUEST_STATE)
    require(not platform.rmp.pages_of(asid) or asid == 0, FirmwareStatus.INVALID_CONFIG)
    on_one_socket = platform.chip.settings.sockets == 1
    require(on_one_socket or not guest.policy.single_socket, FirmwareStatus.POLICY_FAILURE)
    state = platform.asids.get(asid)
    require(state is not None, FirmwareStatus.INVALID_ASID)
    require(state not in (AsidState.ALLOCATED, AsidState.IN_USE), FirmwareStatus.ASID_OWNED)
    require(guest.asid == 0, FirmwareStatus.ACTIVE)
    require(state is AsidState.CLEAN, FirmwareStatus.DFFLUSH_REQUIRED)
    guest.asid = asid
    guest.active = guest.state is GuestState.RUNNING
    platform.asids[asid] = AsidState.IN_USE if guest.active else AsidState.ALLOCATED


def decommission(platform: Platform, buffer: GctxAddress) -> None:
    """SNP_DECOMMISSION: end a guest in any state; Context -> Firmware.

    An ASID that was in use becomes dirty, one that was only allocated clean. The model counts an ASID as in
    use from SNP_LAUNCH_FINISH on, since it does not watch the cores.
    """
    gctx = buffer.gctx_paddr
    require(not gctx & _PAGE_MASK, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    entry = platform.look_up(gctx)
    guest = platform.guest(gctx)
    if guest.asid:
        was_used = platform.asids[guest.asid] is AsidState.IN_USE
        platform.asids[guest.asid] = AsidState.DIRTY if was_used else AsidState.CLEAN
    guest.erase()
    del platform.guests[gctx]
    platform.rmp[gctx] = replace(entry, vmsa=False)


def guest_status(platform: Platform, buffer: GuestStatus) -> None:
    """SNP_GUEST_STATUS, in any guest state.

    1. Reserved bits, or a status buffer that crosses a page: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No guest context: INVALID_GUEST.
    4. Status page not Firmware: INVALID_PAGE_STATE.
    """
    status = buffer.status_paddr
    crosses = (status & _PAGE_MASK) + GuestStatusBuffer.SIZE > PAGE
    require(not (buffer.gctx_paddr & _PAGE_MASK or crosses), FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    entry = platform.look_up(status)
    guest = platform.guest(buffer.gctx_paddr)
    platform.require_output(status, GuestStatusBuffer.SIZE, entry)
    answer = GuestStatusBuffer(
        policy=guest.policy, asid=guest.asid, state=guest.state, vcek_dis=guest.vcek_dis
    )
    platform.memory.write(status, bytes(answer))


def page_reclaim(platform: Platform, buffer: PageReclaim) -> None:
    """SNP_PAGE_RECLAIM: Firmware, Metadata -> Reclaim; Pre-Guest -> Guest-Invalid; Pre-Swap -> Guest-Valid.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No memory there: INVALID_PARAM.
    4. PAGE_SIZE other than the entry's: INVALID_PAGE_SIZE.
    5. 2 MiB, but not aligned: INVALID_ADDRESS.
    6. Not immutable: nothing to do, SUCCESS.
    7. In none of the states above: INVALID_PAGE_STATE.
    """
    size, page = buffer.page_paddr & 1, buffer.page_paddr & ~1
    require(not page & _PAGE_MASK, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    entry = platform.look_up(page, FirmwareStatus.INVALID_PARAM)
    require(size == entry.page_size, FirmwareStatus.INVALID_PAGE_SIZE)
    require(not (size and page & _LARGE_MASK), FirmwareStatus.INVALID_ADDRESS)
    if not entry.immutable:
        return
    require(entry.state in _RECLAIMABLE, FirmwareStatus.INVALID_PAGE_STATE)
    reclaim(platform.rmp, page)


def reclaim(rmp: Rmp, page: int) -> None:
    """IMMUTABLE := 0: the hypervisor may take the page back with RMPUPDATE."""
    rmp[page] = replace(rmp[page], immutable=False)
