"""Page state changes through the GHCB that make no sense. Source: snp_begin_psc of Linux; AMD 56421."""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import PAGE, ExitCode, GhcbError, PscEntry, PscOp
from swsnp.testing.guest_case import Case, Program, everywhere
from swsnp.testing.hostile_guest.ghcb_fields import refused
from swsnp.testing.raw_guest import OUTSIDE
from swsnp.testing.seen import Replied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.testing.raw_guest import RawGuest

__all__ = ["CASES"]

_BUFFER: Final = 0x800
_GENERIC: Final = 0x0000_0100_0000_0000
_INVALID_HEADER: Final = 0x0000_0001_0000_0001
_INVALID_ENTRY: Final = 0x0000_0001_0000_0002
_SPARE: Final = 0x80_0000 // PAGE
_NOWHERE: Final = OUTSIDE // PAGE


def _entry(gfn: int, operation: int, *, cur_page: int = 0, large: int = 0, reserved: int = 0) -> int:
    return PscEntry.of(gfn=gfn, operation=operation, cur_page=cur_page, pagesize=large) | reserved << 57


def _change(
    guest: RawGuest, *, first: int = 0, last: int = 0, entries: tuple[int, ...] = (), scratch: int = _BUFFER
) -> Program:
    """One page state change event; `data` of the reply is cur_entry afterwards."""
    buffer = struct.pack(f"<HHI{len(entries)}Q", first, last, 0, *entries)
    guest.poke(guest.ghcb + scratch, buffer)
    guest.ask(ExitCode.PSC, scratch=guest.ghcb + scratch)
    yield
    info1, info2 = guest.reply()
    return Replied(info1=info1, info2=info2, data=guest.peek(guest.ghcb + scratch, 2))


def _scratch(guest: RawGuest, *, at: int, inside: bool) -> Program:
    guest.poke(guest.ghcb + _BUFFER, bytes(16))
    guest.ask(ExitCode.PSC, scratch=(guest.ghcb if inside else 0) + at)
    yield
    info1, info2 = guest.reply()
    return Replied(info1=info1, info2=info2)


def _done(current: int, info2: int = 0) -> Replied:
    return Replied(info1=0, info2=info2, data=struct.pack("<H", current))


_PRIVATE: Final = int(PscOp.PRIVATE)
_SHARED: Final = int(PscOp.SHARED)
_LISTS: Final[tuple[tuple[str, str, int, int, tuple[int, ...], Replied], ...]] = (
    ("end-253", "header: end beyond the buffer", 0, 253, (), _done(0, _INVALID_HEADER)),
    ("end-65535", "header: end beyond the buffer", 0, 0xFFFF, (), _done(0, _INVALID_HEADER)),
    ("begin-behind-end", "header: nothing left to do", 5, 4, (), _done(5)),
    ("begin-65535", "header: nothing left to do", 0xFFFF, 0, (), _done(0xFFFF)),
    ("entry-too-far", "entry: cur_page beyond the page", 0, 0, (_entry(_SPARE, _SHARED, cur_page=2),),
     _done(0, _INVALID_ENTRY)),
    ("large-entry-too-far", "entry: cur_page beyond 512", 0, 0,
     (_entry(_SPARE, _SHARED, cur_page=513, large=1),), _done(0, _INVALID_ENTRY)),
    ("large-entry-misaligned", "entry: GFN not 2 MiB aligned", 0, 0,
     (_entry(_SPARE + 1, _SHARED, large=1),), _done(0, _INVALID_ENTRY)),
    ("second-entry-wrong", "entries before the wrong one are done", 0, 1,
     (_entry(_SPARE, _SHARED), _entry(_SPARE + 9, _SHARED, cur_page=7)), _done(1, _INVALID_ENTRY)),
    ("done-entry", "an entry that is done is skipped", 0, 0, (_entry(_SPARE, _SHARED, cur_page=1),),
     _done(1)),
    ("operation-0", "other operations are marked done silently", 0, 0, (_entry(_SPARE, 0),), _done(1)),
    ("operation-15", "other operations are marked done silently", 0, 0, (_entry(_SPARE, 15),), _done(1)),
    ("reserved-bits", "reserved bits of an entry are not looked at", 0, 0,
     (_entry(_SPARE, _SHARED, reserved=0x7F),), _done(1)),
    ("private-outside", "no memory: the VMM answers EINVAL", 0, 0, (_entry(_NOWHERE, _PRIVATE),),
     _done(0, _GENERIC)),
    ("shared-outside", "no memory: to shared is accepted (QEMU)", 0, 0, (_entry(_NOWHERE, _SHARED),),
     _done(1)),
    ("half-outside", "a range half in memory: the VMM answers EINVAL", 0, 1,
     (_entry((256 << 20) // PAGE - 1, _SHARED), _entry((256 << 20) // PAGE, _SHARED)), _done(0, _GENERIC)),
    ("twice-the-same-page", "setting the state that a page has is no error", 0, 1,
     (_entry(_SPARE, _SHARED), _entry(_SPARE, _SHARED)), _done(2)),
    ("to-and-fro", "entries are done in order", 0, 2,
     (_entry(_SPARE, _SHARED), _entry(_SPARE, _PRIVATE), _entry(_SPARE, _SHARED)), _done(3)),
)  # fmt: skip

_BAD_SCRATCH: Final = (
    ("zero", 0, False),
    ("top", 2**64 - 4, False),
    ("outside-the-ghcb", 0x10_0000, False),
    ("before-the-buffer", 0x7F8, True),
    ("at-the-save-area", 0, True),
    ("no-room-for-a-header", 0xFE9, True),
    ("behind-the-buffer", 0xFF0, True),
)


def _table() -> Iterator[Case]:
    for name, rule, first, last, entries, seen in _LISTS:
        program = partial(_change, first=first, last=last, entries=entries)
        yield Case(name=f"psc-{name}", rule=rule, program=program, expected=everywhere(seen))
    for name, at, inside in _BAD_SCRATCH:
        yield Case(
            name=f"psc-scratch-{name}",
            rule="scratch area inside the GHCB's shared buffer (GHCB protocol 2)",
            program=partial(_scratch, at=at, inside=inside),
            expected=everywhere(refused(GhcbError.INVALID_SCRATCH_AREA)),
        )
    yield Case(
        name="psc-scratch-room-for-a-header-only",
        rule="header: end beyond the buffer",
        program=partial(_change, scratch=0xFE8),
        expected=everywhere(_done(0, _INVALID_HEADER)),
    )


CASES: Final[tuple[Case, ...]] = tuple(_table())
