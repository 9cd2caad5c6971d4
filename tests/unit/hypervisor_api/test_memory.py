"""A VM's memory as guest code, KVM and the VMM see it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from swsnp.hardware import (
    BusError,
    GuestAccessFault,
    NestedPageFault,
    PageState,
    RmpUpdate,
    Shutdown,
)

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine

    from swsnp.hypervisor.memory import NestedPaging

PAGE = 4096
RAM = 64 * PAGE
SHARED = 32 * PAGE
"""The upper half of the VM below is shared."""


@pytest.fixture
def vm(machine: Machine) -> int:
    """A started VM: 64 pages from GPA 0, the first 32 private."""
    fd = machine.started()
    assert machine.attributes(fd, SHARED, RAM - SHARED, 0) == 0
    return fd


@pytest.fixture
def memory(machine: Machine, vm: int) -> NestedPaging:
    """Its memory."""
    return machine.vm(vm).memory


def _fault(memory: NestedPaging, gpa: int, *, private: bool, write: bool) -> object:
    try:
        if write:
            memory.write(gpa, b"x", private=private)
        else:
            memory.read(gpa, 1, private=private)
    except GuestAccessFault as fault:
        return fault.reason
    pytest.fail(f"access at {gpa:#x} did not fault")


# Guest code


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("gpa", "private"), [(SHARED + 5, True), (SHARED - 1, False), (RAM, False), (RAM, True), (1 << 50, True)]
)
def test_nested_page_fault(memory: NestedPaging, gpa: int, private: bool, write: bool) -> None:
    """KVM: an access whose C-bit differs from the attribute, or where no slot is, is a fault of that page."""
    expected = NestedPageFault(gpa & -PAGE, private=private, write=write)
    assert _fault(memory, gpa, private=private, write=write) == expected


def test_shared_memory_is_the_users(machine: Machine, memory: NestedPaging) -> None:
    """Shared guest memory is the VMM's own mapping, both ways."""
    user = memory.slots()[0].user_address
    memory.write(SHARED + 100, b"from guest", private=False)
    assert machine.task.read(user + SHARED + 100, 10) == b"from guest"
    machine.task.write(user + SHARED + 100, b"from host!")
    assert memory.read(SHARED + 100, 10, private=False) == b"from host!"


def test_across_pages(memory: NestedPaging) -> None:
    """An access over page boundaries is one access; it stops at the first page that faults."""
    data = bytes(range(256)) * 40
    memory.write(SHARED + 4000, data, private=False)
    assert memory.read(SHARED + 4000, len(data), private=False) == data
    assert memory.host_read(SHARED + 4000, len(data)) == data
    with pytest.raises(GuestAccessFault) as caught:
        memory.read(SHARED - 10, 20, private=False)
    assert caught.value.reason == NestedPageFault(SHARED - PAGE, private=False, write=False)
    with pytest.raises(GuestAccessFault):
        memory.read(RAM - 10, 20, private=False)


def test_empty_access(memory: NestedPaging) -> None:
    """Nothing read, nothing written."""
    assert memory.read(SHARED, 0, private=False) == b""
    memory.write(SHARED, b"", private=False)


@pytest.mark.parametrize("write", [False, True])
def test_first_touch_then_not_validated(machine: Machine, memory: NestedPaging, write: bool) -> None:
    """KVM: the first private access assigns the page; the guest gets #VC until it validates."""
    spa = memory.private_page_address(3 * PAGE)
    assert machine.rmp.state(spa) is PageState.HYPERVISOR
    reason = _fault(memory, 3 * PAGE + 8, private=True, write=write)
    assert isinstance(reason, Shutdown)
    assert "0x3000 is Guest-Invalid: not validated" in reason.reason
    entry = machine.rmp[spa]
    assert (entry.assigned, entry.asid, entry.gpa, entry.immutable) == (True, 1, 3 * PAGE, False)


def test_validated_page(machine: Machine, memory: NestedPaging) -> None:
    """PVALIDATE: 0 and no carry for a change, carry without; private bytes lie in the guest_memfd only."""
    assert memory.pvalidate(PAGE, validate=True) == (0, False)
    assert memory.pvalidate(PAGE, validate=True) == (0, True)
    memory.write(PAGE + 1, b"secret", private=True)
    assert memory.read(PAGE, 8, private=True) == b"\0secret\0"
    assert memory.host_read(PAGE, 8) == bytes(8)
    assert machine.memory.read(memory.private_page_address(PAGE + 1), 8) == b"\0secret\0"
    assert memory.pvalidate(PAGE, validate=False) == (0, False)
    assert isinstance(_fault(memory, PAGE, private=True, write=False), Shutdown)


@pytest.mark.parametrize("gpa", [SHARED, RAM])
def test_pvalidate_faults(memory: NestedPaging, gpa: int) -> None:
    """PVALIDATE and RMPADJUST of a page that is shared or absent: nested page fault, as a private write."""
    expected = NestedPageFault(gpa, private=True, write=True)
    with pytest.raises(GuestAccessFault) as caught:
        memory.pvalidate(gpa, validate=True)
    assert caught.value.reason == expected
    with pytest.raises(GuestAccessFault) as caught:
        memory.rmpadjust(gpa, vmpl=1, permissions=1, vmsa=False)
    assert caught.value.reason == expected


def test_misaligned_instructions(memory: NestedPaging) -> None:
    """PVALIDATE and RMPADJUST want a page address: FAIL_INPUT."""
    assert memory.pvalidate(8, validate=True) == (1, False)
    assert memory.rmpadjust(8, vmpl=1, permissions=0, vmsa=True) == 1


def test_rmpadjust(machine: Machine, memory: NestedPaging) -> None:
    """RMPADJUST: permissions and the VMSA bit of a validated page; VMPL0 itself is FAIL_PERMISSION."""
    with pytest.raises(GuestAccessFault):
        memory.rmpadjust(0, vmpl=1, permissions=0, vmsa=True)
    memory.pvalidate(0, validate=True)
    assert memory.rmpadjust(0, vmpl=0, permissions=0, vmsa=True) == 2
    assert memory.rmpadjust(0, vmpl=1, permissions=3, vmsa=True) == 0
    entry = machine.rmp[memory.private_page_address(0)]
    assert (entry.vmsa, entry.permissions) == (True, (0x1F, 3, 0, 0))


@pytest.mark.parametrize(("asid", "gpa"), [(2, 0), (1, PAGE), (0, 0)])
def test_page_of_another(machine: Machine, memory: NestedPaging, asid: int, gpa: int) -> None:
    """A page that the RMP gives to another guest, another GPA or the firmware is not reached."""
    spa = memory.private_page_address(0)
    machine.rmp.rmpupdate(spa, RmpUpdate(assigned=True, asid=asid, gpa=gpa, immutable=not asid))
    assert isinstance(_fault(memory, 0, private=True, write=True), Shutdown)
    with pytest.raises(GuestAccessFault) as caught:
        memory.pvalidate(0, validate=True)
    assert caught.value.reason == NestedPageFault(0, private=True, write=True)


def test_first_touch_refused(machine: Machine, memory: NestedPaging) -> None:
    """KVM: a page that RMPUPDATE does not assign (HV-Fixed) cannot be mapped: memory fault."""
    spa = memory.private_page_address(0)
    machine.rmp.rmpupdate(spa, RmpUpdate(immutable=True))
    assert machine.rmp.state(spa) is PageState.HV_FIXED
    expected = NestedPageFault(0, private=True, write=False)
    assert _fault(memory, 0, private=True, write=False) == expected


def test_immutable_page(machine: Machine, memory: NestedPaging) -> None:
    """A validated page that the hypervisor made immutable (Pre-Swap) is the firmware's, not the guest's."""
    memory.pvalidate(0, validate=True)
    memory.write(0, b"x", private=True)
    spa = memory.private_page_address(0)
    machine.rmp.rmpupdate(spa, RmpUpdate(assigned=True, asid=1, gpa=0, immutable=True))
    assert machine.rmp.state(spa) is PageState.PRE_SWAP
    assert isinstance(_fault(memory, 0, private=True, write=False), Shutdown)


def test_guest_write_to_an_assigned_shared_page(machine: Machine, memory: NestedPaging) -> None:
    """A shared page that the firmware owns (the series' response page): guest writes fault, reads work."""
    memory.write(SHARED, b"before", private=False)
    machine.host.driver.make_firmware(memory.host_page_address(SHARED))
    assert memory.read(SHARED, 6, private=False) == b"before"
    assert isinstance(_fault(memory, SHARED, private=False, write=True), Shutdown)


def test_conversion_changes_what_is_seen(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """A page converted and back: accesses follow the attribute at once, also after it was used before."""
    memory.write(SHARED, b"shared", private=False)
    machine.attributes(vm, SHARED, PAGE)
    assert _fault(memory, SHARED, private=False, write=False) == NestedPageFault(
        SHARED, private=False, write=False
    )
    memory.pvalidate(SHARED, validate=True)
    memory.write(SHARED, b"hidden", private=True)
    assert memory.host_read(SHARED, 6) == b"shared"
    machine.attributes(vm, SHARED, PAGE, 0)
    assert memory.read(SHARED, 6, private=False) == b"shared"
    assert isinstance(_fault(memory, SHARED, private=True, write=False), NestedPageFault)


@pytest.mark.parametrize(
    "before", [0, SHARED - PAGE, RAM - PAGE, RAM, RAM + 3 * PAGE, RAM + 4 * PAGE, 2 * RAM]
)
@pytest.mark.parametrize("gpa", [0, SHARED - PAGE, SHARED, RAM - PAGE, RAM, RAM + 3 * PAGE, RAM + 5 * PAGE])
def test_what_was_looked_at_before_is_not_taken_for_another(
    machine: Machine, vm: int, memory: NestedPaging, before: int, gpa: int
) -> None:
    """A private run ends where the attribute changes and where the memslot does: page by page, as in KVM."""
    machine.slot(vm, slot=1, memfd=machine.memfd(vm), guest_phys_addr=RAM)
    # slot 1 lies behind slot 0 in guest memory, but in a file of its own
    machine.attributes(vm, RAM - 2 * PAGE, RAM + 2 * PAGE)
    machine.attributes(vm, RAM + 4 * PAGE, PAGE, 0)
    with suppress(GuestAccessFault):
        memory.pvalidate(before, validate=True)
    if gpa == SHARED:
        with pytest.raises(GuestAccessFault):
            memory.pvalidate(gpa, validate=True)
        return
    assert memory.pvalidate(gpa, validate=True) == (0, gpa == before)
    entry = machine.rmp[memory.private_page_address(gpa)]
    assert (entry.state, entry.gpa) == (PageState.GUEST_VALID, gpa)
    machine.attributes(vm, gpa, PAGE, 0)
    with pytest.raises(GuestAccessFault):
        memory.pvalidate(gpa, validate=False)


def test_private_without_memfd(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """A private page in a slot without guest_memfd: memory fault."""
    machine.slot(vm, slot=1, guest_phys_addr=1 << 32, size=PAGE)
    machine.attributes(vm, 1 << 32, PAGE)
    assert isinstance(_fault(memory, 1 << 32, private=True, write=True), NestedPageFault)
    with pytest.raises(BusError, match="guest_memfd"):
        memory.private_page_address(1 << 32)


def test_private_memory_before_init2(machine: Machine) -> None:
    """Without an ASID there is no RMP check: nothing is assigned."""
    vm = machine.create_vm()
    memory = machine.ram(vm)
    memory.write(0, b"x", private=True)
    assert memory.read(0, 1, private=True) == b"x"
    assert machine.rmp.state(memory.private_page_address(0)) is PageState.HYPERVISOR


# KVM itself


def test_host_access_ignores_attributes(memory: NestedPaging) -> None:
    """KVM reads and writes through the memslot's user mapping, also where the guest has private memory."""
    memory.host_write(0, b"not for the guest")
    assert memory.host_read(0, 17) == b"not for the guest"
    memory.pvalidate(0, validate=True)
    assert memory.read(0, 17, private=True) == bytes(17)


@pytest.mark.parametrize("gpa", [RAM, RAM - 1, 1 << 51])
def test_host_access_without_slot(memory: NestedPaging, gpa: int) -> None:
    """KVM: no memslot under some byte is a failure of the whole access."""
    with pytest.raises(BusError):
        memory.host_read(gpa, 2)
    with pytest.raises(BusError):
        memory.host_write(gpa, b"xy")
    with pytest.raises(BusError):
        memory.host_view(gpa, 2)


def test_page_addresses_without_slot(memory: NestedPaging) -> None:
    """No page behind a GPA without memslot."""
    with pytest.raises(BusError):
        memory.host_page_address(RAM)
    with pytest.raises(BusError):
        memory.private_page_address(RAM)


def test_host_page_address(machine: Machine, memory: NestedPaging) -> None:
    """The shared page's system address, for the series, which hands it to the firmware."""
    memory.host_write(5 * PAGE, b"here")
    address = memory.host_page_address(5 * PAGE + 100)
    assert address % PAGE == 0
    assert machine.memory.read(address, 4) == b"here"
    assert address == machine.task.translate(memory.slots()[0].user_address) + 5 * PAGE


def test_host_view(memory: NestedPaging) -> None:
    """A view shows and changes shared memory, inside one page."""
    view = memory.host_view(SHARED + PAGE, PAGE)
    view[:2] = view[-2:] = b"ab"
    assert memory.read(SHARED + PAGE, 2, private=False) == b"ab"
    assert memory.read(SHARED + 2 * PAGE - 2, 2, private=False) == b"ab"
    with pytest.raises(BusError, match="2 bytes are not inside one page"):
        memory.host_view(SHARED + PAGE - 1, 2)


def test_host_write_to_an_assigned_page(machine: Machine, memory: NestedPaging) -> None:
    """A host write to a page that the RMP assigns faults, KVM's and the VMM's; reads do not."""
    memory.host_write(SHARED, b"old")
    machine.host.driver.make_firmware(memory.host_page_address(SHARED))
    with pytest.raises(BusError, match="Firmware"):
        memory.host_write(SHARED, b"new")
    with pytest.raises(BusError, match="Firmware"):
        memory.host_write(SHARED - 2, b"long enough for two pages")
    user = memory.slots()[0].user_address
    with pytest.raises(BusError, match="Firmware"):
        machine.task.write(user + SHARED - 8, bytes(16))
    assert memory.host_read(SHARED, 3) == b"old"
    machine.host.driver.reclaim(memory.host_page_address(SHARED))
    memory.host_write(SHARED, b"new")


def test_read_only_slot(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """A read-only slot: KVM's writes fail, the guest's leave for emulation, the VMM's own work."""
    rom = machine.put(b"rom" + bytes(PAGE - 3))
    assert machine.slot(vm, slot=1, guest_phys_addr=1 << 32, size=PAGE, userspace_addr=rom, flags=2) == 0
    assert memory.read(1 << 32, 3, private=False) == b"rom"
    with pytest.raises(BusError, match="read-only"):
        memory.host_write(1 << 32, b"x")
    assert memory.host_view(1 << 32, 3).readonly
    reason = _fault(memory, 1 << 32, private=False, write=True)
    assert reason == NestedPageFault(1 << 32, private=False, write=True)
    machine.task.write(rom, b"RAM")
    assert memory.host_read(1 << 32, 3) == b"RAM"


# The VMM's mappings


def test_unmapped_user_memory(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """A slot may name memory that is not mapped: accesses fail until it is, and again once it is unmapped."""
    probe = machine.task.allocate(PAGE)
    later = probe + 2 * PAGE
    assert machine.slot(vm, slot=1, guest_phys_addr=1 << 32, size=2 * PAGE, userspace_addr=later) == 0
    with pytest.raises(BusError):
        memory.host_read(1 << 32, 1)
    assert machine.task.allocate(PAGE) == later
    memory.host_write(1 << 32, b"now")
    with pytest.raises(BusError):  # the second page stays unmapped
        memory.host_read((1 << 32) + PAGE, 1)
    with pytest.raises(BusError):
        memory.host_view((1 << 32) + PAGE, 1)
    machine.task.free(probe)  # not of this slot
    assert memory.host_read(1 << 32, 3) == b"now"
    machine.task.free(later)
    with pytest.raises(BusError):
        memory.host_read(1 << 32, 1)
    assert _fault(memory, 1 << 32, private=False, write=False) == NestedPageFault(
        1 << 32, private=False, write=False
    )


def test_discarded_user_memory_reads_as_zeros(machine: Machine, memory: NestedPaging) -> None:
    """MADV_DONTNEED on the shared plane: zeros, through pages that were used before."""
    memory.host_write(SHARED, b"gone")
    assert machine.task.discard(memory.slots()[0].user_address + SHARED, PAGE) == 0
    assert memory.host_read(SHARED, 4) == bytes(4)


def test_slots_for_real_processors(machine: Machine, memory: NestedPaging) -> None:
    """A real processor maps both planes of each slot instead of asking for every access."""
    (slot,) = memory.slots()
    assert (slot.gpa, slot.size) == (0, RAM)
    assert slot.shared_view is not None
    assert slot.private_view is not None
    slot.shared_view[SHARED : SHARED + 3] = b"abc"
    assert memory.host_read(SHARED, 3) == b"abc"
    slot.private_view[PAGE : PAGE + 3] = b"def"
    assert machine.memory.read(memory.private_page_address(PAGE), 3) == b"def"


def test_closed_memfd(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """Closing the guest_memfd gives its pages back; its slot then has no private memory."""
    memory.pvalidate(0, validate=True)
    spa = memory.private_page_address(0)
    fds = [fd for fd in range(5, 20) if machine.task.discard_memfd(fd, 0, PAGE) == 0]
    memory.pvalidate(PAGE, validate=True)
    machine.task.close(fds[0])
    assert machine.rmp.state(spa) is PageState.HYPERVISOR
    assert isinstance(_fault(memory, PAGE, private=True, write=False), NestedPageFault)
    assert memory.slots()[0].private_view is None
    with pytest.raises(BusError):
        machine.memory.read(spa, 1)


def test_many_pages_are_remembered_within_bounds(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """What is remembered by page does not grow with the guest's memory."""
    size = 9000 * PAGE
    machine.slot(vm, slot=1, guest_phys_addr=1 << 32, size=size)
    for gpa in range(1 << 32, (1 << 32) + size, PAGE):
        memory.host_read(gpa, 1)
    assert len(memory._host_pages) <= 8192


def test_threads_share_pages_without_a_lock(memory: NestedPaging) -> None:
    """Threads use one page at a time: every access is answered, also without the interpreter's lock."""
    memory.pvalidate(0, validate=True)

    def use(thread: int) -> None:
        at = 64 * thread
        for turn in range(2000):
            data = turn.to_bytes(8, "little") * 8
            memory.write(at, data, private=True)
            memory.write(SHARED + at, data, private=False)
            memory.host_write(SHARED + PAGE + at, data)
            assert memory.read(at, 64, private=True) == data
            assert memory.read(SHARED + at, 64, private=False) == data
            assert memory.host_view(SHARED + PAGE, PAGE)[at : at + 64] == data
            assert len(memory.read(SHARED + 5, 2 * PAGE, private=False)) == 2 * PAGE

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
