"""guest_memfd, memslots and memory attributes: what the ioctls accept and refuse."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import Ioctl
from swsnp.hardware import PageState

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

PAGE = 4096
RAM = 64 * PAGE
EINVAL, EEXIST, EBADF, EFAULT = -errno.EINVAL, -errno.EEXIST, -errno.EBADF, -errno.EFAULT


@pytest.mark.parametrize(
    ("size", "flags", "good"),
    [
        (PAGE, 0, True),
        (1 << 40, 0, True),
        (0, 0, False),
        (100, 0, False),
        (PAGE + 1, 0, False),
        (1 << 63, 0, False),
        (PAGE, 1, False),
        (PAGE, 2, False),
        (PAGE, 1 << 63, False),
    ],
)
def test_create_guest_memfd(machine: Machine, size: int, flags: int, good: bool) -> None:
    """KVM_CREATE_GUEST_MEMFD: a positive number of whole pages, no flags."""
    wanted = kvm.KvmCreateGuestMemfd(size=size, flags=flags)
    result = machine.ioctl(machine.create_vm(), Ioctl.KVM_CREATE_GUEST_MEMFD, wanted)
    assert result > 0 if good else result == EINVAL


@pytest.mark.parametrize(
    "request_number",
    [Ioctl.KVM_CREATE_GUEST_MEMFD, Ioctl.KVM_SET_USER_MEMORY_REGION2, Ioctl.KVM_SET_MEMORY_ATTRIBUTES],
)
@pytest.mark.parametrize("arg", [0, 0x1000, bytearray(7)])
def test_unreadable(machine: Machine, request_number: int, arg: int | bytearray) -> None:
    """KVM: an argument that is not the structure is -EFAULT."""
    assert machine.task.ioctl(machine.create_vm(), request_number, arg) == EFAULT


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"guest_phys_addr": 1}, EINVAL),
        ({"memory_size": 100}, EINVAL),
        ({"userspace_addr": 0x7F0000000800}, EINVAL),
        ({"userspace_addr": 0x7FFFFFFFF000}, EINVAL),
        ({"userspace_addr": 1 << 63}, EINVAL),
        ({"flags": 8}, EINVAL),
        ({"flags": 1 << 31}, EINVAL),
        ({"slot": 1 << 16}, EINVAL),
        ({"slot": 32764}, EINVAL),
        ({"guest_phys_addr": (1 << 64) - PAGE}, EINVAL),
        ({"memory_size": 0}, EINVAL),  # deletes a slot that is not there
        ({"guest_phys_addr": 1 << 40}, 0),
        ({"slot": 32763}, 0),
        ({"flags": 1}, 0),
        ({"flags": 2}, 0),
    ],
)
def test_region_fields(machine: Machine, fields: dict[str, int], result: int) -> None:
    """KVM_SET_USER_MEMORY_REGION2 without guest_memfd: alignment, wrap, user range, slot number, flags."""
    assert machine.slot(machine.create_vm(), **fields) == result


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"guest_memfd_offset": 1}, EINVAL),
        ({"guest_memfd_offset": PAGE}, EINVAL),  # ends behind the file
        ({"guest_memfd_offset": (1 << 64) - PAGE}, EINVAL),
        ({"guest_memfd": 99}, EBADF),
        ({"guest_memfd": 3}, EINVAL),
        ({"flags": 4 | 1}, EINVAL),
        ({"flags": 4 | 2}, EINVAL),
        ({"guest_memfd_offset": PAGE, "memory_size": RAM - PAGE}, 0),
    ],
)
def test_memfd_region_fields(machine: Machine, fields: dict[str, int], result: int) -> None:
    """A slot with guest_memfd: range inside the file, not read-only or dirty-logged, a guest_memfd."""
    vm = machine.create_vm()
    memfd = machine.memfd(vm)
    assert machine.slot(vm, **{"memfd": memfd, "guest_memfd": memfd, **fields}) == result


@pytest.mark.parametrize("profile", ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"])
@pytest.mark.parametrize("fields", [{"guest_memfd_offset": 1}, {"guest_memfd_offset": (1 << 64) - PAGE}])
@pytest.mark.parametrize("flags", [0, 1, 2])
def test_memfd_fields_without_the_flag(
    boot: MakeMachine, profile: str, fields: dict[str, int], flags: int
) -> None:
    """Linux, __kvm_set_memory_region: without KVM_MEM_GUEST_MEMFD nobody looks at the file or its range."""
    machine = boot(profile)
    vm = machine.create_vm()
    assert machine.slot(vm, flags=flags, guest_memfd=99, **fields) == 0
    assert not machine.vm(vm).memory.slots()[0].has_memfd


def test_memfd_of_another_vm(machine: Machine) -> None:
    """A guest_memfd serves only the VM that made it: -EINVAL."""
    other = machine.memfd(machine.create_vm())
    assert machine.slot(machine.create_vm(), memfd=other) == EINVAL


def test_memfd_slot_needs_private_memory(machine: Machine) -> None:
    """A VM whose type has no private memory knows neither the slot flag nor the attribute: -EINVAL."""
    vm = machine.create_vm(kvm.VmType.DEFAULT)
    assert machine.slot(vm, memfd=machine.memfd(vm)) == EINVAL
    assert machine.attributes(vm, 0, PAGE) == EINVAL
    assert machine.attributes(vm, 0, PAGE, attributes=0) == 0


def test_memfd_range_bound_twice(machine: Machine) -> None:
    """The same file range bound twice: -EEXIST; free again once its slot is deleted."""
    vm = machine.create_vm()
    memfd = machine.memfd(vm)
    assert machine.slot(vm, memfd=memfd) == 0
    again: dict[str, Any] = {
        "slot": 1,
        "guest_phys_addr": 1 << 32,
        "size": PAGE,
        "guest_memfd_offset": 5 * PAGE,
    }
    assert machine.slot(vm, memfd=memfd, **again) == EEXIST
    assert machine.slot(vm, size=0) == 0
    assert machine.slot(vm, memfd=memfd, **again) == 0


def test_memfd_slot_is_only_deleted(machine: Machine) -> None:
    """A guest_memfd slot cannot be moved or changed, not even to itself: -EINVAL."""
    vm = machine.create_vm()
    memfd = machine.memfd(vm)
    user = machine.task.allocate(RAM)
    assert machine.slot(vm, memfd=memfd, userspace_addr=user) == 0
    assert machine.slot(vm, memfd=memfd, userspace_addr=user) == EINVAL
    assert machine.slot(vm, memfd=memfd, userspace_addr=user, guest_phys_addr=1 << 32) == EINVAL
    assert machine.slot(vm, size=0) == 0
    assert machine.vm(vm).memory.slots() == ()


def test_slots_overlap_and_move(machine: Machine) -> None:
    """Slots never overlap (-EEXIST); a plain slot can be moved, but not resized or given other memory."""
    vm = machine.create_vm()
    user = machine.task.allocate(RAM)
    assert machine.slot(vm, userspace_addr=user) == 0
    assert machine.slot(vm, slot=1, guest_phys_addr=RAM - PAGE) == EEXIST
    assert machine.slot(vm, userspace_addr=user, guest_phys_addr=PAGE) == 0
    assert machine.slot(vm, slot=1, size=PAGE) == 0
    assert machine.slot(vm, userspace_addr=user, guest_phys_addr=0) == EEXIST
    assert machine.slot(vm, userspace_addr=user, guest_phys_addr=PAGE, size=PAGE) == EINVAL
    assert machine.slot(vm, guest_phys_addr=PAGE) == EINVAL
    assert machine.slot(vm, userspace_addr=user, guest_phys_addr=PAGE, flags=2) == EINVAL
    assert [(slot.gpa, slot.number) for slot in machine.vm(vm).memory.slots()] == [(0, 1), (PAGE, 0)]


@pytest.mark.parametrize(
    ("address", "size", "attributes", "flags"),
    [
        (0, 0, 8, 0),
        (1, PAGE, 8, 0),
        (0, 100, 8, 0),
        (0, PAGE, 8, 1),
        (0, PAGE, 1, 0),
        (0, PAGE, 12, 0),
        ((1 << 64) - PAGE, 2 * PAGE, 8, 0),
    ],
)
def test_attributes_refused(machine: Machine, address: int, size: int, attributes: int, flags: int) -> None:
    """KVM_SET_MEMORY_ATTRIBUTES: zero size, misalignment, wrap, unknown bits, flags: -EINVAL."""
    vm = machine.create_vm()
    assert machine.attributes(vm, address, size, attributes, flags) == EINVAL
    assert machine.vm(vm).memory.attributes.run(0) == (0, 1 << 64, 0)


def test_attributes(machine: Machine) -> None:
    """Every frame is shared at first; setting works where no slot is, and the current value is a no-op."""
    vm = machine.create_vm()
    for _ in range(2):
        assert machine.attributes(vm, 1 << 32, 4 << 30) == 0
    attributes = machine.vm(vm).memory.attributes
    assert attributes.run(1 << 20) == (1 << 20, 2 << 20, 8)
    assert attributes.get((1 << 20) - 1) == 0
    assert machine.attributes(vm, 1 << 32, PAGE, 0) == 0
    assert attributes.run(1 << 20) == (0, (1 << 20) + 1, 0)


# Discarding


def test_punch_hole(machine: Machine) -> None:
    """PUNCH_HOLE: pages go back to the hypervisor and read as zeros."""
    vm = machine.started()
    memfd = next(fd for fd in range(5, 20) if machine.task.discard_memfd(fd, 0, 0) == EINVAL)
    machine.update(vm, 1, b"\x31" * 3 * PAGE)
    memory = machine.vm(vm).memory
    pages = [memory.private_page_address(gfn * PAGE) for gfn in (1, 2, 3)]
    assert machine.task.discard_memfd(memfd, 2 * PAGE, PAGE) == 0
    states = [machine.rmp.state(page) for page in pages]
    assert states == [PageState.GUEST_VALID, PageState.HYPERVISOR, PageState.GUEST_VALID]
    assert [machine.memory.read(page, 1) for page in pages] == [b"\x31", b"\0", b"\x31"]
    assert machine.task.discard_memfd(memfd, 0, 1 << 40) == 0
    assert {machine.rmp.state(page) for page in pages} == {PageState.HYPERVISOR}


def test_punch_large_hole(machine: Machine) -> None:
    """A hole larger than what the guest has: pages beside it stay the guest's."""
    vm = machine.started()
    memfd = next(fd for fd in range(5, 20) if machine.task.discard_memfd(fd, 0, 0) == EINVAL)
    for gfn in (9, 20):
        machine.update(vm, gfn, b"\x31" * PAGE)
    memory = machine.vm(vm).memory
    assert machine.task.discard_memfd(memfd, 10 * PAGE, 10 * PAGE) == 0
    for gfn in (9, 20):
        assert machine.rmp.state(memory.private_page_address(gfn * PAGE)) is PageState.GUEST_VALID
    assert machine.task.discard_memfd(memfd, 9 * PAGE, 11 * PAGE) == 0
    assert machine.rmp.state(memory.private_page_address(9 * PAGE)) is PageState.HYPERVISOR
    assert machine.rmp.state(memory.private_page_address(20 * PAGE)) is PageState.GUEST_VALID


@pytest.mark.parametrize(("offset", "size"), [(1, PAGE), (0, 1), (0, 0), (0, -PAGE), (-PAGE, PAGE)])
def test_punch_hole_arguments(machine: Machine, offset: int, size: int) -> None:
    """PUNCH_HOLE on a guest_memfd works on whole pages: -EINVAL otherwise."""
    assert machine.task.discard_memfd(machine.memfd(machine.create_vm()), offset, size) == EINVAL


def test_punch_hole_descriptors(machine: Machine) -> None:
    """-EBADF for a closed descriptor, -EOPNOTSUPP for a file without such memory; the file has no ioctl."""
    assert machine.task.discard_memfd(99, 0, PAGE) == EBADF
    assert machine.task.discard_memfd(machine.kvm, 0, PAGE) == -errno.EOPNOTSUPP
    assert machine.ioctl(machine.memfd(machine.create_vm()), Ioctl.KVM_RUN) == -errno.ENOTTY


def test_punch_hole_keeps_a_page_of_the_firmware(machine: Machine) -> None:
    """A page that RMPUPDATE refuses stays as it is; Linux only warns."""
    vm = machine.started()
    machine.update(vm, 0, bytes(PAGE))
    memory = machine.vm(vm).memory
    page = memory.private_page_address(0)
    machine.chip._set(page, immutable=True)
    slot = memory.slot_at(0)
    assert slot is not None
    assert slot.memfd is not None
    assert slot.memfd.punch(0, PAGE) == 0
    assert machine.rmp.state(page) is PageState.PRE_SWAP
