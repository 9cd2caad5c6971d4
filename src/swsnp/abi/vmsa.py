"""The virtual machine save area of a vCPU. Source: AMD 24593 (APM volume 2), VMSA layout."""

from __future__ import annotations

from swsnp.abi.record import Record, Word, bits, blob, mbz, record, sub, u8, u16, u32, u64, words
from swsnp.abi.snp_page import GUEST_TSC_FIELDS

__all__ = ["GUEST_TSC_FIELDS", "Segment", "SevFeatures", "Vmsa"]


@record(size=16, source="AMD 24593, VMSA segment register")
class Segment(Record):
    """Selector, packed 12-bit attributes, limit, base."""

    selector: int = u16(0)
    attrib: int = u16(2)
    limit: int = u32(4)
    base: int = u64(8)


class SevFeatures(Word):
    """SEV_FEATURES."""

    snp_active = bits(0, 0)
    vtom = bits(1, 1)
    reflect_vc = bits(2, 2)
    restricted_injection = bits(3, 3)
    alternate_injection = bits(4, 4)
    debug_swap = bits(5, 5)
    prevent_host_ibs = bits(6, 6)
    btb_isolation = bits(7, 7)
    vmpl_sss = bits(8, 8)
    secure_tsc = bits(9, 9)


@record(size=4096, source="AMD 24593, VMSA layout")
class Vmsa(Record):
    """The page that holds a vCPU's registers; fields used by measurement and AP creation have names."""

    es: Segment = sub(0x000, Segment)
    cs: Segment = sub(0x010, Segment)
    ss: Segment = sub(0x020, Segment)
    ds: Segment = sub(0x030, Segment)
    fs: Segment = sub(0x040, Segment)
    gs: Segment = sub(0x050, Segment)
    gdtr: Segment = sub(0x060, Segment)
    ldtr: Segment = sub(0x070, Segment)
    idtr: Segment = sub(0x080, Segment)
    tr: Segment = sub(0x090, Segment)
    reserved_0a0: bytes = mbz(0x0A0, 42)
    vmpl: int = u8(0x0CA)
    cpl: int = u8(0x0CB)
    reserved_0cc: int = u32(0x0CC)
    efer: int = u64(0x0D0)
    reserved_0d8: bytes = mbz(0x0D8, 104)
    xss: int = u64(0x140)
    cr4: int = u64(0x148)
    cr3: int = u64(0x150)
    cr0: int = u64(0x158)
    dr7: int = u64(0x160)
    dr6: int = u64(0x168)
    rflags: int = u64(0x170)
    rip: int = u64(0x178)
    reserved_180: bytes = mbz(0x180, 88)
    rsp: int = u64(0x1D8)
    reserved_1e0: bytes = mbz(0x1E0, 24)
    rax: int = u64(0x1F8)
    reserved_200: bytes = mbz(0x200, 104)
    g_pat: int = u64(0x268)
    reserved_270: bytes = mbz(0x270, 120)
    pkru: int = u32(0x2E8)
    tsc_aux: int = u32(0x2EC)
    guest_tsc_scale: int = u64(0x2F0)
    guest_tsc_offset: int = u64(0x2F8)
    reg_prot_nonce: int = u64(0x300)
    rcx: int = u64(0x308)
    rdx: int = u64(0x310)
    rbx: int = u64(0x318)
    reserved_320: int = u64(0x320)
    rbp: int = u64(0x328)
    rsi: int = u64(0x330)
    rdi: int = u64(0x338)
    r8_to_r15: tuple[int, ...] = words(0x340, 8)
    reserved_380: bytes = mbz(0x380, 48)
    sev_features: SevFeatures = u64(0x3B0, SevFeatures)
    vintr_ctrl: int = u64(0x3B8)
    reserved_3c0: int = u64(0x3C0)
    virtual_tom: int = u64(0x3C8)
    reserved_3d0: bytes = mbz(0x3D0, 16)
    event_inj: int = u64(0x3E0)
    xcr0: int = u64(0x3E8)
    reserved_3f0: bytes = mbz(0x3F0, 16)
    x87_dp: int = u64(0x400)
    mxcsr: int = u32(0x408)
    x87_ftw: int = u16(0x40C)
    x87_fsw: int = u16(0x40E)
    x87_fcw: int = u16(0x410)
    reserved_412: bytes = mbz(0x412, 14)
    fpreg_x87: bytes = blob(0x420, 80)
    fpreg_xmm: bytes = blob(0x470, 256)
    fpreg_ymm: bytes = blob(0x570, 256)
    reserved_670: bytes = mbz(0x670, 0x990)
