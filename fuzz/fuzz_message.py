"""Guest message pages to the firmware: a status; the counter moves with success and not at all without."""

from __future__ import annotations

import struct

from fuzz.chip import FIRMWARE_PAGE, FuzzedChip
from swsnp.abi.snp_command import Command, GuestRequest
from swsnp.abi.snp_message import MessageHeader
from swsnp.crypto.seal import TagMismatch

__all__ = ["one", "seeds"]

_chips: list[FuzzedChip] = []


def _chip() -> FuzzedChip:
    if not _chips or len(_chips[0].mailbox.platform.guests) != 1:
        _chips[:] = [FuzzedChip()]
    return _chips[0]


def _message(kind: int, payload: bytes, vmpck: int = 0, version: int = 1) -> bytes:
    header = MessageHeader(
        algo=1,
        hdr_version=1,
        hdr_size=0x60,
        msg_type=kind,
        msg_version=version,
        msg_size=len(payload),
        msg_vmpck=vmpck,
    )
    return bytes(header) + payload


def seeds() -> list[bytes]:
    """First byte: bit 0 seals the message as a guest does, bit 1 moves it to the end. Then the page."""
    report = bytes(64) + struct.pack("<II24x", 0, 0)
    cpuid = struct.pack("<I12x", 2) + bytes(96)
    return [
        b"\1" + _message(5, report),
        b"\1" + _message(5, report, vmpck=3),
        b"\1" + _message(3, bytes(32)),
        b"\1" + _message(1, cpuid),
        b"\1" + _message(17, bytes(128)),
        b"\1" + _message(13, bytes(64)),
        b"\0" + _message(5, report),
        b"\2" + _message(5, report),
    ]


def one(data: bytes) -> object:
    """One SNP_GUEST_REQUEST; a sealed message has the right number and tag, whatever else is in it."""
    chip = _chip()
    chip.reset()
    gctx, response = chip.pages[0], chip.pages[2]
    context = chip.mailbox.platform.guests[gctx]
    mode, page = data[0] if data else 0, data[1:4097].ljust(4096, b"\0")
    header = MessageHeader.parse(page[:0x60])
    vmpck = header.msg_vmpck & 3
    before = list(context.message_counts)
    if mode & 1:
        sealed = chip.keys[vmpck].seal(
            header.but(msg_seqno=before[vmpck] + 1), page[0x60 : 0x60 + min(header.msg_size, 0xFA0)]
        )
        page = sealed[:4096].ljust(4096, b"\0")
    chip.memory.write(chip.pages[5], page)
    request = chip.pages[5] + (0xFF8 if mode & 2 else 0)
    chip.rmp[response] = FIRMWARE_PAGE
    status = chip.command(
        Command.SNP_GUEST_REQUEST,
        GuestRequest(gctx_paddr=gctx, request_paddr=request, response_paddr=response),
    )
    assert 0 <= status <= 0xFFFF
    if gctx not in chip.mailbox.platform.guests:
        return "moved away"
    after = list(context.message_counts)
    if status:
        assert after == before
        return status
    before[vmpck] += 2
    assert after == before
    raw = chip.memory.read(response, 4096)
    answer = MessageHeader.parse(raw[:0x60])
    assert answer.msg_type == header.msg_type + 1
    try:
        payload = chip.keys[vmpck].open(raw, answer.msg_size)
    except TagMismatch:  # ABSORB_NOMA answers under the keys that it replaces
        raise AssertionError("the answer does not open") from None
    return header.msg_type, payload[:4]
