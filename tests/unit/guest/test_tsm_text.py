"""What may be written into text attributes."""

from __future__ import annotations

import errno

import pytest

from swsnp.guest.tsm_text import TsmError, parse_guid, parse_u32


def refusal(code: int) -> pytest.RaisesExc[TsmError]:
    return pytest.RaisesExc(TsmError, check=lambda error: error.errno == code)


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"\0",
            b"\n",
            b"+",
            b"++1",
            b"-1",
            b" 1",
            b"1 ",
            b"1\n\n",
            b"1\r\n",
            b"a",
            b"1a",
            b"0x",
            b"0X",
        ),
        *(b"0xg", b"08", b"0o7", b"0b1", b"1_0", b"+ 1", b"\xff", b"0x1\nx", b"+-1"),
        *(b"4294967296x", b"18446744073709551615x"),
    ],
)
def test_no_integer(text: bytes) -> None:
    """Linux, kstrtouint: no sign but +, no blanks, one newline; a zero byte alone is an empty text."""
    with refusal(errno.EINVAL):
        parse_u32(text)


@pytest.mark.parametrize(
    "text", [b"4294967296", b"0x100000000", b"040000000000", b"18446744073709551616", b"9" * 30 + b"x"]
)
def test_integer_out_of_range(text: bytes) -> None:
    """Linux, kstrtouint: ERANGE above 32 bits; above 64 bits before what follows the digits is looked at."""
    with refusal(errno.ERANGE):
        parse_u32(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0", 0),
        (b"1\n", 1),
        (b"+2", 2),
        (b"+0x3\n", 3),
        (b"0x0A", 10),
        (b"0XfF", 255),
        (b"010", 8),
        (b"00", 0),
        (b"3\0garbage", 3),
        (b"4294967295", 0xFFFF_FFFF),
        (b"0xFFFFFFFF", 0xFFFF_FFFF),
    ],
)
def test_integers(text: bytes, value: int) -> None:
    """Linux, kstrtouint with base 0: decimal, 0x hexadecimal, 0 octal; a NUL ends the text."""
    assert parse_u32(text) == value


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"c476f1eb-0123-45a5-9641-b4e7dde5bfe",
        b"c476f1eb-0123-45a5-9641_b4e7dde5bfe3",
        b"g476f1eb-0123-45a5-9641-b4e7dde5bfe3",
        b"{c476f1eb-0123-45a5-9641-b4e7dde5bfe3}",
        b" c476f1eb-0123-45a5-9641-b4e7dde5bfe3",
    ],
)
def test_no_guid(text: bytes) -> None:
    """Linux, guid_parse: 36 characters from the start."""
    with refusal(errno.EINVAL):
        parse_guid(text)


@pytest.mark.parametrize("tail", [b"", b"\n", b" and more"])
def test_guid(tail: bytes) -> None:
    """Linux, guid_t: the first three groups little-endian; what follows the 36 characters is not read."""
    assert parse_guid(b"c476f1eb-0123-45a5-9641-B4E7DDE5BFE3" + tail) == bytes.fromhex(
        "ebf176c42301a5459641b4e7dde5bfe3"
    )


def test_the_error_names_its_number() -> None:
    """Style: an error says what it is, also for a number without a name."""
    assert str(TsmError(errno.EBUSY)) == "configfs-tsm: EBUSY"
    assert str(TsmError(9999)) == "configfs-tsm: 9999"
