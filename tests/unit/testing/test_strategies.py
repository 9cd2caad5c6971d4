"""The strategies give what they say, and every parser survives what they damage."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.ghcb import Ghcb
from swsnp.abi.snp_report import AttestationReport
from swsnp.certs import table
from swsnp.crypto.seal import MessageKey, TagMismatch
from swsnp.errors import LayoutError
from swsnp.testing.strategies import (
    SealedMessage,
    certificate_tables,
    damaged,
    ghcb_pages,
    messages,
    reports,
    table_entries,
)


@given(reports())
def test_reports(report: AttestationReport) -> None:
    """1,184 bytes that parse to themselves; younger fields are zero in older versions."""
    assert len(bytes(report)) == 1184
    assert AttestationReport.parse(bytes(report)) == report
    assert report.version in (2, 3, 5)
    if report.version == 2:
        assert (report.cpuid_fam_id, report.cpuid_mod_id, report.cpuid_step) == (0, 0, 0)
    if report.version < 5:
        assert (report.launch_mit_vector, report.current_mit_vector) == (0, 0)
    assert not any(report.reserved_208 + report.reserved_330)


@given(reports(versions=[3]))
def test_reports_of_one_version(report: AttestationReport) -> None:
    """`versions` narrows the choice."""
    assert report.version == 3


@given(ghcb_pages())
def test_ghcb_pages(page: bytes) -> None:
    """Whole pages, reserved ranges zero."""
    ghcb = Ghcb.parse(page)
    assert bytes(ghcb) == page
    assert not any(ghcb.reserved_000 + ghcb.reserved_408 + ghcb.reserved_ff0)


@given(table_entries())
def test_table_entries(entries: list[table.TableEntry]) -> None:
    """They pack, and parse to what was packed."""
    found = table.parse(table.pack(entries))
    assert [(each.guid, each.data) for each in found] == [(each.guid, each.data) for each in entries]


@given(damaged(certificate_tables()))
def test_damaged_tables(data: bytes) -> None:
    """A table parses or is a LayoutError; nothing else."""
    with contextlib.suppress(LayoutError):
        table.parse(data)


@given(damaged(st.builds(bytes, reports())))
def test_damaged_reports(data: bytes) -> None:
    """Another size than 1,184 bytes is a LayoutError; any other damage parses."""
    if len(data) == 1184:
        assert bytes(AttestationReport.parse(data)) == data
    else:
        with pytest.raises(LayoutError):
            AttestationReport.parse(data)


@settings(max_examples=50)
@given(messages(), st.integers(0, 0xFFF))
def test_messages(message: SealedMessage, at: int) -> None:
    """A page opens to the payload; with a changed byte only where nobody covers it."""
    key = MessageKey(message.key)
    assert len(message.page) == 4096
    assert bytes(message.header) == message.page[:0x60]
    assert key.open(message.page, message.header.msg_size) == message.payload
    page = bytearray(message.page)
    page[at] ^= 1
    free = 0x10 <= at < 0x20 or 0x28 <= at < 0x30 or at >= 0x60 + len(message.payload)
    if free:
        assert key.open(bytes(page), len(message.payload)) == message.payload
    else:
        with pytest.raises(TagMismatch):
            key.open(bytes(page), len(message.payload))
    assert message.key.hex() not in repr(message)
