"""The message channel of one VMPCK: a state machine without input or output of its own.

Source: AMD 56860, guest messages; Linux, drivers/virt/coco/sev-guest, and snp_send_guest_request in
arch/x86/coco/sev.

The sequence number is the IV of AES-GCM, so one number must never cover two plaintexts:

1. A number is used up when a page is sealed under it: the counter is stored before the page can leave.
   Linux stores it after VMGEXIT, whatever came of it. The numbers are the same, but a driver that dies in
   between cannot use one twice.
2. While an answer is outstanding the only page that can leave again is the same page, byte for byte.
3. When it is unclear whether the firmware has used the number, the key is wiped.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.snp_message import (
    AUTHTAG_SIZE,
    MESSAGE_PAGE,
    PAYLOAD_MAX,
    MessageHeader,
    message_header,
)
from swsnp.crypto.seal import MessageKey, TagMismatch
from swsnp.errors import LayoutError, SwsnpError, UsageError
from swsnp.trace import MessageOpened, MessageSealed, Trace

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "TRANSITIONS",
    "Channel",
    "ChannelState",
    "CounterExhausted",
    "Event",
    "KeySlot",
    "KeyWiped",
    "ResponseRefused",
]

_SEQNO_LIMIT: Final = 0xFFFF_FFFF
"""UINT_MAX: a number from here on is refused."""

# what a response is judged by; a whole MessageHeader would cost more than the decryption
_SEQNO: Final = struct.Struct("<Q")
_SEQNO_AT: Final = MessageHeader.offset_of("msg_seqno")
_TYPE_VERSION_SIZE: Final = struct.Struct("<BBH")
_TYPE_AT: Final = MessageHeader.offset_of("msg_type")


class ChannelState(Enum):
    """What may happen next."""

    __hash__ = object.__hash__  # members are singletons; Enum hashes the name, in Python

    READY = "ready"
    IN_FLIGHT = "in flight"
    WIPED = "wiped"


class Event(Enum):
    """What happened."""

    __hash__ = object.__hash__

    SEAL = "a request was sealed"
    RETRY = "the same request is sent again"
    ADVANCE = "no response will be read, yet the key is kept"
    OPEN = "the response was opened and is in order"
    WIPE = "the exchange failed, or the response is not in order"


TRANSITIONS: Final[Mapping[tuple[ChannelState, Event], ChannelState]] = {
    (ChannelState.READY, Event.SEAL): ChannelState.IN_FLIGHT,
    (ChannelState.IN_FLIGHT, Event.RETRY): ChannelState.IN_FLIGHT,  # same bytes, same IV
    (ChannelState.IN_FLIGHT, Event.ADVANCE): ChannelState.READY,
    (ChannelState.IN_FLIGHT, Event.OPEN): ChannelState.READY,
    (ChannelState.READY, Event.WIPE): ChannelState.WIPED,
    (ChannelState.IN_FLIGHT, Event.WIPE): ChannelState.WIPED,
    (ChannelState.WIPED, Event.WIPE): ChannelState.WIPED,
}


class KeySlot(Protocol):
    """Where the key and its counter are kept: `swsnp.guest.secrets.VmpckSlot`."""

    @property
    def vmpck_id(self) -> int:
        """0..3."""

    def key(self) -> bytes | None:
        """32 bytes; None when there is no key."""

    def stored(self) -> int | None:
        """The last sequence number used; None when there is no key."""

    def store(self, seqno: int) -> None:
        """Keep the last sequence number used."""

    def wipe(self) -> None:
        """Destroy the key."""


class KeyWiped(SwsnpError):
    """The key is gone: nothing can be sealed any more."""


class CounterExhausted(SwsnpError):
    """The next sequence number would not fit; the key is kept."""


class ResponseRefused(SwsnpError):
    """The response is not the answer to the request. The key has been wiped."""


class Channel:
    """Seals requests and opens their responses under one VMPCK.

    Args:
        slot: key and counter.
        trace: told of every message sealed and opened.

    Raises:
        KeyWiped: the slot holds no key.
    """

    __slots__ = ("_key", "_page", "_request", "_slot", "_trace", "state")

    def __init__(self, slot: KeySlot, *, trace: Trace | None = None) -> None:
        key = slot.key()
        if key is None:
            raise KeyWiped(f"VMPCK{slot.vmpck_id}: all zero, wanted a key (AMD 56860, secrets page)")
        self.state = ChannelState.READY
        self._slot = slot
        self._trace = trace or Trace()
        self._key: MessageKey | None = MessageKey(key)
        self._page = b""
        self._request = (0, 0, 0)

    def __repr__(self) -> str:
        return f"Channel(vmpck_id={self._slot.vmpck_id}, state={self.state.name})"

    @property
    def vmpck_id(self) -> int:
        """The key in use."""
        return self._slot.vmpck_id

    def usable(self) -> bool:
        """Whether there is still a key, here and in the slot."""
        return self.state is not ChannelState.WIPED and self._slot.stored() is not None

    def seal(self, msg_type: int, msg_version: int, payload: bytes) -> bytes:
        """Encrypt a request under the next sequence number, which is used up from now on.

        Args:
            msg_type: an odd type; the response has the next one.
            msg_version: one byte.
            payload: at most FA0h bytes less the 16 of the tag.

        Returns:
            The request page, 4096 bytes, zero-padded.

        Raises:
            KeyWiped: no key here or in the slot.
            CounterExhausted: stored + 1 would be FFFFFFFFh or more; nothing has changed.
            LayoutError: the payload is too large; nothing has changed.
            UsageError: a request is outstanding.
        """
        stored = self._slot.stored()
        if stored is None and self.state is not ChannelState.WIPED:
            self.wipe()
        if stored is None or self.state is ChannelState.WIPED:
            raise KeyWiped(f"VMPCK{self._slot.vmpck_id}: wiped")
        state = self._after(Event.SEAL)
        size = len(payload)
        if size + AUTHTAG_SIZE > PAYLOAD_MAX:
            limit = PAYLOAD_MAX - AUTHTAG_SIZE
            raise LayoutError(f"payload: got {size} bytes, wanted at most {limit} (Linux, enc_payload)")
        seqno = stored + 1
        if seqno >= _SEQNO_LIMIT:
            raise CounterExhausted(f"msg_seqno: got {seqno:#x}, wanted less than {_SEQNO_LIMIT:#x} (Linux)")
        header = message_header(
            msg_seqno=seqno,
            msg_type=msg_type,
            msg_version=msg_version,
            msg_size=size,
            msg_vmpck=self._slot.vmpck_id,
        )
        page = self._live_key().seal(header, payload).ljust(MESSAGE_PAGE, b"\0")
        self._slot.store(seqno + 1)
        self._page, self._request, self.state = page, (seqno, msg_type, msg_version), state
        if (emit := self._trace.emit) is not None:
            emit(
                MessageSealed(
                    by="guest", vmpck=self.vmpck_id, seqno=seqno, msg_type=msg_type, payload_size=size
                )
            )
        return page

    def retry(self) -> bytes:
        """The outstanding request once more: the identical page.

        Raises:
            UsageError: no request is outstanding.
        """
        self.state = self._after(Event.RETRY)
        return self._page

    def open(self, response: bytes, limit: int) -> bytes:
        """Check a response and decrypt it.

        In this order, as Linux does:

        1. the sequence number is the request's plus one;
        2. the type is the request's plus one;
        3. the version is the request's;
        4. payload and tag fit into `limit`;
        5. the tag is right.

        Args:
            response: the whole page, 4096 bytes, copied out of shared memory once.
            limit: bytes for payload and tag together.

        Returns:
            The payload, as long as the response says.

        Raises:
            ResponseRefused: one of the five; the key has been wiped.
            UsageError: no request is outstanding.
        """
        state = self._after(Event.OPEN)
        payload = self._opened(response, limit)
        if isinstance(payload, str):
            self.wipe()
            raise ResponseRefused(f"VMPCK{self.vmpck_id}: {payload}")
        self._page, self.state = b"", state
        if (emit := self._trace.emit) is not None:
            seqno, msg_type = self._request[0] + 1, self._request[1] + 1
            size = len(payload)
            emit(
                MessageOpened(
                    by="guest", vmpck=self.vmpck_id, seqno=seqno, msg_type=msg_type, payload_size=size
                )
            )
        return payload

    def advance(self) -> None:
        """Give up the outstanding request without reading a response; its number stays used up.

        Raises:
            UsageError: no request is outstanding.
        """
        self.state = self._after(Event.ADVANCE)
        self._page = b""

    def wipe(self) -> None:
        """Destroy the key here and in the slot; allowed in every state."""
        self.state = self._after(Event.WIPE)
        self._key, self._page = None, b""
        self._slot.wipe()

    def _opened(self, response: bytes, limit: int) -> bytes | str:
        """The payload, or what is wrong."""
        seqno, msg_type, msg_version = self._request
        if len(response) != MESSAGE_PAGE:
            return f"response page: got {len(response)} bytes, wanted {MESSAGE_PAGE}"
        (got_seqno,) = _SEQNO.unpack_from(response, _SEQNO_AT)
        got_type, got_version, size = _TYPE_VERSION_SIZE.unpack_from(response, _TYPE_AT)
        if got_seqno != seqno + 1:
            return f"response msg_seqno: got {got_seqno}, wanted {seqno + 1}"
        if got_type != msg_type + 1:
            return f"response msg_type: got {got_type}, wanted {msg_type + 1}"
        if got_version != msg_version:
            return f"response msg_version: got {got_version}, wanted {msg_version}"
        if size + AUTHTAG_SIZE > limit:
            return f"response msg_size: got {size}, wanted at most {limit - AUTHTAG_SIZE}"
        try:
            return self._live_key().open(response, size)
        except TagMismatch:
            return "response: authentication tag does not match"

    def _live_key(self) -> MessageKey:
        if self._key is None:
            raise KeyWiped(f"VMPCK{self.vmpck_id}: wiped")
        return self._key

    def _after(self, event: Event) -> ChannelState:
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise UsageError(f"channel: cannot take {event.name} while {self.state.name}")
        return following
