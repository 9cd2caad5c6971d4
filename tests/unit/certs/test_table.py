"""The certificate table. Source: AMD 56421 (GHCB 2.0), "SNP Extended Guest Request"."""

from __future__ import annotations

import struct
from types import ModuleType
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.ghcb import CertTableGuid
from swsnp.certs import table
from swsnp.certs.table import TableEntry, canonical_guid, npages, pack, parse
from swsnp.errors import LayoutError

OTHER = UUID("9f4116cd-c503-4f5a-8f6f-fb68882f4ce2")
END = bytes(24)


def head(guid: UUID, offset: int, length: int) -> bytes:
    return guid.bytes + struct.pack("<II", offset, length)


def test_pack_is_canonical() -> None:
    """AMD 56421: first offset 24 * (n + 1), data packed without gaps, a terminator of 24 zero bytes."""
    blob = pack(
        [TableEntry(guid=CertTableGuid.VCEK, data=b"abc"), TableEntry(guid=CertTableGuid.ASK, data=b"de")]
    )
    assert blob == head(CertTableGuid.VCEK, 72, 3) + head(CertTableGuid.ASK, 75, 2) + END + b"abcde"


def test_guid_bytes_stand_in_textual_order() -> None:
    """virtee, go-sev-guest and AMD's own tool write RFC 4122 order."""
    assert pack([TableEntry(guid=CertTableGuid.VCEK, data=b"")])[:16] == bytes.fromhex(
        "63da758de6644564adc5f4b93be8accd"
    )


def test_empty_table_is_a_terminator() -> None:
    """AMD 56421: no entries, only the end."""
    assert pack([]) == END
    assert parse(END) == ()
    assert parse(END + b"padding") == ()


def test_unknown_guids_and_order_are_kept() -> None:
    """Hosts add entries of their own, such as Google's launch endorsement."""
    entries = (
        TableEntry(guid=OTHER, data=b"endorsement", offset=96),
        TableEntry(guid=CertTableGuid.ARK, data=b"root", offset=107),
        TableEntry(guid=CertTableGuid.CRL, data=b"", offset=111),
    )
    assert parse(pack(entries) + bytes(100)) == entries


def test_gaps_and_another_order_of_data_are_read() -> None:
    """No document asks for packed data; only bounds count."""
    blob = head(OTHER, 80, 2) + head(CertTableGuid.ARK, 72, 3) + END + b"ark.....xy"
    assert [each.data for each in parse(blob)] == [b"xy", b"ark"]


@pytest.mark.parametrize(
    ("blob", "text"),
    [
        (b"", "0 entries in 0x0 bytes and no terminator"),
        (END[:-1], "no terminator"),
        (head(OTHER, 48, 0), "1 entries in 0x18 bytes and no terminator"),
        (head(OTHER, 24, 1) + END + b"x", "entry 0 .*: offset 0x18 is inside the table of 0x30 bytes"),
        (head(OTHER, 47, 1) + END + b"x", "entry 0 .*: offset 0x2f is inside"),
        (head(OTHER, 48, 2) + END + b"x", "entry 0 .*: ends at 0x32, blob has 0x31 bytes"),
        (head(OTHER, 0xFFFFFFFF, 1) + END, "entry 0 .*: offset 0xffffffff . length 0x1 overflows 32 bits"),
        (head(OTHER, 48, 0xFFFFFFFF) + END, "overflows 32 bits"),
        (head(UUID(int=0), 48, 1) + END + b"x", "entry 0: zero GUID with offset 0x30 and length 0x1"),
        (
            head(OTHER, 72, 1) + head(OTHER, 73, 1) + END + b"xy",
            f"entry 1: GUID {OTHER} as in entry 0",
        ),
        (
            head(OTHER, 72, 2) + head(CertTableGuid.ARK, 73, 1) + END + b"xy",
            "entry 1: starts at 0x49, entry 0 ends at 0x4a",
        ),
    ],
)
def test_broken_tables_are_refused(blob: bytes, text: str) -> None:
    """AMD 56421: the table comes from the host; each offset and length is held against the whole."""
    with pytest.raises(LayoutError, match=text):
        parse(blob)


def test_pack_refuses_what_parse_would() -> None:
    """The zero GUID ends the table, and one GUID names one certificate."""
    with pytest.raises(LayoutError, match="entry 0: the zero GUID"):
        pack([TableEntry(guid=UUID(int=0), data=b"")])
    with pytest.raises(LayoutError, match="entry 1: GUID"):
        pack([TableEntry(guid=OTHER, data=b"a"), TableEntry(guid=OTHER, data=b"b")])


def test_mixed_endian_guids_are_recognised() -> None:
    """Scripts in the field write EFI's byte order; only the five documented GUIDs are read so."""
    swapped = UUID(bytes=CertTableGuid.VLEK.bytes_le)
    assert canonical_guid(swapped) == CertTableGuid.VLEK
    assert canonical_guid(CertTableGuid.VLEK) == CertTableGuid.VLEK
    assert canonical_guid(OTHER) == OTHER
    assert parse(pack([TableEntry(guid=swapped, data=b"v")]))[0].guid == swapped


@pytest.mark.parametrize(("size", "pages"), [(0, 0), (1, 1), (4096, 1), (4097, 2), (16384, 4)])
def test_npages(size: int, pages: int) -> None:
    """AMD 56421: sizes are exchanged in whole pages of 4,096 bytes."""
    assert npages(size) == pages


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_parse_parses_or_refuses(blob: bytes) -> None:
    """Any bytes: a table, or LayoutError."""
    try:
        entries = parse(blob)
    except LayoutError:
        return
    assert all(blob[each.offset : each.offset + len(each.data)] == each.data for each in entries)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_what_was_packed_is_parsed(parts: list[bytes]) -> None:
    """Parsing and packing are inverse on canonical tables."""
    blob = pack(TableEntry(guid=UUID(int=n + 1), data=each) for n, each in enumerate(parts))
    assert [each.data for each in parse(blob)] == parts
    assert pack(parse(blob)) == blob


def test_public_names() -> None:
    """Every name that the package promises can be fetched, and is no module."""
    import swsnp.certs
    import swsnp.certs.build
    import swsnp.certs.lint

    for name in swsnp.certs.__all__:
        found = getattr(swsnp.certs, name)
        assert found is not None
        assert not isinstance(found, ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = swsnp.certs.nothing


def test_large_heads_are_not_kept() -> None:
    """Where the entries lie is remembered for tables that a platform may have; a host may send others."""
    for count, kept in ((16, 1), (17, 0)):
        table._known_places.cache_clear()
        entries = tuple(TableEntry(UUID(int=number + 1), b"data") for number in range(count))
        for _ in range(2):
            assert [each.data for each in parse(pack(entries))] == [b"data"] * count
        assert table._known_places.cache_info().currsize == kept


def test_a_head_is_judged_with_its_size() -> None:
    """What was found of a head says nothing of a blob of another size that begins alike."""
    whole = pack((TableEntry(OTHER, b"data"),))
    assert parse(whole)[0].data == b"data"
    with pytest.raises(LayoutError, match="ends at 0x34, blob has 0x33 bytes"):
        parse(whole[:-1])
