"""Limits of KVM's user interface, and refusals that a later check would have hidden."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.kvm import Ioctl, VmType
from swsnp.abi.psp_sev import SEV_ISSUE_CMD, SevIssueCmd, SevUserCommand, SevUserDataGetId2
from swsnp.abi.snp_command import Command, VlekLoad
from swsnp.hardware import BusError, GuestAccessFault, NestedPageFault, Shutdown
from swsnp.hardware.rmp import VMPL0_ALL, RmpEntry

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

    from swsnp.hardware import GuestExit
    from swsnp.hypervisor.memory import NestedPaging

PAGE = 4096
EINVAL, EFAULT, EEXIST = -errno.EINVAL, -errno.EFAULT, -errno.EEXIST
USER_END = 0x7FFF_FFFF_F000


@pytest.mark.parametrize("vm_type", [-1, 63, 64, 1 << 40])
def test_vm_types_are_bits_of_a_word(machine: Machine, vm_type: int) -> None:
    """KVM_CREATE_VM: a type outside of the mask is refused, however large the number."""
    assert machine.ioctl(machine.kvm, Ioctl.KVM_CREATE_VM, vm_type) == EINVAL


@pytest.mark.parametrize("request_number", [Ioctl.KVM_CREATE_VM, Ioctl.KVM_CREATE_VCPU])
def test_a_number_is_wanted(machine: Machine, request_number: int) -> None:
    """KVM_CREATE_VM and KVM_CREATE_VCPU take a number, no structure."""
    fd = machine.kvm if request_number == Ioctl.KVM_CREATE_VM else machine.create_vm()
    assert machine.task.ioctl(fd, request_number, bytearray(8)) == EINVAL


def test_user_memory_may_end_with_the_address_space(machine: Machine) -> None:
    """The model's end of user space, four-level page tables. UNVERIFIED: kernels differ in the last page."""
    vm = machine.create_vm()
    assert machine.slot(vm, userspace_addr=USER_END - PAGE, size=PAGE) == 0
    assert machine.slot(vm, userspace_addr=USER_END - PAGE, size=2 * PAGE, slot=1) == EINVAL


@pytest.mark.parametrize(
    ("size", "gpa", "result"),
    [
        (((1 << 31) - 1) * PAGE, 0, 0),
        ((1 << 31) * PAGE, 0, EINVAL),
        (PAGE, (1 << 64) - 2 * PAGE, 0),
        (PAGE, (1 << 64) - PAGE, EINVAL),
    ],
)
def test_the_largest_slot(machine: Machine, size: int, gpa: int, result: int) -> None:
    """Linux, KVM_MEM_MAX_NR_PAGES: 2^31 - 1 pages; and the range does not wrap."""
    assert machine.slot(machine.create_vm(), userspace_addr=PAGE, size=size, guest_phys_addr=gpa) == result


@pytest.mark.parametrize("size", [0, PAGE])
def test_attributes_end_below_the_wrap(machine: Machine, size: int) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES: address + size must not wrap to 0."""
    vm = machine.create_vm()
    assert machine.attributes(vm, (1 << 64) - 2 * PAGE, PAGE + size) == (EINVAL if size else 0)


def test_memfd_range_must_not_wrap(machine: Machine) -> None:
    """Linux, __kvm_set_memory_region: guest_memfd_offset + size that wraps is -EINVAL, before the fd."""
    vm = machine.create_vm()
    assert machine.slot(vm, memfd=99, guest_memfd_offset=(1 << 64) - 64 * PAGE) == EINVAL
    assert machine.slot(vm, memfd=99, guest_memfd_offset=(1 << 64) - 65 * PAGE) == -errno.EBADF


def test_a_vcpu_whose_vm_is_dead(boot: MakeMachine) -> None:
    """Linux, kvm_vcpu_ioctl: every ioctl of a vCPU of a dead VM is -EIO."""
    machine = boot()
    vm = machine.create_vm()
    vcpu = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    machine.vm(vm).bugged = True
    for request in (Ioctl.KVM_GET_MP_STATE, Ioctl.KVM_PRE_FAULT_MEMORY, Ioctl.KVM_RUN):
        assert machine.task.ioctl(vcpu, request, bytearray(4)) == -errno.EIO


def test_a_vcpu_that_exists_costs_nothing(boot: MakeMachine) -> None:
    """KVM_CREATE_VCPU with an id in use: -EEXIST before a processor is made for it."""
    made: list[int] = []
    processors: Callable[..., Any] = _processors(made)
    machine = boot(processors=processors)
    vm = machine.create_vm()
    assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 7) > 0
    assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 7) == EEXIST
    assert made == [7]


def _processors(made: list[int]) -> Callable[..., Any]:
    class Silent:
        ghcb_msr = 0

    def make(_memory: object, _name: str, vcpu: int) -> Silent:
        made.append(vcpu)
        return Silent()

    return make


def test_no_secure_processor_answers_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux, sev_ioctl: without the device -ENODEV, whatever the request."""
    monkeypatch.setattr(type(machine.host.driver), "present", property(lambda _: False))
    for request in (SEV_ISSUE_CMD, SEV_ISSUE_CMD + 1):
        assert machine.ioctl(machine.sev, request, 0) == -errno.ENODEV


@pytest.mark.parametrize(
    ("profile", "wanted"), [("linux-6.12", (-errno.EIO, 0)), ("linux-7.2", (EINVAL, 0xEEEE))]
)
def test_an_empty_update_goes_to_nobody(boot: MakeMachine, profile: str, wanted: tuple[int, int]) -> None:
    """KVM_SEV_SNP_LAUNCH_UPDATE of length 0: -EIO in 6.12, -EINVAL in 7.2; `error` is the model's choice."""
    machine = boot(profile)
    vm = machine.started()
    before = len(machine.chip.commands)
    result, error, left = machine.update(vm, 3, machine.put(bytes(PAGE)), length=0)
    assert (result, error) == wanted
    assert left.gfn_start == 3
    assert len(machine.chip.commands) == before


@pytest.mark.parametrize(("asid", "gpa"), [(2, 0x3000), (1, 0x5000)])
def test_a_validated_page_of_another(machine: Machine, asid: int, gpa: int) -> None:
    """AMD 24593, RMP: ASID and guest physical address of the entry must be those of the access."""
    memory = machine.vm(machine.started()).memory
    with pytest.raises(GuestAccessFault):
        memory.read(0x3000, 1, private=True)  # the first touch makes it the guest's, not yet validated
    page = next(slot for slot in memory.slots() if slot.has_memfd).memfd
    assert page is not None
    entry = RmpEntry(assigned=True, asid=asid, gpa=gpa, validated=True, permissions=VMPL0_ALL)
    machine.rmp[page.address + 0x3000] = entry
    with pytest.raises(GuestAccessFault) as caught:
        memory.read(0x3000, 1, private=True)
    assert isinstance(caught.value.reason, Shutdown)
    assert f"RMP has ASID {asid}, GPA {gpa:#x}" in caught.value.reason.reason


def test_a_mapping_of_exactly_what_is_discarded(machine: Machine) -> None:
    """MADV_DONTNEED: the whole mapping may go, one page more is -ENOMEM."""
    address = machine.task.allocate(2 * PAGE)
    machine.task.write(address, b"x")
    assert machine.task.discard(address, 3 * PAGE) == -errno.ENOMEM
    assert machine.task.read(address, 1) == b"x"
    assert machine.task.discard(address, 2 * PAGE) == 0
    assert machine.task.read(address, 1) == b"\0"


def test_memory_below_the_first_slot(machine: Machine) -> None:
    """KVM, gfn_to_memslot: a frame below every slot belongs to none."""
    vm = machine.create_vm()
    assert machine.slot(vm, guest_phys_addr=1 << 20) == 0
    memory = machine.vm(vm).memory
    assert memory.slot_at(0) is None
    with pytest.raises(BusError):
        memory.host_read(0, 1)


def _fault_of_two_pages(memory: NestedPaging, gpa: int, *, write: bool) -> GuestExit:
    try:
        if write:
            memory.write(gpa, bytes(2 * PAGE), private=False)
        else:
            memory.read(gpa, 2 * PAGE, private=False)
    except GuestAccessFault as fault:
        return fault.reason
    pytest.fail("the access was good")


def test_ranges_of_shared_pages_that_fault(machine: Machine) -> None:
    """A range faults where its first refused page does: no slot, no user memory, read-only, assigned."""
    vm = machine.create_vm()
    memory = machine.vm(vm).memory
    gap = machine.task.allocate(PAGE) + (1 << 30)
    rom, ram = machine.task.allocate(2 * PAGE), machine.task.allocate(3 * PAGE)
    assert machine.slot(vm, slot=0, size=2 * PAGE, guest_phys_addr=0x10000, userspace_addr=gap) == 0
    assert machine.slot(vm, slot=1, size=2 * PAGE, guest_phys_addr=0x20000, userspace_addr=rom, flags=2) == 0
    assert machine.slot(vm, slot=2, size=3 * PAGE, guest_phys_addr=0x30000, userspace_addr=ram) == 0
    for gpa, write in ((0x50000, False), (0x10000, False), (0x20000, True)):
        reason = _fault_of_two_pages(memory, gpa, write=write)
        assert reason == NestedPageFault(gpa, private=False, write=write)
    assert machine.host.driver.make_firmware(memory.host_page_address(0x31000)) == 0
    reason = _fault_of_two_pages(memory, 0x30000, write=True)
    assert isinstance(reason, Shutdown)
    assert "shared page 0x31000" in reason.reason
    assert memory.read(0x31000, 2 * PAGE, private=False) == bytes(2 * PAGE)


def test_a_page_that_the_firmware_keeps_is_lost(machine: Machine) -> None:
    """Linux, snp_reclaim_pages: when SNP_PAGE_RECLAIM fails the page is leaked, whatever its entry says."""
    driver = machine.host.driver
    page = machine.memory.allocate_page()
    machine.chip.answer(Command.SNP_PAGE_RECLAIM, 0x1A)
    assert driver.reclaim(page) == -errno.EIO
    assert page in driver.leaked


def test_pages_are_lent_to_a_firmware_with_snp_only(boot: MakeMachine) -> None:
    """`PspDriver.lend`: no page changes hands without SNP; a page that RMPUPDATE refuses is not lent."""
    machine = boot(snp_enabled=False)
    page = machine.memory.allocate_page()
    assert not machine.host.driver.lend(page)
    assert not machine.rmp[page].assigned
    machine = boot(prepare=lambda chip: chip.answer(Command.SNP_INIT_EX, 3))
    page = machine.memory.allocate_page()
    assert not machine.host.driver.lend(page)
    assert not machine.rmp[page].assigned
    machine = boot()
    page = machine.memory.allocate_page()
    machine.rmp[page] = RmpEntry(assigned=True, immutable=True, page_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(machine.host.driver), "make_firmware", lambda _self, _spa: EFAULT)
        assert not machine.host.driver.lend(page)


def test_a_vlek_is_not_taken_without_snp(boot: MakeMachine) -> None:
    """Linux 6.12, sev_ioctl_do_snp_vlek_load: -EINVAL before anything is read. Later kernels differ."""
    machine = boot(snp_enabled=False)
    stick = machine.put(bytes(432))
    data = machine.put(VlekLoad(length=VlekLoad.SIZE, vlek_wrapped_paddr=stick))
    arg = bytearray(bytes(SevIssueCmd(cmd=SevUserCommand.SNP_VLEK_LOAD, data=data)))
    before = len(machine.chip.commands)
    assert machine.task.ioctl(machine.sev, SEV_ISSUE_CMD, arg) == EINVAL
    assert len(machine.chip.commands) == before


def _get_id2(machine: Machine, **fields: int) -> int:
    data = machine.put(SevUserDataGetId2(**fields))
    arg = bytearray(bytes(SevIssueCmd(cmd=SevUserCommand.SEV_GET_ID2, data=data)))
    return machine.task.ioctl(machine.sev, SEV_ISSUE_CMD, arg)


def test_get_id2_takes_a_page(machine: Machine) -> None:
    """SEV_GET_ID2: a buffer of one page is not too large."""
    assert _get_id2(machine, address=machine.task.allocate(PAGE), length=PAGE) == 0
    assert _get_id2(machine, address=machine.task.allocate(2 * PAGE), length=PAGE + 1) == -errno.ENOMEM


def test_get_id2_whose_argument_vanishes(machine: Machine) -> None:
    """SEV_GET_ID2: an argument that another thread unmaps meanwhile is -EFAULT, and the id goes nowhere."""
    target = machine.task.allocate(PAGE)
    data = machine.put(SevUserDataGetId2(address=target, length=64))
    effect = machine.chip._effect

    def unmap(command: int, raw: bytes, buffer: int) -> None:
        if command == Command.GET_ID:
            machine.task.free(data)
        effect(command, raw, buffer)

    machine.chip._effect = unmap  # type: ignore[method-assign]
    arg = bytearray(bytes(SevIssueCmd(cmd=SevUserCommand.SEV_GET_ID2, data=data)))
    assert machine.task.ioctl(machine.sev, SEV_ISSUE_CMD, arg) == EFAULT
    assert machine.task.read(target, 64) == bytes(64)


def test_large_mappings_are_aligned(machine: Machine) -> None:
    """`HostTask.allocate`: a mapping of 2 MiB and more starts at a multiple of that, the limit included."""
    machine.task.allocate(PAGE)
    assert machine.task.allocate(2 << 20) % (2 << 20) == 0


def test_nothing_to_discard(machine: Machine) -> None:
    """MADV_DONTNEED of what is not mapped: -ENOMEM."""
    assert machine.task.discard(0x1000, PAGE) == -errno.ENOMEM


def test_the_offset_is_looked_at_before_the_descriptor(machine: Machine) -> None:
    """Linux, __kvm_set_memory_region: a misaligned guest_memfd_offset is -EINVAL, whatever the descriptor."""
    vm = machine.create_vm()
    assert machine.slot(vm, memfd=99, guest_memfd_offset=1) == EINVAL
    assert machine.slot(vm, memfd=99, guest_memfd_offset=PAGE) == -errno.EBADF


def test_a_vm_without_sev_ends(machine: Machine) -> None:
    """A VM that was never initialised for SNP ends without a command to the firmware."""
    vm = machine.create_vm(VmType.DEFAULT)
    before = len(machine.chip.commands)
    assert machine.task.close(vm) == 0
    assert len(machine.chip.commands) == before


@pytest.mark.parametrize(("profile", "result"), [("linux-6.12", EINVAL), ("linux-7.2", 0)])
def test_smt_is_left_to_the_firmware_later(boot: MakeMachine, profile: str, result: int) -> None:
    """Linux, snp_launch_start: 6.12 refuses a policy without SMT, 7.2 leaves it to the firmware."""
    machine = boot(profile)
    vm = machine.create_vm()
    assert machine.init2(vm) == 0
    assert machine.start(vm, policy=0x20000)[0] == result
