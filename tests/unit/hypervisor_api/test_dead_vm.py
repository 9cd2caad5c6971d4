"""Lost pages and dead VMs: a page that does not come back is never used again, its VM answers -EIO."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import Ioctl
from swsnp.abi.snp_command import Command, FirmwareStatus
from swsnp.hardware import PageState

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine

PAGE = 4096
EIO = -errno.EIO


def by_update(machine: Machine, vm: int) -> None:
    """A page of the image is refused and not given back."""
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_PARAM)
    machine.chip.answer(Command.SNP_PAGE_RECLAIM, FirmwareStatus.INVALID_PAGE_STATE)
    assert machine.update(vm, 0, bytes(PAGE))[0] == EIO


def by_finish(machine: Machine, vm: int) -> None:
    """A VMSA page is refused and not given back."""
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_PARAM)
    machine.chip.answer(Command.SNP_PAGE_RECLAIM, FirmwareStatus.INVALID_PAGE_STATE)
    assert machine.finish(vm)[0] == EIO


def by_reclaim_without_effect(machine: Machine, vm: int) -> None:
    """SNP_PAGE_RECLAIM succeeds, but RMPUPDATE still refuses the page."""
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_PARAM)
    machine.chip._effect = lambda *_: None  # type: ignore[method-assign]
    assert machine.update(vm, 0, bytes(PAGE))[0] == EIO


@pytest.mark.parametrize("kill", [by_update, by_finish, by_reclaim_without_effect])
def test_dead_vm(machine: Machine, kill: object) -> None:
    """KVM_BUG: every later ioctl on the VM and its vCPU is -EIO, whatever it asks for; others live on."""
    vm = machine.started(vcpus=1)
    vcpu = max(fd for fd in range(3, 30) if machine.task.descriptor(fd))
    assert callable(kill)
    kill(machine, vm)
    assert machine.vm(vm).bugged
    (lost,) = machine.host.driver.leaked
    assert machine.rmp.state(lost) is not PageState.HYPERVISOR
    for request in (
        Ioctl.KVM_CHECK_EXTENSION,
        Ioctl.KVM_ENABLE_CAP,
        Ioctl.KVM_CREATE_VCPU,
        Ioctl.KVM_SET_USER_MEMORY_REGION2,
        Ioctl.KVM_SET_MEMORY_ATTRIBUTES,
        Ioctl.KVM_CREATE_GUEST_MEMFD,
        Ioctl.KVM_MEMORY_ENCRYPT_OP,
        0x1234,
    ):
        assert machine.ioctl(vm, request) == EIO
    for request in (
        Ioctl.KVM_RUN,
        Ioctl.KVM_GET_MP_STATE,
        Ioctl.KVM_SET_MP_STATE,
        Ioctl.KVM_PRE_FAULT_MEMORY,
        0x1234,
    ):
        assert machine.ioctl(vcpu, request) == EIO
    assert machine.init2(machine.create_vm()) == 0


@pytest.mark.parametrize("kill", [by_update, by_finish])
def test_lost_page_is_never_used_again(machine: Machine, kill: object) -> None:
    """After the VM's end everything is free but the lost page."""
    vm = machine.started(vcpus=1)
    assert callable(kill)
    kill(machine, vm)
    (lost,) = machine.host.driver.leaked
    for fd in range(5, 20):
        machine.task.close(fd)
    assert lost not in {machine.memory.allocate_page() for _ in range(200)}
    assert machine.rmp.state(lost) is not PageState.HYPERVISOR


def test_vmsa_page_lost_at_the_end(machine: Machine) -> None:
    """A VMSA page that RMPUPDATE does not make shared at the VM's end is lost; the VM's end goes on."""
    vm = machine.started(vcpus=1)
    assert machine.finish(vm) == (0, 0)
    (page,) = machine.vm(vm).vmsa_pages.values()
    machine.chip._set(page, immutable=True)
    for fd in range(5, 20):
        machine.task.close(fd)
    assert machine.host.driver.leaked == [page]
    assert len(machine.chip.issued(Command.SNP_DECOMMISSION)) == 1


def test_context_that_stays(machine: Machine) -> None:
    """A context that SNP_DECOMMISSION refuses keeps its ASID for good, and its page."""
    vm = machine.started()
    machine.chip.answer(Command.SNP_DECOMMISSION, FirmwareStatus.INVALID_GUEST)
    sev = machine.vm(vm).sev
    assert sev is not None
    for fd in range(5, 20):
        machine.task.close(fd)
    assert sev.gctx is not None
    assert machine.rmp.state(sev.gctx) is PageState.CONTEXT
    again = machine.create_vm()
    machine.init2(again)
    other = machine.vm(again).sev
    assert other is not None
    assert other.asid != sev.asid


def test_unknown_argument_kinds(machine: Machine) -> None:
    """A capability number that is no number is no capability."""
    arg = bytearray(bytes(kvm.KvmEnableCap()))
    assert machine.task.ioctl(machine.kvm, Ioctl.KVM_CHECK_EXTENSION, arg) == 0
