"""Command buffers of the commands that move, swap, join and look into pages. Source: AMD 56860, chapter 8."""

from __future__ import annotations

from enum import IntEnum

from swsnp.abi.record import Record, Word, bits, record, u32, u64

__all__ = [
    "DebugCopy",
    "PageMdInit",
    "PageMove",
    "PageSetState",
    "PageSwap",
    "PageUnsmash",
    "SwapFlags",
    "SwapPageType",
]


@record(size=0x18, source="AMD 56860, SNP_DBG_DECRYPT and SNP_DBG_ENCRYPT")
class DebugCopy(Record):
    """Command buffer of SNP_DBG_DECRYPT and SNP_DBG_ENCRYPT."""

    gctx_paddr: int = u64(0x00)
    src_paddr: int = u64(0x08)
    dst_paddr: int = u64(0x10)


class SwapPageType(IntEnum):
    """PAGE_TYPE of the swap commands."""

    DATA = 0
    METADATA = 1
    VMSA = 2


class SwapFlags(Word):
    """Quadword 28h of SNP_PAGE_SWAP_OUT and SNP_PAGE_SWAP_IN; SWAP_IN_PLACE is reserved in the first."""

    page_size = bits(0, 0)
    page_type = bits(2, 1)
    swap_in_place = bits(3, 3)
    root_mdata_en = bits(4, 4)


@record(size=0x30, source="AMD 56860, SNP_PAGE_SWAP_OUT and SNP_PAGE_SWAP_IN")
class PageSwap(Record):
    """Command buffer of SNP_PAGE_SWAP_OUT and SNP_PAGE_SWAP_IN; SOFTWARE_DATA is reserved in the second."""

    gctx_paddr: int = u64(0x00)
    src_paddr: int = u64(0x08)
    dst_paddr: int = u64(0x10)
    mdata_paddr: int = u64(0x18)
    software_data: int = u64(0x20)
    flags: SwapFlags = u64(0x28, SwapFlags)


@record(size=0x20, source="AMD 56860, SNP_PAGE_MOVE")
class PageMove(Record):
    """Command buffer of SNP_PAGE_MOVE; bit 0 of PAGE_SIZE is the size."""

    gctx_paddr: int = u64(0x00)
    page_size: int = u32(0x08)
    reserved_0c: int = u32(0x0C)
    src_paddr: int = u64(0x10)
    dst_paddr: int = u64(0x18)


@record(size=0x10, source="AMD 56860, SNP_PAGE_MD_INIT")
class PageMdInit(Record):
    """Command buffer of SNP_PAGE_MD_INIT."""

    gctx_paddr: int = u64(0x00)
    page_paddr: int = u64(0x08)


@record(size=0x10, source="AMD 56860, SNP_PAGE_SET_STATE")
class PageSetState(Record):
    """Command buffer of SNP_PAGE_SET_STATE; names a range list as SNP_INIT_EX takes."""

    length: int = u32(0x00)
    reserved_04: int = u32(0x04)
    list_paddr: int = u64(0x08)


@record(size=8, source="AMD 56860, SNP_PAGE_UNSMASH")
class PageUnsmash(Record):
    """Command buffer of SNP_PAGE_UNSMASH."""

    page_paddr: int = u64(0)
