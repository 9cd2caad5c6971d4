"""A vCPU's registers before its VM is measured: what KVM_SET_REGS and KVM_SET_SREGS reach.

They are kept as the VMSA page that LAUNCH_FINISH measures, with the values that QEMU leaves in a processor at
reset; once measured they belong to the guest.

Source: Linux, arch/x86/kvm/x86.c (kvm_arch_vcpu_ioctl_get_regs and its neighbours) and arch/x86/kvm/svm/sev.c
(sev_es_sync_vmsa); AMD 24593, VMSA layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm_registers import KvmDtable, KvmRegs, KvmSregs
from swsnp.abi.vmsa import Segment, Vmsa
from swsnp.abi.vmsa_registers import CR4_MCE, EFER_SVME, packed, unpacked
from swsnp.measure.vmsa_pages import RESET_EIP, Vmm, reset_page

if TYPE_CHECKING:
    from swsnp.abi.vmsa import SevFeatures

__all__ = ["RESET_EIP", "Registers"]

_SAME: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8_to_r15", "rip", "rflags")
"""General registers that have one name in both structures."""
_SEGMENTS: Final = {
    **{name: name for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr")},
    "ldt": "ldtr",
}
_CONTROL: Final = ("cr0", "cr3", "cr4", "efer")


class Registers:
    """The state of one vCPU; `signature` is CPUID Fn1 EAX of its model, in RDX at reset.

    UNVERIFIED: which values KVM refuses in KVM_SET_SREGS (kvm_is_valid_sregs) is not modelled; CR2, CR8, the
    APIC base and pending interrupts are taken and forgotten, since no VMSA page holds them.
    """

    def __init__(self, signature: int = 0) -> None:
        self._state = Vmsa.parse(reset_page(Vmm.QEMU, eip=RESET_EIP, features=0, signature=signature))

    def vmsa(self, features: SevFeatures) -> Vmsa:
        """The page to measure."""
        return self._state.but(sev_features=features)

    def get_regs(self) -> KvmRegs:
        """KVM_GET_REGS."""
        return KvmRegs(**{name: getattr(self._state, name) for name in _SAME})

    def set_regs(self, regs: KvmRegs) -> None:
        """KVM_SET_REGS."""
        self._state = self._state.but(**{name: getattr(regs, name) for name in _SAME})

    def get_sregs(self) -> KvmSregs:
        """KVM_GET_SREGS."""
        state = self._state
        segments = {name: unpacked(getattr(state, held)) for name, held in _SEGMENTS.items()}
        sregs = KvmSregs().but(**segments, **{name: getattr(state, name) for name in _CONTROL})
        return sregs.but(
            gdt=KvmDtable(base=state.gdtr.base, limit=state.gdtr.limit),
            idt=KvmDtable(base=state.idtr.base, limit=state.idtr.limit),
        )

    def set_sregs(self, sregs: KvmSregs) -> None:
        """KVM_SET_SREGS."""
        segments = {held: packed(getattr(sregs, name)) for name, held in _SEGMENTS.items()}
        tables = {
            "gdtr": Segment(base=sregs.gdt.base, limit=sregs.gdt.limit),
            "idtr": Segment(base=sregs.idt.base, limit=sregs.idt.limit),
        }
        # what KVM adds for the processor
        control = {name: getattr(sregs, name) for name in _CONTROL}
        control["efer"] |= EFER_SVME
        control["cr4"] |= CR4_MCE
        self._state = self._state.but(**segments, **tables, **control)
