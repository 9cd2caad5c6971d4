"""SNP_PAGE_SWAP_OUT and SNP_PAGE_SWAP_IN: guest pages encrypted for the hypervisor to keep.

Source: AMD 56860, commands C0h and C1h. UNVERIFIED: how the 8-byte IV of a metadata entry becomes the 12
bytes of AES-GCM; here 4 zero bytes follow it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import FirmwareStatus
from swsnp.abi.snp_migration import MetadataEntry, MetadataWord
from swsnp.abi.snp_page_command import SwapPageType
from swsnp.crypto.aead import open_bytes, seal_bytes
from swsnp.crypto.seal import TagMismatch
from swsnp.firmware.faults import FirmwareFault, require
from swsnp.firmware.pages import require_swappable
from swsnp.hardware.memory import PAGE
from swsnp.hardware.rmp import PageState, RmpEntry

if TYPE_CHECKING:
    from swsnp.abi.snp_page_command import PageSwap
    from swsnp.firmware.context import GuestContext
    from swsnp.firmware.platform import Platform

__all__ = ["IV_COUNT_MAX", "page_swap_in", "page_swap_out"]

IV_COUNT_MAX: Final = (1 << 64) - 2
"""An IV counter under which no page leaves any more."""
_PAGE_MASK: Final = PAGE - 1
_LARGE: Final = 2 << 20
_LARGE_MASK: Final = _LARGE - 1
_LAUNCHED: Final = (PageState.PRE_GUEST, PageState.PRE_SWAP)


@dataclass(frozen=True, slots=True)
class _Swap:
    """A command whose pages were looked up."""

    platform: Platform
    buffer: PageSwap
    guest: GuestContext
    source: RmpEntry
    target: RmpEntry

    @property
    def size(self) -> int:
        return _LARGE if self.buffer.flags.page_size else PAGE

    def read_entry(self) -> MetadataEntry:
        if self.buffer.flags.root_mdata_en:
            return self.guest.root_md_entry
        return MetadataEntry.parse(
            self.platform.memory.read(self.buffer.mdata_paddr, MetadataEntry.SIZE)
        )  # fmt: skip

    def write_entry(self, entry: MetadataEntry) -> None:
        if self.buffer.flags.root_mdata_en:
            self.guest.root_md_entry = entry
        else:
            self.platform.memory.write(self.buffer.mdata_paddr, bytes(entry))


def _prepare(platform: Platform, buffer: PageSwap, *, reserved: bool, check_sizes: bool) -> _Swap:
    """What both commands begin with.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. A page that is not memory: INVALID_ADDRESS.
    4. No guest context: INVALID_GUEST.
    5. The metadata entry (not the root's) is not 64-byte aligned, or inside source or destination:
       INVALID_PARAM; its page is not Metadata: INVALID_PAGE_STATE; another guest's: INVALID_PAGE_OWNER.
    6. PAGE_SIZE is not that of both entries: INVALID_PAGE_SIZE (SWAP_IN looks later).
    7. See `require_swappable`.
    """
    flags = buffer.flags
    misaligned = (buffer.gctx_paddr | buffer.src_paddr | buffer.dst_paddr) & _PAGE_MASK
    require(not (reserved or misaligned or flags.unnamed()), FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    source, target = platform.look_up(buffer.src_paddr), platform.look_up(buffer.dst_paddr)
    mdata = None if flags.root_mdata_en else platform.look_up(buffer.mdata_paddr)
    guest = platform.guest(buffer.gctx_paddr)
    swap = _Swap(platform, buffer, guest, source, target)
    if mdata is not None:
        _check_metadata_page(swap, mdata)
    if check_sizes:
        require(_sizes_agree(swap), FirmwareStatus.INVALID_PAGE_SIZE)
    require_swappable(guest)
    return swap


def _check_metadata_page(swap: _Swap, mdata: RmpEntry) -> None:
    at, size = swap.buffer.mdata_paddr, swap.size
    overlaps = any(base <= at < base + size for base in (swap.buffer.src_paddr, swap.buffer.dst_paddr))
    require(not (at % MetadataEntry.SIZE or overlaps), FirmwareStatus.INVALID_PARAM)
    require(mdata.state is PageState.METADATA, FirmwareStatus.INVALID_PAGE_STATE)
    require(mdata.gpa == swap.guest.gctx_paddr, FirmwareStatus.INVALID_PAGE_OWNER)


def _sizes_agree(swap: _Swap) -> bool:
    size = swap.buffer.flags.page_size
    aligned = not (size and (swap.buffer.src_paddr | swap.buffer.dst_paddr) & _LARGE_MASK)
    return bool(swap.source.page_size == size == swap.target.page_size and aligned)


def page_swap_out(platform: Platform, buffer: PageSwap) -> None:
    """SNP_PAGE_SWAP_OUT: Pre-Swap -> Pre-Guest, or Metadata -> Firmware; the ciphertext in a Firmware page.

    1. to 7. See `_prepare`.
    8. PAGE_TYPE 3: INVALID_PAGE_STATE.
    9. Source not Pre-Swap or Pre-Guest (metadata: not Metadata), or destination not Firmware:
       INVALID_PAGE_STATE.
    10. Source another guest's: INVALID_PAGE_OWNER.
    11. The IV counter is used up: AEAD_OFLOW.
    """
    reserved = bool(buffer.flags.swap_in_place)
    swap = _prepare(platform, buffer, reserved=reserved, check_sizes=True)
    guest, source = swap.guest, swap.source
    kind = buffer.flags.page_type
    metadata = kind == SwapPageType.METADATA
    require(kind in SwapPageType.__members__.values(), FirmwareStatus.INVALID_PAGE_STATE)
    wanted = (PageState.METADATA,) if metadata else _LAUNCHED
    in_order = source.state in wanted and swap.target.state is PageState.FIRMWARE
    require(in_order, FirmwareStatus.INVALID_PAGE_STATE)
    owned = source.gpa == guest.gctx_paddr if metadata else source.asid == guest.asid
    require(owned, FirmwareStatus.INVALID_PAGE_OWNER)
    require(guest.oek_iv_count < IV_COUNT_MAX, FirmwareStatus.AEAD_OFLOW)
    guest.oek_iv_count += 1
    data, tag = seal_bytes(
        guest.oek, _iv(guest.oek_iv_count), platform.memory.read(buffer.src_paddr, swap.size)
    )
    platform.memory.write(buffer.dst_paddr, data)
    swap.write_entry(_entry(swap, metadata=metadata, tag=tag))
    changed = replace(source, gpa=0) if metadata else replace(source, validated=False)
    platform.rmp[buffer.src_paddr] = changed


def _iv(count: int) -> bytes:
    return count.to_bytes(8, "little") + bytes(4)


def _entry(swap: _Swap, *, metadata: bool, tag: bytes) -> MetadataEntry:
    source = swap.source
    return MetadataEntry(
        software_data=swap.buffer.software_data,
        iv=swap.guest.oek_iv_count,
        auth_tag=tag,
        page=MetadataWord.of(
            valid=1,
            page_validated=source.validated,
            vmsa=source.vmsa,
            metadata=metadata,
            page_size=source.page_size,
            gfn=0 if metadata else source.gpa >> 12,
        ),
        permissions=bytes(source.permissions).ljust(8, b"\0"),
    )


def page_swap_in(platform: Platform, buffer: PageSwap) -> None:
    """SNP_PAGE_SWAP_IN: a page comes back; Pre-Guest -> Pre-Swap when it was validated, Firmware -> Metadata.

    1. to 7. See `_prepare`; sizes are looked at in 9.
    8. The entry is not VALID, is metadata and VMSA at once, or of another type: INVALID_MDATA_ENTRY.
    9. PAGE_SIZE is not that of both RMP entries and of the metadata entry: INVALID_PAGE_SIZE.
    10. In place, but no data page: INVALID_PARAM. A VMSA of 2 MiB: INVALID_PAGE_SIZE.
    11. Destination not Pre-Guest (metadata: not Firmware): INVALID_PAGE_STATE. In place with another source:
        INVALID_ADDRESS.
    12. Destination another guest's: INVALID_PAGE_OWNER.
    13. Authentication tag: BAD_MEASUREMENT.
    """
    swap = _prepare(platform, buffer, reserved=bool(buffer.software_data), check_sizes=False)
    flags, guest, target = buffer.flags, swap.guest, swap.target
    entry = swap.read_entry()
    kind = _type_of(entry)
    require(bool(entry.page.valid) and kind == flags.page_type, FirmwareStatus.INVALID_MDATA_ENTRY)
    sizes_agree = _sizes_agree(swap) and entry.page.page_size == flags.page_size
    require(sizes_agree, FirmwareStatus.INVALID_PAGE_SIZE)
    _check_target(swap, kind)
    data = _opened(swap, entry)
    platform.memory.write(buffer.dst_paddr, data)
    swap.write_entry(entry.but(page=entry.page.but(valid=0)))
    if kind == SwapPageType.METADATA:
        platform.rmp[buffer.dst_paddr] = replace(target, gpa=guest.gctx_paddr)
        return
    vmpl0, vmpl1, vmpl2, vmpl3 = entry.permissions[:4]
    platform.rmp[buffer.dst_paddr] = replace(
        target,
        gpa=entry.page.gfn << 12,
        vmsa=bool(entry.page.vmsa),
        permissions=(vmpl0, vmpl1, vmpl2, vmpl3),
        validated=bool(entry.page.page_validated),
    )


def _type_of(entry: MetadataEntry) -> int | None:
    """The PAGE_TYPE that an entry is for; None: metadata and VMSA at once."""
    if entry.page.metadata:
        return None if entry.page.vmsa else SwapPageType.METADATA
    return SwapPageType.VMSA if entry.page.vmsa else SwapPageType.DATA


def _check_target(swap: _Swap, kind: int | None) -> None:
    in_place, metadata = swap.buffer.flags.swap_in_place, kind == SwapPageType.METADATA
    require(not in_place or kind == SwapPageType.DATA, FirmwareStatus.INVALID_PARAM)
    too_large = kind == SwapPageType.VMSA and swap.buffer.flags.page_size
    require(not too_large, FirmwareStatus.INVALID_PAGE_SIZE)
    wanted = PageState.FIRMWARE if metadata else PageState.PRE_GUEST
    require(swap.target.state is wanted, FirmwareStatus.INVALID_PAGE_STATE)
    same = swap.buffer.src_paddr == swap.buffer.dst_paddr
    require(same or not in_place, FirmwareStatus.INVALID_ADDRESS)
    require(metadata or swap.target.asid == swap.guest.asid, FirmwareStatus.INVALID_PAGE_OWNER)


def _opened(swap: _Swap, entry: MetadataEntry) -> bytes:
    data = swap.platform.memory.read(swap.buffer.src_paddr, swap.size)
    try:
        return open_bytes(swap.guest.oek, _iv(entry.iv), data, entry.auth_tag)
    except TagMismatch:
        raise FirmwareFault(FirmwareStatus.BAD_MEASUREMENT) from None
