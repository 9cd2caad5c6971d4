"""The envelope of guest messages: known answers and refusals."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.snp_message import (
    GuestFieldSelect,
    MessageHeader,
    MessageType,
    MsgKeyReq,
    MsgReportReq,
    MsgReportRspHeader,
    RootKeySelect,
    message_header,
)
from swsnp.crypto.seal import MessageKey, TagMismatch
from swsnp.errors import LayoutError

VMPCK = bytes(range(32))
KEY = MessageKey(VMPCK)


def _header(seqno: int, msg_type: int, size: int) -> MessageHeader:
    return MessageHeader(
        msg_seqno=seqno, algo=1, hdr_version=1, hdr_size=0x60, msg_type=msg_type, msg_version=1, msg_size=size
    )


def _page(message: bytes) -> bytes:
    return message + bytes(4096 - len(message))


def test_report_request_known_answer() -> None:
    """Known answer: report request, seqno 1, report data 00..3F, VMPCK 00..1F (independent AES-GCM)."""
    payload = bytes(MsgReportReq(report_data=bytes(range(64))))
    sealed = KEY.seal(_header(1, MessageType.REPORT_REQ, 96), payload)
    assert sealed[0x30:0x60].hex() == "0101600005016000" + "00" * 40
    assert sealed[:16].hex() == "0f354f26b13f7433d3674d8eebcaf847"
    assert sealed[16:32] == bytes(16)
    assert sealed[0x60:].hex() == (
        "e22d803ca0aaea00420d0fc830cc86c4dc70dd3d68bd7d05560647e5013b996fccddd2ea048788e8f0f437f862242ea7c0e4"
        "fcb7d1456ca0bbb1da492b891678bcafa49213c0f2445044cd48be94fd5eb5f3e8b761e80896f353185b4abd740d"
    )
    page = _page(sealed)
    assert (
        hashlib.sha256(page).hexdigest() == "80287cc666d38c7378104b319db2e4f42eb0cbf307c8a97646a01b63e64b38d8"
    )
    assert KEY.open(page, 96) == payload


def test_report_request_second_known_answer() -> None:
    """Known answer: report request, seqno 1, report data 64 times 5Ah, VMPCK 00..1F."""
    sealed = KEY.seal(_header(1, MessageType.REPORT_REQ, 96), bytes(MsgReportReq(report_data=b"\x5a" * 64)))
    assert sealed[:16].hex() == "19d6b29292db57048aaf6c15987d2a3b"
    assert sealed[0x60:].hex() == (
        "b876d865fef5b65d105e5f99669bd291963b957426f23148144507a4477cdd2ab6a6aa937af8f4958287478914535ad2aa8f"
        "94debf2a00cdd9d2ba284dee721dbcafa49213c0f2445044cd48be94fd5eb5f3e8b761e80896f353185b4abd740d"
    )


def test_report_response_known_answer() -> None:
    """Known answer: report response, seqno 2, report byte i = i mod 256."""
    payload = bytes(MsgReportRspHeader(report_size=0x4A0)) + bytes(i & 0xFF for i in range(0x4A0))
    sealed = KEY.seal(_header(2, MessageType.REPORT_RSP, len(payload)), payload)
    assert sealed[:16].hex() == "4cacb6f052b105c6b897985b58487740"
    assert sealed[0x60:0x70].hex() == "e66eeb605aa168bdadbd6e148c86f702"
    assert (
        hashlib.sha256(_page(sealed)).hexdigest()
        == "0e93750ecf795e1438dbc14e714fbecd0283e99a2cf37e393408521242cd9579"
    )


def test_key_request_known_answer() -> None:
    """Known answer: key request, seqno 3, root key select 1, fields 3Fh."""
    payload = bytes(MsgKeyReq(flags=RootKeySelect(1), guest_field_select=GuestFieldSelect(0x3F)))
    sealed = KEY.seal(_header(3, MessageType.KEY_REQ, 32), payload)
    assert sealed[:16].hex() == "c17463bffd4fd8f79523b1a554891fb4"
    assert sealed[0x60:].hex() == "918c5899595132d8c7388fa492d606c92fd3c064da9bd2e0cb97494f1e4bd012"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(at=st.integers(0, 0x60 + 96 - 1), bit=st.integers(0, 7))
def test_every_authenticated_bit_counts(at: int, bit: int) -> None:
    """AMD 56860: tag, sequence number (as IV), bytes 30h..5Fh and ciphertext are covered, no other."""
    payload = bytes(MsgReportReq(report_data=bytes(range(64))))
    message = bytearray(KEY.seal(_header(1, MessageType.REPORT_REQ, 96), payload))
    message[at] ^= 1 << bit
    if 0x10 <= at < 0x20 or 0x28 <= at < 0x30:
        assert KEY.open(bytes(message), 96) == payload
    else:
        with pytest.raises(TagMismatch):
            KEY.open(bytes(message), 96)


def test_another_key_does_not_open() -> None:
    """AMD 56860: a message sealed with another VMPCK fails at the tag."""
    sealed = KEY.seal(_header(1, MessageType.REPORT_REQ, 96), bytes(96))
    with pytest.raises(TagMismatch):
        MessageKey(bytes(32)).open(sealed, 96)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_vmpck_has_32_bytes(size: int) -> None:
    """AMD 56860: AES-256."""
    with pytest.raises(LayoutError, match="32"):
        MessageKey(bytes(size))


def test_repr_withholds_the_key() -> None:
    """Secrets are never in a repr."""
    assert repr(KEY) == "MessageKey(withheld)"


def test_a_header_of_bytes_seals_the_same() -> None:
    """`message_header` is the record's encoding, whatever the values."""
    fields = {"msg_seqno": 2**64 - 3, "msg_type": 17, "msg_version": 255, "msg_size": 128, "msg_vmpck": 3}
    record = MessageHeader(algo=1, hdr_version=1, hdr_size=0x60).but(**fields)
    assert message_header(**fields) == bytes(record)
    assert KEY.seal(message_header(**fields), bytes(128)) == KEY.seal(record, bytes(128))
