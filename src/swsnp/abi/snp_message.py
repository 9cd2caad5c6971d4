"""Guest messages: header, types and payloads. Source: AMD 56860, chapter 7 (guest messages)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, Word, bits, blob, mbz, record, sub, u8, u16, u32, u64
from swsnp.abi.snp_report import TcbVersion

__all__ = [
    "ALGO_AES_256_GCM",
    "AUTHTAG_SIZE",
    "GuestFieldSelect",
    "GuestFieldSelectV2",
    "HDR_SIZE",
    "HDR_VERSION",
    "KeySelWord",
    "KeySel",
    "MESSAGE_PAGE",
    "MSG_TYPE_OFFSET",
    "MessageHeader",
    "MessageType",
    "MsgCpuidHeader",
    "MsgKeyReq",
    "MsgKeyReqV2",
    "MsgKeyRsp",
    "MsgReportReq",
    "MsgReportRspHeader",
    "MsgTscInfoRsp",
    "TSC_INFO_SIZE",
    "PAYLOAD_MAX",
    "message_header",
    "REPORT_RSP_SIZE",
]

MESSAGE_PAGE: Final = 4096
HDR_SIZE: Final = 0x60
HDR_VERSION: Final = 1
ALGO_AES_256_GCM: Final = 1
AUTHTAG_SIZE: Final = 16
PAYLOAD_MAX: Final = MESSAGE_PAGE - HDR_SIZE
AAD_START: Final = 0x30
MSG_TYPE_OFFSET: Final = 0x34
REPORT_RSP_SIZE: Final = 0x4C0


class MessageType(IntEnum):
    """MSG_TYPE. A response is its request plus one."""

    CPUID_REQ = 1
    CPUID_RSP = 2
    KEY_REQ = 3
    KEY_RSP = 4
    REPORT_REQ = 5
    REPORT_RSP = 6
    EXPORT_REQ = 7
    EXPORT_RSP = 8
    IMPORT_REQ = 9
    IMPORT_RSP = 10
    ABSORB_REQ = 11
    ABSORB_RSP = 12
    VMRK_REQ = 13
    VMRK_RSP = 14
    ABSORB_NOMA_REQ = 15
    ABSORB_NOMA_RSP = 16
    TSC_INFO_REQ = 17
    TSC_INFO_RSP = 18


@record(size=HDR_SIZE, source="AMD 56860, guest message header")
class MessageHeader(Record):
    """The plaintext header of a guest message page; bytes 30h..5Fh are authenticated."""

    authtag: bytes = blob(0x00, 32)
    msg_seqno: int = u64(0x20)
    reserved_28: bytes = mbz(0x28, 8)
    algo: int = u8(0x30)
    hdr_version: int = u8(0x31)
    hdr_size: int = u16(0x32)
    msg_type: int = u8(0x34)
    msg_version: int = u8(0x35)
    msg_size: int = u16(0x36)
    reserved_38: bytes = mbz(0x38, 4)
    msg_vmpck: int = u8(0x3C)
    reserved_3d: bytes = mbz(0x3D, 35)


_PLAIN_HEADER: Final = struct.Struct("<32xQ8xBBHBBH4xB35x")


def message_header(
    *, msg_seqno: int, msg_type: int, msg_version: int, msg_size: int, msg_vmpck: int
) -> bytes:
    """The 96 bytes of a header as both sides write it: authtag and reserved bytes zero.

    The same as `bytes(MessageHeader(...))`, without the object: this is done four times a request.
    """
    algo = (ALGO_AES_256_GCM, HDR_VERSION, HDR_SIZE)
    return _PLAIN_HEADER.pack(msg_seqno, *algo, msg_type, msg_version, msg_size, msg_vmpck)


class KeySel(IntEnum):
    """KEY_SEL of MSG_REPORT_REQ and MSG_KEY_REQ."""

    VLEK_ELSE_VCEK = 0
    VCEK = 1
    VLEK = 2


class KeySelWord(Word):
    """Dword 44h of MSG_REPORT_REQ."""

    key_sel = bits(1, 0)


@record(size=0x60, source="AMD 56860, MSG_REPORT_REQ")
class MsgReportReq(Record):
    """Request for an attestation report."""

    report_data: bytes = blob(0x00, 64)
    vmpl: int = u32(0x40)
    flags: KeySelWord = u32(0x44, KeySelWord)
    reserved_48: bytes = mbz(0x48, 24)


@record(size=0x20, source="AMD 56860, MSG_REPORT_RSP")
class MsgReportRspHeader(Record):
    """What precedes the report in MSG_REPORT_RSP."""

    status: int = u32(0x00)
    report_size: int = u32(0x04)
    reserved_08: bytes = mbz(0x08, 24)


class RootKeySelect(Word):
    """Dword 0 of MSG_KEY_REQ: root 0 is VCEK or VLEK, root 1 is the VM root key."""

    root_key_select = bits(0, 0)
    key_sel = bits(2, 1)


class GuestFieldSelect(Word):
    """GUEST_FIELD_SELECT of MSG_KEY_REQ: what the derived key is bound to."""

    guest_policy = bits(0, 0)
    image_id = bits(1, 1)
    family_id = bits(2, 2)
    measurement = bits(3, 3)
    guest_svn = bits(4, 4)
    tcb_version = bits(5, 5)


@record(size=0x20, source="AMD 56860, MSG_KEY_REQ version 1")
class MsgKeyReq(Record):
    """Request for a derived key."""

    flags: RootKeySelect = u32(0x00, RootKeySelect)
    reserved_04: bytes = mbz(0x04, 4)
    guest_field_select: GuestFieldSelect = u64(0x08, GuestFieldSelect)
    vmpl: int = u32(0x10)
    guest_svn: int = u32(0x14)
    tcb_version: TcbVersion = u64(0x18, TcbVersion)


class GuestFieldSelectV2(GuestFieldSelect):
    """GUEST_FIELD_SELECT of MSG_KEY_REQ version 2."""

    launch_mit_vector = bits(6, 6)


@record(size=0x30, source="AMD 56860, MSG_KEY_REQ version 2; UNVERIFIED: the size that it is padded to")
class MsgKeyReqV2(Record):
    """Request for a derived key that may be bound to a mitigation vector."""

    version_1: MsgKeyReq = sub(0x00, MsgKeyReq)
    launch_mit_vector: int = u64(0x20)
    reserved_28: bytes = mbz(0x28, 8)


@record(size=0x40, source="AMD 56860, MSG_KEY_RSP")
class MsgKeyRsp(Record):
    """The derived key; zero unless the status is zero."""

    status: int = u32(0x00)
    reserved_04: bytes = mbz(0x04, 28)
    derived_key: bytes = blob(0x20, 32)


@record(size=0x10, source="AMD 56860, MSG_CPUID_REQ and MSG_CPUID_RSP")
class MsgCpuidHeader(Record):
    """What precedes the entries: COUNT and zeros in the request, STATUS and COUNT in the response."""

    count_or_status: int = u32(0x00)
    count: int = u32(0x04)
    reserved_08: bytes = mbz(0x08, 8)


TSC_INFO_SIZE: Final = 0x80
"""MSG_TSC_INFO_REQ, all zero, and its response."""


@record(size=TSC_INFO_SIZE, source="AMD 56860, MSG_TSC_INFO_RSP")
class MsgTscInfoRsp(Record):
    """What the guest's time stamp counter is made from; zero unless the status is zero."""

    status: int = u32(0x00)
    reserved_04: int = u32(0x04)
    guest_tsc_scale: int = u64(0x08)
    guest_tsc_offset: int = u64(0x10)
    tsc_factor: int = u32(0x18)
    reserved_1c: bytes = mbz(0x1C, 100)
