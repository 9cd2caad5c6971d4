"""Private memory in pages of 2 MiB: assigned at once, split where the guest or a conversion wants less."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, FirmwareStatus, LaunchUpdate, PageType
from swsnp.hardware import GuestAccessFault, NestedPageFault, PageState, Shutdown

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

    from swsnp.hypervisor.memory import NestedPaging

PAGE = 4096
LARGE = 2 << 20
RAM = 3 * LARGE
SIZEMISMATCH = 6


@pytest.fixture
def machine(boot: MakeMachine) -> Machine:
    return boot(launch_large=True)


@pytest.fixture
def vm(machine: Machine) -> int:
    """A started VM with 6 MiB, all private."""
    fd = machine.create_vm()
    assert machine.init2(fd) == 0
    assert machine.start(fd) == (0, 0)
    assert machine.slot(fd, memfd=machine.memfd(fd, RAM), size=RAM) == 0
    assert machine.attributes(fd, 0, RAM) == 0
    return fd


@pytest.fixture
def memory(machine: Machine, vm: int) -> NestedPaging:
    return machine.vm(vm).memory


def size_of(machine: Machine, memory: NestedPaging, gpa: int) -> int:
    return machine.rmp[memory.private_page_address(gpa)].page_size


def test_pvalidate_of_2_mib(machine: Machine, memory: NestedPaging) -> None:
    """AMD 24594, PVALIDATE with ECX 1: one entry for 2 MiB, carry when it was valid already."""
    assert memory.pvalidate(LARGE, validate=True, page_size=1) == (0, False)
    assert memory.pvalidate(LARGE, validate=True, page_size=1) == (0, True)
    assert size_of(machine, memory, LARGE) == 1
    memory.write(LARGE + 5 * PAGE, b"inside", private=True)
    assert memory.read(LARGE + 5 * PAGE, 6, private=True) == b"inside"
    assert memory.rmpadjust(LARGE, vmpl=1, permissions=1, vmsa=False, page_size=1) == 0
    assert memory.pvalidate(LARGE, validate=False, page_size=1) == (0, False)


def test_small_inside_large(machine: Machine, memory: NestedPaging) -> None:
    """KVM splits a 2 MiB entry (PSMASH) when the guest validates 4 KiB of it; the others stay as they are."""
    memory.pvalidate(0, validate=True, page_size=1)
    assert memory.pvalidate(3 * PAGE, validate=False) == (0, False)
    assert size_of(machine, memory, 0) == 0
    states = [machine.rmp.state(memory.private_page_address(gpa)) for gpa in (2 * PAGE, 3 * PAGE)]
    assert states == [PageState.GUEST_VALID, PageState.GUEST_INVALID]
    assert memory.rmpadjust(5 * PAGE, vmpl=1, permissions=0, vmsa=True) == 0
    assert memory.pvalidate(0, validate=True, page_size=1) == (SIZEMISMATCH, False)


@pytest.mark.parametrize("touched", [0, PAGE, LARGE - PAGE])
def test_large_over_small(memory: NestedPaging, touched: int) -> None:
    """AMD 24594: FAIL_SIZEMISMATCH where part of the 2 MiB has entries of 4 KiB."""
    memory.pvalidate(touched, validate=True)
    assert memory.pvalidate(0, validate=True, page_size=1) == (SIZEMISMATCH, False)


def test_large_where_part_is_shared(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """2 MiB of which a page is shared is not one private page."""
    assert machine.attributes(vm, LARGE + PAGE, PAGE, 0) == 0
    assert memory.pvalidate(LARGE, validate=True, page_size=1) == (SIZEMISMATCH, False)


@pytest.mark.parametrize("offset", [PAGE, LARGE - PAGE])
def test_memory_that_is_not_aligned(machine: Machine, offset: int) -> None:
    """RMPUPDATE wants system and guest address aligned: others have entries of 4 KiB."""
    fd = machine.create_vm()
    machine.init2(fd)
    machine.start(fd)
    machine.slot(fd, memfd=machine.memfd(fd, RAM), size=LARGE, guest_memfd_offset=offset)
    machine.attributes(fd, 0, LARGE)
    assert machine.vm(fd).memory.pvalidate(0, validate=True, page_size=1) == (SIZEMISMATCH, False)


def test_slot_ends_inside(machine: Machine) -> None:
    """2 MiB that reach over the slot are not all there, although the file behind goes on."""
    fd = machine.create_vm()
    machine.init2(fd)
    machine.start(fd)
    machine.slot(fd, memfd=machine.memfd(fd, RAM), size=LARGE - PAGE)
    machine.attributes(fd, 0, RAM)
    assert machine.vm(fd).memory.pvalidate(0, validate=True, page_size=1) == (SIZEMISMATCH, False)


def test_the_slots_last_2_mib(machine: Machine, memory: NestedPaging) -> None:
    """Memory up to the slot's end is all there."""
    assert memory.pvalidate(RAM - LARGE, validate=True, page_size=1) == (0, False)
    assert size_of(machine, memory, RAM - LARGE) == 1


@pytest.mark.parametrize("what", ["no slot", "no guest_memfd"])
def test_no_private_memory(machine: Machine, vm: int, memory: NestedPaging, what: str) -> None:
    """KVM: where nothing private can be mapped the access is a nested page fault for userspace."""
    if what == "no guest_memfd":
        assert machine.slot(vm, size=LARGE, slot=1, guest_phys_addr=RAM) == 0
    machine.attributes(vm, RAM, LARGE)
    with pytest.raises(GuestAccessFault) as caught:
        memory.pvalidate(RAM, validate=True, page_size=1)
    assert isinstance(caught.value.reason, NestedPageFault)


def test_before_there_is_a_guest(boot: MakeMachine) -> None:
    """sev_gmem_prepare: no page is anybody's before KVM_SEV_INIT2 has given the VM an ASID."""
    machine = boot()
    fd = machine.create_vm()
    machine.slot(fd, memfd=machine.memfd(fd, LARGE), size=LARGE)
    machine.attributes(fd, 0, LARGE)
    memory = machine.vm(fd).memory
    with pytest.raises(GuestAccessFault):
        memory.pvalidate(0, validate=True, page_size=1)
    assert machine.rmp.state(memory.private_page_address(0)) is PageState.HYPERVISOR


def test_a_page_stays_where_it_was_assigned(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """sev_gmem_prepare: only what nobody has is assigned; memory that moves keeps its entries."""
    memory.pvalidate(0, validate=True, page_size=1)
    (slot,) = memory.slots()
    address = slot.private_address(0)
    assert address is not None
    fds = [fd for fd in range(3, 30) if machine.task.descriptor(fd) is slot.memfd]
    assert machine.slot(vm, memfd=fds[0], size=0) == 0
    assert machine.slot(vm, memfd=fds[0], size=RAM, guest_phys_addr=RAM) == 0
    machine.attributes(vm, RAM, RAM)
    with pytest.raises(GuestAccessFault) as caught:
        memory.pvalidate(RAM, validate=True, page_size=1)
    assert isinstance(caught.value.reason, NestedPageFault)
    assert machine.rmp[address].gpa == 0


def test_misaligned(memory: NestedPaging) -> None:
    """AMD 24594: FAIL_INPUT."""
    assert memory.pvalidate(PAGE, validate=True, page_size=1) == (1, False)
    assert memory.rmpadjust(PAGE, vmpl=1, permissions=0, vmsa=False, page_size=1) == 1


def test_part_is_converted(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """guest_memfd: a hole in 2 MiB takes that page from the guest, and no other."""
    memory.pvalidate(0, validate=True, page_size=1)
    memory.write(2 * PAGE, b"stays", private=True)
    memfd = memory.slots()[0].memfd
    assert memfd is not None
    assert memfd.punch(PAGE, PAGE) == 0
    assert machine.rmp.state(memory.private_page_address(PAGE)) is PageState.HYPERVISOR
    assert memory.read(2 * PAGE, 5, private=True) == b"stays"
    with pytest.raises(GuestAccessFault) as caught:
        memory.read(PAGE, 1, private=True)
    assert isinstance(caught.value.reason, Shutdown)


def test_all_is_converted(machine: Machine, memory: NestedPaging) -> None:
    """guest_memfd: a hole of 2 MiB takes the entry as a whole, and all that follows."""
    memory.pvalidate(0, validate=True, page_size=1)
    memory.pvalidate(LARGE, validate=True, page_size=1)
    memfd = memory.slots()[0].memfd
    assert memfd is not None
    assert memfd.punch(0, LARGE) == 0
    assert machine.rmp.state(memory.private_page_address(LARGE - PAGE)) is PageState.HYPERVISOR
    assert machine.rmp.state(memory.private_page_address(LARGE)) is PageState.GUEST_VALID
    assert list(memfd.assigned) == list(range(LARGE // PAGE, 2 * LARGE // PAGE))


# Launch


def commands(machine: Machine) -> list[tuple[int, int]]:
    """PAGE_SIZE and PAGE_TYPE of every LAUNCH_UPDATE."""
    found = [LaunchUpdate.parse_at(each, 0).info for each in machine.chip.issued(Command.SNP_LAUNCH_UPDATE)]
    return [(each.page_size, each.page_type) for each in found]


def test_launch_takes_2_mib(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """AMD 56860: SNP_LAUNCH_UPDATE takes 2 MiB where all of it is aligned, 4 KiB before and behind."""
    data = bytes(PAGE) + b"\xa5" * LARGE + b"\x5a" * PAGE
    result, _, left = machine.update(vm, LARGE // PAGE - 1, data)
    assert (result, left.len, left.gfn_start) == (0, 0, 2 * LARGE // PAGE + 1)
    assert commands(machine) == [(0, 1), (1, 1), (0, 1)]
    assert memory.read(2 * LARGE - 1, 2, private=True) == b"\xa5\x5a"


def test_zero_pages(machine: Machine, vm: int) -> None:
    """Pages of zeros have no source."""
    assert machine.update(vm, 0, 0, page_type=PageType.ZERO, length=LARGE)[0] == 0
    assert commands(machine) == [(1, PageType.ZERO)]


def test_linux_loads_pages(boot: MakeMachine) -> None:
    """Linux, sev_gmem_post_populate: page by page, unless the host is told otherwise."""
    machine = boot()
    vm = machine.create_vm()
    machine.init2(vm)
    machine.start(vm)
    machine.slot(vm, memfd=machine.memfd(vm, LARGE), size=LARGE)
    machine.attributes(vm, 0, LARGE)
    assert machine.update(vm, 0, bytes(LARGE))[0] == 0
    assert commands(machine) == [(0, 1)] * 512


@pytest.mark.parametrize("at", [1, 511])
def test_part_is_shared(machine: Machine, vm: int, at: int) -> None:
    """A shared page is none of the guest's: what is before it is loaded, page by page."""
    machine.attributes(vm, at * PAGE, PAGE, 0)
    result, _, left = machine.update(vm, 0, bytes(LARGE))
    assert (result, left.gfn_start) == (0, at)
    assert commands(machine) == [(0, 1)] * at


def test_other_types_come_in_pages(machine: Machine, vm: int) -> None:
    """AMD 56860: secrets and CPUID pages are 4 KiB each."""
    assert machine.update(vm, 0, bytes(LARGE), page_type=PageType.SECRETS)[0] == 0
    assert commands(machine) == [(0, PageType.SECRETS)] * 512


def test_2_mib_without_memory(machine: Machine, vm: int, memory: NestedPaging) -> None:
    """A guest_memfd that was closed has nothing to load into: -EIO, as page by page."""
    (slot,) = memory.slots()
    for fd in [fd for fd in range(3, 30) if machine.task.descriptor(fd) is slot.memfd]:
        machine.task.close(fd)
    result, _, left = machine.update(vm, 0, bytes(LARGE))
    assert (result, left.gfn_start) == (-errno.EIO, 0)
    assert commands(machine) == []


@pytest.mark.parametrize("gfn", [1, 512])
def test_launch_of_what_is_not_aligned(machine: Machine, gfn: int) -> None:
    """AMD 56860, SNP_LAUNCH_UPDATE: 2 MiB pages are aligned, in the guest and in the system."""
    fd = machine.create_vm()
    machine.init2(fd)
    machine.start(fd)
    offset = 0 if gfn % 512 else PAGE
    machine.slot(
        fd,
        memfd=machine.memfd(fd, RAM),
        size=LARGE,
        guest_phys_addr=gfn * PAGE,
        guest_memfd_offset=offset,
    )
    machine.attributes(fd, gfn * PAGE, LARGE)
    data = b"".join(bytes([number % 251]) * PAGE for number in range(512))
    assert machine.update(fd, gfn, data)[0] == 0
    assert commands(machine) == [(0, 1)] * 512


def test_the_entry_cannot_be_made(machine: Machine, vm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """RMPUPDATE may refuse 2 MiB where it takes 4 KiB: nothing is lost but time."""
    driver = machine.vm(vm).driver
    genuine = driver.make_private

    def refuse(spa: int, *, page_size: int = 0, **rest: Any) -> int:
        return -errno.EFAULT if page_size else genuine(spa, **rest)

    monkeypatch.setattr(driver, "make_private", refuse)
    assert machine.update(vm, 0, bytes(LARGE))[0] == 0
    assert commands(machine) == [(0, 1)] * 512


def test_part_is_there(machine: Machine, vm: int) -> None:
    """A page that is launched already is -EEXIST, as page by page."""
    assert machine.update(vm, 7, bytes(PAGE))[0] == 0
    result, _, left = machine.update(vm, 0, bytes(LARGE))
    assert (result, left.gfn_start) == (0, 7)


@pytest.mark.parametrize("page_type", [PageType.NORMAL, PageType.ZERO])
def test_all_of_it_is_there(machine: Machine, vm: int, memory: NestedPaging, page_type: int) -> None:
    """2 MiB that are launched already are refused, and stay what they are."""
    assert machine.update(vm, 0, b"\xa5" * LARGE)[0] == 0
    result, _, left = machine.update(vm, 0, bytes(LARGE), page_type=page_type)
    assert (result, left.gfn_start) == (-errno.EIO, 0)
    assert commands(machine) == [(1, 1)]
    assert memory.read(LARGE - 1, 1, private=True) == b"\xa5"


def test_firmware_refuses(machine: Machine, vm: int) -> None:
    """A refusal of 2 MiB is told as a refusal."""
    machine.chip.answer(
        Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_GUEST_STATE, FirmwareStatus.INVALID_GUEST_STATE
    )
    assert machine.update(vm, 0, bytes(LARGE))[0] < 0


def test_source_is_gone(machine: Machine, vm: int) -> None:
    """A source that is not mapped as a whole is found page by page."""
    source = machine.put(bytes(LARGE - PAGE))
    result, _, left = machine.update(vm, 0, source, length=LARGE)
    assert (result, left.gfn_start) == (0, LARGE // PAGE - 1)
