"""Strict DER, as far as certificates and CRLs need it.

`asn1crypto` reads BER as well, with lengths that have several forms; what a signature covers, and what a
fingerprint is taken over, must have one. So the tree is walked here, on the bytes that came in.
Source: ITU-T X.690, DER.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Final

from swsnp.errors import LayoutError

__all__ = [
    "BIT_STRING",
    "BOOLEAN",
    "Der",
    "IA5_STRING",
    "INTEGER",
    "OCTET_STRING",
    "OID",
    "SEQUENCE",
    "SET",
    "bit_string",
    "boolean",
    "explicit",
    "integer",
    "moment",
    "oid",
    "spans",
    "time",
    "unwrap",
]

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
NULL: Final = 0x05
OID: Final = 0x06
UTF8_STRING: Final = 0x0C
PRINTABLE_STRING: Final = 0x13
IA5_STRING: Final = 0x16
UTC_TIME: Final = 0x17
GENERALIZED_TIME: Final = 0x18
SEQUENCE: Final = 0x30
SET: Final = 0x31
_SOURCE: Final = "X.690, DER"
_UTC_TIME: Final = len("YYMMDDhhmmssZ")
_GENERALIZED_TIME: Final = len("YYYYMMDDhhmmssZ")


def explicit(number: int) -> int:
    """The tag of an explicitly tagged, constructed value: [number]."""
    return 0xA0 | number


class Der:
    """A cursor over concatenated DER values; `where` names the structure in error texts.

    Certificates are read for every chip that is seen for the first time, so names are put together only for
    an error text.
    """

    __slots__ = ("_at", "_data", "_field", "_inside")

    def __init__(self, data: bytes, where: str, inside: Der | None = None) -> None:
        self._data, self._field, self._inside, self._at = data, where, inside, 0

    def peek(self) -> int | None:
        """The next value's tag byte; None at the end."""
        return self._data[self._at] if self._at < len(self._data) else None

    def raw(self, tag: int, field: str) -> bytes:
        """The next value with its header.

        Raises:
            LayoutError: another tag, a length in a form that DER does not have, or fewer bytes than it says.
        """
        start = self._at
        self.skip(tag, field)
        return self._data[start : self._at]

    def value(self, tag: int, field: str) -> bytes:
        """The next value's contents; LayoutError as `raw`."""
        start = self.skip(tag, field)
        return self._data[start : self._at]

    def inside(self, tag: int, field: str) -> Der:
        """A cursor over the next value's contents; LayoutError as `raw`."""
        return Der(self.value(tag, field), field, self)

    def skip(self, tag: int, field: str) -> int:
        """Pass over the next value; returns where its contents begin. LayoutError as `raw`."""
        data, at = self._data, self._at
        if at >= len(data) or data[at] != tag:
            got = "nothing" if at >= len(data) else f"tag {data[at]:#04x}"
            raise self._error(field, got, f"tag {tag:#04x}")
        start = at + 2
        if start > len(data):
            raise self._error(field, "no length", "a length")
        length = data[at + 1]
        if length >= 0x80:
            length, start = self._long_length(at + 1, field)
        self._at = end = start + length
        if end > len(data):
            raise self._error(field, f"{len(data) - start} bytes", f"{length} bytes as its length says")
        return start

    def left(self) -> int:
        """Bytes that follow."""
        return len(self._data) - self._at

    def end(self) -> None:
        """Nothing may follow.

        Raises:
            LayoutError: there are bytes left.
        """
        left = self.left()
        if left:
            where = self._where()
            raise LayoutError(f"{where}: {left} bytes follow at {self._at}, wanted none ({_SOURCE})")

    def _long_length(self, at: int, field: str) -> tuple[int, int]:
        """A length in the long form, and where the contents begin."""
        first = self._data[at]
        size = first & 0x7F
        raw = self._data[at + 1 : at + 1 + size]
        length = int.from_bytes(raw, "big")
        if not 1 <= size <= 4 or len(raw) != size or length < 0x80 or not raw[0]:
            raise self._error(field, f"length {first:#04x} {raw[:4].hex()}", "the shortest definite form")
        return length, at + 1 + size

    def _where(self) -> str:
        return self._field if self._inside is None else f"{self._inside._where()}.{self._field}"

    def _error(self, field: str, got: str, wanted: str) -> LayoutError:
        return LayoutError(f"{self._where()}.{field}: got {got}, wanted {wanted} ({_SOURCE})")


def spans(data: bytes, where: str, at: int = 0, end: int | None = None) -> list[tuple[int, int, int, int]]:
    """Every value from `at` to `end`: its tag, where it begins, where its contents begin, and where it ends.

    The same that a cursor would find step by step, in one pass: a certificate has sixty small values.

    Raises:
        LayoutError: a length in a form that DER does not have, or fewer bytes than it says.
    """
    found: list[tuple[int, int, int, int]] = []
    size = len(data) if end is None else end
    while at < size:
        start, body = at, at + 2
        if body > size or data[at + 1] >= 0x80:
            cursor = Der(data[at:size], where)
            body = at + cursor.skip(data[at], f"[{len(found)}]")
            at = size - cursor.left()
        else:
            at = body + data[at + 1]
            if at > size:
                Der(data[start:size], where).skip(data[start], f"[{len(found)}]")  # says what is wrong
        found.append((data[start], start, body, at))
    return found


def unwrap(data: bytes, tag: int, where: str) -> bytes:
    """The contents of a value that is all of `data`."""
    cursor = Der(data, where)
    start = cursor.skip(tag, "value")
    cursor.end()
    return data[start:]


def integer(body: bytes, where: str) -> int:
    """Contents of an INTEGER, two's complement, shortest form only."""
    if not body or (len(body) > 1 and (body[0], body[1] >> 7) in ((0x00, 0), (0xFF, 1))):
        raise LayoutError(f"{where}: INTEGER {body.hex() or 'empty'} is not the shortest form ({_SOURCE})")
    return int.from_bytes(body, "big", signed=True)


def boolean(body: bytes, where: str) -> bool:
    """Contents of a BOOLEAN: 00 or FF."""
    if body not in (b"\x00", b"\xff"):
        raise LayoutError(f"{where}: BOOLEAN {body.hex() or 'empty'}, wanted 00 or ff ({_SOURCE})")
    return body == b"\xff"


def bit_string(body: bytes, where: str) -> bytes:
    """Contents of a BIT STRING of whole bytes."""
    if not body or body[0]:
        raise LayoutError(
            f"{where}: BIT STRING {body[:1].hex() or 'empty'}, wanted no unused bits ({_SOURCE})"
        )
    return body[1:]


@lru_cache(maxsize=256)
def oid(body: bytes, where: str) -> str:
    """Contents of an OBJECT IDENTIFIER, dotted."""
    arcs, value, fresh = [], 0, True
    for byte in body:
        if fresh and byte == 0x80:
            raise LayoutError(f"{where}: object identifier {body.hex()} has a padded arc ({_SOURCE})")
        value = value << 7 | byte & 0x7F
        fresh = byte < 0x80
        if fresh:
            arcs.append(value)
            value = 0
    if not arcs or not fresh:
        raise LayoutError(f"{where}: object identifier {body.hex() or 'empty'} is cut off ({_SOURCE})")
    top = min(arcs[0] // 40, 2)
    return ".".join(map(str, (top, arcs[0] - 40 * top, *arcs[1:])))


def time(cursor: Der, field: str) -> datetime:
    """The next value, a Time of RFC 5280; LayoutError as `moment`."""
    tag = GENERALIZED_TIME if cursor.peek() == GENERALIZED_TIME else UTC_TIME
    return moment(tag, cursor.value(tag, field), field)


def moment(tag: int, body: bytes, field: str) -> datetime:
    """Contents of a UTCTime (1950..2049) or GeneralizedTime, to the second, with Z."""
    short = tag != GENERALIZED_TIME
    digits, zone = body[:-1], body[-1:]
    if len(body) == (_UTC_TIME if short else _GENERALIZED_TIME) and digits.isdigit() and zone == b"Z":
        text = digits.decode()
        if short:
            text = ("19" if text >= "50" else "20") + text
        try:
            if text[8:10] != "24":  # ISO 8601 has that hour, X.690 has not
                return datetime.fromisoformat(f"{text[:8]}T{text[8:]}Z")
        except ValueError:
            pass  # digits that are no date: told below, like any other text that is no time
    raise LayoutError(f"{field}: time {body[:32]!r}, wanted [YY]YYMMDDhhmmssZ (RFC 5280)")
