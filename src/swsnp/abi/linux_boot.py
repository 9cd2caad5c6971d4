"""The Linux boot protocol on x86: what a kernel file begins with, and what a kernel is handed.

Source: Linux, Documentation/arch/x86/boot.rst and zero-page.rst, arch/x86/include/uapi/asm/bootparam.h;
arch/x86/include/asm/sev.h (struct cc_blob_sev_info).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, mbz, record, u8, u16, u32, u64

__all__ = [
    "BOOT_FLAG",
    "BOOT_PARAMS_SIZE",
    "CcBlobSevInfo",
    "E820Entry",
    "E820Type",
    "HEADER_MAGIC",
    "SETUP_CC_BLOB",
    "SETUP_HEADER_OFFSET",
    "SetupData",
    "SetupHeader",
    "boot_params",
]

SETUP_HEADER_OFFSET: Final = 0x1F1
"""Where the header lies, in the file and in `boot_params`."""
BOOT_FLAG: Final = 0xAA55
HEADER_MAGIC: Final = 0x53726448
"""The letters HdrS."""
BOOT_PARAMS_SIZE: Final = 4096
SETUP_CC_BLOB: Final = 7
CC_BLOB_MAGIC: Final = 0x45444D41
"""The letters AMDE."""
_ACPI_RSDP_ADDR: Final = 0x070
_E820_ENTRIES: Final = 0x1E8
_E820_TABLE: Final = 0x2D0
_E820_MAX: Final = 128
_RSDP: Final = struct.Struct("<Q")


@record(size=0x7B, source="Linux, struct setup_header, protocol 2.15")
class SetupHeader(Record):
    """From offset 0x1F1 on; offsets here count from there."""

    setup_sects: int = u8(0x00)
    root_flags: int = u16(0x01)
    syssize: int = u32(0x03)
    ram_size: int = u16(0x07)
    vid_mode: int = u16(0x09)
    root_dev: int = u16(0x0B)
    boot_flag: int = u16(0x0D)
    jump: int = u16(0x0F)
    header: int = u32(0x11)
    version: int = u16(0x15)
    realmode_swtch: int = u32(0x17)
    start_sys_seg: int = u16(0x1B)
    kernel_version: int = u16(0x1D)
    type_of_loader: int = u8(0x1F)
    loadflags: int = u8(0x20)
    setup_move_size: int = u16(0x21)
    code32_start: int = u32(0x23)
    ramdisk_image: int = u32(0x27)
    ramdisk_size: int = u32(0x2B)
    bootsect_kludge: int = u32(0x2F)
    heap_end_ptr: int = u16(0x33)
    ext_loader_ver: int = u8(0x35)
    ext_loader_type: int = u8(0x36)
    cmd_line_ptr: int = u32(0x37)
    initrd_addr_max: int = u32(0x3B)
    kernel_alignment: int = u32(0x3F)
    relocatable_kernel: int = u8(0x43)
    min_alignment: int = u8(0x44)
    xloadflags: int = u16(0x45)
    cmdline_size: int = u32(0x47)
    hardware_subarch: int = u32(0x4B)
    hardware_subarch_data: int = u64(0x4F)
    payload_offset: int = u32(0x57)
    payload_length: int = u32(0x5B)
    setup_data: int = u64(0x5F)
    pref_address: int = u64(0x67)
    init_size: int = u32(0x6F)
    handover_offset: int = u32(0x73)
    kernel_info_offset: int = u32(0x77)


class E820Type(IntEnum):
    """What a range of memory is."""

    RAM = 1
    RESERVED = 2
    ACPI = 3


@record(size=20, source="Linux, struct boot_e820_entry")
class E820Entry(Record):
    """One range."""

    addr: int = u64(0)
    size: int = u64(8)
    type: int = u32(16)


@record(size=16, source="Linux, struct setup_data")
class SetupData(Record):
    """The head of one item in a linked list; the data follow."""

    next: int = u64(0)
    type: int = u32(8)
    len: int = u32(12)


@record(size=48, source="Linux, struct cc_blob_sev_info")
class CcBlobSevInfo(Record):
    """Where the secrets and CPUID pages are."""

    magic: int = u32(0)
    version: int = u16(4)
    reserved: int = u16(6)
    secrets_phys: int = u64(8)
    secrets_len: int = u32(16)
    rsvd1: int = u32(20)
    cpuid_phys: int = u64(24)
    cpuid_len: int = u32(32)
    rsvd2: bytes = mbz(36, 12)


def boot_params(header: SetupHeader, memory: tuple[E820Entry, ...], *, rsdp: int) -> bytes:
    """The page that a kernel finds at RSI: `struct boot_params`, also called the zero page.

    Args:
        header: the kernel file's, with what the boot loader filled in.
        memory: the memory map; at most 128 ranges.
        rsdp: address of the ACPI root pointer, 0 for none.
    """
    page = bytearray(BOOT_PARAMS_SIZE)
    page[SETUP_HEADER_OFFSET : SETUP_HEADER_OFFSET + SetupHeader.SIZE] = bytes(header)
    _RSDP.pack_into(page, _ACPI_RSDP_ADDR, rsdp)
    entries = b"".join(map(bytes, memory[:_E820_MAX]))
    page[_E820_ENTRIES] = len(entries) // E820Entry.SIZE
    page[_E820_TABLE : _E820_TABLE + len(entries)] = entries
    return bytes(page)
