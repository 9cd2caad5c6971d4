"""SNP_GUEST_REQUEST: open a guest's message, answer it, seal the response. Source: AMD 56860, command 94h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

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
from swsnp.hardware.rmp import PageState

if TYPE_CHECKING:
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

    While a report is signed other commands may run (`Platform.aside`). This one has changed nothing by then,
    and starts again when they changed what its answer stands on: it is as if done in one piece at its end.

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
    guest, response_entry = _find_guest(platform, buffer)
    page = platform.memory.read(buffer.request_paddr & ~_PAGE_MASK, MESSAGE_PAGE)
    offset = buffer.request_paddr & _PAGE_MASK
    message = page[offset:] if offset else page
    while not _answer(platform, buffer, message, guest, response_entry):
        guest, response_entry = _find_guest(platform, buffer)


def _answer(
    platform: Platform, buffer: GuestRequest, message: bytes, guest: GuestContext, response_entry: RmpEntry
) -> bool:
    """Checks 8 to 17 and the response; False when other commands changed what it stands on."""
    header = _checked_header(message)
    vmpck = header.msg_vmpck
    key = guest.message_keys[vmpck]
    try:
        payload = key.open(message, header.msg_size)
    except TagMismatch:
        raise FirmwareFault(FirmwareStatus.BAD_MEASUREMENT) from None  # 12
    counter = guest.message_counts[vmpck]
    if counter == COUNTER_MAX or header.msg_seqno != counter + 1:
        raise FirmwareFault(FirmwareStatus.AEAD_OFLOW)  # 13
    request = _known_request(platform, header)
    emit = platform.trace.emit
    if emit is not None:
        emit(
            trace.MessageOpened(
                by="firmware",
                vmpck=vmpck,
                seqno=header.msg_seqno,
                msg_type=header.msg_type,
                payload_size=header.msg_size,
            )
        )
    response_size = request.response_size or header.msg_size
    # before 16, of which nothing is seen when this fails: a guest that exports itself must not be lost
    if (buffer.response_paddr & _PAGE_MASK) + HDR_SIZE + response_size > MESSAGE_PAGE:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM)  # 17
    variables, counts = platform.chip.variables, guest.message_counts
    response = request.handler(platform, guest, payload, vmpck)
    if request.signs and (
        platform.chip.variables is not variables
        or platform.guests.get(buffer.gctx_paddr) is not guest
        or platform.rmp[buffer.response_paddr] is not response_entry
        or guest.message_counts is not counts
        or counts[vmpck] != counter
    ):
        return False
    answer = message_header(
        msg_seqno=counter + 2,
        msg_type=header.msg_type + 1,
        msg_version=header.msg_version,
        msg_size=response_size,
        msg_vmpck=vmpck,
    )
    platform.memory.write(buffer.response_paddr, key.seal(answer, response))
    counts[vmpck] = counter + 2  # of the keys that answered: an absorbed context has its own
    if emit is not None:
        emit(
            trace.MessageSealed(
                by="firmware",
                vmpck=vmpck,
                seqno=counter + 2,
                msg_type=header.msg_type + 1,
                payload_size=len(response),
            )
        )
    return True


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
