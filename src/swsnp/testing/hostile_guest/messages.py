"""Messages that the firmware refuses: header, number, key, type, version.

Nothing but the type byte is KVM's to look at; the firmware refuses with a status, and its counter stays.
Source: AMD 56860, SNP_GUEST_REQUEST and guest messages.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.snp_message import MessageType
from swsnp.testing.guest_case import Case, Program, everywhere, firmware_status
from swsnp.testing.seen import Answer, Replied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.testing.raw_guest import RawGuest

__all__ = ["CASES"]

_BAD_MEASUREMENT: Final = 0x0B
_INVALID_PARAM: Final = 0x16
_AEAD_OFLOW: Final = 0x1D

_SEALED: Final[tuple[tuple[str, int, dict[str, Any]], ...]] = (
    ("algo-0", _INVALID_PARAM, {"algo": 0}),
    ("algo-2", _INVALID_PARAM, {"algo": 2}),
    ("header-version-0", _INVALID_PARAM, {"hdr_version": 0}),
    ("header-version-2", _INVALID_PARAM, {"hdr_version": 2}),
    ("header-size-5f", _INVALID_PARAM, {"hdr_size": 0x5F}),
    ("header-size-61", _INVALID_PARAM, {"hdr_size": 0x61}),
    ("size-0", _INVALID_PARAM, {"msg_size": 0}),
    ("size-15", _INVALID_PARAM, {"msg_size": 15}),
    ("size-17", _INVALID_PARAM, {"msg_size": 17}),
    ("size-4016", _INVALID_PARAM, {"msg_size": 4016}),
    ("size-fff0", _INVALID_PARAM, {"msg_size": 0xFFF0}),
    ("size-4000-of-96", _BAD_MEASUREMENT, {"msg_size": 4000}),
    ("another-key", _BAD_MEASUREMENT, {"msg_vmpck": 1}),
    ("no-such-key", _INVALID_PARAM, {"msg_vmpck": 4}),
    ("key-255", _INVALID_PARAM, {"msg_vmpck": 255}),
    ("version-0", _INVALID_PARAM, {"msg_version": 0}),
    ("version-2", _INVALID_PARAM, {"msg_version": 2}),
    ("type-0", _INVALID_PARAM, {"msg_type": 0}),
    ("type-a-response", _INVALID_PARAM, {"msg_type": MessageType.REPORT_RSP}),
    ("type-255", _INVALID_PARAM, {"msg_type": 255}),
    ("number-repeated", _AEAD_OFLOW, {"skip": -1}),
    ("number-skipped", _AEAD_OFLOW, {"skip": 1}),
    ("number-of-the-next-request", _AEAD_OFLOW, {"skip": 2}),
)
"""Sealed as they are: name, firmware status, what differs."""

_CHANGED: Final[tuple[tuple[str, int, int], ...]] = (
    ("tag", 0x00, _BAD_MEASUREMENT),
    ("last-tag-byte", 0x0F, _BAD_MEASUREMENT),
    ("number", 0x20, _BAD_MEASUREMENT),
    ("type", 0x34, _BAD_MEASUREMENT),
    ("reserved-38", 0x38, _BAD_MEASUREMENT),
    ("last-header-byte", 0x5F, _BAD_MEASUREMENT),
    ("ciphertext", 0x60, _BAD_MEASUREMENT),
    ("last-ciphertext-byte", 0xBF, _BAD_MEASUREMENT),
)
"""Changed after sealing: name, offset of the byte, firmware status."""

_FREE: Final = (("tag-16", 0x10), ("tag-31", 0x1F), ("reserved-28", 0x28), ("behind-the-message", 0xC0))
"""Bytes that nothing covers."""


def _sealed(guest: RawGuest, *, skip: int = 0, **header: Any) -> Program:
    return (yield from guest.send(guest.message(skip=skip, **header)))


def _changed(guest: RawGuest, *, offset: int) -> Program:
    page = guest.message()
    page[offset] ^= 0x80
    return (yield from guest.send(page))


def _zeros(guest: RawGuest) -> Program:
    return (yield from guest.send(bytes(4096)))


def _table() -> Iterator[Case]:
    for name, status, header in _SEALED:
        seen = Replied(info1=0, info2=status, answer=Answer.GARBAGE)
        yield Case(
            name=f"message-{name}",
            rule="SNP_GUEST_REQUEST, checks of header, tag and number",
            program=partial(_sealed, **header),
            expected=firmware_status(status, seen),
        )
    for name, offset, status in _CHANGED:
        seen = Replied(info1=0, info2=status, answer=Answer.GARBAGE)
        yield Case(
            name=f"message-changed-{name}",
            rule="authenticated: tag, number (as IV), header from 30h on, payload",
            program=partial(_changed, offset=offset),
            expected=firmware_status(status, seen),
        )
    for name, offset in _FREE:
        yield Case(
            name=f"message-free-{name}",
            rule="not authenticated",
            program=partial(_changed, offset=offset),
            expected=everywhere(Replied(info1=0, info2=0, answer=Answer.OPENED)),
        )
    seen = Replied(info1=0, info2=_INVALID_PARAM, answer=Answer.GARBAGE)
    yield Case(
        name="message-zeros",
        rule="SNP_GUEST_REQUEST, checks of header, tag and number",
        program=_zeros,
        expected=firmware_status(_INVALID_PARAM, seen),
    )


CASES: Final[tuple[Case, ...]] = tuple(_table())
