"""The tables at the end of a firmware image: what is read, and each way to be broken."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.ovmf import (
    FOOTER,
    HASH_TABLE,
    LAUNCH_SECRET,
    RESET_BLOCK,
    SEV_METADATA,
    SVSM_INFO,
    SectionType,
    guid_bytes,
    guid_table,
    number_pair,
    reset_eip,
    sev_sections,
    svsm_entry,
)
from swsnp.errors import LayoutError
from swsnp.testing import firmware_image as made

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = made.firmware_image()
OTHER = guid_bytes("01234567-89ab-cdef-0123-456789abcdef".replace("-", ""))
UNKNOWN = [(0x80_0000, 0x1000, 0x77)]


def image_of(entries: list[tuple[bytes, bytes]], before: bytes = b"") -> bytes:
    return (before + made.guid_table(entries) + bytes(32)).rjust(4096, b"\xff")


def sections_of(image: bytes) -> object:
    return sev_sections(image, guid_table(image))


def metadata(raw: bytes, offset: int | None = None) -> bytes:
    """An image whose metadata is `raw`."""
    table = made.guid_table([(SEV_METADATA, bytes(4))])
    at = 32 + len(table) + len(raw) if offset is None else offset
    return image_of([(SEV_METADATA, at.to_bytes(4, "little"))], raw)


@pytest.mark.parametrize(
    ("guid", "text"),
    [
        (FOOTER, "96b582de-1fb2-45f7-baea-a366c55a082d"),
        (RESET_BLOCK, "00f771de-1a7e-4fcb-890e-68c77e2fb44e"),
        (HASH_TABLE, "7255371f-3a3b-4b04-927b-1da6efa8d454"),
        (LAUNCH_SECRET, "4c2eb361-7d9b-4cc3-8081-127c90d3d294"),
        (SEV_METADATA, "dc886566-984a-4798-a75e-5585a7bf67cc"),
        (SVSM_INFO, "a789a612-0597-4c4b-a49f-cbb1fe9d1ddd"),
    ],
)
def test_guids(guid: bytes, text: str) -> None:
    """EDK II: GUIDs are stored with their first three groups little-endian."""
    assert guid == UUID(text).bytes_le


def test_tables_of_an_image() -> None:
    """EDK II, ResetVector: the footer ends 32 bytes before the image; every entry is found by its GUID."""
    table = guid_table(IMAGE)
    assert set(table) == {RESET_BLOCK, HASH_TABLE, SEV_METADATA}
    assert reset_eip(table) == made.AP_RESET_EIP
    assert number_pair(table, HASH_TABLE) == (0x81_0C00, 0x400)
    assert number_pair(table, LAUNCH_SECRET) is None
    found = sev_sections(IMAGE, table)
    assert found is not None
    assert [(each.gpa, each.size, each.type) for each in found] == list(made.AMD_SEV)
    assert [each.number for each in found] == list(range(7))
    assert found[5].name == "section 5 (SNP_KERNEL_HASHES)"
    assert repr(found[5]) == "Section(5, 0x810000, 0x1000, SNP_KERNEL_HASHES)"


def test_hash_table_of_zeros_is_none() -> None:
    """EDK II built without kernel hashing: base and size are both zero."""
    assert number_pair(guid_table(made.firmware_image(hash_table=(0, 0))), HASH_TABLE) is None
    assert number_pair(guid_table(made.firmware_image(hash_table=(0, 1))), HASH_TABLE) == (0, 1)


def test_image_without_metadata() -> None:
    """An image built without SEV metadata has none, which is no error of its table."""
    assert sections_of(made.firmware_image(sections=None)) is None


def test_genuine_images(vectors: Path) -> None:
    """The sections of two EDK II builds, AmdSevX64 and OvmfPkgX64."""
    suffix = (vectors / "measure" / "ovmf_AmdSev_suffix.bin").read_bytes()
    found = sev_sections(suffix, guid_table(suffix))
    assert found is not None
    assert [(each.gpa, each.size, each.type) for each in found] == list(made.AMD_SEV)
    assert reset_eip(guid_table(suffix)) == made.AP_RESET_EIP
    suffix = (vectors / "measure" / "ovmf_OvmfX64_suffix.bin").read_bytes()
    found = sev_sections(suffix, guid_table(suffix))
    assert found is not None
    assert SectionType.SNP_KERNEL_HASHES not in {each.type for each in found}


@pytest.mark.parametrize("size", [0, 1, 32, 49])
def test_too_small(size: int) -> None:
    """An image holds at least the footer and the 32 bytes after it."""
    with pytest.raises(LayoutError, match=f"firmware image: got {size} bytes, wanted at least 50"):
        guid_table(bytes(size))


def test_smallest_table() -> None:
    """A footer alone is a table without entries."""
    assert guid_table(made.guid_table([]) + bytes(32)) == {}


def test_no_footer() -> None:
    """EDK II: the last entry's GUID is the footer's."""
    with pytest.raises(LayoutError, match="footer: got GUID 00000000-.* at 0xfd0, wanted 96b582de-1fb2-"):
        guid_table(bytes(4096))


@pytest.mark.parametrize("length", [0, 17, 4096 - 32 + 1, 0xFFFF])
def test_footer_length(length: int) -> None:
    """EDK II: the footer's length covers the whole table, itself included, and lies in the image."""
    image = struct.pack("<H16s", length, FOOTER).rjust(4096 - 32, b"\xff") + bytes(32)
    with pytest.raises(LayoutError, match=f"footer: got length {length:#x}, wanted 0x12..0xfe0"):
        guid_table(image)


def test_footer_length_up_to_the_whole_image() -> None:
    """A table may fill the image up to its first byte."""
    data = bytes(4096 - 32 - 36)
    assert guid_table(made.guid_table([(OTHER, data)]) + bytes(32)) == {OTHER: data}


def test_bytes_left_over() -> None:
    """A table ends where an entry does."""
    image = bytearray(image_of([(OTHER, b"")], b"12345"))
    image[-32 - 18 : -32 - 16] = (36 + 5).to_bytes(2, "little")
    with pytest.raises(LayoutError, match="entry 1: got 5 bytes at .*, wanted at least 18"):
        guid_table(bytes(image))


@pytest.mark.parametrize("length", [0, 17, 23])
def test_entry_length(length: int) -> None:
    """An entry's length covers its own 18 bytes and stays inside the table."""
    image = bytearray(image_of([(OTHER, b"data")]))
    at = len(image) - 32 - 18 - 18
    image[at : at + 2] = length.to_bytes(2, "little")
    with pytest.raises(LayoutError, match=f"entry 0 \\(01234567-.*got length {length:#x}, wanted 0x12..0x16"):
        guid_table(bytes(image))


def test_entry_without_data() -> None:
    """An entry may be its length and GUID alone, also the first of the table."""
    assert guid_table(image_of([(OTHER, b""), (RESET_BLOCK, b"data")])) == {OTHER: b"", RESET_BLOCK: b"data"}


def test_guid_twice() -> None:
    """Two entries of one GUID could be read either way."""
    with pytest.raises(LayoutError, match=r"entry 1 \(SEV-ES reset block\): stands twice"):
        guid_table(image_of([(RESET_BLOCK, bytes(4)), (RESET_BLOCK, bytes(4))]))


@pytest.mark.parametrize(
    ("guid", "read", "wanted"),
    [
        (RESET_BLOCK, reset_eip, 4),
        (SVSM_INFO, svsm_entry, 4),
        (HASH_TABLE, lambda table: number_pair(table, HASH_TABLE), 8),
        (SEV_METADATA, lambda table: sev_sections(b"", table), 4),
    ],
)
def test_entry_with_little_data(guid: bytes, read: object, wanted: int) -> None:
    """An entry holds at least what its GUID promises; more is left alone."""
    table = guid_table(image_of([(guid, bytes(wanted - 1))]))
    with pytest.raises(LayoutError, match=f"got {wanted - 1} bytes of data, wanted {wanted}"):
        read(table)  # type: ignore[operator]


def test_longer_entries_are_read() -> None:
    """A later revision may add to an entry: its beginning keeps its meaning."""
    table = guid_table(image_of([(SVSM_INFO, b"\x10\0\0\0more"), (RESET_BLOCK, b"\x20\0\0\0more")]))
    assert (svsm_entry(table), reset_eip(table)) == (0x10, 0x20)


def test_no_reset_block() -> None:
    """Application processors start at the reset block's address: without one there is nothing to measure."""
    with pytest.raises(LayoutError, match="no SEV-ES reset block, wanted 00f771de"):
        reset_eip(guid_table(made.firmware_image(reset_eip=None)))


def test_no_svsm_info() -> None:
    """An SVSM says where it is entered."""
    with pytest.raises(LayoutError, match="no SVSM info block, wanted a789a612"):
        svsm_entry(guid_table(IMAGE))


@pytest.mark.parametrize("offset", [0, 15, 4097, 0xFFFF_FFFF])
def test_metadata_offset(offset: int) -> None:
    """The metadata's header lies in the image."""
    with pytest.raises(LayoutError, match=f"SEV metadata offset: got {offset:#x} from the end, wanted 0x10"):
        sections_of(metadata(made.sev_metadata([]), offset))


def test_metadata_at_the_image_start() -> None:
    """The offset may reach back to the first byte."""
    whole = 4096
    raw = made.sev_metadata([])
    image = metadata(raw, whole)
    assert sections_of(raw + image[len(raw) :]) == ()


def test_metadata_at_the_image_end() -> None:
    """The offset may be that of the last bytes that a header fits into."""
    image = image_of([(SEV_METADATA, (16).to_bytes(4, "little"))])
    assert sections_of(image[:-16] + made.sev_metadata([])) == ()


def test_metadata_magic() -> None:
    """The metadata begins with ASEV."""
    with pytest.raises(LayoutError, match="SEV metadata magic: got b'ASEW' at .*, wanted b'ASEV'"):
        sections_of(metadata(struct.pack("<4sIII", b"ASEW", 16, 1, 0)))


@pytest.mark.parametrize("version", [0, 2])
def test_metadata_version(version: int) -> None:
    """Only version 1 is known."""
    with pytest.raises(LayoutError, match=f"SEV metadata version: got {version}, wanted 1"):
        sections_of(metadata(struct.pack("<4sIII", b"ASEV", 16, version, 0)))


@pytest.mark.parametrize(("size", "count"), [(16, 1), (40, 1), (28, 0), (16 + 12 * 0x1000, 0x1000)])
def test_metadata_size(size: int, count: int) -> None:
    """Size and count of the header agree, and both fit into the image."""
    with pytest.raises(LayoutError, match=f"SEV metadata size: got {size:#x} for {count} sections"):
        sections_of(metadata(struct.pack("<4sIII", b"ASEV", size, 1, count)))


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ((0x80_0000, 0x1000, 0), "type: got 0x0, wanted one of 0x1, 0x2, 0x3, 0x4, 0x10"),
        ((0x80_0000, 0x1000, 5), "type: got 0x5"),
        ((0x80_0001, 0x1000, 1), "gpa: got 0x800001, wanted a multiple of 0x1000"),
        ((0x80_0000, 0, 1), "size: got 0x0, wanted whole pages, at least one"),
        ((0x80_0000, 0x1001, 2), "size: got 0x1001, wanted whole pages"),
        ((0xFFFF_F000, 0x2000, 1), "end: got 0x100001000, wanted at most 0x100000000"),
    ],
)
def test_section(section: tuple[int, int, int], text: str) -> None:
    """QEMU and AMD 56860: known types, whole pages, below 4 GiB."""
    before = (0x70_0000, 0x1000, 1)
    with pytest.raises(LayoutError, match=f"SEV metadata section 1 {text}"):
        sections_of(metadata(made.sev_metadata([before, section])))


def test_section_up_to_4_gib() -> None:
    """A section may end at 4 GiB."""
    assert sections_of(metadata(made.sev_metadata([(0xFFFF_F000, 0x1000, 1)])))


@pytest.mark.parametrize("order", [1, -1])
def test_sections_overlap(order: int) -> None:
    """AMD 56860: a page is launched once, so two sections cannot share one."""
    sections = [(0x80_0000, 0x2000, 1), (0x80_1000, 0x1000, 2)][::order]
    with pytest.raises(LayoutError, match=r"starts at 0x801000 inside section .*, wanted 0x802000 or above"):
        sections_of(metadata(made.sev_metadata(sections)))


def test_sections_side_by_side() -> None:
    """Sections in any order, one beginning where the other ends."""
    sections = [(0x80_1000, 0x1000, 2), (0x80_0000, 0x1000, 1), (0, 0x1000, 1)]
    found = sections_of(metadata(made.sev_metadata(sections)))
    assert isinstance(found, tuple)
    assert [each.gpa for each in found] == [0x80_1000, 0x80_0000, 0]


@given(st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    """Sections and table, or LayoutError, nothing else."""
    try:
        table = guid_table(data)
        found = sev_sections(data, table)
    except LayoutError:
        return
    assert found is None or all(each.size for each in found)
