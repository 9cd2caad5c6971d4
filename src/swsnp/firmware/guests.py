"""Commands that give guests contexts, ASIDs and pages. Source: AMD 56860, commands 90h..93h, 95h and C7h."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import (
    Activate,
    ActivateEx,
    FirmwareStatus,
    GctxAddress,
    GuestStatus,
    GuestStatusBuffer,
    PageReclaim,
)
from swsnp.firmware.context import GuestContext, GuestState
from swsnp.firmware.faults import FirmwareFault, require
from swsnp.firmware.platform import AsidState
from swsnp.hardware.memory import PAGE, BusError
from swsnp.hardware.rmp import PageState

if TYPE_CHECKING:
    from swsnp.firmware.platform import Platform
    from swsnp.hardware.rmp import Rmp

__all__ = [
    "activate",
    "activate_ex",
    "decommission",
    "forget",
    "gctx_create",
    "guest_status",
    "page_reclaim",
    "reclaim",
]

_PAGE_MASK: Final = PAGE - 1
_LARGE_MASK: Final = (2 << 20) - 1
_VEK_SIZE: Final = 32
_APIC_ID_SIZE: Final = 4
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
    sockets = platform.chip.settings.sockets
    require(sockets == 1 or not guest.policy.single_socket, FirmwareStatus.POLICY_FAILURE)
    require(asid in platform.asids, FirmwareStatus.INVALID_ASID)
    _require_free(platform, asid)
    require(guest.asid == 0, FirmwareStatus.ACTIVE)
    _give_asid(platform, guest, asid, frozenset(range(sockets)))


def _require_free(platform: Platform, asid: int) -> None:
    owned = platform.asids[asid] in (AsidState.ALLOCATED, AsidState.IN_USE)
    require(not owned, FirmwareStatus.ASID_OWNED)


def _give_asid(platform: Platform, guest: GuestContext, asid: int, sockets: frozenset[int]) -> None:
    require(platform.asids[asid] is AsidState.CLEAN, FirmwareStatus.DFFLUSH_REQUIRED)
    guest.asid, guest.sockets = asid, sockets
    guest.active = guest.state is GuestState.RUNNING
    platform.asids[asid] = AsidState.IN_USE if guest.active else AsidState.ALLOCATED


def activate_ex(platform: Platform, buffer: ActivateEx) -> None:
    """SNP_ACTIVATE_EX: give a guest its ASID on some cores; more may be added later.

    1. LEN or reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No guest context: INVALID_GUEST.
    4. Guest neither LAUNCH nor RUNNING: INVALID_GUEST_STATE.
    5. Guest without ASID, and pages of that ASID in the RMP: INVALID_CONFIG.
    6. ASID 0 or too big: INVALID_ASID.
    7. NUMIDS 0 or more than there are, an id that no core has, no memory at IDS_PADDR: INVALID_PARAM.
    8. SINGLE_SOCKET with cores on two sockets, or not that of an active agent: POLICY_FAILURE.
    9. The guest has another ASID: ACTIVE.
    10. As SNP_ACTIVATE from ASID_OWNED on, unless the guest has this ASID already.
    """
    asid = buffer.asid
    misaligned = buffer.gctx_paddr & _PAGE_MASK
    well_formed = buffer.length == ActivateEx.SIZE and not (buffer.reserved_04 or misaligned)
    require(well_formed, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    guest = platform.guest(buffer.gctx_paddr)
    require(guest.state is not GuestState.INIT, FirmwareStatus.INVALID_GUEST_STATE)
    used = asid != 0 and guest.asid == 0 and platform.rmp.pages_of(asid)
    require(not used, FirmwareStatus.INVALID_CONFIG)
    require(asid in platform.asids, FirmwareStatus.INVALID_ASID)
    sockets = guest.sockets | _sockets_named(platform, buffer)
    if guest.policy.single_socket:
        require(_on_one_socket(platform, guest, sockets), FirmwareStatus.POLICY_FAILURE)
    require(guest.asid in (0, asid), FirmwareStatus.ACTIVE)
    if guest.asid == asid:
        guest.sockets = sockets
        return
    _require_free(platform, asid)
    _give_asid(platform, guest, asid, sockets)


def _sockets_named(platform: Platform, buffer: ActivateEx) -> frozenset[int]:
    settings = platform.chip.settings
    threads = settings.sockets * settings.threads_per_socket
    require(0 < buffer.numids <= threads, FirmwareStatus.INVALID_PARAM)
    try:
        raw = platform.memory.read(buffer.ids_paddr, buffer.numids * _APIC_ID_SIZE)
    except BusError:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM) from None
    ids = struct.unpack(f"<{buffer.numids}I", raw)
    require(max(ids) < threads, FirmwareStatus.INVALID_PARAM)
    return frozenset(each // settings.threads_per_socket for each in ids)


def _on_one_socket(platform: Platform, guest: GuestContext, sockets: frozenset[int]) -> bool:
    if len(sockets) != 1:
        return False
    if not guest.has_migration_agent:
        return True
    agent = platform.guests.get(guest.ma_paddr)
    return agent is not None and agent.active and agent.sockets == sockets


def decommission(platform: Platform, buffer: GctxAddress) -> None:
    """SNP_DECOMMISSION: end a guest in any state; Context -> Firmware.

    An ASID that was in use becomes dirty, one that was only allocated clean. The model counts an ASID as in
    use from SNP_LAUNCH_FINISH on, since it does not watch the cores.
    """
    gctx = buffer.gctx_paddr
    require(not gctx & _PAGE_MASK, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(gctx)
    forget(platform, platform.guest(gctx))


def forget(platform: Platform, guest: GuestContext) -> None:
    """End a guest: keys erased, ASID given back, Context -> Firmware; its other pages stay as they are."""
    gctx = guest.gctx_paddr
    if guest.asid:
        was_used = platform.asids[guest.asid] is AsidState.IN_USE
        platform.asids[guest.asid] = AsidState.DIRTY if was_used else AsidState.CLEAN
    guest.erase()
    del platform.guests[gctx]
    platform.rmp[gctx] = replace(platform.rmp[gctx], vmsa=False)


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
