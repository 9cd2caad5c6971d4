"""Strict DER. Source: ITU-T X.690; RFC 5280 for times."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from asn1crypto import core
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.certs import der
from swsnp.errors import LayoutError


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("", "got nothing, wanted tag 0x02"),
        ("0401", "got tag 0x04, wanted tag 0x02"),
        ("02", "no length"),
        ("0280", "the shortest definite form"),
        ("02810100", "the shortest definite form"),
        ("0282008000", "the shortest definite form"),
        ("0282", "the shortest definite form"),
        ("0285000000000100", "the shortest definite form"),
        ("0202ff", "got 1 bytes, wanted 2 bytes"),
    ],
)
def test_headers_have_one_form(data: str, text: str) -> None:
    """X.690, 10.1: definite lengths in the shortest form."""
    with pytest.raises(LayoutError, match=text):
        der.Der(bytes.fromhex(data), "x").value(der.INTEGER, "field")


def test_nothing_may_follow() -> None:
    """A signature's reader and the next one must see the same end."""
    with pytest.raises(LayoutError, match="x: 1 bytes follow at 3"):
        der.unwrap(bytes.fromhex("02010500"), der.INTEGER, "x")


@pytest.mark.parametrize("body", ["", "0000", "007f", "ff80"])
def test_integers_have_the_shortest_form(body: str) -> None:
    """X.690, 8.3.2."""
    with pytest.raises(LayoutError, match="not the shortest form"):
        der.integer(bytes.fromhex(body), "x")


@pytest.mark.parametrize(("body", "value"), [("00", 0), ("00d9", 0xD9), ("73", 0x73), ("ff", -1)])
def test_integers(body: str, value: int) -> None:
    """AMD 57230: a patch level of 80h and above has a leading zero byte."""
    assert der.integer(bytes.fromhex(body), "x") == value


@pytest.mark.parametrize("body", ["", "80", "2a80", "2a8001", "86"])
def test_broken_object_identifiers(body: str) -> None:
    """X.690, 8.19: no padding, and the last byte ends an arc."""
    with pytest.raises(LayoutError, match="object identifier"):
        der.oid(bytes.fromhex(body), "x")


@pytest.mark.parametrize(
    "dotted", ["1.3.6.1.4.1.3704.1.3.8", "2.5.29.15", "2.999.1", "0.9.2342", "1.3.132.0.34"]
)
def test_object_identifiers(dotted: str) -> None:
    """Against asn1crypto's encoder."""
    assert der.oid(core.ObjectIdentifier(dotted).contents, "x") == dotted


@pytest.mark.parametrize(("body", "bad"), [("01", True), ("", True), ("00", False), ("ff", False)])
def test_booleans(body: str, bad: bool) -> None:
    """X.690, 11.1: TRUE is FF."""
    if bad:
        with pytest.raises(LayoutError, match="BOOLEAN"):
            der.boolean(bytes.fromhex(body), "x")
    else:
        assert der.boolean(bytes.fromhex(body), "x") is (body == "ff")


def test_bit_strings_of_whole_bytes() -> None:
    """Keys and signatures have no unused bits."""
    assert der.bit_string(b"\x00ab", "x") == b"ab"
    for body in (b"", b"\x01\xfe"):
        with pytest.raises(LayoutError, match="BIT STRING"):
            der.bit_string(body, "x")


@pytest.mark.parametrize(
    ("tag", "text", "wanted"),
    [
        (0x17, b"201022172305Z", datetime(2020, 10, 22, 17, 23, 5, tzinfo=UTC)),
        (0x17, b"491231235959Z", datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (0x17, b"500101000000Z", datetime(1950, 1, 1, tzinfo=UTC)),
        (0x18, b"20511022172305Z", datetime(2051, 10, 22, 17, 23, 5, tzinfo=UTC)),
    ],
)
def test_times(tag: int, text: bytes, wanted: datetime) -> None:
    """RFC 5280, 4.1.2.5: two-digit years from 50 on are of the last century."""
    assert der.time(der.Der(bytes((tag, len(text))) + text, "x"), "t") == wanted


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (0x17, b"2010221723Z"),
        (0x17, b"201022172305+0100"),
        (0x17, b"201322172305Z"),
        (0x17, b"20511022172305Z"),
        (0x18, b"201022172305Z"),
        (0x18, b"20201022172305.5Z"),
        (0x18, b"20200230000000Z"),
    ],
)
def test_times_that_are_none(tag: int, text: bytes) -> None:
    """RFC 5280, 4.1.2.5: seconds, and Z."""
    with pytest.raises(LayoutError, match="RFC 5280"):
        der.time(der.Der(bytes((tag, len(text))) + text, "x"), "t")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.integers(min_value=-(1 << 70), max_value=1 << 70))
def test_integers_agree_with_asn1crypto(value: int) -> None:
    """Every integer, read from another program's encoding."""
    assert der.integer(der.unwrap(core.Integer(value).dump(), der.INTEGER, "x"), "x") == value
