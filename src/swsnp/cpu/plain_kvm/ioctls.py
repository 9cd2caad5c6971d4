"""The part of KVM's user interface that a VMM without SEV uses, beside what `abi.kvm` has.

Source: Linux, include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, blob, mbz, record, sub, u8, u16, u32, u64, words

__all__ = [
    "API_VERSION",
    "CPUID_ENTRIES",
    "HostCapability",
    "HostIoctl",
    "InternalError",
    "KvmCpuidEntry",
    "KvmDtable",
    "KvmExitInternalError",
    "KvmExitMsr",
    "KvmMsrFilterRange",
    "KvmRegs",
    "KvmSegment",
    "KvmSregs",
    "KvmTranslation",
    "KvmUserspaceMemoryRegion",
    "MSR_EXIT_REASON_FILTER",
    "MSR_FILTER_RANGES",
    "MsrFilterFlag",
]

API_VERSION: Final = 12
CPUID_ENTRIES: Final = 256
"""Entries offered to KVM_GET_SUPPORTED_CPUID; E2BIG would say that they are too few."""
MSR_FILTER_RANGES: Final = 16
MSR_EXIT_REASON_FILTER: Final = 1 << 2
"""Argument of KVM_CAP_X86_USER_SPACE_MSR: leave to userspace for the MSRs that the filter denies."""


class HostIoctl(IntEnum):
    """Requests that `abi.kvm.Ioctl` does not have; numbers on x86-64."""

    KVM_GET_SUPPORTED_CPUID = 0xC008AE05
    KVM_SET_USER_MEMORY_REGION = 0x4020AE46
    KVM_GET_REGS = 0x8090AE81
    KVM_SET_REGS = 0x4090AE82
    KVM_GET_SREGS = 0x8138AE83
    KVM_SET_SREGS = 0x4138AE84
    KVM_TRANSLATE = 0xC018AE85
    KVM_SET_CPUID2 = 0x4008AE90
    KVM_X86_SET_MSR_FILTER = 0x4188AEC6


class HostCapability(IntEnum):
    """Extensions without which this processor cannot be."""

    USER_MEMORY = 3
    EXT_CPUID = 7
    X86_USER_SPACE_MSR = 188
    X86_MSR_FILTER = 189


class MsrFilterFlag(IntEnum):
    """Flags of a filter range: the accesses it speaks of."""

    READ = 1
    WRITE = 2


class InternalError(IntEnum):
    """`suberror` of KVM_EXIT_INTERNAL_ERROR."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


@record(size=32, source="Linux, struct kvm_userspace_memory_region")
class KvmUserspaceMemoryRegion(Record):
    """KVM_SET_USER_MEMORY_REGION; a size of 0 removes the slot."""

    slot: int = u32(0)
    flags: int = u32(4)
    guest_phys_addr: int = u64(8)
    memory_size: int = u64(16)
    userspace_addr: int = u64(24)


@record(size=144, source="Linux, struct kvm_regs (x86)")
class KvmRegs(Record):
    """General registers."""

    rax: int = u64(0)
    rbx: int = u64(8)
    rcx: int = u64(16)
    rdx: int = u64(24)
    rsi: int = u64(32)
    rdi: int = u64(40)
    rsp: int = u64(48)
    rbp: int = u64(56)
    r8_to_r15: tuple[int, ...] = words(64, 8)
    rip: int = u64(128)
    rflags: int = u64(136)


@record(size=24, source="Linux, struct kvm_segment (x86)")
class KvmSegment(Record):
    """A segment register with its hidden part."""

    base: int = u64(0)
    limit: int = u32(8)
    selector: int = u16(12)
    type: int = u8(14)
    present: int = u8(15)
    dpl: int = u8(16)
    db: int = u8(17)
    s: int = u8(18)
    l: int = u8(19)  # noqa: E741  # the structure's name
    g: int = u8(20)
    avl: int = u8(21)
    unusable: int = u8(22)
    padding: int = u8(23)


@record(size=16, source="Linux, struct kvm_dtable (x86)")
class KvmDtable(Record):
    """A descriptor table register."""

    base: int = u64(0)
    limit: int = u16(8)
    padding: bytes = mbz(10, 6)


@record(size=312, source="Linux, struct kvm_sregs (x86)")
class KvmSregs(Record):
    """Segments, tables and control registers."""

    cs: KvmSegment = sub(0, KvmSegment)
    ds: KvmSegment = sub(24, KvmSegment)
    es: KvmSegment = sub(48, KvmSegment)
    fs: KvmSegment = sub(72, KvmSegment)
    gs: KvmSegment = sub(96, KvmSegment)
    ss: KvmSegment = sub(120, KvmSegment)
    tr: KvmSegment = sub(144, KvmSegment)
    ldt: KvmSegment = sub(168, KvmSegment)
    gdt: KvmDtable = sub(192, KvmDtable)
    idt: KvmDtable = sub(208, KvmDtable)
    cr0: int = u64(224)
    cr2: int = u64(232)
    cr3: int = u64(240)
    cr4: int = u64(248)
    cr8: int = u64(256)
    efer: int = u64(264)
    apic_base: int = u64(272)
    interrupt_bitmap: bytes = blob(280, 32)


@record(size=24, source="Linux, struct kvm_translation")
class KvmTranslation(Record):
    """KVM_TRANSLATE: a linear address by the vCPU's page tables."""

    linear_address: int = u64(0)
    physical_address: int = u64(8)
    valid: int = u8(16)
    writeable: int = u8(17)
    usermode: int = u8(18)
    pad: bytes = mbz(19, 5)


@record(size=40, source="Linux, struct kvm_cpuid_entry2")
class KvmCpuidEntry(Record):
    """One leaf of KVM_GET_SUPPORTED_CPUID and KVM_SET_CPUID2."""

    function: int = u32(0)
    index: int = u32(4)
    flags: int = u32(8)
    eax: int = u32(12)
    ebx: int = u32(16)
    ecx: int = u32(20)
    edx: int = u32(24)
    padding: bytes = mbz(28, 12)


@record(size=24, source="Linux, struct kvm_msr_filter_range")
class KvmMsrFilterRange(Record):
    """One of the 16 ranges of KVM_X86_SET_MSR_FILTER; a clear bit of the bitmap denies."""

    flags: int = u32(0)
    nmsrs: int = u32(4)
    base: int = u32(8)
    pad: int = u32(12)
    bitmap: int = u64(16)


@record(size=24, source="Linux, kvm_run.msr")
class KvmExitMsr(Record):
    """KVM_EXIT_X86_RDMSR and _WRMSR; a non-zero `error` injects #GP."""

    error: int = u8(0)
    pad: bytes = mbz(1, 7)
    reason: int = u32(8)
    index: int = u32(12)
    data: int = u64(16)


@record(size=136, source="Linux, kvm_run.internal")
class KvmExitInternalError(Record):
    """KVM_EXIT_INTERNAL_ERROR."""

    suberror: int = u32(0)
    ndata: int = u32(4)
    data: tuple[int, ...] = words(8, 16)
