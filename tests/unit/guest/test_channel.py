"""The message channel: known answers, the state machine, counters, the order of checks, wiping."""

from __future__ import annotations

import hashlib
import struct
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_message import MessageHeader
from swsnp.crypto.seal import MessageKey
from swsnp.errors import LayoutError, UsageError
from swsnp.guest.channel import (
    TRANSITIONS,
    Channel,
    ChannelState,
    CounterExhausted,
    Event,
    KeyWiped,
    ResponseRefused,
)
from swsnp.guest.secrets import Secrets
from swsnp.trace import MessageOpened, MessageSealed, Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.guest.conftest import ScriptedHost

KEY = bytes(range(32))
REPORT_REQ = bytes(range(64)) + bytes(32)
REPORT_RSP = struct.pack("<II24x", 0, 0x4A0) + bytes(i & 0xFF for i in range(0x4A0))
LIMIT = 4016


class Slot:
    """A key and its counter."""

    def __init__(self, stored: int = 0, key: bytes | None = KEY, vmpck_id: int = 0) -> None:
        self.vmpck_id = vmpck_id
        self.counter = stored
        self.bytes = key
        self.log: list[str] = []

    def key(self) -> bytes | None:
        return self.bytes

    def stored(self) -> int | None:
        return None if self.bytes is None else self.counter

    def store(self, seqno: int) -> None:
        self.log.append(f"store {seqno}")
        self.counter = seqno

    def wipe(self) -> None:
        self.log.append("wipe")
        self.bytes = None


def response_page(payload: bytes = REPORT_RSP, *, key: bytes = KEY, **changes: Any) -> bytes:
    """A sealed response, by default the right one to the first report request."""
    header = MessageHeader(
        msg_seqno=2,
        algo=1,
        hdr_version=1,
        hdr_size=0x60,
        msg_type=6,
        msg_version=1,
        msg_size=len(payload),
    ).but(**changes)
    return MessageKey(key).seal(header, payload).ljust(4096, b"\0")


@pytest.fixture
def slot() -> Slot:
    return Slot()


@pytest.fixture
def channel(slot: Slot) -> Channel:
    return Channel(slot)


# known answers


def test_known_report_request(channel: Channel) -> None:
    """Computed with an independent AES-GCM: REPORT_REQ under VMPCK 00..1F, sequence number 1."""
    page = channel.seal(5, 1, REPORT_REQ)
    assert len(page) == 4096
    assert page[:32].hex() == "0f354f26b13f7433d3674d8eebcaf847" + "00" * 16
    assert page[0x20:0x30].hex() == "01" + "00" * 15
    assert page[0x30:0x60].hex() == "0101600005016000" + "00" * 40
    assert page[0x60:0xC0].hex() == (
        "e22d803ca0aaea00420d0fc830cc86c4dc70dd3d68bd7d05560647e5013b996f"
        "ccddd2ea048788e8f0f437f862242ea7c0e4fcb7d1456ca0bbb1da492b891678"
        "bcafa49213c0f2445044cd48be94fd5eb5f3e8b761e80896f353185b4abd740d"
    )
    assert hashlib.sha256(page).hexdigest() == (
        "80287cc666d38c7378104b319db2e4f42eb0cbf307c8a97646a01b63e64b38d8"
    )


def test_known_report_response(channel: Channel) -> None:
    """Computed with an independent AES-GCM: REPORT_RSP, sequence number 2, 1216 bytes."""
    page = response_page()
    assert page[:16].hex() == "4cacb6f052b105c6b897985b58487740"
    assert page[0x60:0x70].hex() == "e66eeb605aa168bdadbd6e148c86f702"
    assert hashlib.sha256(page).hexdigest() == (
        "0e93750ecf795e1438dbc14e714fbecd0283e99a2cf37e393408521242cd9579"
    )
    channel.seal(5, 1, REPORT_REQ)
    assert channel.open(page, LIMIT) == REPORT_RSP


def test_known_key_request() -> None:
    """Computed with an independent AES-GCM: KEY_REQ under sequence number 3, root key 1, fields 3Fh."""
    page = Channel(Slot(stored=2)).seal(3, 1, struct.pack("<IIQIIQ", 1, 0, 0x3F, 0, 0, 0))
    assert page[:16].hex() == "c17463bffd4fd8f79523b1a554891fb4"
    assert page[0x20] == 3
    assert page[0x60:0x80].hex() == "918c5899595132d8c7388fa492d606c92fd3c064da9bd2e0cb97494f1e4bd012"


# sequence numbers


def test_numbers_of_one_key(channel: Channel, slot: Slot) -> None:
    """AMD 56860: request 1, response 2, next request 3; the stored number is always even."""
    for n in (1, 3, 5):
        page = channel.seal(5, 1, REPORT_REQ)
        assert struct.unpack_from("<Q", page, 0x20) == (n,)
        channel.open(response_page(msg_seqno=n + 1), LIMIT)
        assert slot.counter == n + 1


def test_each_key_has_its_own_counter(host: ScriptedHost) -> None:
    """AMD 56860: one counter per VMPCK; the boot's TSC_INFO message under VMPCK0 makes only its own go on."""
    secrets = Secrets(host.memory, 0x1000)
    first, second = Channel(secrets.slot(0)), Channel(secrets.slot(2))
    page = first.seal(17, 1, bytes(128))
    status, response = host.firmware.process(page)
    assert status == 0
    assert first.open(response.ljust(4096, b"\0"), 144) == bytes(128)
    assert struct.unpack_from("<Q", Channel(secrets.slot(0)).seal(5, 1, REPORT_REQ), 0x20) == (3,)
    page = second.seal(5, 1, REPORT_REQ)
    assert (page[0x20], page[0x3C]) == (1, 2)
    assert (host.stored(0), host.stored(1), host.stored(2)) == (4, 0, 2)


def test_the_number_is_used_up_before_the_page_exists(channel: Channel, slot: Slot) -> None:
    """One IV, one plaintext: a driver that dies after sealing cannot use the number again."""
    channel.seal(5, 1, REPORT_REQ)
    assert slot.log == ["store 2"]
    assert Channel(slot).seal(5, 1, bytes(96))[0x20] == 3


@pytest.mark.parametrize(
    ("stored", "number"),
    [(0xFFFFFFFC, 0xFFFFFFFD), (0xFFFFFFFD, 0xFFFFFFFE), (0xFFFFFFFE, None), (0xFFFFFFFF, None)],
)
def test_the_last_numbers(stored: int, number: int | None) -> None:
    """Linux, snp_get_msg_seqno: stored + 1 at UINT_MAX or above is refused, and the key is kept."""
    slot = Slot(stored)
    channel = Channel(slot)
    if number is not None:
        assert struct.unpack_from("<Q", channel.seal(5, 1, REPORT_REQ), 0x20) == (number,)
        assert slot.counter == number + 1
        return
    for _ in range(2):
        with pytest.raises(CounterExhausted, match="wanted less than 0xffffffff"):
            channel.seal(5, 1, REPORT_REQ)
    assert slot.log == []
    assert slot.bytes == KEY
    assert channel.state is ChannelState.READY


# the state machine


EVENTS: dict[Event, Callable[[Channel], object]] = {
    Event.SEAL: lambda channel: channel.seal(5, 1, REPORT_REQ),
    Event.RETRY: lambda channel: channel.retry(),
    Event.ADVANCE: lambda channel: channel.advance(),
    Event.OPEN: lambda channel: channel.open(response_page(), LIMIT),
    Event.WIPE: lambda channel: channel.wipe(),
}


def in_state(state: ChannelState) -> Channel:
    channel = Channel(Slot())
    if state is not ChannelState.READY:
        channel.seal(5, 1, REPORT_REQ)
    if state is ChannelState.WIPED:
        channel.wipe()
    assert channel.state is state
    return channel


@pytest.mark.parametrize(("state", "event"), list(product(ChannelState, Event)))
def test_every_event_in_every_state(state: ChannelState, event: Event) -> None:
    """The table is the machine: what it has leads where it says, all else is refused and changes nothing."""
    channel = in_state(state)
    if (state, event) in TRANSITIONS:
        EVENTS[event](channel)
        assert channel.state is TRANSITIONS[state, event]
        return
    refused = KeyWiped if (state, event) == (ChannelState.WIPED, Event.SEAL) else UsageError
    with pytest.raises(refused):
        EVENTS[event](channel)
    assert channel.state is state


def test_retry_is_the_identical_page(channel: Channel, slot: Slot) -> None:
    """GHCB 2.0, BUSY: the identical message is sent again, as often as needed; the counter does not move."""
    page = channel.seal(5, 1, REPORT_REQ)
    assert [channel.retry() for _ in range(3)] == [page] * 3
    assert slot.log == ["store 2"]


def test_advance_keeps_key_and_uses_up_the_number(channel: Channel, slot: Slot) -> None:
    """Linux: after INVALID_LEN no response is read; the number stays used up and the key is kept."""
    channel.seal(5, 1, REPORT_REQ)
    channel.advance()
    assert channel.seal(5, 1, bytes(96))[0x20] == 3
    assert slot.bytes == KEY


def test_a_wiped_channel_is_silent(channel: Channel, slot: Slot) -> None:
    """Linux, snp_disable_vmpck: key zeroed and forgotten; nothing leaves any more."""
    channel.seal(5, 1, REPORT_REQ)
    channel.wipe()
    assert slot.bytes is None
    assert not channel.usable()
    with pytest.raises(KeyWiped):
        channel.seal(5, 1, REPORT_REQ)
    assert slot.log == ["store 2", "wipe"]


def test_a_key_put_back_does_not_revive_the_channel(channel: Channel, slot: Slot) -> None:
    """Linux drops its pointer to the key: only a reload reads the secrets page again."""
    channel.wipe()
    slot.bytes = KEY
    assert not channel.usable()
    with pytest.raises(KeyWiped):
        channel.seal(5, 1, REPORT_REQ)
    assert slot.bytes == KEY


def test_a_key_that_vanished_from_the_page(channel: Channel, slot: Slot) -> None:
    """Linux, is_vmpck_empty: the secrets page is looked at for every request."""
    assert channel.usable()
    slot.bytes = None
    assert not channel.usable()
    with pytest.raises(KeyWiped):
        channel.seal(5, 1, REPORT_REQ)
    assert channel.state is ChannelState.WIPED
    assert slot.log == ["wipe"]


def test_no_key_no_channel() -> None:
    """Linux, probe: an all-zero VMPCK is refused."""
    with pytest.raises(KeyWiped, match="VMPCK3: all zero"):
        Channel(Slot(key=None, vmpck_id=3))


# requests


@pytest.mark.parametrize(("size", "fits"), [(0, True), (3984, True), (3985, False), (4000, False)])
def test_largest_payload(channel: Channel, slot: Slot, size: int, fits: bool) -> None:
    """Linux, enc_payload: payload and 16 bytes of tag within 4000; a refusal uses no number."""
    if fits:
        page = channel.seal(5, 1, bytes(size))
        assert struct.unpack_from("<H", page, 0x36) == (size,)
        assert MessageKey(KEY).open(page, size) == bytes(size)
        return
    with pytest.raises(LayoutError, match="wanted at most 3984"):
        channel.seal(5, 1, bytes(size))
    assert slot.log == []
    assert channel.state is ChannelState.READY


def test_header_of_a_request() -> None:
    """AMD 56860, message header: version and key id are the caller's, reserved bytes zero."""
    page = Channel(Slot(stored=6, vmpck_id=3)).seal(3, 0x7F, bytes(32))
    header = MessageHeader.parse(page[:0x60])
    expected = MessageHeader(
        authtag=page[:16] + bytes(16),
        msg_seqno=7,
        algo=1,
        hdr_version=1,
        hdr_size=0x60,
        msg_type=3,
        msg_version=0x7F,
        msg_size=32,
        msg_vmpck=3,
    )
    assert header == expected
    assert page[0x80:] == bytes(4096 - 0x80)


# responses


def refused(page: bytes, why: str, *, limit: int = LIMIT) -> None:
    """A channel that sent a report request refuses `page` for the reason `why`, and wipes its key."""
    slot = Slot()
    channel = Channel(slot)
    channel.seal(5, 1, REPORT_REQ)
    with pytest.raises(ResponseRefused, match=why):
        channel.open(page, limit)
    assert channel.state is ChannelState.WIPED
    assert slot.bytes is None


@pytest.mark.parametrize("seqno", [0, 1, 3, 4, 2 + (1 << 32), (1 << 64) - 1])
def test_response_number(seqno: int) -> None:
    """Linux, verify_and_dec_payload 1: the response's number is the request's plus one."""
    refused(response_page(msg_seqno=seqno), "msg_seqno")


@pytest.mark.parametrize("msg_type", [0, 4, 5, 7, 255])
def test_response_type(msg_type: int) -> None:
    """Linux, verify_and_dec_payload 2: the response's type is the request's plus one."""
    refused(response_page(msg_type=msg_type), "msg_type")


@pytest.mark.parametrize("version", [0, 2, 255])
def test_response_version(version: int) -> None:
    """Linux, verify_and_dec_payload 3: the response's version is the request's."""
    refused(response_page(msg_version=version), "msg_version")


@pytest.mark.parametrize(
    ("limit", "size", "fits"),
    [
        (4016, 4000, True),
        (4016, 4001, False),
        (80, 64, True),
        (80, 65, False),
        (144, 128, True),
        (144, 129, False),
    ],
)
def test_response_size(limit: int, size: int, fits: bool) -> None:
    """Linux, verify_and_dec_payload 4: payload and tag within the buffer; 4016, 80 and 144 bytes."""
    page = response_page(bytes(min(size, 4000)), msg_size=size)
    if not fits:
        refused(page, "msg_size", limit=limit)
        return
    channel = Channel(Slot())
    channel.seal(5, 1, REPORT_REQ)
    assert channel.open(page, limit) == bytes(size)


def test_tag(channel: Channel) -> None:
    """Linux, verify_and_dec_payload 5: sealed with another key, the tag does not match."""
    refused(response_page(key=bytes([1]) * 32), "tag")


def test_order_of_checks() -> None:
    """Linux: number before type before version before size before tag."""
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("msg_seqno", {"msg_seqno": 9}),
        ("msg_type", {"msg_type": 9}),
        ("msg_version", {"msg_version": 9}),
        ("msg_size", {"msg_size": 4001}),
    ]
    for first, (name, _) in enumerate(wrong):
        changes = {k: v for _, change in wrong[first:] for k, v in change.items()}
        page = bytearray(response_page(**changes))
        page[0] ^= 1
        refused(bytes(page), f"response {name}")


@pytest.mark.parametrize("size", [0, 1, 32, 1216])
def test_a_shorter_payload_is_accepted(channel: Channel, size: int) -> None:
    """Linux: a response shorter than the structure is taken; the driver leaves the rest zero."""
    channel.seal(5, 1, REPORT_REQ)
    assert channel.open(response_page(bytes(size)), LIMIT) == bytes(size)


@pytest.mark.parametrize("size", [0, 95, 4095, 4097])
def test_a_response_is_a_page(size: int) -> None:
    """The whole page is copied out of shared memory before it is looked at."""
    refused(bytes(size), f"got {size} bytes, wanted 4096")


@pytest.mark.parametrize("offset", [*range(16), *range(0x20, 0x28), *range(0x30, 0x60), 0x60, 0x9F, 0x51F])
def test_every_authenticated_bit(offset: int) -> None:
    """AMD 56860: tag bytes 0..15, sequence number, header bytes 30h..5Fh and ciphertext are all covered."""
    page = bytearray(response_page())
    for bit in range(8):
        page[offset] ^= 1 << bit
        refused(bytes(page), "VMPCK0: response")
        page[offset] ^= 1 << bit


@pytest.mark.parametrize("offset", [*range(16, 32), *range(0x28, 0x30), 0x520, 0xFFF])
def test_bits_that_nobody_covers(channel: Channel, offset: int) -> None:
    """AMD 56860: tag bytes 16..31, header bytes 28h..2Fh and padding are not authenticated."""
    channel.seal(5, 1, REPORT_REQ)
    page = bytearray(response_page())
    page[offset] ^= 0xFF
    assert channel.open(bytes(page), LIMIT) == REPORT_RSP


# what others see


def test_trace_tells_hops_without_content(slot: Slot) -> None:
    """Trace events carry numbers and sizes, never keys or plaintext."""
    trace = Trace()
    channel = Channel(slot, trace=trace)
    events: list[object] = []
    with trace.listen(events.append):
        channel.seal(5, 1, REPORT_REQ)
        channel.retry()
        channel.open(response_page(), LIMIT)
    assert events == [
        MessageSealed(by="guest", vmpck=0, seqno=1, msg_type=5, payload_size=96),
        MessageOpened(by="guest", vmpck=0, seqno=2, msg_type=6, payload_size=1216),
    ]


def test_a_refused_response_is_not_reported_as_opened(slot: Slot) -> None:
    """MessageOpened means "decrypted and found in order"."""
    trace = Trace()
    channel = Channel(slot, trace=trace)
    channel.seal(5, 1, REPORT_REQ)
    events: list[object] = []
    with trace.listen(events.append), pytest.raises(ResponseRefused):
        channel.open(bytes(4096), LIMIT)
    assert events == []


def test_no_key_in_any_text(channel: Channel) -> None:
    """Keys never show."""
    assert repr(channel) == "Channel(vmpck_id=0, state=READY)"
