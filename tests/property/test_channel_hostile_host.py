"""The message channel against a host that answers, stalls, shortens, replays and garbles, in any order."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from tests.property.steps import CountedMachine, machine_test

from swsnp.abi.snp_message import MessageHeader
from swsnp.crypto.seal import MessageKey
from swsnp.errors import UsageError
from swsnp.guest.channel import Channel, ChannelState, CounterExhausted, KeyWiped, ResponseRefused

KEY = bytes(range(32))
LIMIT = 4016
AUTHENTICATED = st.one_of(st.integers(0, 15), st.integers(0x20, 0x27), st.integers(0x30, 0x60 + 31))
PAYLOADS = st.binary(min_size=1, max_size=96)


class SecretsSlot:
    """The key and counter that survive a driver."""

    vmpck_id = 0

    def __init__(self, stored: int) -> None:
        self.counter = stored
        self.bytes: bytes | None = KEY

    def key(self) -> bytes | None:
        return self.bytes

    def stored(self) -> int | None:
        return None if self.bytes is None else self.counter

    def store(self, seqno: int) -> None:
        self.counter = seqno

    def wipe(self) -> None:
        self.bytes = None


class HostileHost(CountedMachine):
    """No sequence number ever covers two plaintexts; a wiped channel stays silent."""

    def __init__(self) -> None:
        super().__init__()
        self.firmware = MessageKey(KEY)
        self.covered: dict[int, bytes] = {}
        self.responses: list[bytes] = []
        self.page = b""

    @initialize(stored=st.sampled_from([0, 2, 0x7FFFFFFE, 0xFFFFFFF6, 0xFFFFFFFA, 0xFFFFFFFE]))
    def guest_starts(self, stored: int) -> None:
        self.slot = SecretsSlot(stored)
        self.first = stored
        self.channel = Channel(self.slot)

    # helpers

    def leaves(self, page: bytes) -> None:
        """Whatever reaches shared memory is remembered by its number."""
        (seqno,) = struct.unpack_from("<Q", page, 0x20)
        assert self.covered.setdefault(seqno, page) == page
        self.page = page

    def response(self, payload: bytes = bytes(32), **changes: Any) -> bytearray:
        seqno, msg_type, version = (
            *struct.unpack_from("<Q", self.page, 0x20),
            *struct.unpack_from("<BB", self.page, 0x34),
        )
        header = MessageHeader(
            msg_seqno=seqno + 1,
            algo=1,
            hdr_version=1,
            hdr_size=0x60,
            msg_type=msg_type + 1,
            msg_version=version,
            msg_size=len(payload),
        ).but(**changes)
        return bytearray(self.firmware.seal(header, payload).ljust(4096, b"\0"))

    def refused(self, response: bytes) -> None:
        with pytest.raises(ResponseRefused):
            self.channel.open(response, LIMIT)
        assert self.channel.state is ChannelState.WIPED
        assert self.slot.bytes is None

    def ready(self) -> bool:
        return self.channel.state is ChannelState.READY

    def in_flight(self) -> bool:
        return self.channel.state is ChannelState.IN_FLIGHT

    # the guest

    @precondition(ready)
    @rule(msg_type=st.sampled_from([3, 5, 17]), version=st.integers(0, 255), payload=PAYLOADS)
    def guest_asks(self, msg_type: int, version: int, payload: bytes) -> None:
        before = self.slot.counter
        try:
            page = self.channel.seal(msg_type, version, payload)
        except CounterExhausted:
            assert before + 1 >= 0xFFFFFFFF
            assert self.slot.counter == before
            assert self.ready()
            return
        assert struct.unpack_from("<Q", page, 0x20) == (before + 1,)
        assert before + 1 not in self.covered
        self.leaves(page)

    @precondition(lambda self: self.slot.bytes is not None)
    @rule()
    def driver_is_reloaded(self) -> None:
        """Even with a request outstanding: the counter in the secrets page is what counts."""
        self.channel = Channel(self.slot)

    @precondition(lambda self: self.channel.state is not ChannelState.WIPED)
    @rule(sure=st.integers(0, 9))
    def guest_wipes(self, sure: int) -> None:
        assume(sure == 0)  # seldom, since nothing but silence follows
        self.channel.wipe()

    # the host

    @precondition(in_flight)
    @rule()
    def host_answers(self) -> None:
        self.responses.append(bytes(self.response()))
        assert self.channel.open(self.responses[-1], LIMIT) == bytes(32)
        assert self.ready()

    @precondition(in_flight)
    @rule()
    def host_says_busy(self) -> None:
        self.leaves(self.channel.retry())
        assert self.in_flight()

    @precondition(in_flight)
    @rule()
    def host_says_too_small(self) -> None:
        """INVALID_LEN: no response is read, the key is kept."""
        self.channel.advance()
        assert self.ready()

    @precondition(in_flight)
    @rule(size=st.integers(1, 31), real=st.booleans(), sure=st.integers(0, 3))
    def host_shortens(self, size: int, real: bool, sure: int) -> None:
        """A payload that the firmware made short is taken; one that the host cut is not."""
        if real:
            assert self.channel.open(bytes(self.response(bytes(size))), LIMIT) == bytes(size)
            return
        assume(sure == 0)
        cut = self.response()
        struct.pack_into("<H", cut, 0x36, size)
        self.refused(bytes(cut))

    @precondition(lambda self: self.in_flight() and self.responses)
    @rule(data=st.data(), sure=st.integers(0, 3))
    def host_replays(self, data: st.DataObject, sure: int) -> None:
        assume(sure == 0)
        self.refused(data.draw(st.sampled_from(self.responses)))

    @precondition(in_flight)
    @rule(offset=AUTHENTICATED, bit=st.integers(0, 7), sure=st.integers(0, 3))
    def host_garbles(self, offset: int, bit: int, sure: int) -> None:
        assume(sure == 0)
        page = self.response()
        page[offset] ^= 1 << bit
        self.refused(bytes(page))

    @precondition(in_flight)
    @rule(offset=st.one_of(st.integers(16, 31), st.integers(0x28, 0x2F), st.integers(0x80, 0xFFF)))
    def host_garbles_what_nobody_reads(self, offset: int) -> None:
        page = self.response()
        page[offset] ^= 0xFF
        assert self.channel.open(bytes(page), LIMIT) == bytes(32)

    @precondition(in_flight)
    @rule(sure=st.integers(0, 3))
    def host_reflects(self, sure: int) -> None:
        """The request itself is no response."""
        assume(sure == 0)
        self.refused(self.page)

    @precondition(lambda self: self.channel.state is ChannelState.WIPED)
    @rule(payload=PAYLOADS)
    def a_wiped_channel_stays_silent(self, payload: bytes) -> None:
        with pytest.raises(KeyWiped):
            self.channel.seal(5, 1, payload)
        for refused in (
            self.channel.retry,
            self.channel.advance,
            lambda: self.channel.open(bytes(4096), LIMIT),
        ):
            with pytest.raises(UsageError):
                refused()
        with pytest.raises(KeyWiped):
            Channel(self.slot)

    # always

    @invariant()
    def numbers_are_used_in_order(self) -> None:
        """Odd numbers without a gap: each sealed page took the next one, the counter is behind the last."""
        if hasattr(self, "slot"):
            assert sorted(self.covered) == list(range(self.first + 1, self.slot.counter, 2))

    @invariant()
    def a_wiped_channel_has_no_key(self) -> None:
        if hasattr(self, "slot") and self.channel.state is ChannelState.WIPED:
            assert self.slot.bytes is None
            assert not self.channel.usable()


TestHostileHost = machine_test(HostileHost, steps=6_000, per_run=30)
