"""The guest-hypervisor communication block. Source: AMD 56421 (GHCB 2.0).

The GHCB itself is memory that both sides write: the parties read and write it field by field at the offsets
below, never as a whole.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final
from uuid import UUID

from swsnp.abi.record import Record, Word, bits, blob, mbz, record, u8, u16, u32, u64, words

__all__ = [
    "CertTableEntry",
    "CertTableGuid",
    "EVENT_INPUTS",
    "ApJumpTable",
    "ErrorWord",
    "ExitCode",
    "GHCB_MSR",
    "Ghcb",
    "GhcbError",
    "GhcbField",
    "HvFeature",
    "IoioInfo",
    "MsrCode",
    "PAGE",
    "PscEntry",
    "PscHeader",
    "PscMsrRequest",
    "PscOp",
    "Reply",
    "TERMINATION_REASONS",
    "TerminateInfo",
    "TerminateRequest",
    "VmmError",
    "describe_termination",
    "field_bit",
    "valid_mask",
]

PAGE: Final = 4096
GHCB_MSR: Final = 0xC0010130
SEV_STATUS_MSR: Final = 0xC0010131
GHCB_PROTOCOL_MIN: Final = 1
GHCB_PROTOCOL_MAX: Final = 2
SHARED_BUFFER: Final = 0x800
SHARED_BUFFER_SIZE: Final = 0x7F0
VALID_BITMAP: Final = 0x3F0


@record(size=PAGE, source="AMD 56421, GHCB layout")
class Ghcb(Record):
    """The page, for tests and tools; the parties use the offsets of `GhcbField`."""

    reserved_000: bytes = mbz(0x000, 203)
    cpl: int = u8(0x0CB)
    reserved_0cc: bytes = mbz(0x0CC, 116)
    xss: int = u64(0x140)
    reserved_148: bytes = mbz(0x148, 24)
    dr7: int = u64(0x160)
    reserved_168: bytes = mbz(0x168, 16)
    rip: int = u64(0x178)
    reserved_180: bytes = mbz(0x180, 88)
    rsp: int = u64(0x1D8)
    reserved_1e0: bytes = mbz(0x1E0, 24)
    rax: int = u64(0x1F8)
    reserved_200: bytes = mbz(0x200, 264)
    rcx: int = u64(0x308)
    rdx: int = u64(0x310)
    rbx: int = u64(0x318)
    reserved_320: bytes = mbz(0x320, 8)
    rbp: int = u64(0x328)
    rsi: int = u64(0x330)
    rdi: int = u64(0x338)
    r8_to_r15: tuple[int, ...] = words(0x340, 8)
    reserved_380: bytes = mbz(0x380, 16)
    sw_exit_code: int = u64(0x390)
    sw_exit_info_1: int = u64(0x398)
    sw_exit_info_2: int = u64(0x3A0)
    sw_scratch: int = u64(0x3A8)
    reserved_3b0: bytes = mbz(0x3B0, 56)
    xcr0: int = u64(0x3E8)
    valid_bitmap: bytes = blob(0x3F0, 16)
    x87_state_gpa: int = u64(0x400)
    reserved_408: bytes = mbz(0x408, 1016)
    shared_buffer: bytes = blob(0x800, 2032)
    reserved_ff0: bytes = mbz(0xFF0, 10)
    protocol_version: int = u16(0xFFA)
    ghcb_usage: int = u32(0xFFC)


class GhcbField(IntEnum):
    """Offset of each field that KVM reads or writes."""

    CPL = 0x0CB
    XSS = 0x140
    RAX = 0x1F8
    RCX = 0x308
    RDX = 0x310
    RBX = 0x318
    RSI = 0x330
    SW_EXIT_CODE = 0x390
    SW_EXIT_INFO_1 = 0x398
    SW_EXIT_INFO_2 = 0x3A0
    SW_SCRATCH = 0x3A8
    XCR0 = 0x3E8
    VALID_BITMAP = 0x3F0
    SHARED_BUFFER = 0x800
    PROTOCOL_VERSION = 0xFFA
    GHCB_USAGE = 0xFFC


def field_bit(offset: int) -> int:
    """Number of the valid bit that stands for the quadword around `offset`."""
    return offset // 8


def valid_mask(*offsets: int) -> int:
    """The valid bitmap, as a 128-bit little-endian integer, with these fields' bits set."""
    mask = 0
    for offset in offsets:
        mask |= 1 << (offset // 8)
    return mask


class ExitCode(IntEnum):
    """SW_EXITCODE: architectural codes that are relayed, then the software-defined ones."""

    READ_DR7 = 0x27
    WRITE_DR7 = 0x37
    RDTSC = 0x6E
    RDPMC = 0x6F
    CPUID = 0x72
    INVD = 0x76
    IOIO = 0x7B
    MSR = 0x7C
    VMMCALL = 0x81
    RDTSCP = 0x87
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MMIO_READ = 0x80000001
    MMIO_WRITE = 0x80000002
    NMI_COMPLETE = 0x80000003
    AP_HLT_LOOP = 0x80000004
    AP_JUMP_TABLE = 0x80000005
    PSC = 0x80000010
    GUEST_REQUEST = 0x80000011
    EXT_GUEST_REQUEST = 0x80000012
    AP_CREATION = 0x80000013
    HV_FEATURES = 0x8000FFFD
    TERM_REQUEST = 0x8000FFFE
    UNSUPPORTED_EVENT = 0x8000FFFF


class Reply(IntEnum):
    """Low half of SW_EXITINFO1 in a reply."""

    NO_ACTION = 0
    ISSUE_EXCEPTION = 1
    MALFORMED_INPUT = 2


class GhcbError(IntEnum):
    """SW_EXITINFO2 beside `Reply.MALFORMED_INPUT`."""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH_AREA = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


GP_EXCEPTION: Final = 0x8000030D


class VmmError(IntEnum):
    """High half of SW_EXITINFO2 after a guest request."""

    NONE = 0
    INVALID_LEN = 1
    BUSY = 2
    GENERIC_V1 = 0x80000000
    GENERIC = 0xFFFFFFFF


class ErrorWord(Word):
    """SW_EXITINFO2 after a guest request, and `exitinfo2` of the guest's ioctl."""

    fw_error = bits(31, 0)
    vmm_error = bits(63, 32)


class MsrCode(IntEnum):
    """Low 12 bits of the GHCB MSR; 0 means that the MSR holds the GHCB's address."""

    SEV_INFO_RESP = 0x001
    SEV_INFO_REQ = 0x002
    CPUID_REQ = 0x004
    CPUID_RESP = 0x005
    AP_RESET_HOLD_REQ = 0x006
    AP_RESET_HOLD_RESP = 0x007
    PREFERRED_GPA_REQ = 0x010
    PREFERRED_GPA_RESP = 0x011
    REGISTER_GPA_REQ = 0x012
    REGISTER_GPA_RESP = 0x013
    PSC_REQ = 0x014
    PSC_RESP = 0x015
    HV_FEATURES_REQ = 0x080
    HV_FEATURES_RESP = 0x081
    TERM_REQ = 0x100


class HvFeature(IntEnum):
    """Hypervisor feature bits."""

    SNP = 1 << 0
    SNP_AP_CREATION = 1 << 1


class SevInfo(Word):
    """GHCB MSR value of SEV_INFO_RESP."""

    code = bits(11, 0)
    cbit = bits(31, 24)
    min_version = bits(47, 32)
    max_version = bits(63, 48)


class TerminateRequest(Word):
    """GHCB MSR value of a termination request."""

    code = bits(11, 0)
    reason_set = bits(15, 12)
    reason_code = bits(23, 16)


class TerminateInfo(Word):
    """SW_EXITINFO1 of a TERM_REQUEST event."""

    reason_set = bits(3, 0)
    reason_code = bits(11, 4)


TERMINATION_REASONS: Final[dict[int, tuple[str, dict[int, str]]]] = {
    0: (
        "GHCB specification",
        {
            0: "general request",
            1: "no common GHCB protocol version",
            2: "the hypervisor lacks an SNP feature that the guest needs",
        },
    ),
    1: (
        "Linux",
        {
            0: "GHCB address not registered",
            1: "page state change failed",
            2: "PVALIDATE failed",
            3: "not running at VMPL0",
            4: "CPUID page not valid",
            5: "CPUID from the hypervisor failed",
            6: "secrets page not valid",
            7: "no SVSM, although the guest is not at VMPL0",
            8: "an SVSM is present, although the guest is at VMPL0",
            9: "calling area of the SVSM not page aligned",
            10: "Secure TSC failed",
            11: "calling area of the SVSM could not be moved",
            12: "Secure AVIC failed",
        },
    ),
}
"""Reason sets: who defines the codes, and what each means. Source: AMD 56421; Linux, asm/sev-common.h."""


def describe_termination(ghcb_msr: int, info1: int | None = None) -> str:
    """Say for people why a guest was terminated.

    Args:
        ghcb_msr: the datum of KVM_EXIT_SYSTEM_EVENT, SEV_TERM: the GHCB MSR's value.
        info1: exit info 1 of the TERM_REQUEST event, where it is known. KVM writes 0 over it in the page
            before it looks at the event, so userspace cannot read it there.
    """
    code = ghcb_msr & 0xFFF
    if code == MsrCode.TERM_REQ:
        asked = TerminateRequest(ghcb_msr)
        return _say_reason(asked.reason_set, asked.reason_code)
    if code:
        return f"GHCB MSR request {code:#05x} is for SNP guests only, and this guest is none"
    if info1 is None:
        return f"TERM_REQUEST through the GHCB at {ghcb_msr:#x}; its reason is in KVM's log only"
    event = TerminateInfo(info1)
    return _say_reason(event.reason_set, event.reason_code)


def _say_reason(reason_set: int, reason_code: int) -> str:
    owner, reasons = TERMINATION_REASONS.get(reason_set, ("unknown", {}))
    reason = reasons.get(reason_code, "unknown")
    return f"set {reason_set} ({owner}), code {reason_code}: {reason}"


class IoioInfo(Word):
    """SW_EXITINFO1 of an IOIO event, as EXITINFO1 of the architectural exit (AMD 24593)."""

    read = bits(0, 0)
    string = bits(2, 2)
    rep = bits(3, 3)
    size = bits(6, 4)
    """Bytes: the exit's three size bits are 1, 2 and 4."""
    port = bits(31, 16)


class ApJumpTable(IntEnum):
    """SW_EXITINFO1 of an AP_JUMP_TABLE event."""

    SET = 0
    GET = 1


class PscOp(IntEnum):
    """Page operation of a page state change."""

    PRIVATE = 1
    SHARED = 2


class PscMsrRequest(Word):
    """GHCB MSR value of a page state change request."""

    code = bits(11, 0)
    gfn = bits(51, 12)
    operation = bits(55, 52)


@record(size=8, source="AMD 56421, page state change header")
class PscHeader(Record):
    """At the start of the page state change buffer."""

    cur_entry: int = u16(0)
    end_entry: int = u16(2)
    reserved_4: int = u32(4)


class PscEntry(Word):
    """One entry of the page state change buffer, 8 bytes."""

    cur_page = bits(11, 0)
    gfn = bits(51, 12)
    operation = bits(55, 52)
    pagesize = bits(56, 56)


PSC_MAX_ENTRIES: Final = (SHARED_BUFFER_SIZE - PscHeader.SIZE) // 8
PSC_ERROR_GENERIC: Final = 0x0000010000000000
PSC_ERROR_INVALID_HEADER: Final = 0x0000000100000001
PSC_ERROR_INVALID_ENTRY: Final = 0x0000000100000002


EVENT_INPUTS: Final[dict[int, tuple[GhcbField, ...]]] = {
    ExitCode.READ_DR7: (),
    ExitCode.WRITE_DR7: (GhcbField.RAX,),
    ExitCode.RDTSC: (),
    ExitCode.RDPMC: (GhcbField.RCX,),
    ExitCode.CPUID: (GhcbField.RAX, GhcbField.RCX),
    ExitCode.INVD: (),
    ExitCode.IOIO: (),
    ExitCode.MSR: (GhcbField.RCX,),
    ExitCode.VMMCALL: (GhcbField.RAX, GhcbField.CPL),
    ExitCode.RDTSCP: (),
    ExitCode.WBINVD: (),
    ExitCode.MONITOR: (GhcbField.RAX, GhcbField.RCX, GhcbField.RDX),
    ExitCode.MWAIT: (GhcbField.RAX, GhcbField.RCX),
    ExitCode.MMIO_READ: (GhcbField.SW_SCRATCH,),
    ExitCode.MMIO_WRITE: (GhcbField.SW_SCRATCH,),
    ExitCode.NMI_COMPLETE: (),
    ExitCode.AP_HLT_LOOP: (),
    ExitCode.AP_JUMP_TABLE: (),
    ExitCode.PSC: (GhcbField.SW_SCRATCH,),
    ExitCode.GUEST_REQUEST: (),
    ExitCode.EXT_GUEST_REQUEST: (),
    ExitCode.AP_CREATION: (),
    ExitCode.HV_FEATURES: (),
    ExitCode.TERM_REQUEST: (),
    ExitCode.UNSUPPORTED_EVENT: (),
}
"""Fields required valid per event beside the three exit fields; the hypervisor adds the conditional ones."""


class CertTableGuid:
    """GUIDs of the certificate table; on the wire in textual (big-endian) byte order."""

    VCEK: Final = UUID("63da758d-e664-4564-adc5-f4b93be8accd")
    VLEK: Final = UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1")
    ASK: Final = UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782")
    ARK: Final = UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae")
    CRL: Final = UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea")


@record(size=24, source="AMD 56421, certificate table")
class CertTableEntry(Record):
    """One entry; the table ends with an entry of 24 zero bytes. ASK also stands for ASVK."""

    guid: bytes = blob(0x00, 16)
    offset: int = u32(0x10)
    length: int = u32(0x14)
