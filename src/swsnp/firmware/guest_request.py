"""SNP_GUEST_REQUEST: open a guest's message, answer it, seal the response. Source: AMD 56860, command 94h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp import trace
from swsnp.abi.snp_command import FirmwareStatus, GuestRequest
from swsnp.abi.snp_message import (
    ALGO_AES_256_GCM,
    HDR_SIZE,
    HDR_VERSION,
    MESSAGE_PAGE,
    MessageHeader,
    message_header,
)
from swsnp.crypto.seal import TagMismatch
from swsnp.firmware.context import GuestContext, GuestState
from swsnp.firmware.faults import FirmwareFault
from swsnp.firmware.messages import REQUESTS, REQUESTS_2, Request
from swsnp.hardware.memory import BusError
from swsnp.hardware.rmp import PageState

if TYPE_CHECKING:
    from swsnp.crypto.seal import MessageKey
    from swsnp.firmware.chip import PlatformVariables
    from swsnp.firmware.platform import Platform
    from swsnp.hardware.rmp import RmpEntry

__all__ = ["COUNTER_MAX", "guest_request"]

COUNTER_MAX: Final = (1 << 64) - 2
"""A message counter that answers no more."""
_PAGE_MASK: Final = MESSAGE_PAGE - 1
_BLOCK: Final = 16
_VMPCKS: Final = 4
_VERSION_2: Final = 2


def guest_request(platform: Platform, buffer: GuestRequest) -> None:
    """Answer one message of a running guest.

    The request page is copied once and looked at only in the copy. Nothing but header and payload of the
    response is written, and the counter moves only with success: the guest may send the same message again.

    Other commands may run until the answer is ready (`Platform.aside`). Nothing has changed by then, and what
    the answer stands on is looked at once more: when that changed, or the request was refused, it is done
    again with all others waiting. So it is as if done in one piece at its end.

    1. Low bits of GCTX_PADDR: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. A page that is not memory: INVALID_ADDRESS.
    4. No guest context: INVALID_GUEST.
    5. Response page not Firmware: INVALID_PAGE_STATE.
    6. Request or response in a 2 MiB entry: INVALID_PAGE_SIZE.
    7. Guest not RUNNING: INVALID_GUEST_STATE.
    8. to 11. The header's form: INVALID_PARAM.
    12. Authentication tag: BAD_MEASUREMENT.
    13. MSG_SEQNO not the counter plus 1, or the counter used up: AEAD_OFLOW.
    14. MSG_VERSION: INVALID_PARAM.
    15. MSG_TYPE not a request that is known: INVALID_PARAM.
    16. The message's own checks: SUCCESS, with the failure inside the response.
    17. The response does not fit its page: INVALID_PARAM.
    """
    with platform.aside:
        prepared = _tried(platform, buffer)
    if prepared is None or not _holds_still(platform, buffer, prepared):
        prepared = _prepare(platform, buffer)
    _answer(platform, buffer, prepared)


class _Prepared(NamedTuple):
    """A request up to its answer, and what that stands on: replaced as a whole, or only counted up."""

    guest: GuestContext
    response_entry: RmpEntry
    variables: PlatformVariables
    counts: list[int]
    counter: int
    key: MessageKey
    header: MessageHeader
    payload: bytes
    request: Request
    response_size: int
    response: bytes | None
    """None: to be made when no other command can run any more."""


def _tried(platform: Platform, buffer: GuestRequest) -> _Prepared | None:
    """`_prepare` beside other commands; None: refused, for the time being."""
    try:
        return _prepare(platform, buffer)
    except (FirmwareFault, BusError, LookupError):  # LookupError: the keys of a guest that ends just now
        return None


def _holds_still(platform: Platform, buffer: GuestRequest, prepared: _Prepared) -> bool:
    """Whether nothing happened to what the answer stands on."""
    return (
        platform.is_unchanged(
            prepared.variables,
            gctx_paddr=buffer.gctx_paddr,
            guest=prepared.guest,
            page=buffer.response_paddr,
            entry=prepared.response_entry,
        )
        and prepared.guest.message_counts is prepared.counts
        and prepared.counts[prepared.header.msg_vmpck] == prepared.counter
    )


def _prepare(platform: Platform, buffer: GuestRequest) -> _Prepared:
    """Checks 1 to 15 and 17, and the response of a request that changes nothing."""
    variables = platform.chip.variables  # before anything that is read of them
    guest, response_entry = _find_guest(platform, buffer)
    page = platform.memory.read(buffer.request_paddr & ~_PAGE_MASK, MESSAGE_PAGE)
    offset = buffer.request_paddr & _PAGE_MASK
    message = page[offset:] if offset else page
    header = _checked_header(message)
    vmpck = header.msg_vmpck
    counts, key = guest.message_counts, guest.message_keys[vmpck]
    try:
        payload = key.open(message, header.msg_size)
    except TagMismatch:
        raise FirmwareFault(FirmwareStatus.BAD_MEASUREMENT) from None  # 12
    counter = counts[vmpck]
    if counter == COUNTER_MAX or header.msg_seqno != counter + 1:
        raise FirmwareFault(FirmwareStatus.AEAD_OFLOW)  # 13
    request = _known_request(platform, header)
    # before 16, of which nothing is seen when this fails: a guest that exports itself must not be lost
    response_size = request.response_size or header.msg_size
    if (buffer.response_paddr & _PAGE_MASK) + HDR_SIZE + response_size > MESSAGE_PAGE:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM)  # 17
    if (emit := platform.trace.emit) is not None:
        emit(
            trace.MessageOpened(
                by="firmware",
                vmpck=vmpck,
                seqno=header.msg_seqno,
                msg_type=header.msg_type,
                payload_size=header.msg_size,
            )
        )
    response = request.handler(platform, guest, payload, vmpck) if request.signs else None
    return _Prepared(
        guest,
        response_entry,
        variables,
        counts,
        counter,
        key,
        header,
        payload,
        request,
        response_size,
        response,
    )


def _answer(platform: Platform, buffer: GuestRequest, prepared: _Prepared) -> None:
    """Check 16 and the response, while no other command runs."""
    header, counter = prepared.header, prepared.counter
    vmpck, response = header.msg_vmpck, prepared.response
    if response is None:
        response = prepared.request.handler(platform, prepared.guest, prepared.payload, vmpck)
    answer = message_header(
        msg_seqno=counter + 2,
        msg_type=header.msg_type + 1,
        msg_version=header.msg_version,
        msg_size=prepared.response_size,
        msg_vmpck=vmpck,
    )
    platform.memory.write(buffer.response_paddr, prepared.key.seal(answer, response))
    prepared.counts[vmpck] = counter + 2  # of the keys that answered: an absorbed context has its own
    if (emit := platform.trace.emit) is not None:
        emit(
            trace.MessageSealed(
                by="firmware",
                vmpck=vmpck,
                seqno=counter + 2,
                msg_type=header.msg_type + 1,
                payload_size=len(response),
            )
        )


def _find_guest(platform: Platform, buffer: GuestRequest) -> tuple[GuestContext, RmpEntry]:
    """The guest and the entry of its response page; checks 1 to 7."""
    gctx = buffer.gctx_paddr
    if gctx & _PAGE_MASK:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM)  # 1
    platform.require_init()  # 2
    platform.look_up(gctx)  # 3
    request = platform.look_up(buffer.request_paddr)
    response = platform.look_up(buffer.response_paddr)
    guest = platform.guest(gctx)  # 4
    if response.state is not PageState.FIRMWARE:
        raise FirmwareFault(FirmwareStatus.INVALID_PAGE_STATE)  # 5
    if request.page_size or response.page_size:
        raise FirmwareFault(FirmwareStatus.INVALID_PAGE_SIZE)  # 6
    if guest.state is not GuestState.RUNNING:
        raise FirmwareFault(FirmwareStatus.INVALID_GUEST_STATE)  # 7
    return guest, response


def _checked_header(message: bytes) -> MessageHeader:
    """The header of a message that reaches to the end of its page; checks 8 to 11."""
    if len(message) < HDR_SIZE:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM)  # 8
    header = MessageHeader.parse(message[:HDR_SIZE])
    size = header.msg_size
    if (
        header.hdr_version != HDR_VERSION  # 9
        or header.hdr_size != HDR_SIZE
        or header.algo != ALGO_AES_256_GCM
        or size == 0
        or size % _BLOCK
        or HDR_SIZE + size > len(message)  # 10
        or header.msg_vmpck >= _VMPCKS  # 11
    ):
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM)
    return header


def _known_request(platform: Platform, header: MessageHeader) -> Request:
    """Checks 14 and 15, and with a strict chip whether the payload holds the whole request."""
    version = header.msg_version
    if version == 1:
        request = REQUESTS.get(header.msg_type)
    elif version == _VERSION_2 <= platform.chip.settings.key_req_version:
        request = REQUESTS_2.get(header.msg_type)
    else:
        request = None
    if request is None:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM)
    if platform.chip.settings.strict_msg_size and header.msg_size < request.size:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM)
    return request
