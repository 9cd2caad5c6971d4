"""Certificate table: parses into entries that lie apart inside the blob, or LayoutError, nothing else."""

from __future__ import annotations

from uuid import UUID

from fuzz.outcome import attempt
from swsnp.abi.ghcb import CertTableGuid
from swsnp.certs.table import TableEntry, canonical_guid, pack, parse
from swsnp.errors import LayoutError

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """Empty, small and large tables."""
    guids = [CertTableGuid.VCEK, CertTableGuid.ASK, CertTableGuid.ARK, CertTableGuid.CRL, UUID(int=7)]
    entries = [TableEntry(guid=guid, data=bytes([n]) * (40 * n)) for n, guid in enumerate(guids)]
    return [bytes(24), b"", pack(entries[:1]), pack(entries), pack(entries[1:3]).ljust(4096, b"\0")]


def one(data: bytes) -> object:
    """Parse; what was found can be packed and found again."""
    entries, refusal = attempt(lambda: parse(data), LayoutError)
    if refusal:
        return refusal
    end = 24 * (len(entries) + 1)
    for each in sorted(entries, key=lambda entry: entry.offset):
        assert data[each.offset : each.offset + len(each.data)] == each.data
        assert each.offset >= 24 * (len(entries) + 1)
        assert not each.data or each.offset >= end
        end = max(end, each.offset + len(each.data))
        canonical_guid(each.guid)
    again = parse(pack(entries))
    assert [(each.guid, each.data) for each in again] == [(each.guid, each.data) for each in entries]
    return len(entries)
