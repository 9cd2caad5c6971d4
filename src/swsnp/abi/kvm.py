"""KVM's user interface, both generations of the certificate exit.

Source: Linux, include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, blob, mbz, record, u8, u16, u32, u64, words
from swsnp.abi.snp_report import GuestPolicy

__all__ = [
    "Capability",
    "DeviceAttr",
    "EXIT_UNION",
    "ExitCoco",
    "ExitHypercall",
    "ExitIo",
    "ExitMemoryFault",
    "ExitMmio",
    "ExitReason",
    "ExitSnpReqCerts",
    "ExitSystemEvent",
    "HYPERCALL_LONG_MODE",
    "InternalErrorCode",
    "Ioctl",
    "KvmCreateGuestMemfd",
    "KvmDeviceAttr",
    "KvmEnableCap",
    "KvmMemoryAttributes",
    "KvmPreFaultMemory",
    "KvmMpState",
    "KvmRunPage",
    "KvmSevCmd",
    "KvmSevInit",
    "KvmSevSnpLaunchFinish",
    "KvmSevSnpLaunchStart",
    "KvmSevSnpLaunchUpdate",
    "KvmUserspaceMemoryRegion2",
    "MAP_GPA_RANGE",
    "MapGpaRange",
    "MemoryAttribute",
    "MpState",
    "PIO_PAGE_OFFSET",
    "ReqCertsV1",
    "RunOffset",
    "SevCommand",
    "SystemEvent",
    "VCPU_MMAP_SIZE",
    "VmType",
]

VCPU_MMAP_SIZE: Final = 3 * 4096
EXIT_UNION: Final = 32
EXIT_UNION_SIZE: Final = 256
MAP_GPA_RANGE: Final = 12
"""KVM_HC_MAP_GPA_RANGE."""
HYPERCALL_LONG_MODE: Final = 1
"""KVM_EXIT_HYPERCALL_LONG_MODE, in the flags of KVM_EXIT_HYPERCALL."""
PIO_PAGE_OFFSET: Final = 4096
"""Where the data of KVM_EXIT_IO lies in the vCPU mapping."""


class Ioctl(IntEnum):
    """Requests; numbers on x86-64."""

    KVM_GET_API_VERSION = 0xAE00
    KVM_CREATE_VM = 0xAE01
    KVM_CHECK_EXTENSION = 0xAE03
    KVM_GET_VCPU_MMAP_SIZE = 0xAE04
    KVM_CREATE_VCPU = 0xAE41
    KVM_SET_USER_MEMORY_REGION2 = 0x40A0AE49
    KVM_RUN = 0xAE80
    KVM_GET_REGS = 0x8090AE81
    KVM_SET_REGS = 0x4090AE82
    KVM_GET_SREGS = 0x8138AE83
    KVM_SET_SREGS = 0x4138AE84
    KVM_GET_MP_STATE = 0x8004AE98
    KVM_SET_MP_STATE = 0x4004AE99
    KVM_ENABLE_CAP = 0x4068AEA3
    KVM_MEMORY_ENCRYPT_OP = 0xC008AEBA
    KVM_SET_MEMORY_ATTRIBUTES = 0x4020AED2
    KVM_CREATE_GUEST_MEMFD = 0xC040AED4
    KVM_PRE_FAULT_MEMORY = 0xC040AED5
    KVM_GET_DEVICE_ATTR = 0x4018AEE2
    KVM_HAS_DEVICE_ATTR = 0x4018AEE3


class Capability(IntEnum):
    """Extension numbers."""

    IMMEDIATE_EXIT = 136
    EXIT_HYPERCALL = 201
    SYS_ATTRIBUTES = 209
    SYSTEM_EVENT_DATA = 215
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    EXIT_COCO = 237
    """The series' number; upstream gave 237 to another capability."""


class VmType(IntEnum):
    """Argument of KVM_CREATE_VM."""

    DEFAULT = 0
    SW_PROTECTED = 1
    SEV = 2
    SEV_ES = 3
    SNP = 4


class ExitReason(IntEnum):
    """exit_reason, as met in the life of an SNP guest. 40 and 43 are the two certificate exits."""

    UNKNOWN = 0
    IO = 2
    HYPERCALL = 3
    HLT = 5
    MMIO = 6
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    X86_RDMSR = 29
    X86_WRMSR = 30
    MEMORY_FAULT = 39
    COCO = 40
    SNP_REQ_CERTS = 43


class SystemEvent(IntEnum):
    """Type of KVM_EXIT_SYSTEM_EVENT."""

    SEV_TERM = 6


class InternalErrorCode(IntEnum):
    """Suberror of KVM_EXIT_INTERNAL_ERROR."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


class MpState(IntEnum):
    """KVM_GET_MP_STATE and KVM_SET_MP_STATE."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class MemoryAttribute(IntEnum):
    """KVM_MEMORY_ATTRIBUTE_*."""

    PRIVATE = 1 << 3


class MapGpaRange(IntEnum):
    """Attributes (args[2]) of KVM_HC_MAP_GPA_RANGE."""

    PAGE_SIZE_2M = 1
    ENCRYPTED = 1 << 4


class RunOffset(IntEnum):
    """Offsets in kvm_run that both sides use while it is shared."""

    IMMEDIATE_EXIT = 1
    EXIT_REASON = 8
    FLAGS = 14
    EXIT = 32
    HYPERCALL_RET = 88
    VALID_REGS = 288
    DIRTY_REGS = 296


@record(size=2352, source="Linux, struct kvm_run (x86-64)")
class KvmRunPage(Record):
    """The shared structure at the start of the vCPU mapping."""

    request_interrupt_window: int = u8(0)
    immediate_exit: int = u8(1)
    padding1: bytes = mbz(2, 6)
    exit_reason: int = u32(8)
    ready_for_interrupt_injection: int = u8(12)
    if_flag: int = u8(13)
    flags: int = u16(14)
    cr8: int = u64(16)
    apic_base: int = u64(24)
    exit: bytes = blob(32, 256)
    kvm_valid_regs: int = u64(288)
    kvm_dirty_regs: int = u64(296)
    s: bytes = blob(304, 2048)


@record(size=24, source="KVM_EXIT_COCO of the series (June 2024), struct kvm_exit_coco")
class ExitCoco(Record):
    """Exit 40: a certificate request when `nr` is 0. `ret` lies at kvm_run offset 52."""

    nr: int = u8(0)
    pad0: bytes = mbz(1, 7)
    gfn: int = u64(8)
    npages: int = u32(16)
    ret: int = u32(20)


class ReqCertsV1(IntEnum):
    """`ret` of the series' exit: REQ_CERTS_ERR_*."""

    OK = 0
    INVALID_LEN = 1
    GENERIC = 1 << 31


@record(size=24, source="Linux, struct kvm_exit_snp_req_certs")
class ExitSnpReqCerts(Record):
    """Exit 43 (42 in the commit). `ret` lies at kvm_run offset 48."""

    gpa: int = u64(0)
    npages: int = u64(8)
    ret: int = u64(16)


@record(size=16, source="Linux, kvm_run.io")
class ExitIo(Record):
    """Exit 2: `count` items of `size` bytes at `data_offset` of the vCPU mapping; direction 0 in, 1 out."""

    direction: int = u8(0)
    size: int = u8(1)
    port: int = u16(2)
    count: int = u32(4)
    data_offset: int = u64(8)


@record(size=24, source="Linux, kvm_run.mmio")
class ExitMmio(Record):
    """Exit 6: the first `len` bytes of `data` count."""

    phys_addr: int = u64(0)
    data: bytes = blob(8, 8)
    len: int = u32(16)
    is_write: int = u8(20)
    pad: bytes = mbz(21, 3)


@record(size=72, source="Linux, kvm_run.hypercall")
class ExitHypercall(Record):
    """Exit 3."""

    nr: int = u64(0)
    args: tuple[int, ...] = words(8, 6)
    ret: int = u64(56)
    flags: int = u64(64)


@record(size=24, source="Linux, kvm_run.memory_fault")
class ExitMemoryFault(Record):
    """Exit 39, delivered with -EFAULT; flag bit 3: the access was private."""

    flags: int = u64(0)
    gpa: int = u64(8)
    size: int = u64(16)


@record(size=136, source="Linux, kvm_run.system_event")
class ExitSystemEvent(Record):
    """Exit 24."""

    type: int = u32(0)
    ndata: int = u32(4)
    data: tuple[int, ...] = words(8, 16)


@record(size=104, source="Linux, struct kvm_enable_cap")
class KvmEnableCap(Record):
    """Argument of KVM_ENABLE_CAP."""

    cap: int = u32(0)
    flags: int = u32(4)
    args: tuple[int, ...] = words(8, 4)
    pad: bytes = mbz(40, 64)


@record(size=24, source="Linux, struct kvm_device_attr")
class KvmDeviceAttr(Record):
    """Argument of KVM_GET_DEVICE_ATTR and KVM_HAS_DEVICE_ATTR."""

    flags: int = u32(0)
    group: int = u32(4)
    attr: int = u64(8)
    addr: int = u64(16)


class DeviceAttr(IntEnum):
    """Attributes of group 1 (KVM_X86_GRP_SEV) on the system descriptor."""

    SEV_VMSA_FEATURES = 0
    SNP_POLICY_BITS = 1
    SEV_SNP_REQ_CERTS = 2


class SevCommand(IntEnum):
    """`id` of struct kvm_sev_cmd."""

    SEV_INIT2 = 22
    SNP_LAUNCH_START = 100
    SNP_LAUNCH_UPDATE = 101
    SNP_LAUNCH_FINISH = 102
    SNP_ENABLE_REQ_CERTS = 103


@record(size=24, source="Linux, struct kvm_sev_cmd")
class KvmSevCmd(Record):
    """Argument of KVM_MEMORY_ENCRYPT_OP."""

    id: int = u32(0)
    pad: int = u32(4)
    data: int = u64(8)
    error: int = u32(16)
    sev_fd: int = u32(20)


@record(size=48, source="Linux, struct kvm_sev_init")
class KvmSevInit(Record):
    """KVM_SEV_INIT2."""

    vmsa_features: int = u64(0)
    flags: int = u32(8)
    ghcb_version: int = u16(12)
    pad1: int = u16(14)
    pad2: bytes = mbz(16, 32)


@record(size=64, source="Linux, struct kvm_sev_snp_launch_start")
class KvmSevSnpLaunchStart(Record):
    """KVM_SEV_SNP_LAUNCH_START."""

    policy: GuestPolicy = u64(0, GuestPolicy)
    gosvw: bytes = blob(8, 16)
    flags: int = u16(24)
    pad0: bytes = mbz(26, 6)
    pad1: bytes = mbz(32, 32)


@record(size=64, source="Linux, struct kvm_sev_snp_launch_update")
class KvmSevSnpLaunchUpdate(Record):
    """KVM_SEV_SNP_LAUNCH_UPDATE."""

    gfn_start: int = u64(0)
    uaddr: int = u64(8)
    len: int = u64(16)
    type: int = u8(24)
    pad0: int = u8(25)
    flags: int = u16(26)
    pad1: int = u32(28)
    pad2: bytes = mbz(32, 32)


@record(size=88, source="Linux, struct kvm_sev_snp_launch_finish")
class KvmSevSnpLaunchFinish(Record):
    """KVM_SEV_SNP_LAUNCH_FINISH; `host_data` is not aligned."""

    id_block_uaddr: int = u64(0)
    id_auth_uaddr: int = u64(8)
    id_block_en: int = u8(16)
    auth_key_en: int = u8(17)
    vcek_disabled: int = u8(18)
    host_data: bytes = blob(19, 32)
    pad0: bytes = mbz(51, 3)
    flags: int = u16(54)
    pad1: bytes = mbz(56, 32)


@record(size=64, source="Linux, struct kvm_create_guest_memfd")
class KvmCreateGuestMemfd(Record):
    """KVM_CREATE_GUEST_MEMFD."""

    size: int = u64(0)
    flags: int = u64(8)
    reserved: bytes = mbz(16, 48)


GUEST_MEMFD_SLOT: Final = 1 << 2
"""KVM_MEM_GUEST_MEMFD."""


@record(size=160, source="Linux, struct kvm_userspace_memory_region2")
class KvmUserspaceMemoryRegion2(Record):
    """KVM_SET_USER_MEMORY_REGION2."""

    slot: int = u32(0)
    flags: int = u32(4)
    guest_phys_addr: int = u64(8)
    memory_size: int = u64(16)
    userspace_addr: int = u64(24)
    guest_memfd_offset: int = u64(32)
    guest_memfd: int = u32(40)
    pad1: int = u32(44)
    pad2: bytes = mbz(48, 112)


@record(size=32, source="Linux, struct kvm_memory_attributes")
class KvmMemoryAttributes(Record):
    """KVM_SET_MEMORY_ATTRIBUTES."""

    address: int = u64(0)
    size: int = u64(8)
    attributes: int = u64(16)
    flags: int = u64(24)


@record(size=64, source="Linux, struct kvm_pre_fault_memory")
class KvmPreFaultMemory(Record):
    """KVM_PRE_FAULT_MEMORY; comes back with what is left."""

    gpa: int = u64(0)
    size: int = u64(8)
    flags: int = u64(16)
    padding: bytes = blob(24, 40)


@record(size=4, source="Linux, struct kvm_mp_state")
class KvmMpState(Record):
    """KVM_GET_MP_STATE."""

    mp_state: int = u32(0)
