"""KVM_PRE_FAULT_MEMORY. Source: Linux, kvm_vcpu_pre_fault_memory and kvm_arch_vcpu_pre_fault_memory."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import Ioctl, KvmPreFaultMemory, VmType
from swsnp.hardware import PageState
from swsnp.hypervisor.profiles import PROFILES

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

PAGE = 4096
RAM = 64 * PAGE
EINVAL, EFAULT, ENOENT, EINTR = -errno.EINVAL, -errno.EFAULT, -errno.ENOENT, -errno.EINTR
EOPNOTSUPP = -errno.EOPNOTSUPP


def _pre_fault(machine: Machine, vcpu: int, gpa: int, size: int, flags: int = 0) -> tuple[int, int, int]:
    """Result, and what the structure says is left."""
    wanted = bytearray(bytes(KvmPreFaultMemory(gpa=gpa, size=size, flags=flags)))
    result = machine.task.ioctl(vcpu, Ioctl.KVM_PRE_FAULT_MEMORY, wanted)
    left = KvmPreFaultMemory.parse(wanted)
    return result, left.gpa, left.size


def _launched(machine: Machine) -> tuple[int, int]:
    """A VM with 64 private pages, launched; its descriptor and its vCPU's."""
    vm = machine.started()
    vcpu = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    assert machine.finish(vm) == (0, 0)
    return vm, vcpu


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_private_pages_before_the_first_touch(boot: MakeMachine, profile: str) -> None:
    """As the guest's first touch: Hypervisor -> Guest-Invalid; once more is no fault."""
    machine = boot(profile)
    vm, vcpu = _launched(machine)
    slot = machine.vm(vm).memory.slots()[0]
    for _ in range(2):
        assert _pre_fault(machine, vcpu, PAGE, 2 * PAGE) == (0, 3 * PAGE, 0)
    states = [machine.rmp.state(slot.private_address(number * PAGE) or 0) for number in range(4)]
    hypervisor, invalid = PageState.HYPERVISOR, PageState.GUEST_INVALID
    assert states == [hypervisor, invalid, invalid, hypervisor]


def test_not_before_the_launch_is_over(machine: Machine) -> None:
    """SNP: -EOPNOTSUPP until LAUNCH_FINISH has succeeded, since LAUNCH_UPDATE wants untouched pages."""
    vm = machine.create_vm()
    vcpu = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    assert _pre_fault(machine, vcpu, 0, PAGE) == (EOPNOTSUPP, 0, PAGE)
    vm = machine.started()
    vcpu = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    assert _pre_fault(machine, vcpu, 0, PAGE) == (EOPNOTSUPP, 0, PAGE)
    assert machine.finish(vm) == (0, 0)
    assert _pre_fault(machine, vcpu, 0, PAGE) == (0, PAGE, 0)


@pytest.mark.parametrize(
    ("gpa", "size", "flags"),
    [
        (0, 0, 0),
        (1, PAGE, 0),
        (0, PAGE + 1, 0),
        (0, PAGE, 1),
        ((1 << 64) - PAGE, PAGE, 0),
        (PAGE, (1 << 64) - PAGE, 0),
    ],
)
def test_refused(machine: Machine, gpa: int, size: int, flags: int) -> None:
    """No flags, whole pages, at least one, no wrap: else -EINVAL, whatever state the VM is in."""
    vcpu = machine.ioctl(machine.create_vm(), Ioctl.KVM_CREATE_VCPU, 0)
    assert _pre_fault(machine, vcpu, gpa, size, flags) == (EINVAL, gpa, size)


@pytest.mark.parametrize("arg", [0, 4096, bytearray(63), bytearray(65)])
def test_unreadable(machine: Machine, arg: int | bytearray) -> None:
    """An argument that is not the structure is -EFAULT."""
    _, vcpu = _launched(machine)
    assert machine.task.ioctl(vcpu, Ioctl.KVM_PRE_FAULT_MEMORY, arg) == EFAULT


def test_progress_counts_as_success(machine: Machine) -> None:
    """An error after some pages is 0; the next call starts there and reports it: -ENOENT without memslot."""
    _, vcpu = _launched(machine)
    assert _pre_fault(machine, vcpu, RAM - PAGE, 3 * PAGE) == (0, RAM, 2 * PAGE)
    assert _pre_fault(machine, vcpu, RAM, 2 * PAGE) == (ENOENT, RAM, 2 * PAGE)
    assert _pre_fault(machine, vcpu, (1 << 64) - 2 * PAGE, PAGE)[0] == ENOENT


def test_a_signal_ends_it(machine: Machine) -> None:
    """A pending signal is -EINTR, with what is left."""
    _, vcpu = _launched(machine)
    machine.task.signal_pending = True
    assert _pre_fault(machine, vcpu, 0, PAGE) == (EINTR, 0, PAGE)


def test_shared_pages(machine: Machine) -> None:
    """A shared page needs the VMM's memory, as in a VM without private memory at any time."""
    vm = machine.create_vm(VmType.DEFAULT)
    vcpu = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    assert machine.slot(vm, size=2 * PAGE) == 0
    assert _pre_fault(machine, vcpu, 0, 2 * PAGE) == (0, 2 * PAGE, 0)
    assert machine.slot(vm, slot=1, size=PAGE, guest_phys_addr=RAM, userspace_addr=0x1000) == 0
    assert _pre_fault(machine, vcpu, RAM, PAGE) == (EFAULT, RAM, PAGE)


def test_private_pages_without_guest_memfd(machine: Machine) -> None:
    """An attribute that says private over a slot that has no private memory: -EFAULT, as a guest's touch."""
    vm, vcpu = _launched(machine)
    assert machine.slot(vm, slot=1, size=PAGE, guest_phys_addr=RAM) == 0
    assert machine.attributes(vm, RAM, PAGE) == 0
    assert _pre_fault(machine, vcpu, RAM, PAGE) == (EFAULT, RAM, PAGE)


def test_it_waits_for_the_vcpu(machine: Machine) -> None:
    """It is an ioctl of the vCPU: one at a time."""
    vm, vcpu = _launched(machine)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(_pre_fault(machine, vcpu, 0, PAGE)[0]))
    with machine.vm(vm).vcpus[0].mutex:
        thread.start()
        thread.join(0.05)
        assert results == []
    thread.join()
    assert results == [0]
