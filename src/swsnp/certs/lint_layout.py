"""Rules T1 to T14: the table's bytes, before anybody looks at what the entries hold.

`table.parse` refuses a broken table at its first fault. Here the rest is read too, as far as it makes sense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final
from uuid import UUID

from swsnp.abi.ghcb import CertTableEntry, CertTableGuid
from swsnp.abi.sev_guest import EXT_GUEST_DATA_MAX
from swsnp.certs.table import ENTRY_SIZE, canonical_guid, entry_name, is_mixed_endian, npages

if TYPE_CHECKING:
    from swsnp.certs.lint_result import Findings

__all__ = ["CANONICAL_ORDER", "Slot", "check_layout"]

CANONICAL_ORDER: Final = {
    CertTableGuid.VCEK: 0,
    CertTableGuid.VLEK: 1,
    CertTableGuid.ASK: 2,
    CertTableGuid.ARK: 3,
    CertTableGuid.CRL: 4,
}
"""Place by GUID; all others come after. VCEK, ASK, ARK is the order of AMD's sev-host-set-cert-chain."""
_NIL: Final = bytes(16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One entry as it stands in the blob."""

    number: int
    guid: UUID
    offset: int
    length: int
    blob: bytes = field(repr=False)

    @property
    def data(self) -> bytes | None:
        """What it points at, cut out at every call; None where that is not inside the blob."""
        return self.blob[self.offset : self.end] if self.is_inside else None

    @property
    def is_inside(self) -> bool:
        """Whether the data lie inside the blob."""
        return self.end <= len(self.blob)

    @property
    def end(self) -> int:
        """First byte after the data."""
        return self.offset + self.length

    @property
    def meant(self) -> UUID:
        """The GUID in textual order."""
        return canonical_guid(self.guid)

    @property
    def shown(self) -> str:
        """Name, or GUID where there is none."""
        return entry_name(self.guid) or str(self.guid)


def check_layout(blob: bytes, findings: Findings) -> tuple[Slot, ...]:
    """T1 to T14, as `lint_result.RULES` has them.

    Returns:
        The entries before the terminator; without one, those before the first data.
    """
    slots, first = _read(blob, findings)
    _check_bounds(slots, first, blob, findings)
    inside = sorted((each for each in slots if each.length and each.is_inside), key=lambda each: each.offset)
    _check_overlaps(inside, findings)
    # an entry that is cut off claims all that is left
    claimed = max((len(blob) for each in slots if not each.is_inside), default=first)
    _check_packing(inside, first, findings)
    _check_tail(blob, max((claimed, *(each.end for each in inside))), findings)
    _check_guids(slots, findings)
    pages = npages(len(blob))
    wanted = f"at most {EXT_GUEST_DATA_MAX}"
    findings.holds("T11", len(blob) <= EXT_GUEST_DATA_MAX, f"{len(blob)} bytes, {pages} pages", wanted)
    _check_order(slots, findings)
    for each in slots:
        known = entry_name(each.guid) is not None
        findings.holds("T13", known, each.guid, "a known GUID; it is kept as it is", entry=each.number)
        findings.holds("T14", each.length > 0, "length 0", "data", entry=each.number)
    return slots


def _read(blob: bytes, findings: Findings) -> tuple[tuple[Slot, ...], int]:
    """T1, T2. The entries, and where data may begin."""
    end = _terminator(blob)
    if end is None:
        end = _first_data(blob)
        findings.fail("T1", f"{end // ENTRY_SIZE} entries and no terminator", "24 zero bytes", offset=end)
        return _slots(blob, end), end or len(blob)
    terminator = CertTableEntry.parse(blob[end : end + ENTRY_SIZE])
    findings.holds(
        "T2",
        not terminator.offset and not terminator.length,
        f"offset {terminator.offset:#x} and length {terminator.length:#x}",
        "zeros",
        entry=end // ENTRY_SIZE,
        offset=end,
    )
    return _slots(blob, end), end + ENTRY_SIZE


def _terminator(blob: bytes) -> int | None:
    """Where the first zero GUID stands that ends the entries; None when there is none before the data.

    A zero GUID behind bytes that cannot be entries is padding or part of a certificate.
    """
    limit = _first_data(blob)
    for at in range(0, len(blob) - ENTRY_SIZE + 1, ENTRY_SIZE):
        if blob[at : at + 16] == _NIL:
            fits = all(each.is_inside for each in _slots(blob, at))
            return at if at <= limit or fits else None
    return None


def _first_data(blob: bytes) -> int:
    """The end of the entries when nothing else tells: the least offset that lies behind its own entry."""
    limit, at = len(blob), 0
    while at + ENTRY_SIZE <= limit:
        offset = CertTableEntry.parse(blob[at : at + ENTRY_SIZE]).offset
        at += ENTRY_SIZE
        limit = min(limit, offset) if offset >= at else limit
    return at


def _slots(blob: bytes, end: int) -> tuple[Slot, ...]:
    slots = []
    for number, at in enumerate(range(0, end, ENTRY_SIZE)):
        head = CertTableEntry.parse(blob[at : at + ENTRY_SIZE])
        guid = UUID(bytes=bytes(head.guid))
        slots.append(Slot(number=number, guid=guid, offset=head.offset, length=head.length, blob=blob))
    return tuple(slots)


def _check_bounds(slots: tuple[Slot, ...], first: int, blob: bytes, findings: Findings) -> None:
    """T3, T4."""
    for each in slots:
        at, name = each.number * ENTRY_SIZE, each.shown
        outside = each.offset >= first
        findings.holds(
            "T3", outside, f"{name} at {each.offset:#x}", f"{first:#x} or more", entry=each.number, offset=at
        )
        findings.holds(
            "T4",
            each.is_inside,
            f"{name} that ends at {each.end:#x}",
            f"{len(blob):#x} or less",
            entry=each.number,
            offset=at,
        )


def _check_overlaps(inside: list[Slot], findings: Findings) -> None:
    """T5. Each against the one that reaches farthest before it."""
    farthest: Slot | None = None
    for each in inside:
        if farthest is not None and each.offset < farthest.end:
            findings.fail(
                "T5",
                f"{each.shown} at {each.offset:#x}",
                f"{farthest.end:#x} or more, where entry {farthest.number} ends",
                entry=each.number,
                offset=each.offset,
            )
        farthest = each if farthest is None or each.end > farthest.end else farthest


def _check_packing(inside: list[Slot], first: int, findings: Findings) -> None:
    """T6, T7."""
    end = first
    for each in inside:
        gap = each.offset - end
        findings.holds("T6", gap <= 0, f"{gap} bytes of no entry", "none", entry=each.number, offset=end)
        end = max(end, each.end)
    for before, after in pairwise(inside):
        findings.holds(
            "T7",
            before.number < after.number,
            f"data of entry {before.number} before that of entry {after.number}",
            "the entries' order",
            entry=before.number,
            offset=before.offset,
        )


def _check_tail(blob: bytes, end: int, findings: Findings) -> None:
    """T8."""
    rest = blob[end:].lstrip(b"\0")
    findings.holds("T8", not rest, f"{len(rest)} bytes of no entry", "none", offset=len(blob) - len(rest))


def _check_guids(slots: tuple[Slot, ...], findings: Findings) -> None:
    """T9, T10."""
    seen: dict[UUID, int] = {}
    for each in slots:
        at = each.number * ENTRY_SIZE
        before = seen.setdefault(each.meant, each.number)
        findings.holds(
            "T9",
            before == each.number,
            f"{each.shown} as in entry {before}",
            "once",
            entry=each.number,
            offset=at,
        )
        findings.holds(
            "T10",
            not is_mixed_endian(each.guid),
            f"{each.guid}, which is {each.shown} in mixed-endian order",
            f"{each.meant}",
            entry=each.number,
            offset=at,
        )


def _check_order(slots: tuple[Slot, ...], findings: Findings) -> None:
    """T12."""
    places = [CANONICAL_ORDER.get(each.meant, len(CANONICAL_ORDER)) for each in slots]
    if places != sorted(places):
        wanted = sorted(slots, key=lambda each: places[each.number])
        findings.fail(
            "T12",
            ", ".join(each.shown for each in slots),
            ", ".join(each.shown for each in wanted),
        )
