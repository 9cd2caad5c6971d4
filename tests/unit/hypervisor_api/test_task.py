"""A host process: descriptors and address space."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import Ioctl
from swsnp.abi.snp_command import Command, FirmwareStatus
from swsnp.errors import UsageError
from swsnp.hardware import BusError, PageState
from swsnp.hardware.memory import SystemMemory

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

PAGE = 4096
EBADF, EINVAL, EIO = -errno.EBADF, -errno.EINVAL, -errno.EIO


def test_open(machine: Machine) -> None:
    """Descriptors count from 3, the lowest free one first; a device that is not there is -ENOENT."""
    assert (machine.kvm, machine.sev) == (3, 4)
    assert machine.task.open("/dev/kvm") == 5
    assert machine.task.close(3) == 0
    assert machine.task.open("/dev/sev") == 3
    assert machine.task.open("/dev/null") == -errno.ENOENT


def test_no_secure_processor(boot: MakeMachine) -> None:
    """Without a secure processor there is no /dev/sev."""
    machine = boot(mailbox=None, snp_enabled=False)
    assert machine.sev == -errno.ENOENT


def test_closed_descriptor(machine: Machine) -> None:
    """-EBADF for close and ioctl."""
    assert machine.task.close(9) == EBADF
    assert machine.task.ioctl(9, Ioctl.KVM_RUN) == EBADF
    assert machine.task.descriptor(9) is None


@pytest.mark.parametrize("fd", [3, 99])
def test_map_vcpu(machine: Machine, fd: int) -> None:
    """Only a vCPU can be mapped."""
    with pytest.raises(UsageError, match="wanted a vCPU"):
        machine.task.map_vcpu(fd)


def test_memory(machine: Machine) -> None:
    """Anonymous memory: zeros, page aligned, in whole pages, apart from each other."""
    first, second = machine.task.allocate(1), machine.task.allocate(3 << 20)
    assert first % PAGE == 0
    assert second % (2 << 20) == 0
    assert machine.task.read(first, PAGE) == bytes(PAGE)
    machine.task.write(first + PAGE - 1, b"x")
    assert machine.task.read(first + PAGE - 1, 1) == b"x"
    assert machine.memory.read(machine.task.translate(first, PAGE) + PAGE - 1, 1) == b"x"
    assert machine.task.extent(first + 10) == (machine.task.translate(first) + 10, PAGE - 10)


def test_memory_for_other_processes(boot: MakeMachine) -> None:
    """memfd_create(2) and mmap(2): a descriptor for such a mapping, as long as it is there."""
    machine = boot(memory=SystemMemory(shareable=True))
    address, plain = machine.task.allocate(PAGE, passable=True), machine.task.allocate(PAGE)
    fd = machine.task.memfd_of(address)
    assert fd is not None
    machine.task.write(address, b"there")
    assert os.pread(fd, 5, 0) == b"there"
    assert machine.task.memfd_of(plain) is None
    assert machine.task.memfd_of(address + PAGE) is None
    machine.task.free(address)
    assert machine.task.memfd_of(address) is None


def test_unmapped(machine: Machine) -> None:
    """BusError for an access that is not wholly inside one mapping."""
    address = machine.task.allocate(PAGE)
    for bad, size in ((address + PAGE, 1), (address + 1, PAGE), (address - 1, 2), (0, 1)):
        with pytest.raises(BusError, match="not mapped"):
            machine.task.read(bad, size)
        with pytest.raises(BusError, match="not mapped"):
            machine.task.write(bad, bytes(size))
    machine.task.free(address)
    with pytest.raises(BusError):
        machine.task.read(address, 1)


def test_misuse(machine: Machine) -> None:
    """What no program would ask for is the caller's error."""
    with pytest.raises(UsageError, match="positive"):
        machine.task.allocate(0)
    with pytest.raises(UsageError, match="no mapping starts"):
        machine.task.free(machine.task.allocate(2 * PAGE) + PAGE)


def test_discard(machine: Machine) -> None:
    """MADV_DONTNEED: whole pages read as zeros; -EINVAL misaligned, -ENOMEM unmapped."""
    address = machine.task.allocate(3 * PAGE)
    machine.task.write(address, b"x" * 3 * PAGE)
    assert machine.task.discard(address + PAGE, 1) == 0
    assert machine.task.read(address, 3 * PAGE) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
    assert machine.task.discard(address + 1, PAGE) == EINVAL
    assert machine.task.discard(address, -PAGE) == EINVAL
    assert machine.task.discard(address, 4 * PAGE) == -errno.ENOMEM
    assert machine.task.discard(address, 0) == 0


# The end of a VM


def _fds(machine: Machine) -> list[int]:
    return [fd for fd in range(3, 40) if machine.task.descriptor(fd) is not None]


@pytest.mark.parametrize("order", [1, -1])
def test_vm_ends_with_its_last_file(machine: Machine, order: int) -> None:
    """KVM: VM, vCPU and guest_memfd files hold the VM; closing the last frees all pages."""
    vm = machine.started(vcpus=2)
    assert machine.finish(vm) == (0, 0)
    state = machine.vm(vm)
    sev = state.sev
    assert sev is not None
    pages = [sev.response_page, sev.gctx or 0, *state.vmsa_pages.values()]
    assert len(pages) == 4
    mine = [fd for fd in _fds(machine) if fd > 4][::order]
    for fd in mine[:-1]:
        machine.task.close(fd)
    assert machine.chip.issued(Command.SNP_DECOMMISSION) == []
    machine.task.close(mine[-1])
    assert len(machine.chip.issued(Command.SNP_DECOMMISSION)) == 1
    assert {machine.rmp.state(page) for page in pages} == {PageState.HYPERVISOR}
    assert machine.host.driver.leaked == []
    assert machine.rmp._entries == {}


def test_response_page_is_freed_before_the_context(machine: Machine) -> None:
    """KVM: the response page is reclaimed before the guest context is decommissioned."""
    vm = machine.started()
    before = len(machine.chip.commands)
    machine.task.exit()
    reclaimed = [command for command, _ in machine.chip.commands[before:]]
    assert reclaimed == [Command.SNP_PAGE_RECLAIM, Command.SNP_DECOMMISSION, Command.SNP_PAGE_RECLAIM]
    assert machine.task.close(vm) == EBADF


def test_end_of_a_process(machine: Machine) -> None:
    """A process that ends closes its files and unmaps its memory."""
    address = machine.put(b"x")
    machine.started(vcpus=1)
    machine.task.exit()
    assert _fds(machine) == []
    assert machine.task.extent(address) is None
    assert machine.rmp._entries == {}


def test_response_page_lost(machine: Machine) -> None:
    """KVM: a response page that cannot be reclaimed is lost and counted; its page is never used again."""
    vm = machine.started()
    sev = machine.vm(vm).sev
    assert sev is not None
    machine.chip.answer(Command.SNP_PAGE_RECLAIM, FirmwareStatus.INVALID_PAGE_STATE)
    machine.task.exit()
    assert machine.host.driver.leaked == [sev.response_page]
    assert machine.rmp.state(sev.response_page) is PageState.FIRMWARE
    assert sev.response_page not in [machine.memory.allocate_page() for _ in range(600)]


def test_context_not_released(boot: MakeMachine) -> None:
    """KVM: a context that SNP_DECOMMISSION does not end keeps its page and its ASID for good."""
    machine = boot(max_asid=1)
    vm = machine.started()
    sev = machine.vm(vm).sev
    assert sev is not None
    machine.chip.answer(Command.SNP_DECOMMISSION, FirmwareStatus.INVALID_PARAM)
    machine.task.exit()
    assert machine.rmp.state(sev.gctx or 0) is PageState.CONTEXT
    other = machine.host.task("vm1")
    fd = other.ioctl(other.open("/dev/kvm"), Ioctl.KVM_CREATE_VM, kvm.VmType.SNP)
    data = other.allocate(48)
    arg = bytearray(bytes(kvm.KvmSevCmd(id=22, data=data)))
    assert other.ioctl(fd, Ioctl.KVM_MEMORY_ENCRYPT_OP, arg) == -errno.EBUSY


def test_vmsa_page_lost(machine: Machine) -> None:
    """A VMSA page that RMPUPDATE does not take back is lost."""
    vm = machine.started(vcpus=1)
    machine.finish(vm)
    page = machine.vm(vm).vmsa_pages[0]
    machine.chip._set(page, immutable=True)
    machine.task.exit()
    assert machine.host.driver.leaked == [page]


def test_processes_are_apart(machine: Machine) -> None:
    """Descriptors and addresses belong to one process; VMs carry its name."""
    other = machine.host.task("vm1")
    assert other.descriptor(machine.kvm) is None
    address = machine.put(b"mine")
    assert other.extent(address) is None
    assert machine.vm(machine.create_vm()).name == "vm0"
