"""What a launch measures and installs: PAGE_INFO, ID block, secrets and CPUID pages.

Source: AMD 56860, chapters 7 and 8.
"""

from __future__ import annotations

from typing import Final

from swsnp.abi.record import Record, blob, mbz, record, u8, u16, u32, u64, words
from swsnp.abi.snp_page import VMSA_GPA
from swsnp.abi.snp_report import GuestPolicy

__all__ = [
    "CPUID_COUNT_MAX",
    "CpuidFunction",
    "CpuidPage",
    "EcdsaPublicKey",
    "EcdsaSignature",
    "IdAuth",
    "IdBlock",
    "INITIAL_DIGEST",
    "PageInfo",
    "SecretsPage",
    "VMSA_GPA",
]

INITIAL_DIGEST: Final = bytes(48)
CPUID_COUNT_MAX: Final = 64


@record(size=0x70, source="AMD 56860, PAGE_INFO")
class PageInfo(Record):
    """One step of the launch digest: LD := SHA-384(PAGE_INFO).

    UNVERIFIED: the order of the permission bytes; public tools print the reverse, all callers use zero.
    """

    digest_cur: bytes = blob(0x00, 48)
    contents: bytes = blob(0x30, 48)
    length: int = u16(0x60)
    page_type: int = u8(0x62)
    imi_page: int = u8(0x63)
    reserved_64: int = u8(0x64)
    vmpl1_perms: int = u8(0x65)
    vmpl2_perms: int = u8(0x66)
    vmpl3_perms: int = u8(0x67)
    gpa: int = u64(0x68)


@record(size=0x60, source="AMD 56860, ID block")
class IdBlock(Record):
    """What the guest owner expects of a launch."""

    ld: bytes = blob(0x00, 48)
    family_id: bytes = blob(0x30, 16)
    image_id: bytes = blob(0x40, 16)
    version: int = u32(0x50)
    guest_svn: int = u32(0x54)
    policy: GuestPolicy = u64(0x58, GuestPolicy)


@record(size=0x200, source="AMD 56860, ECDSA signature")
class EcdsaSignature(Record):
    """R and S, little-endian, zero-extended to 72 bytes."""

    r: bytes = blob(0x00, 72)
    s: bytes = blob(0x48, 72)
    reserved_90: bytes = mbz(0x90, 368)


@record(size=0x404, source="AMD 56860, ECDSA public key")
class EcdsaPublicKey(Record):
    """CURVE 1 is P-256, 2 is P-384; coordinates little-endian, zero-extended to 72 bytes."""

    curve: int = u32(0x00)
    qx: bytes = blob(0x04, 72)
    qy: bytes = blob(0x4C, 72)
    reserved_94: bytes = mbz(0x94, 0x370)


@record(size=0x1000, source="AMD 56860, ID authentication information")
class IdAuth(Record):
    """Signatures and keys that vouch for an ID block; bytes, since digests are taken over what came in."""

    id_key_algo: int = u32(0x000)
    auth_key_algo: int = u32(0x004)
    reserved_008: bytes = mbz(0x008, 0x38)
    id_block_sig: bytes = blob(0x040, 0x200)
    id_key: bytes = blob(0x240, 0x404)
    reserved_644: bytes = mbz(0x644, 0x3C)
    id_key_sig: bytes = blob(0x680, 0x200)
    author_key: bytes = blob(0x880, 0x404)
    reserved_c84: bytes = mbz(0xC84, 0x37C)


@record(size=0x1000, source="AMD 56860, secrets page; AMD 56421, guest reserved area")
class SecretsPage(Record):
    """What the firmware gives a guest at launch; A0h..FFh and 140h..15Fh are the guest's own to write."""

    version: int = u32(0x000)
    flags: int = u32(0x004)
    fms: int = u32(0x008)
    reserved_00c: int = u32(0x00C)
    gosvw: bytes = blob(0x010, 16)
    vmpck0: bytes = blob(0x020, 32)
    vmpck1: bytes = blob(0x040, 32)
    vmpck2: bytes = blob(0x060, 32)
    vmpck3: bytes = blob(0x080, 32)
    msg_seqno_low: tuple[int, ...] = words(0x0A0, 4, "I")
    ap_jump_table_pa: int = u64(0x0B0)
    msg_seqno_high: tuple[int, ...] = words(0x0B8, 4, "I")
    reserved_0c8: bytes = mbz(0x0C8, 22)
    area_version: int = u16(0x0DE)
    guest_usage: bytes = blob(0x0E0, 32)
    vmsa_tweak_bitmap: bytes = blob(0x100, 64)
    svsm_base: int = u64(0x140)
    svsm_size: int = u64(0x148)
    svsm_caa: int = u64(0x150)
    svsm_max_version: int = u32(0x158)
    svsm_guest_vmpl: int = u8(0x15C)
    reserved_15d: bytes = mbz(0x15D, 3)
    tsc_factor: int = u32(0x160)
    reserved_164: int = u32(0x164)
    launch_mit_vector: int = u64(0x168)
    reserved_170: bytes = mbz(0x170, 0xE90)

    def __repr__(self) -> str:
        return f"SecretsPage(version={self.version}, keys withheld)"


@record(size=48, source="AMD 56860, CPUID page entry")
class CpuidFunction(Record):
    """One CPUID leaf with its inputs and outputs."""

    eax_in: int = u32(0x00)
    ecx_in: int = u32(0x04)
    xcr0_in: int = u64(0x08)
    xss_in: int = u64(0x10)
    eax: int = u32(0x18)
    ebx: int = u32(0x1C)
    ecx: int = u32(0x20)
    edx: int = u32(0x24)
    reserved_28: int = u64(0x28)


@record(size=0x1000, source="AMD 56860, CPUID page")
class CpuidPage(Record):
    """COUNT entries of `CpuidFunction`, at most 64."""

    count: int = u32(0x000)
    reserved_004: bytes = mbz(0x004, 12)
    functions: bytes = blob(0x010, 64 * 48)
    rest: bytes = blob(0xC10, 0x3F0)
