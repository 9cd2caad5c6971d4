"""The certificate table of an extended guest request: functions over bytes.

Source: AMD 56421 (GHCB 2.0), "SNP Extended Guest Request". The table comes from the host, so nothing in it is
trusted: every offset and length is held against the whole, and a table that two readers could read
differently (entries that overlap, one GUID twice) is refused.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple
from uuid import UUID

from swsnp.abi.ghcb import PAGE, CertTableEntry, CertTableGuid
from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ENTRY_SIZE",
    "TableEntry",
    "begins_with_known_guid",
    "canonical_guid",
    "entry_name",
    "is_mixed_endian",
    "npages",
    "pack",
    "parse",
    "places",
]

ENTRY_SIZE: Final = CertTableEntry.SIZE
_NIL: Final = UUID(int=0)
_TERMINATOR: Final = bytes(ENTRY_SIZE)
_U32: Final = 1 << 32
_LARGEST_KEPT: Final = 16 * ENTRY_SIZE
_SOURCE: Final = "AMD 56421, certificate table"
_KNOWN: Final = (
    CertTableGuid.VCEK,
    CertTableGuid.VLEK,
    CertTableGuid.ASK,
    CertTableGuid.ARK,
    CertTableGuid.CRL,
)
_MIXED_ENDIAN: Final = {UUID(bytes=guid.bytes_le): guid for guid in _KNOWN}
_NAMES: Final = {
    CertTableGuid.VCEK: "VCEK",
    CertTableGuid.VLEK: "VLEK",
    CertTableGuid.ASK: "ASK or ASVK",
    CertTableGuid.ARK: "ARK",
    CertTableGuid.CRL: "CRL",
    UUID("ecae0c0f-9502-43b1-afa2-0ae2e0d565b6"): "CPUID Fn1 EAX (go-sev-guest)",
    UUID("9f4116cd-c503-4f5a-8f6f-fb68882f4ce2"): "launch endorsement (Google)",
}
_KNOWN_BYTES: Final = frozenset((*(guid.bytes for guid in _KNOWN), *(guid.bytes_le for guid in _KNOWN)))


class TableEntry(NamedTuple):
    """One entry and what it points at; `offset` counts from the table's start and is ignored by `pack`."""

    guid: UUID
    data: bytes
    offset: int = 0


def canonical_guid(guid: UUID) -> UUID:
    """The GUID that a table's writer meant.

    GUIDs stand in textual (big-endian) order. Some tools write the mixed-endian form of EFI; for the five
    GUIDs of AMD 56421 that form is recognised, any other GUID comes back as it is.
    """
    return _MIXED_ENDIAN.get(guid, guid)


def begins_with_known_guid(data: bytes) -> bool:
    """Whether the first entry has one of the five GUIDs, in either byte order.

    That is what a table looks like even when the rest of it is broken.
    """
    return data[:16] in _KNOWN_BYTES


def is_mixed_endian(guid: UUID) -> bool:
    """Whether this is one of the five GUIDs in EFI's byte order."""
    return guid in _MIXED_ENDIAN


def entry_name(guid: UUID) -> str | None:
    """What an entry with that GUID is called, in either byte order; None when it is not known here."""
    return _NAMES.get(canonical_guid(guid))


def npages(size: int) -> int:
    """Pages of 4,096 bytes that `size` bytes take."""
    return -(-size // PAGE)


def pack(entries: Iterable[TableEntry]) -> bytes:
    """Build a table in canonical form: first offset 24 * (n + 1), data packed without gaps, in order.

    Args:
        entries: in the order wanted. None is a table too: the terminator alone.

    Raises:
        LayoutError: the zero GUID, one GUID twice, or more data than 32-bit offsets reach.
    """
    kept = tuple(entries)
    _refuse_duplicates([each.guid for each in kept])
    head, at = [], ENTRY_SIZE * (len(kept) + 1)
    for number, each in enumerate(kept):
        if each.guid == _NIL:
            raise LayoutError(
                f"certificate table entry {number}: the zero GUID ends the table, wanted another ({_SOURCE})"
            )
        if at + len(each.data) >= _U32:
            raise LayoutError(
                f"certificate table entry {number}: ends at {at + len(each.data):#x}, wanted below 2^32 "
                f"({_SOURCE})"
            )
        head.append(bytes(CertTableEntry(guid=each.guid.bytes, offset=at, length=len(each.data))))
        at += len(each.data)
    return b"".join((*head, _TERMINATOR, *(each.data for each in kept)))


def parse(data: bytes) -> tuple[TableEntry, ...]:
    """Read a table.

    1. A terminator of 24 zero bytes ends the entries.
    2. Data starts at or after the terminator: offset >= 24 * (n + 1).
    3. offset + length neither overflows 32 bits nor passes the end of `data`.
    4. No GUID stands twice, and no two entries share bytes.

    Args:
        data: the table and whatever follows it; padding after the last data is allowed.

    Returns:
        The entries in their order, unknown GUIDs too.

    Raises:
        LayoutError: a rule is broken; the text names the entry and the numbers.
    """
    return tuple(
        TableEntry(guid=UUID(bytes=guid), data=bytes(data[start:end]), offset=start)
        for guid, start, end in places(data)
    )


def places(data: bytes) -> tuple[tuple[bytes, int, int], ...]:
    """The GUID's bytes, start and end of the data of every entry of `parse`; LayoutError as there."""
    head = bytes(data[: _head_size(data)])
    return (_known_places if len(head) <= _LARGEST_KEPT else _places)(head, len(data))


def _head_size(data: bytes) -> int:
    """Bytes before the terminator."""
    for at in range(0, len(data) - ENTRY_SIZE + 1, ENTRY_SIZE):
        if data[at : at + ENTRY_SIZE] == _TERMINATOR:
            return at
    raise LayoutError(
        f"certificate table: {len(data) // ENTRY_SIZE} entries in {len(data):#x} bytes and no terminator, "
        f"wanted an entry of 24 zero bytes ({_SOURCE})"
    )


def _places(head: bytes, size: int) -> tuple[tuple[bytes, int, int], ...]:
    """The same from what stands before the terminator: rules 2 to 4."""
    heads = [CertTableEntry.parse_at(head, at) for at in range(0, len(head), ENTRY_SIZE)]
    first = len(head) + ENTRY_SIZE
    _refuse_duplicates([_guid(number, each, first, size) for number, each in enumerate(heads)])
    # nothing is cut out before that: thousands of entries could each claim the whole blob
    _refuse_overlaps(heads)
    return tuple((each.guid, each.offset, each.offset + each.length) for each in heads)


_known_places = lru_cache(maxsize=64)(_places)
"""The same, remembered: the tables of a line's chips begin alike."""


def _guid(number: int, head: CertTableEntry, first: int, size: int) -> UUID:
    """The entry's GUID, once it is known to lie inside."""
    where = f"certificate table entry {number}"
    guid = UUID(bytes=head.guid)
    if guid == _NIL:
        raise LayoutError(
            f"{where}: zero GUID with offset {head.offset:#x} and length {head.length:#x}, "
            f"wanted zeros in a terminator ({_SOURCE})"
        )
    if head.offset < first:
        raise LayoutError(
            f"{where} ({guid}): offset {head.offset:#x} is inside the table of {first:#x} bytes ({_SOURCE})"
        )
    end = head.offset + head.length
    if end >= _U32:
        raise LayoutError(
            f"{where} ({guid}): offset {head.offset:#x} + length {head.length:#x} overflows 32 bits "
            f"({_SOURCE})"
        )
    if end > size:
        raise LayoutError(f"{where} ({guid}): ends at {end:#x}, blob has {size:#x} bytes ({_SOURCE})")
    return guid


def _refuse_duplicates(guids: list[UUID]) -> None:
    seen: dict[UUID, int] = {}
    for number, guid in enumerate(guids):
        first = seen.setdefault(guid, number)
        if first != number:
            raise LayoutError(
                f"certificate table entry {number}: GUID {guid} as in entry {first} ({_SOURCE})"
            )


def _refuse_overlaps(heads: list[CertTableEntry]) -> None:
    spans = sorted((each.offset, each.offset + each.length, n) for n, each in enumerate(heads) if each.length)
    for (_, end, before), (start, _, after) in pairwise(spans):
        if start < end:
            raise LayoutError(
                f"certificate table entry {after}: starts at {start:#x}, entry {before} ends at {end:#x} "
                f"({_SOURCE})"
            )
