"""What a vCPU waits for, as the host's KVM tells it."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import Ioctl, MpState
from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
from swsnp.cpu.plain_kvm.ioctls import HostIoctl
from swsnp.cpu.plain_kvm.ordinary import OrdinaryHostVm
from swsnp.cpu.plain_kvm.processor import PlainKvmProcessor
from swsnp.cpu.plain_kvm.vcpu_state import VcpuState, vcpu_state
from swsnp.cpu.plain_kvm.vm import HostVm
from swsnp.errors import HostError
from swsnp.machine.ordinary_vm import OrdinaryProcessor

if TYPE_CHECKING:
    from tests.unit.plain_kvm.conftest import ScriptedKvm, ScriptedMemory

MASKED = 1 << 16


def put(kvm: ScriptedKvm, **registers: int) -> None:
    """Registers of the local APIC, by their offsets: r100=1."""
    for name, value in registers.items():
        struct.pack_into("<I", kvm.lapic, int(name[1:], 16), value)


@pytest.fixture
def processor(kvm: ScriptedKvm, memory: ScriptedMemory) -> PlainKvmProcessor:
    return PlainKvmProcessor(HostVm(kvm, memory, whole_kernel=True), memory)


def test_state(kvm: ScriptedKvm, processor: PlainKvmProcessor) -> None:
    """AMD 24593, APIC registers: requested and in-service vectors by 32, the timer's counts and mask."""
    kvm.regs = KvmRegs(rip=0x1234, rflags=0x202)
    kvm.mp_state = MpState.HALTED
    put(kvm, r270=1 << 12 | 1, r100=0, r170=1 << 31, r320=0xEC, r380=0x5000, r390=0x40)
    assert processor.state() == VcpuState(
        mp_state=3,
        rip=0x1234,
        interrupts=True,
        pending=(0xE0, 0xEC),
        in_service=(0xFF,),
        timer=(0x5000, 0x40),
    )
    assert str(processor.state()) == (
        "halted, interrupts on, pending 0xe0, 0xec, in service 0xff, timer 0x40 of 0x5000"
    )


def test_nothing_waits(kvm: ScriptedKvm, processor: PlainKvmProcessor) -> None:
    """A vCPU that has interrupts off and no timer never wakes; a state that is new has its number."""
    kvm.regs = KvmRegs(rip=1, rflags=2)
    kvm.mp_state = 77
    put(kvm, r320=MASKED | 0xEC, r380=1)
    assert str(processor.state()) == "77, interrupts off, pending none, in service none, timer masked"


def test_without_snp(kvm: ScriptedKvm) -> None:
    """An ordinary guest's vCPU tells the same."""
    start = (KvmRegs(rip=0x1000, rflags=2), KvmSregs(apic_base=0xFEE00900))
    vm = OrdinaryHostVm(kvm, ((0, 0x10000),), vcpus=1, start=start)
    (fd, _), *_ = vm.vcpus
    assert OrdinaryProcessor(vm, fd).state() == vcpu_state(kvm, fd)
    assert OrdinaryProcessor(vm, fd).state().rip == 0x1000


@pytest.mark.parametrize(
    "request_number", [Ioctl.KVM_GET_MP_STATE, Ioctl.KVM_GET_REGS, HostIoctl.KVM_GET_LAPIC]
)
def test_refused(kvm: ScriptedKvm, processor: PlainKvmProcessor, request_number: Ioctl | HostIoctl) -> None:
    """KVM_GET_LAPIC is -EINVAL without KVM's interrupt controller; each refusal names its request."""
    kvm.refuse[request_number] = errno.EINVAL
    with pytest.raises(HostError, match=f"{request_number.name}: Invalid argument"):
        processor.state()
