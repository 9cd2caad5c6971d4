"""The MSRs that a guest reaches by relaying RDMSR and WRMSR: few, and the local APIC's INIT and SIPI.

The local APIC counts as KVM's own (a split interrupt controller, as QEMU has it for SNP). Of it only what
starts processors is modelled: the x2APIC id and the interrupt command register. No interrupt is delivered.
Source: Linux, arch/x86/kvm/x86.c (kvm_get_msr_common), arch/x86/kvm/mtrr.c, arch/x86/kvm/lapic.c; AMD 24593.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from swsnp.abi.record import Word, bits

if TYPE_CHECKING:
    from swsnp.hypervisor.vcpu import Vcpu

__all__ = ["Icr", "Msr", "Msrs"]

_VARIABLE_MTRRS: Final = range(0x200, 0x210)
_APIC_BASE_RESET: Final = 0xFEE0_0800
_BOOT_PROCESSOR: Final = 1 << 8
_X2APIC: Final = 1 << 10
_ENABLED: Final = 1 << 11
_MODE: Final = _X2APIC | _ENABLED
_APIC_BASE_RESERVED: Final = 0x2FF
_CPUID_X2APIC: Final = 1 << 21
_PATCH_LEVEL: Final = 0x0100_0065
_MTRR_CAP: Final = 0x508
"""Write-combining, fixed ranges, 8 variable ranges."""
_INIT, _STARTUP = 5, 6
_ALL, _OTHERS = 2, 3


class Msr(IntEnum):
    """Indices."""

    APIC_BASE = 0x1B
    PATCH_LEVEL = 0x8B
    MTRR_CAP = 0xFE
    MTRR_DEF_TYPE = 0x2FF
    X2APIC_ID = 0x802
    X2APIC_ICR = 0x830
    SYSCFG = 0xC0010010


class Icr(Word):
    """Interrupt command register in x2APIC mode."""

    vector = bits(7, 0)
    delivery_mode = bits(10, 8)
    logical = bits(11, 11)
    assert_level = bits(14, 14)
    level_triggered = bits(15, 15)
    shorthand = bits(19, 18)
    destination = bits(63, 32)


class Msrs:
    """One vCPU's MSRs. An index that is not here is #GP for the guest."""

    __slots__ = ("_kept", "_vcpu")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        boot = 0 if vcpu.id else _BOOT_PROCESSOR
        self._kept: dict[int, int] = {Msr.APIC_BASE: _APIC_BASE_RESET | boot}

    def read(self, index: int) -> int | None:
        """The value; None: #GP."""
        if index == Msr.PATCH_LEVEL:
            return _PATCH_LEVEL
        if index == Msr.MTRR_CAP:
            return _MTRR_CAP
        if index == Msr.SYSCFG:
            return 0
        if index == Msr.X2APIC_ID and self._in_x2apic_mode:
            return self._vcpu.id
        if index in (Msr.APIC_BASE, Msr.MTRR_DEF_TYPE) or index in _VARIABLE_MTRRS:
            return self._kept.get(index, 0)
        if index == Msr.X2APIC_ICR and self._in_x2apic_mode:
            return self._kept.get(index, 0)
        return None

    def write(self, index: int, value: int) -> bool:
        """Store a value; False: #GP."""
        if index in (Msr.PATCH_LEVEL, Msr.SYSCFG):
            return True  # ignored
        if index == Msr.APIC_BASE and not self._accepts_apic_base(value):
            return False
        if index == Msr.X2APIC_ICR:
            if not self._in_x2apic_mode:
                return False
            self._send(Icr(value))
        elif index not in (Msr.APIC_BASE, Msr.MTRR_DEF_TYPE) and index not in _VARIABLE_MTRRS:
            return False
        self._kept[index] = value
        return True

    @property
    def _in_x2apic_mode(self) -> bool:
        return self._kept[Msr.APIC_BASE] & _MODE == _MODE

    def _accepts_apic_base(self, value: int) -> bool:
        """KVM's rules for changing the local APIC's mode."""
        has_x2apic = self._vcpu.cpuid(1)[2] & _CPUID_X2APIC
        reserved = _APIC_BASE_RESERVED | (0 if has_x2apic else _X2APIC)
        if value & reserved or value >> self._vcpu.gpa_bits or value & _MODE == _X2APIC:
            return False
        old, new = self._kept[Msr.APIC_BASE] & _MODE, value & _MODE
        return not ((old == _MODE and new == _ENABLED) or (not old and new == _MODE))

    def _send(self, command: Icr) -> None:
        """Deliver INIT or SIPI; other interrupts go nowhere, nor do logical destinations."""
        mode = command.delivery_mode
        if mode not in (_INIT, _STARTUP) or command.logical:
            return
        if mode == _INIT and command.level_triggered and not command.assert_level:
            return  # the de-assertion of old processors
        for vcpu in self._targets(command):
            if mode == _INIT:
                vcpu.startup.signal_init()
            else:
                vcpu.startup.signal_sipi()

    def _targets(self, command: Icr) -> list[Vcpu]:
        everyone, sender = self._vcpu.vm.vcpus, self._vcpu
        if command.shorthand == _ALL:
            return list(everyone.values())
        if command.shorthand == _OTHERS:
            return [each for each in everyone.values() if each is not sender]
        if command.shorthand:
            return [sender]
        found = everyone.get(command.destination)
        return [] if found is None else [found]
