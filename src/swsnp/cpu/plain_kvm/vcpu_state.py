"""What the host's KVM knows of a vCPU that has stopped: what it waits for, and what waits for it.

Source: Linux, Documentation/virt/kvm/api.rst, KVM_GET_MP_STATE and KVM_GET_LAPIC; AMD 24593 (APM volume 2),
"APIC Registers".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import Ioctl, KvmMpState, MpState
from swsnp.abi.kvm_registers import KvmRegs
from swsnp.cpu.plain_kvm.host import checked_ioctl
from swsnp.cpu.plain_kvm.ioctls import LAPIC_SIZE, HostIoctl

if TYPE_CHECKING:
    from swsnp.cpu.plain_kvm.host import HostKvm

__all__ = ["VcpuState", "vcpu_state"]

_U32: Final = struct.Struct("<I")
_STEP: Final = 0x10
"""Each register of the local APIC has 16 bytes, of which the first four count."""
_IN_SERVICE, _REQUESTED = 0x100, 0x200
_TIMER, _INITIAL_COUNT, _CURRENT_COUNT = 0x320, 0x380, 0x390
_MASKED: Final = 1 << 16
_INTERRUPT_FLAG: Final = 1 << 9


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuState:
    """A vCPU at rest.

    Attributes:
        mp_state: KVM's, as `MpState` names it.
        rip: where it was left.
        interrupts: whether RFLAGS.IF lets it take one.
        pending: vectors that its local APIC has accepted and not delivered.
        in_service: vectors that are being served.
        timer: the local APIC's timer: initial and current count; None: masked.
    """

    mp_state: int
    rip: int
    interrupts: bool
    pending: tuple[int, ...]
    in_service: tuple[int, ...]
    timer: tuple[int, int] | None

    def __str__(self) -> str:
        """One line for people."""
        known = {int(each): each.name.lower() for each in MpState}
        timer = "masked" if self.timer is None else f"{self.timer[1]:#x} of {self.timer[0]:#x}"
        return (
            f"{known.get(self.mp_state, self.mp_state)}, interrupts {'on' if self.interrupts else 'off'}, "
            f"pending {_listed(self.pending)}, in service {_listed(self.in_service)}, timer {timer}"
        )


def vcpu_state(host: HostKvm, vcpu: int) -> VcpuState:
    """Ask for it; the vCPU's thread must not be in KVM_RUN.

    Args:
        host: the host's KVM.
        vcpu: the vCPU's descriptor.

    Raises:
        HostError: the host's KVM refused; it does where it has no local APIC of its own.
    """
    state, regs, lapic = bytearray(KvmMpState.SIZE), bytearray(KvmRegs.SIZE), bytearray(LAPIC_SIZE)
    checked_ioctl(host, vcpu, Ioctl.KVM_GET_MP_STATE, state)
    checked_ioctl(host, vcpu, Ioctl.KVM_GET_REGS, regs)
    checked_ioctl(host, vcpu, HostIoctl.KVM_GET_LAPIC, lapic)
    registers = KvmRegs.parse(regs)
    counts = _register(lapic, _INITIAL_COUNT), _register(lapic, _CURRENT_COUNT)
    return VcpuState(
        mp_state=KvmMpState.parse(state).mp_state,
        rip=registers.rip,
        interrupts=bool(registers.rflags & _INTERRUPT_FLAG),
        pending=_vectors(lapic, _REQUESTED),
        in_service=_vectors(lapic, _IN_SERVICE),
        timer=None if _register(lapic, _TIMER) & _MASKED else counts,
    )


def _register(lapic: bytearray, at: int) -> int:
    value: int = _U32.unpack_from(lapic, at)[0]
    return value


def _vectors(lapic: bytearray, at: int) -> tuple[int, ...]:
    """Of eight registers the bits that are set."""
    words = (_register(lapic, at + number * _STEP) for number in range(8))
    return tuple(
        32 * number + bit for number, word in enumerate(words) for bit in range(32) if word >> bit & 1
    )


def _listed(vectors: tuple[int, ...]) -> str:
    return ", ".join(map(hex, vectors)) or "none"
