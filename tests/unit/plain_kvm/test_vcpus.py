"""Several vCPUs: what CPUID tells each, the interrupt controller, and the start from a VMSA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import Ioctl, KvmMpState
from swsnp.abi.kvm_registers import KvmRegs, KvmSegment, KvmSregs
from swsnp.abi.snp_launch import CpuidFunction
from swsnp.abi.vmsa_registers import regs_of, sregs_of, vmsa_of
from swsnp.cpu.plain_kvm.cpuid import cpuid_page, leaves_of_vcpu
from swsnp.cpu.plain_kvm.ioctls import (
    HostIoctl,
    KvmCpuidEntry,
    KvmIrqLevel,
    KvmMsrEntry,
    OptionalCapability,
)
from swsnp.cpu.plain_kvm.processor import PlainKvmProcessor
from swsnp.cpu.plain_kvm.vm import HostVm
from swsnp.errors import HostError

if TYPE_CHECKING:
    from tests.unit.plain_kvm.conftest import ScriptedKvm, ScriptedMemory

LEAVES = (
    KvmCpuidEntry(function=1, ebx=0x12345678, edx=1 << 28),
    KvmCpuidEntry(function=0xB, index=0, flags=1, edx=77),
    KvmCpuidEntry(function=0x1F, index=0, flags=1, edx=77),
    KvmCpuidEntry(function=0x80000001),
    KvmCpuidEntry(function=0x80000008, eax=0x3030, ecx=0xF),
    KvmCpuidEntry(function=0x8000001E, eax=9, ebx=9, ecx=9),
)


def by_function(leaves: tuple[KvmCpuidEntry, ...]) -> dict[tuple[int, int], KvmCpuidEntry]:
    return {(each.function, each.index): each for each in leaves}


def test_topology_of_four() -> None:
    """AMD 24594: APIC id and number of cores in Fn1, FnB, Fn8000_0008 and Fn8000_001E."""
    found = by_function(leaves_of_vcpu(LEAVES, 2, 4))
    assert found[1, 0].ebx == 0x02045678
    assert found[1, 0].edx == 1 << 28
    assert [(found[0xB, each].eax, found[0xB, each].ebx, found[0xB, each].edx) for each in range(3)] == [
        (0, 1, 2),
        (2, 4, 2),
        (0, 0, 2),
    ]
    assert [found[0xB, each].ecx for each in range(3)] == [0x100, 0x201, 2]
    assert found[0x80000001, 0].ecx == 2
    assert found[0x80000008, 0].ecx == 0x2003
    assert (found[0x8000001E, 0].eax, found[0x8000001E, 0].ebx, found[0x8000001E, 0].ecx) == (2, 2, 0)
    assert (0x1F, 0) not in found


def test_topology_of_one() -> None:
    """One processor: no HTT, no CmpLegacy."""
    found = by_function(leaves_of_vcpu(LEAVES, 0, 1))
    assert (found[1, 0].ebx, found[1, 0].edx, found[0x80000001, 0].ecx) == (0x00015678, 0, 0)
    assert (found[0xB, 1].eax, found[0xB, 1].ebx) == (0, 1)


def test_cpuid_page() -> None:
    """AMD 56860, CPUID page: what CPUID tells, without leaves of zeros; sub-leaves where they count."""
    leaves = (
        KvmCpuidEntry(function=0, eax=0x10),
        KvmCpuidEntry(function=7, index=0, flags=1, ebx=5),
        KvmCpuidEntry(function=0xD, index=0, flags=1, eax=7, ebx=0x980),
        KvmCpuidEntry(function=0xD, index=1, flags=1, eax=15),
        KvmCpuidEntry(function=0xD, index=2, flags=1, eax=256, ebx=832),
        KvmCpuidEntry(function=2),
        KvmCpuidEntry(function=0x80000001, index=9, ecx=1),
    )
    page = cpuid_page(leaves)
    entries = [CpuidFunction.parse_at(page.functions, 48 * at) for at in range(page.count)]
    assert [(each.eax_in, each.ecx_in, each.xcr0_in) for each in entries] == [
        (0, 0, 0),
        (7, 0, 0),
        (0xD, 0, 1),
        (0xD, 1, 1),
        (0xD, 2, 0),
        (0x80000001, 0, 0),
    ]
    assert (entries[1].ebx, entries[5].ecx) == (5, 1)
    # x87 state and XSAVE header, as for XCR0 1; nothing where the host has none; an offset stays as it is
    assert [entries[at].ebx for at in (2, 3, 4)] == [0x240, 0, 832]


def test_cpuid_page_is_full() -> None:
    """AMD 56860: 64 functions at most."""
    assert cpuid_page(tuple(KvmCpuidEntry(function=each, eax=1) for each in range(64))).count == 64
    with pytest.raises(HostError, match="65 CPUID functions, wanted at most 64"):
        cpuid_page(tuple(KvmCpuidEntry(function=each, eax=1) for each in range(65)))


def test_each_vcpu_has_its_own_leaves(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """KVM_SET_CPUID2 is asked per vCPU."""
    vm = HostVm(kvm, memory, vcpus=2)
    for number in range(2):
        vm.create_vcpu(number)
    assert kvm.arguments(Ioctl.KVM_CREATE_VCPU) == [0, 1]
    one, two = kvm.arguments(HostIoctl.KVM_SET_CPUID2)
    assert one != two
    assert vm.leaves[-3:] == leaves_of_vcpu(vm.leaves, 0, 2)[-3:]


def test_interrupt_controller(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """Linux, KVM_IRQ_LINE: a device's line is called with its level."""
    vm = HostVm(kvm, memory, whole_kernel=True)
    asked = [request for request, _ in kvm.asked]
    assert asked.index(HostIoctl.KVM_CREATE_IRQCHIP) < asked.index(HostIoctl.KVM_CREATE_PIT2)
    line = vm.interrupt_line(4)
    line(True)
    line(False)
    levels = [each for each in kvm.arguments(HostIoctl.KVM_IRQ_LINE) if isinstance(each, bytes)]
    assert [KvmIrqLevel.parse(each) for each in levels] == [
        KvmIrqLevel(irq=4, level=1),
        KvmIrqLevel(irq=4, level=0),
    ]


@pytest.mark.parametrize("missing", [OptionalCapability.IRQCHIP, OptionalCapability.PIT2])
def test_no_interrupt_controller(
    kvm: ScriptedKvm, memory: ScriptedMemory, missing: OptionalCapability
) -> None:
    """A kernel needs both; a guest of a few instructions needs neither."""
    kvm.capabilities[missing] = 0
    with pytest.raises(HostError, match=rf"no KVM_CAP_{missing.name} \({missing.value}\)"):
        HostVm(kvm, memory, whole_kernel=True)
    assert not kvm.open_fds
    HostVm(kvm, memory)


@pytest.mark.parametrize("vcpu", [0, 1])
def test_load(kvm: ScriptedKvm, memory: ScriptedMemory, vcpu: int) -> None:
    """AMD 24593: PAT from the VMSA, memory types write-back; an application processor becomes runnable."""
    one = PlainKvmProcessor(HostVm(kvm, memory, whole_kernel=True, vcpus=2), memory, vcpu=vcpu)
    one.load(bytes(vmsa_of(KvmRegs(rip=0x50, rflags=2), KvmSregs(cr0=0x60000010), features=1)))
    (msrs,) = kvm.arguments(HostIoctl.KVM_SET_MSRS)
    assert isinstance(msrs, bytes)
    assert [KvmMsrEntry.parse_at(msrs, at) for at in (8, 24)] == [
        KvmMsrEntry(index=0x277, data=0x0007040600070406),
        KvmMsrEntry(index=0x2FF, data=0xC06),
    ]
    states = [KvmMpState(mp_state=0)] if vcpu else []
    assert kvm.arguments(Ioctl.KVM_SET_MP_STATE) == [bytes(each) for each in states]


def test_msrs_refused(kvm: ScriptedKvm, memory: ScriptedMemory) -> None:
    """Linux, KVM_SET_MSRS: the number that was set; fewer is an error."""
    one = PlainKvmProcessor(HostVm(kvm, memory, whole_kernel=True), memory)
    kvm.msrs_set = 1
    with pytest.raises(HostError, match="KVM_SET_MSRS: 1 of 2 done"):
        one.load(bytes(4096))


def test_registers_there_and_back() -> None:
    """What a VMM sets is what the VMSA says is what the processor takes."""
    code = KvmSegment(limit=0xFFFFFFFF, selector=0x10, type=11, present=1, s=1, g=1, l=1, avl=1)
    sregs = KvmSregs(cs=code, cr0=0x80050033, cr3=0x20000, cr4=0x60, efer=0x500, apic_base=0xFEE00900)
    regs = KvmRegs(rip=1, rsp=2, rax=3, r8_to_r15=(1, 2, 3, 4, 5, 6, 7, 8), rflags=2)
    vmsa = vmsa_of(regs, sregs, features=1)
    assert (vmsa.cs.attrib, vmsa.efer, vmsa.sev_features) == (0xA9B | 1 << 8, 0x1500, 1)
    assert regs_of(vmsa) == regs
    back = sregs_of(vmsa, KvmSregs(apic_base=0xFEE00900))
    assert (back.cs, back.cr0, back.cr3, back.cr4, back.efer) == (code, 0x80050033, 0x20000, 0x60, 0x500)
    assert back.apic_base == 0xFEE00900
    assert back.ds.unusable
