"""Firmware images with EDK II's tables, made to order: sound ones, and the parts to make broken ones of.

They hold no code. Real images come from EDK II, OvmfPkg/AmdSev.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from swsnp.abi.ovmf import FOOTER, HASH_TABLE, RESET_BLOCK, SEV_METADATA, SVSM_INFO, SectionType

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AMD_SEV", "AP_RESET_EIP", "firmware_image", "guid_table", "sev_metadata"]

AP_RESET_EIP: Final = 0x80_B004
AMD_SEV: Final[tuple[tuple[int, int, int], ...]] = (
    (0x80_0000, 0x9000, SectionType.SNP_SEC_MEM),
    (0x80_A000, 0x3000, SectionType.SNP_SEC_MEM),
    (0x80_D000, 0x1000, SectionType.SNP_SECRETS),
    (0x80_E000, 0x1000, SectionType.CPUID),
    (0x80_F000, 0x1000, SectionType.SVSM_CAA),
    (0x81_0000, 0x1000, SectionType.SNP_KERNEL_HASHES),
    (0x81_1000, 0xF000, SectionType.SNP_SEC_MEM),
)
"""GPA, size and type of the sections of an AmdSev build."""
_AFTER_TABLE: Final = 32


def guid_table(entries: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A table of GUIDs, as stored, with their data; the footer comes last and covers it all."""
    body = b"".join(data + struct.pack("<H16s", len(data) + 18, guid) for guid, data in entries)
    return body + struct.pack("<H16s", len(body) + 18, FOOTER)


def sev_metadata(sections: Sequence[tuple[int, int, int]]) -> bytes:
    """SEV metadata: header and sections."""
    head = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sections), 1, len(sections))
    return head + b"".join(struct.pack("<III", *each) for each in sections)


def firmware_image(
    *,
    size: int = 0x1_0000,
    sections: Sequence[tuple[int, int, int]] | None = AMD_SEV,
    hash_table: tuple[int, int] = (0x81_0C00, 0x400),
    reset_eip: int | None = AP_RESET_EIP,
    svsm_entry: int | None = None,
    text: bytes = b"",
    fill: bytes = b"\xff",
) -> bytes:
    """An image of `size` bytes.

    Args:
        size: of the image.
        sections: of the SEV metadata; None for an image without.
        hash_table: base and size of the area for kernel hashes; zeros say that there is none.
        reset_eip: where application processors start; None for an image without a reset block.
        svsm_entry: makes it an SVSM's image: offset of the entry point.
        text: what it begins with.
        fill: one byte, for empty flash.
    """
    metadata = b"" if sections is None else sev_metadata(sections)
    entries = [(HASH_TABLE, struct.pack("<II", *hash_table))]
    if reset_eip is not None:
        entries.append((RESET_BLOCK, reset_eip.to_bytes(4, "little")))
    if svsm_entry is not None:
        entries.append((SVSM_INFO, svsm_entry.to_bytes(4, "little")))
    if sections is not None:
        table_size = len(guid_table([*entries, (SEV_METADATA, bytes(4))]))
        offset = _AFTER_TABLE + table_size + len(metadata)
        entries.append((SEV_METADATA, offset.to_bytes(4, "little")))
    tail = metadata + guid_table(entries) + bytes(_AFTER_TABLE)
    return (text + fill * (size - len(text) - len(tail))) + tail
