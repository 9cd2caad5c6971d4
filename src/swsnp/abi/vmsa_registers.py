"""A vCPU's registers from KVM's user interface to the VMSA, and back.

Source: Linux, arch/x86/include/uapi/asm/kvm.h; AMD 24593 (APM volume 2), VMSA layout.
"""

from __future__ import annotations

from typing import Any, Final

from swsnp.abi.kvm_registers import KvmDtable, KvmRegs, KvmSegment, KvmSregs
from swsnp.abi.vmsa import Segment, SevFeatures, Vmsa

__all__ = [
    "CR4_MCE",
    "EFER_SVME",
    "X86_PAT",
    "packed",
    "regs_of",
    "sregs_of",
    "unpacked",
    "vmsa_of",
]

EFER_SVME: Final = 1 << 12
"""Set in every VMSA: the processor wants it of a guest's EFER. Guests never see it."""
X86_PAT: Final = 0x0007_0406_0007_0406
"""The page attribute table after reset."""
CR4_MCE: Final = 1 << 6
"""The host's, which KVM adds to every guest's CR4 in the VMSA."""
_DR6_RESET: Final = 0xFFFF_0FF0
_DR7_RESET: Final = 0x400
_MXCSR_RESET: Final = 0x1F80
_FCW_RESET: Final = 0x37F
_SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr")
_GENERAL: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8_to_r15", "rip", "rflags")
_ATTRIBUTES: Final = (
    ("type", 0, 4),
    ("s", 4, 1),
    ("dpl", 5, 2),
    ("present", 7, 1),
    ("avl", 8, 1),
    ("l", 9, 1),
    ("db", 10, 1),
    ("g", 11, 1),
)
"""Fields of a packed segment attribute: first bit and width."""


def vmsa_of(regs: KvmRegs, sregs: KvmSregs, *, features: int) -> Vmsa:
    """The VMSA that KVM has a vCPU measured with, whose registers a VMM has set.

    KVM adds EFER.SVME and the host's CR4.MCE; what KVM_SET_REGS and KVM_SET_SREGS do not reach stays as after
    reset.

    Args:
        regs: general registers.
        sregs: segments, tables and control registers.
        features: SEV_FEATURES of the VM.
    """
    segments: dict[str, Any] = {name: packed(getattr(sregs, name)) for name in _SEGMENTS}
    general: dict[str, Any] = {name: getattr(regs, name) for name in _GENERAL}
    return Vmsa(
        **segments,
        ldtr=packed(sregs.ldt),
        gdtr=Segment(limit=sregs.gdt.limit, base=sregs.gdt.base),
        idtr=Segment(limit=sregs.idt.limit, base=sregs.idt.base),
        efer=sregs.efer | EFER_SVME,
        cr4=sregs.cr4 | CR4_MCE,
        cr3=sregs.cr3,
        cr0=sregs.cr0,
        dr7=_DR7_RESET,
        dr6=_DR6_RESET,
        g_pat=X86_PAT,
        sev_features=SevFeatures(features),
        xcr0=1,
        mxcsr=_MXCSR_RESET,
        x87_fcw=_FCW_RESET,
        **general,
    )


def regs_of(vmsa: Vmsa) -> KvmRegs:
    """The general registers that a VMSA holds."""
    return KvmRegs(**{name: getattr(vmsa, name) for name in _GENERAL})


def sregs_of(vmsa: Vmsa, reset: KvmSregs) -> KvmSregs:
    """The system registers that a VMSA holds; the local APIC's stay those of `reset`."""
    return reset.but(
        **{name: unpacked(getattr(vmsa, name)) for name in _SEGMENTS},
        ldt=unpacked(vmsa.ldtr),
        gdt=KvmDtable(base=vmsa.gdtr.base, limit=vmsa.gdtr.limit & 0xFFFF),
        idt=KvmDtable(base=vmsa.idtr.base, limit=vmsa.idtr.limit & 0xFFFF),
        cr0=vmsa.cr0,
        cr3=vmsa.cr3,
        cr4=vmsa.cr4,
        efer=vmsa.efer & ~EFER_SVME,
    )


def packed(segment: KvmSegment) -> Segment:
    """A segment as the VMSA has it."""
    attributes = 0
    if not segment.unusable:
        for name, low, width in _ATTRIBUTES:
            attributes |= (getattr(segment, name) & (1 << width) - 1) << low
    return Segment(selector=segment.selector, attrib=attributes, limit=segment.limit, base=segment.base)


def unpacked(segment: Segment) -> KvmSegment:
    """A segment as KVM's user interface has it."""
    attributes = {name: segment.attrib >> low & (1 << width) - 1 for name, low, width in _ATTRIBUTES}
    return KvmSegment(
        base=segment.base,
        limit=segment.limit,
        selector=segment.selector,
        unusable=not attributes["present"],
        **attributes,
    )
