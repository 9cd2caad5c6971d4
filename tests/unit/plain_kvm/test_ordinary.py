"""A host VM without SNP: set up whole or not at all, and ioctls as the VMM's run loop asks them."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import Ioctl
from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
from swsnp.cpu.plain_kvm.ioctls import HostIoctl
from swsnp.cpu.plain_kvm.ordinary import OrdinaryHostVm
from swsnp.errors import HostError, UsageError

if TYPE_CHECKING:
    from tests.unit.plain_kvm.conftest import ScriptedKvm

AREAS = ((0, 0x10000),)
START = (KvmRegs(rip=0x1000, rflags=2), KvmSregs(apic_base=0xFEE00900))


def test_starts_with_its_registers(kvm: ScriptedKvm) -> None:
    """KVM_SET_REGS, KVM_SET_SREGS: vCPU 0 begins where it is told, the others wait for SIPI."""
    vm = OrdinaryHostVm(kvm, AREAS, vcpus=2, start=START)
    assert kvm.arguments(Ioctl.KVM_CREATE_VCPU) == [0, 1]
    assert (kvm.regs, kvm.sregs) == START
    assert kvm.arguments(Ioctl.KVM_SET_REGS) == [bytes(START[0])]
    vm.close()
    assert not kvm.open_fds


def test_a_host_that_is_too_old(kvm: ScriptedKvm) -> None:
    """Linux, KVM API: an application refuses to run when KVM_GET_API_VERSION is not 12."""
    kvm.version = 11
    with pytest.raises(HostError, match="API version 11, wanted 12") as caught:
        OrdinaryHostVm(kvm, AREAS, vcpus=1, start=START)
    assert not kvm.open_fds
    del caught  # until here it kept what was half set up alive, so nothing was closed by its end


@pytest.mark.parametrize(
    "refused", [Ioctl.KVM_CREATE_VM, HostIoctl.KVM_SET_CPUID2, HostIoctl.KVM_SET_USER_MEMORY_REGION]
)
def test_set_up_refused(kvm: ScriptedKvm, refused: Ioctl | HostIoctl) -> None:
    """Each refusal in setting up names the request and leaves no descriptor behind."""
    kvm.refuse[refused] = errno.EINVAL
    with pytest.raises(HostError, match=f"{refused.name}: Invalid argument") as caught:
        OrdinaryHostVm(kvm, AREAS, vcpus=1, start=START)
    assert not kvm.open_fds
    del caught  # as above


def test_ioctls_of_the_run_loop(kvm: ScriptedKvm) -> None:
    """ioctl(2): numbers, structures and views of them go through; an error is its negative number."""
    vm = OrdinaryHostVm(kvm, AREAS, vcpus=1, start=START)
    fd = vm.vcpus[0][0]
    for rip, wrapped in ((1, bytearray), (2, memoryview)):
        assert vm.ioctl(fd, Ioctl.KVM_SET_REGS, wrapped(bytearray(bytes(KvmRegs(rip=rip))))) == 0
        assert kvm.regs.rip == rip
    kvm.refuse[Ioctl.KVM_SET_REGS] = errno.EBUSY
    assert vm.ioctl(fd, Ioctl.KVM_SET_REGS, bytearray(KvmRegs.SIZE)) == -errno.EBUSY


def test_memory_for_other_processes(kvm: ScriptedKvm) -> None:
    """KVM_SET_USER_MEMORY_REGION takes memory of a memfd too; its descriptors go with the VM."""
    vm = OrdinaryHostVm(kvm, (*AREAS, (0x100000, 0x2000)), vcpus=1, start=START, passable=True)
    (first, low, _), (second, high, fd) = vm.passable()
    assert ((first, low), (second, high)) == ((0, 0x10000), (0x100000, 0x2000))
    vm.write(0x101000, b"there")
    assert os.pread(fd, 5, 0x1000) == b"there"
    vm.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_of_nobody_else(kvm: ScriptedKvm) -> None:
    """It has no descriptor unless it was asked for."""
    vm = OrdinaryHostVm(kvm, AREAS, vcpus=1, start=START)
    with pytest.raises(UsageError, match="ordinary guest: wanted a VM with passable memory"):
        vm.passable()
    vm.close()
