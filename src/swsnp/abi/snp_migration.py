"""Migration: the exported guest context, its messages, and the metadata of swapped pages.

Source: AMD 56860, MSG_EXPORT_REQ, MSG_IMPORT_REQ, MSG_ABSORB_REQ, MSG_ABSORB_NOMA_REQ, MSG_VMRK_REQ, and
SNP_PAGE_SWAP_OUT.
"""

from __future__ import annotations

from typing import Final

from swsnp.abi.record import Record, Word, bits, blob, mbz, record, sub, u8, u32, u64, words
from swsnp.abi.snp_launch import IdBlock
from swsnp.abi.snp_report import GuestPolicy, TcbVersion

__all__ = [
    "CONTEXT_SIZE",
    "CONTEXT_VERSION",
    "ContextFlags",
    "ExportFlags",
    "ExportedContext",
    "MetadataEntry",
    "MetadataWord",
    "MsgExportReq",
    "MsgExportRsp",
    "MsgImportReq",
    "MsgStatusRsp",
    "MsgVmrkReq",
]

CONTEXT_SIZE: Final = 0x300
CONTEXT_VERSION: Final = 3
"""Version of the exported context that IMPORT, ABSORB and ABSORB_NOMA take."""


class ContextFlags(Word):
    """Quadword 220h of the exported context."""

    author_key_en = bits(0, 0)
    id_block_en = bits(1, 1)
    vcek_dis = bits(2, 2)


class MetadataWord(Word):
    """Quadword 20h of a metadata entry; the page number of the guest physical address fills the rest."""

    valid = bits(0, 0)
    page_validated = bits(1, 1)
    vmsa = bits(2, 2)
    metadata = bits(3, 3)
    page_size = bits(4, 4)
    gfn = bits(63, 12)


@record(size=64, source="AMD 56860, metadata entry")
class MetadataEntry(Record):
    """What the firmware keeps of a page that was swapped out."""

    software_data: int = u64(0x00)
    iv: int = u64(0x08)
    auth_tag: bytes = blob(0x10, 16)
    page: MetadataWord = u64(0x20, MetadataWord)
    permissions: bytes = blob(0x28, 8)
    reserved_30: bytes = mbz(0x30, 16)


@record(size=CONTEXT_SIZE, source="AMD 56860, MSG_EXPORT_RSP, exported guest context version 3")
class ExportedContext(Record):
    """All of a guest that leaves its host."""

    ld: bytes = blob(0x000, 48)
    oek: bytes = blob(0x030, 32)
    vmpck0: bytes = blob(0x050, 32)
    vmpck1: bytes = blob(0x070, 32)
    vmpck2: bytes = blob(0x090, 32)
    vmpck3: bytes = blob(0x0B0, 32)
    vmrk: bytes = blob(0x0D0, 32)
    host_data: bytes = blob(0x0F0, 32)
    id_key_digest: bytes = blob(0x110, 48)
    author_key_digest: bytes = blob(0x140, 48)
    report_id: bytes = blob(0x170, 32)
    imd: bytes = blob(0x190, 48)
    msg_counts: tuple[int, ...] = words(0x1C0, 4)
    root_md_entry: MetadataEntry = sub(0x1E0, MetadataEntry)
    flags: ContextFlags = u64(0x220, ContextFlags)
    policy: GuestPolicy = u64(0x228, GuestPolicy)
    state: int = u8(0x230)
    reserved_231: bytes = mbz(0x231, 7)
    oek_iv_count: int = u64(0x238)
    id_block: IdBlock = sub(0x240, IdBlock)
    gosvw: bytes = blob(0x2A0, 16)
    desired_tsc_khz: int = u32(0x2B0)
    reserved_2b4: int = u32(0x2B4)
    psp_tsc_offset: int = u64(0x2B8)
    launch_tcb: TcbVersion = u64(0x2C0, TcbVersion)
    reserved_2c8: bytes = mbz(0x2C8, 56)

    def __repr__(self) -> str:
        return f"ExportedContext(state={self.state}, policy={self.policy:#x}, keys withheld)"


class ExportFlags(Word):
    """Dword 8 of MSG_EXPORT_REQ."""

    imi_en = bits(0, 0)


@record(size=0x10, source="AMD 56860, MSG_EXPORT_REQ")
class MsgExportReq(Record):
    """Request for the context of a guest."""

    gctx_paddr: int = u64(0x00)
    flags: ExportFlags = u32(0x08, ExportFlags)
    reserved_0c: int = u32(0x0C)


@record(size=0xFA0, source="AMD 56860, MSG_EXPORT_RSP")
class MsgExportRsp(Record):
    """The context; the response fills its page."""

    status: int = u32(0x000)
    context_size: int = u32(0x004)
    context_version: int = u32(0x008)
    reserved_00c: bytes = mbz(0x00C, 20)
    context: bytes = blob(0x020, CONTEXT_SIZE)
    reserved_320: bytes = mbz(0x320, 0xC80)

    def __repr__(self) -> str:
        return f"MsgExportRsp(status={self.status}, context withheld)"


@record(size=0x320, source="AMD 56860, MSG_IMPORT_REQ, MSG_ABSORB_REQ, MSG_ABSORB_NOMA_REQ")
class MsgImportReq(Record):
    """A context to fill in; GCTX_PADDR is reserved in MSG_ABSORB_NOMA_REQ."""

    gctx_paddr: int = u64(0x000)
    context_size: int = u32(0x008)
    context_version: int = u32(0x00C)
    reserved_010: bytes = mbz(0x010, 16)
    context: ExportedContext = sub(0x020, ExportedContext)


@record(size=0x40, source="AMD 56860, MSG_VMRK_REQ")
class MsgVmrkReq(Record):
    """A VM root key for another guest."""

    gctx_paddr: int = u64(0x00)
    reserved_08: bytes = mbz(0x08, 24)
    vmrk: bytes = blob(0x20, 32)

    def __repr__(self) -> str:
        return f"MsgVmrkReq(gctx_paddr={self.gctx_paddr:#x}, key withheld)"


@record(size=0x10, source="AMD 56860, MSG_IMPORT_RSP, MSG_ABSORB_RSP, MSG_ABSORB_NOMA_RSP, MSG_VMRK_RSP")
class MsgStatusRsp(Record):
    """A response that is only a status."""

    status: int = u32(0x00)
    reserved_04: bytes = mbz(0x04, 12)
