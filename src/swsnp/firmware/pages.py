"""Commands on pages: debugging, moving, metadata, fixed ranges, joining. Source: AMD 56860, chapter 8."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import FirmwareStatus
from swsnp.abi.snp_page_command import PageSetState
from swsnp.firmware.context import GuestContext, GuestState
from swsnp.firmware.faults import require
from swsnp.firmware.platform import range_list
from swsnp.hardware.memory import PAGE
from swsnp.hardware.rmp import PageState, RmpEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.abi.snp_command import RangeElement
    from swsnp.abi.snp_page_command import DebugCopy, PageMdInit, PageMove, PageUnsmash
    from swsnp.firmware.platform import Platform

__all__ = [
    "dbg_decrypt",
    "dbg_encrypt",
    "page_md_init",
    "page_move",
    "page_set_state",
    "page_unsmash",
    "require_swappable",
]

_PAGE_MASK: Final = PAGE - 1
_LARGE: Final = 2 << 20
_LARGE_MASK: Final = _LARGE - 1
_LAUNCHED: Final = (PageState.PRE_GUEST, PageState.PRE_SWAP)
_GUESTS: Final = (*_LAUNCHED, PageState.GUEST_INVALID, PageState.GUEST_VALID)


def dbg_decrypt(platform: Platform, buffer: DebugCopy) -> None:
    """SNP_DBG_DECRYPT: a guest's page in plaintext into a Firmware page.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. A page that is not memory: INVALID_ADDRESS.
    4. No guest context: INVALID_GUEST.
    5. Source no guest's page, or destination not Firmware: INVALID_PAGE_STATE.
    6. Source another guest's: INVALID_PAGE_OWNER. A guest without ASID owns no page.
    7. POLICY without DEBUG: POLICY_FAILURE.
    """
    _require_aligned(buffer)
    platform.require_init()
    guest, source, target = _debugged(platform, buffer)
    in_order = source.state in _GUESTS and target.state is PageState.FIRMWARE
    require(in_order, FirmwareStatus.INVALID_PAGE_STATE)
    _require_debug(guest, source)
    _copy(platform, buffer.src_paddr, buffer.dst_paddr, PAGE)


def dbg_encrypt(platform: Platform, buffer: DebugCopy) -> None:
    """SNP_DBG_ENCRYPT: plaintext into a Pre-Guest or Pre-Swap page of a guest.

    1. SNP not INIT: INVALID_PLATFORM_STATE; here it comes before reserved bits: INVALID_PARAM.
    2. As SNP_DBG_DECRYPT, with states and owner of the destination; the source's state is not checked.
    """
    platform.require_init()
    _require_aligned(buffer)
    guest, _, target = _debugged(platform, buffer)
    require(target.state in _LAUNCHED, FirmwareStatus.INVALID_PAGE_STATE)
    _require_debug(guest, target)
    _copy(platform, buffer.src_paddr, buffer.dst_paddr, PAGE)


def _require_aligned(buffer: DebugCopy) -> None:
    misaligned = (buffer.gctx_paddr | buffer.src_paddr | buffer.dst_paddr) & _PAGE_MASK
    require(not misaligned, FirmwareStatus.INVALID_PARAM)


def _debugged(platform: Platform, buffer: DebugCopy) -> tuple[GuestContext, RmpEntry, RmpEntry]:
    platform.look_up(buffer.gctx_paddr)
    source, target = platform.look_up(buffer.src_paddr), platform.look_up(buffer.dst_paddr)
    return platform.guest(buffer.gctx_paddr), source, target


def _require_debug(guest: GuestContext, entry: RmpEntry) -> None:
    require(entry.asid == guest.asid, FirmwareStatus.INVALID_PAGE_OWNER)
    require(bool(guest.policy.debug), FirmwareStatus.POLICY_FAILURE)


def _copy(platform: Platform, source: int, target: int, size: int) -> None:
    platform.memory.write(target, platform.memory.read(source, size))


def page_md_init(platform: Platform, buffer: PageMdInit) -> None:
    """SNP_PAGE_MD_INIT: Firmware -> Metadata of a guest.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. A page that is not memory: INVALID_ADDRESS.
    4. No guest context: INVALID_GUEST.
    5. Page not Firmware: INVALID_PAGE_STATE; not a 4 KiB entry: INVALID_PAGE_SIZE.
    6. Guest neither LAUNCH nor RUNNING: INVALID_GUEST_STATE.
    """
    page = buffer.page_paddr
    require(not (buffer.gctx_paddr | page) & _PAGE_MASK, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    entry = platform.look_up(page)
    guest = platform.guest(buffer.gctx_paddr)
    require(entry.state is PageState.FIRMWARE, FirmwareStatus.INVALID_PAGE_STATE)
    require(not entry.page_size, FirmwareStatus.INVALID_PAGE_SIZE)
    require(guest.state is not GuestState.INIT, FirmwareStatus.INVALID_GUEST_STATE)
    platform.memory.write(page, bytes(PAGE))
    platform.rmp[page] = replace(entry, gpa=guest.gctx_paddr)


def require_swappable(guest: GuestContext) -> None:
    """What moving and swapping want of a guest.

    Neither LAUNCH nor RUNNING: INVALID_GUEST_STATE; no ASID: INACTIVE; PAGE_SWAP_DISABLE in POLICY:
    POLICY_FAILURE (UNVERIFIED).
    """
    require(guest.state is not GuestState.INIT, FirmwareStatus.INVALID_GUEST_STATE)
    require(guest.asid != 0, FirmwareStatus.INACTIVE)
    require(not guest.policy.page_swap_disable, FirmwareStatus.POLICY_FAILURE)


def page_move(platform: Platform, buffer: PageMove) -> None:
    """SNP_PAGE_MOVE: a guest's page, or its metadata, to another place.

    Pre-Guest or Pre-Swap to Pre-Guest: the destination becomes Guest-Invalid or Guest-Valid, the source
    Guest-Invalid. Metadata to Firmware: both change places.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. A page that is not memory: INVALID_ADDRESS.
    4. No guest context: INVALID_GUEST.
    5. PAGE_SIZE not that of both entries: INVALID_PAGE_SIZE; 2 MiB, but not aligned: INVALID_ADDRESS.
    6. See `require_swappable`.
    7. The pair of states is none of those above: INVALID_PAGE_STATE.
    8. A page is another guest's: INVALID_PAGE_OWNER.
    """
    source_at, target_at, size = buffer.src_paddr, buffer.dst_paddr, buffer.page_size
    misaligned = (buffer.gctx_paddr | source_at | target_at) & _PAGE_MASK
    require(not (misaligned or size & ~1 or buffer.reserved_0c), FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    source, target = platform.look_up(source_at), platform.look_up(target_at)
    guest = platform.guest(buffer.gctx_paddr)
    require(source.page_size == size == target.page_size, FirmwareStatus.INVALID_PAGE_SIZE)
    require(not (size and (source_at | target_at) & _LARGE_MASK), FirmwareStatus.INVALID_ADDRESS)
    require_swappable(guest)
    pair = (source.state, target.state)
    moves_metadata = pair == (PageState.METADATA, PageState.FIRMWARE)
    moves_page = source.state in _LAUNCHED and target.state is PageState.PRE_GUEST
    require(moves_metadata or moves_page, FirmwareStatus.INVALID_PAGE_STATE)
    if moves_metadata:
        require(source.gpa == guest.gctx_paddr, FirmwareStatus.INVALID_PAGE_OWNER)
        platform.rmp[target_at], platform.rmp[source_at] = source, target
    else:
        require(source.asid == guest.asid == target.asid, FirmwareStatus.INVALID_PAGE_OWNER)
        platform.rmp[target_at] = replace(source, immutable=False)
        platform.rmp[source_at] = replace(source, immutable=False, validated=False)
    _copy(platform, source_at, target_at, _LARGE if size else PAGE)


def page_set_state(platform: Platform, buffer: PageSetState) -> None:
    """SNP_PAGE_SET_STATE: ranges of Firmware pages become HV-Fixed; all are checked before one is changed.

    1. LEN not 10h: INVALID_LENGTH.
    2. Reserved bits: INVALID_PARAM.
    3. SNP not INIT: INVALID_PLATFORM_STATE.
    4. The list: INVALID_PARAM.
    5. A range where no memory answers: INVALID_ADDRESS.
    6. A page that is not Firmware, or a 2 MiB page that is only partly in its range: INVALID_PAGE_STATE.
    """
    require(buffer.length == PageSetState.SIZE, FirmwareStatus.INVALID_LENGTH)
    require(not (buffer.reserved_04 or buffer.list_paddr & _PAGE_MASK), FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    elements = range_list(platform, buffer.list_paddr)
    pages = [page for element in elements for page in _pages_of(platform, element)]
    require(all(whole for _, whole in pages), FirmwareStatus.INVALID_PAGE_STATE)
    for page, _ in pages:
        platform.rmp[page] = replace(platform.rmp[page], assigned=False)


def _pages_of(platform: Platform, element: RangeElement) -> Iterator[tuple[int, bool]]:
    """The pages of a range, and whether each is Firmware and wholly inside."""
    at, end = element.base, element.base + element.page_count * PAGE
    while at < end:
        entry = platform.look_up(at)
        size = _LARGE if entry.page_size else PAGE
        yield at, entry.state is PageState.FIRMWARE and not at % size and at + size <= end
        at += size - at % size


def page_unsmash(platform: Platform, buffer: PageUnsmash) -> None:
    """SNP_PAGE_UNSMASH: 512 entries of 4 KiB become one of 2 MiB.

    1. Not 2 MiB aligned: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No memory there: INVALID_ADDRESS.
    4. Each entry is 4 KiB, immutable, a guest's and not a VMSA; the first guest address is 2 MiB aligned, the
       others follow; state, ASID and permissions are the same: else INVALID_PAGE_STATE.
    """
    page = buffer.page_paddr
    require(not page & _LARGE_MASK, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    first = platform.look_up(page)
    platform.look_up(page + _LARGE - PAGE)
    joinable = (
        not first.page_size
        and first.immutable
        and not first.vmsa
        and first.asid != 0
        and not first.gpa & _LARGE_MASK
        and all(
            platform.rmp[page + offset] == replace(first, gpa=first.gpa + offset)
            for offset in range(PAGE, _LARGE, PAGE)
        )
    )
    require(joinable, FirmwareStatus.INVALID_PAGE_STATE)
    platform.rmp.unsmash(page)
