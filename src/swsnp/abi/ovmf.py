"""The tables at the end of a firmware image: GUID table and SEV metadata. Functions over bytes.

Every offset and length is held against the image, and an image that two readers could read differently (a
GUID twice, sections that overlap) is refused. `typing` and records are not loaded: see `abi.snp_page`.

Source: EDK II, OvmfPkg/ResetVector; QEMU, hw/i386/pc_sysfw_ovmf.c and target/i386/sev.c.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from swsnp.abi.snp_page import PAGE
from swsnp.errors import LayoutError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from mmap import mmap
    from typing import Final

__all__ = [
    "FOOTER",
    "HASH_TABLE",
    "LAUNCH_SECRET",
    "RESET_BLOCK",
    "SEV_METADATA",
    "SVSM_INFO",
    "Section",
    "SectionType",
    "guid_bytes",
    "guid_table",
    "number_pair",
    "reset_eip",
    "sev_sections",
    "svsm_entry",
]


def guid_bytes(text: str) -> bytes:
    """A GUID as EFI stores it: the first three groups little-endian."""
    raw = bytes.fromhex(text)
    return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]


FOOTER: Final = guid_bytes("96b582de1fb245f7baeaa366c55a082d")
RESET_BLOCK: Final = guid_bytes("00f771de1a7e4fcb890e68c77e2fb44e")
HASH_TABLE: Final = guid_bytes("7255371f3a3b4b04927b1da6efa8d454")
LAUNCH_SECRET: Final = guid_bytes("4c2eb3617d9b4cc38081127c90d3d294")
SEV_METADATA: Final = guid_bytes("dc886566984a4798a75e5585a7bf67cc")
SVSM_INFO: Final = guid_bytes("a789a61205974c4ba49fcbb1fe9d1ddd")
_NAMES: Final = {
    FOOTER: "footer",
    RESET_BLOCK: "SEV-ES reset block",
    HASH_TABLE: "hash table",
    LAUNCH_SECRET: "launch secret area",
    SEV_METADATA: "SEV metadata",
    SVSM_INFO: "SVSM info block",
}
_AFTER_TABLE: Final = 32
"""Bytes between the table's end and the image's."""
_ENTRY_TAIL: Final = struct.Struct("<H16s")
_METADATA: Final = struct.Struct("<4sIII")
_SECTION: Final = struct.Struct("<III")
_MAGIC: Final = b"ASEV"
_VERSION: Final = 1
_FOUR_GIB: Final = 1 << 32
_SOURCE: Final = "EDK II, ResetVector"


class SectionType(IntEnum):
    """Types of SEV metadata sections."""

    SNP_SEC_MEM = 1
    SNP_SECRETS = 2
    CPUID = 3
    SVSM_CAA = 4
    SNP_KERNEL_HASHES = 0x10


_KNOWN_TYPES: Final = frozenset(SectionType)


class Section:
    """One SEV metadata section: `size` bytes, whole pages, at `gpa`; `number` is its place in the table."""

    __slots__ = ("gpa", "number", "size", "type")

    def __init__(self, number: int, gpa: int, size: int, kind: SectionType) -> None:
        self.number, self.gpa, self.size, self.type = number, gpa, size, kind

    @property
    def name(self) -> str:
        """What to call it: its number in the table and its type."""
        return f"section {self.number} ({self.type.name})"

    @property
    def end(self) -> int:
        """First GPA after it."""
        return self.gpa + self.size

    def __repr__(self) -> str:
        return f"Section({self.number}, {self.gpa:#x}, {self.size:#x}, {self.type.name})"


def guid_table(image: bytes | mmap) -> dict[bytes, bytes]:
    """Data by GUID, GUIDs as stored, of the table that ends 32 bytes before the image's end.

    1. The image holds a footer entry, whose GUID is the footer's.
    2. The footer's length covers at least itself, and lies within the image.
    3. Walking backwards, every entry's length covers at least its own 18 bytes and stays inside the table.
    4. No GUID stands twice.

    Raises:
        LayoutError: a rule is broken.
    """
    end = len(image) - _AFTER_TABLE
    if end < _ENTRY_TAIL.size:
        raise LayoutError(
            f"firmware image: got {len(image)} bytes, wanted at least {_AFTER_TABLE + _ENTRY_TAIL.size} "
            f"({_SOURCE})"
        )
    total, guid = _ENTRY_TAIL.unpack_from(image, end - _ENTRY_TAIL.size)
    if guid != FOOTER:
        raise LayoutError(
            f"firmware table footer: got GUID {_text(guid)} at {end - 16:#x}, wanted {_text(FOOTER)} "
            f"({_SOURCE})"
        )
    if not _ENTRY_TAIL.size <= total <= end:
        raise LayoutError(
            f"firmware table footer: got length {total:#x}, wanted {_ENTRY_TAIL.size:#x}..{end:#x} "
            f"({_SOURCE})"
        )
    return _entries(image, end - total, end - _ENTRY_TAIL.size)


def _entries(image: bytes | mmap, start: int, at: int) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    while at > start:
        if at - start < _ENTRY_TAIL.size:
            raise LayoutError(
                f"firmware table entry {len(found)}: got {at - start} bytes at {start:#x}, wanted at least "
                f"{_ENTRY_TAIL.size} ({_SOURCE})"
            )
        length, guid = _ENTRY_TAIL.unpack_from(image, at - _ENTRY_TAIL.size)
        if not _ENTRY_TAIL.size <= length <= at - start:
            raise LayoutError(
                f"firmware table entry {len(found)} ({_name(guid)}): got length {length:#x}, wanted "
                f"{_ENTRY_TAIL.size:#x}..{at - start:#x} ({_SOURCE})"
            )
        if guid in found:
            raise LayoutError(
                f"firmware table entry {len(found)} ({_name(guid)}): stands twice, wanted each GUID once "
                f"({_SOURCE})"
            )
        found[guid] = image[at - length : at - _ENTRY_TAIL.size]
        at -= length
    return found


def _text(guid: bytes) -> str:
    from uuid import UUID  # only an error's text needs it

    return str(UUID(bytes_le=guid))


def _name(guid: bytes) -> str:
    return _NAMES.get(guid) or _text(guid)


def _data(table: Mapping[bytes, bytes], guid: bytes, size: int) -> bytes | None:
    """An entry's first `size` bytes, or None where there is no such entry."""
    data = table.get(guid)
    if data is not None and len(data) < size:
        raise LayoutError(
            f"firmware table entry {_name(guid)}: got {len(data)} bytes of data, wanted {size} ({_SOURCE})"
        )
    return None if data is None else data[:size]


def _number(table: Mapping[bytes, bytes], guid: bytes) -> int | None:
    data = _data(table, guid, 4)
    return None if data is None else int.from_bytes(data, "little")


def number_pair(table: Mapping[bytes, bytes], guid: bytes) -> tuple[int, int] | None:
    """Base and size of HASH_TABLE or LAUNCH_SECRET; None without such an entry, or with one of zeros.

    Raises:
        LayoutError: its data is shorter than 8 bytes.
    """
    data = _data(table, guid, 8)
    return None if data is None or not any(data) else struct.Struct("<II").unpack(data)


def reset_eip(table: Mapping[bytes, bytes]) -> int:
    """Where application processors start, linear.

    Raises:
        LayoutError: no SEV-ES reset block, or a short one.
    """
    eip = _number(table, RESET_BLOCK)
    if eip is None:
        raise LayoutError(f"firmware table: no SEV-ES reset block, wanted {_text(RESET_BLOCK)} ({_SOURCE})")
    return eip


def svsm_entry(table: Mapping[bytes, bytes]) -> int:
    """Offset of an SVSM's entry point from the start of its image.

    Raises:
        LayoutError: no SVSM info block, or a short one.
    """
    entry = _number(table, SVSM_INFO)
    if entry is None:
        raise LayoutError(f"SVSM table: no SVSM info block, wanted {_text(SVSM_INFO)} (Coconut-SVSM)")
    return entry


def sev_sections(image: bytes | mmap, table: Mapping[bytes, bytes]) -> tuple[Section, ...] | None:
    """The sections of the SEV metadata, in table order; None for an image without any.

    1. The entry's offset, from the end of the image, leaves room for the header.
    2. Magic "ASEV", version 1.
    3. The size in the header is that of header and sections, and lies within the image.
    4. Every section has a known type, is whole pages, at least one, and ends at or below 4 GiB.
    5. No two sections share a page.

    Raises:
        LayoutError: a rule is broken; the text names the section.
    """
    offset = _number(table, SEV_METADATA)
    if offset is None:
        return None
    if not _METADATA.size <= offset <= len(image):
        raise LayoutError(
            f"SEV metadata offset: got {offset:#x} from the end, wanted {_METADATA.size:#x}..{len(image):#x} "
            f"({_SOURCE})"
        )
    start = len(image) - offset
    magic, size, version, count = _METADATA.unpack_from(image, start)
    if magic != _MAGIC:
        raise LayoutError(f"SEV metadata magic: got {magic!r} at {start:#x}, wanted {_MAGIC!r} ({_SOURCE})")
    if version != _VERSION:
        raise LayoutError(f"SEV metadata version: got {version}, wanted {_VERSION} ({_SOURCE})")
    wanted = _METADATA.size + count * _SECTION.size
    if size != wanted or size > offset:
        raise LayoutError(
            f"SEV metadata size: got {size:#x} for {count} sections, wanted {wanted:#x}, at most {offset:#x} "
            f"({_SOURCE})"
        )
    first = start + _METADATA.size
    found = tuple(
        _section(number, *_SECTION.unpack_from(image, first + number * _SECTION.size))
        for number in range(count)
    )
    _refuse_overlaps(found)
    return found


def _section(number: int, gpa: int, size: int, kind: int) -> Section:
    where = f"SEV metadata section {number}"
    if kind not in _KNOWN_TYPES:
        known = ", ".join(f"{each.value:#x}" for each in SectionType)
        raise LayoutError(f"{where} type: got {kind:#x}, wanted one of {known} ({_SOURCE})")
    if gpa % PAGE:
        raise LayoutError(f"{where} gpa: got {gpa:#x}, wanted a multiple of {PAGE:#x} ({_SOURCE})")
    if not size or size % PAGE:
        raise LayoutError(f"{where} size: got {size:#x}, wanted whole pages, at least one ({_SOURCE})")
    if gpa + size > _FOUR_GIB:
        raise LayoutError(f"{where} end: got {gpa + size:#x}, wanted at most {_FOUR_GIB:#x} ({_SOURCE})")
    return Section(number, gpa, size, SectionType(kind))


def _refuse_overlaps(sections: tuple[Section, ...]) -> None:
    end, before = 0, None
    for each in sorted(sections, key=lambda section: section.gpa):
        if each.gpa < end and before is not None:
            raise LayoutError(
                f"SEV metadata {each.name}: starts at {each.gpa:#x} inside {before.name}, wanted {end:#x} or "
                "above: a page is launched once (AMD 56860, SNP_LAUNCH_UPDATE)"
            )
        end, before = each.end, each
