"""SNP_VERIFY_MITIGATION: its command buffer and what it writes.

Source: AMD 56860 1.58 by way of Linux, patch "crypto/ccp: Introduce SNP_VERIFY_MITIGATION command" v4.
"""

from __future__ import annotations

from enum import IntEnum

from swsnp.abi.record import Record, Word, bits, mbz, record, u16, u32, u64

__all__ = ["MitigationCommand", "MitigationFlags", "MitigationStatus", "VerifyMitigation"]


class MitigationCommand(IntEnum):
    """SUBCOMMAND of SNP_VERIFY_MITIGATION."""

    STATUS = 0
    VERIFY = 1


class MitigationFlags(Word):
    """Dword 10h of SNP_VERIFY_MITIGATION: which of the addresses count."""

    dst_paddr_en = bits(0, 0)
    src_paddr_en = bits(1, 1)


@record(size=0x40, source="AMD 56860, SNP_VERIFY_MITIGATION")
class VerifyMitigation(Record):
    """Command buffer of SNP_VERIFY_MITIGATION; VECTOR names one mitigation by its bit."""

    length: int = u32(0x00)
    subcommand: int = u16(0x04)
    reserved_06: int = u16(0x06)
    vector: int = u64(0x08)
    flags: MitigationFlags = u32(0x10, MitigationFlags)
    reserved_14: int = u32(0x14)
    src_paddr: int = u64(0x18)
    dst_paddr: int = u64(0x20)
    reserved_28: bytes = mbz(0x28, 24)


@record(size=0x14, source="AMD 56860, SNP_VERIFY_MITIGATION result")
class MitigationStatus(Record):
    """What SNP_VERIFY_MITIGATION writes to DST_PADDR; FAILURE_STATUS is 0 unless a verification failed."""

    verified_vector: int = u64(0x00)
    supported_vector: int = u64(0x08)
    failure_status: int = u32(0x10)
