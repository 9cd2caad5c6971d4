"""Private memory in pages of 2 MiB: assigned at once, split where the guest or a conversion wants less."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_command import Command, FirmwareStatus, LaunchUpdate, PageType
from swsnp.hardware import GuestAccessFault, PageState, Shutdown

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
    assert memfd.assigned == set(range(LARGE // PAGE, 2 * LARGE // PAGE))


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


def test_part_is_there(machine: Machine, vm: int) -> None:
    """A page that is launched already is -EEXIST, as page by page."""
    assert machine.update(vm, 7, bytes(PAGE))[0] == 0
    result, _, left = machine.update(vm, 0, bytes(LARGE))
    assert (result, left.gfn_start) == (0, 7)


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
