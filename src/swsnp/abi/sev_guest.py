"""`/dev/sev-guest`: ioctl numbers and structures. Source: Linux, include/uapi/linux/sev-guest.h."""

from __future__ import annotations

from typing import Final

from swsnp.abi.ghcb import ErrorWord
from swsnp.abi.record import Record, blob, mbz, record, u8, u32, u64

__all__ = [
    "DEVICE",
    "EXITINFO2_UNSET",
    "EXT_GUEST_DATA_MAX",
    "SNP_GET_DERIVED_KEY",
    "SNP_GET_EXT_REPORT",
    "SNP_GET_REPORT",
    "SnpDerivedKeyReq",
    "SnpDerivedKeyResp",
    "SnpExtReportReq",
    "SnpGuestRequestIoctl",
    "SnpReportReq",
    "SnpReportResp",
]

DEVICE: Final = "/dev/sev-guest"
SNP_GET_REPORT: Final = 0xC0205300
SNP_GET_DERIVED_KEY: Final = 0xC0205301
SNP_GET_EXT_REPORT: Final = 0xC0205302
EXT_GUEST_DATA_MAX: Final = 0x4000
"""SEV_FW_BLOB_MAX_SIZE: the largest certificate table that a Linux guest can receive."""
EXITINFO2_UNSET: Final = 0xFF
NO_FW_CALL: Final = 0xFFFFFFFFFFFFFFFF


@record(size=32, source="Linux, struct snp_guest_request_ioctl")
class SnpGuestRequestIoctl(Record):
    """The argument of every ioctl of the device. Bytes 1..7 are padding, whatever a client puts there."""

    msg_version: int = u8(0x00)
    pad_01: bytes = mbz(0x01, 7)
    req_data: int = u64(0x08)
    resp_data: int = u64(0x10)
    exitinfo2: ErrorWord = u64(0x18, ErrorWord)


@record(size=96, source="Linux, struct snp_report_req")
class SnpReportReq(Record):
    """Passed on unchanged as MSG_REPORT_REQ."""

    user_data: bytes = blob(0x00, 64)
    vmpl: int = u32(0x40)
    rsvd: bytes = blob(0x44, 28)


@record(size=4000, source="Linux, struct snp_report_resp")
class SnpReportResp(Record):
    """MSG_REPORT_RSP, zero-padded."""

    data: bytes = blob(0, 4000)


@record(size=32, source="Linux, struct snp_derived_key_req")
class SnpDerivedKeyReq(Record):
    """Passed on unchanged as MSG_KEY_REQ."""

    root_key_select: int = u32(0x00)
    rsvd: int = u32(0x04)
    guest_field_select: int = u64(0x08)
    vmpl: int = u32(0x10)
    guest_svn: int = u32(0x14)
    tcb_version: int = u64(0x18)


@record(size=64, source="Linux, struct snp_derived_key_resp")
class SnpDerivedKeyResp(Record):
    """MSG_KEY_RSP."""

    data: bytes = blob(0, 64)


@record(size=112, source="Linux, struct snp_ext_report_req")
class SnpExtReportReq(Record):
    """A report request with a buffer for the certificate table."""

    user_data: bytes = blob(0x00, 64)
    vmpl: int = u32(0x40)
    rsvd: bytes = blob(0x44, 28)
    certs_address: int = u64(0x60)
    certs_len: int = u32(0x68)
    pad_6c: int = u32(0x6C)
