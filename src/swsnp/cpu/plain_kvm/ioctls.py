"""The part of KVM's user interface that a VMM without SEV uses, beside what `abi.kvm` has.

Source: Linux, include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, mbz, record, u8, u32, u64, words

__all__ = [
    "API_VERSION",
    "CPUID_ENTRIES",
    "HostCapability",
    "HostIoctl",
    "InternalError",
    "KvmCpuidEntry",
    "KvmExitInternalError",
    "KvmExitMsr",
    "KvmIrqLevel",
    "KvmMsrEntry",
    "KvmMsrFilterRange",
    "KvmPitConfig",
    "KvmTranslation",
    "KvmUserspaceMemoryRegion",
    "LAPIC_SIZE",
    "MSR_EXIT_REASON_FILTER",
    "MSR_FILTER_RANGES",
    "MsrFilterFlag",
    "OptionalCapability",
    "SYNC_GENERAL_REGS",
]

API_VERSION: Final = 12
CPUID_ENTRIES: Final = 256
"""Entries offered to KVM_GET_SUPPORTED_CPUID; E2BIG would say that they are too few."""
LAPIC_SIZE: Final = 0x400
"""Bytes of `struct kvm_lapic_state`."""
MSR_FILTER_RANGES: Final = 16
MSR_EXIT_REASON_FILTER: Final = 1 << 2
"""Argument of KVM_CAP_X86_USER_SPACE_MSR: leave to userspace for the MSRs that the filter denies."""


class HostIoctl(IntEnum):
    """Requests of a VMM without SEV; numbers on x86-64."""

    KVM_SET_TSS_ADDR = 0xAE47
    KVM_SET_IDENTITY_MAP_ADDR = 0x4008AE48
    KVM_CREATE_IRQCHIP = 0xAE60
    KVM_IRQ_LINE = 0x4008AE61
    KVM_CREATE_PIT2 = 0x4040AE77
    KVM_SET_MSRS = 0x4008AE89
    KVM_GET_LAPIC = 0x8400AE8E
    KVM_GET_SUPPORTED_CPUID = 0xC008AE05
    KVM_SET_USER_MEMORY_REGION = 0x4020AE46
    KVM_TRANSLATE = 0xC018AE85
    KVM_SET_CPUID2 = 0x4008AE90
    KVM_X86_SET_MSR_FILTER = 0x4188AEC6


class HostCapability(IntEnum):
    """Extensions without which this processor cannot be."""

    USER_MEMORY = 3
    EXT_CPUID = 7
    X86_USER_SPACE_MSR = 188
    X86_MSR_FILTER = 189


class OptionalCapability(IntEnum):
    """Extensions that make this processor faster, or able to run a kernel."""

    IRQCHIP = 0
    PIT2 = 33
    SYNC_REGS = 74


SYNC_GENERAL_REGS: Final = 1
"""KVM_SYNC_X86_REGS: the general registers lie in `kvm_run` after each exit."""


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


@record(size=64, source="Linux, struct kvm_pit_config")
class KvmPitConfig(Record):
    """KVM_CREATE_PIT2; flag 1: port 0x61 is KVM's too."""

    flags: int = u32(0)
    pad: bytes = mbz(4, 60)


@record(size=8, source="Linux, struct kvm_irq_level")
class KvmIrqLevel(Record):
    """KVM_IRQ_LINE."""

    irq: int = u32(0)
    level: int = u32(4)


@record(size=16, source="Linux, struct kvm_msr_entry")
class KvmMsrEntry(Record):
    """One entry of KVM_SET_MSRS."""

    index: int = u32(0)
    reserved: int = u32(4)
    data: int = u64(8)


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
