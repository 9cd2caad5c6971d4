"""KVM_SEV_SNP_LAUNCH_UPDATE: order of checks, page by page, what a failure leaves behind."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import Ioctl, SevCommand
from swsnp.abi.snp_command import (
    Command,
    FirmwareStatus,
    LaunchUpdate,
)
from swsnp.hardware import PageState, RmpUpdate
from swsnp.hypervisor.profiles import PROFILES

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine


PAGE = 4096
BAD_ADDRESS = 0x1000
EINVAL = -errno.EINVAL
EFAULT = -errno.EFAULT
EIO = -errno.EIO
UNTOUCHED = 0xEEEE
ALL = sorted(PROFILES)


# KVM_SEV_SNP_LAUNCH_UPDATE


def test_update_before_start(machine: Machine) -> None:
    """LAUNCH_UPDATE: not SNP or no context -EINVAL, before the argument is read."""
    vm = machine.create_vm()
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_UPDATE, BAD_ADDRESS)[0] == EINVAL
    machine.init2(vm)
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_UPDATE, BAD_ADDRESS)[0] == EINVAL
    machine.start(vm)
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_UPDATE, BAD_ADDRESS)[0] == EFAULT


@pytest.mark.parametrize("page_type", [0, 2, 7, 8, 255])
def test_update_page_type(machine: Machine, page_type: int) -> None:
    """LAUNCH_UPDATE: types other than 1, 3, 4, 5, 6 are -EINVAL; 2 (VMSA) is KVM's own."""
    vm = machine.started()
    assert machine.update(vm, 0, bytes(PAGE), page_type=page_type)[:2] == (EINVAL, UNTOUCHED)


def test_update_arguments(machine: Machine) -> None:
    """LAUNCH_UPDATE: length not in pages, flags, a first GFN outside guest_memfd slots: -EINVAL."""
    vm = machine.started()
    assert machine.slot(vm, slot=1, guest_phys_addr=1 << 32, size=PAGE) == 0
    assert machine.update(vm, 0, bytes(PAGE), length=100)[0] == EINVAL
    assert machine.update(vm, 0, bytes(PAGE), flags=1)[0] == EINVAL
    assert machine.update(vm, 64, bytes(PAGE))[0] == EINVAL
    assert machine.update(vm, 1 << 20, bytes(PAGE))[0] == EINVAL  # a slot without guest_memfd
    assert machine.update(vm, (1 << 64) - 1, bytes(PAGE))[0] == EINVAL
    assert machine.chip.issued(Command.SNP_LAUNCH_UPDATE) == []


@pytest.mark.parametrize(
    ("profile", "result"),
    [("coco-v1", EIO), ("coco-v1-revised", EIO), ("linux-6.12", EIO), ("linux-7.2", EINVAL)],
)
def test_update_length_0(boot: MakeMachine, profile: str, result: int) -> None:
    """LAUNCH_UPDATE of nothing: -EIO in Linux 6.12, and only once the slot was found; -EINVAL in 7.2."""
    machine = boot(profile)
    vm = machine.started()
    assert machine.update(vm, 0, bytes(PAGE), length=0)[0] == result
    assert machine.update(vm, 64, bytes(PAGE), length=0)[0] == EINVAL


@pytest.mark.parametrize("profile", ALL)
def test_update_source_alignment(boot: MakeMachine, profile: str) -> None:
    """LAUNCH_UPDATE: Linux 7.2 wants an aligned source, 6.12 copies from anywhere; ZERO has no source."""
    machine = boot(profile)
    vm = machine.started()
    source = machine.put(bytes(8) + b"x" * PAGE + bytes(8))
    assert machine.update(vm, 0, source + 8)[0] == (EINVAL if profile == "linux-7.2" else 0)
    assert machine.update(vm, 1, 12345, page_type=3)[0] == 0
    if profile != "linux-7.2":
        assert machine.memory.read(machine.vm(vm).memory.private_page_address(0), PAGE) == b"x" * PAGE


@pytest.mark.parametrize("page_type", [1, 4, 5, 6])
def test_update_pages(machine: Machine, page_type: int) -> None:
    """LAUNCH_UPDATE: each page copied, made Pre-Guest, given to the firmware; structure advanced."""
    vm = machine.started()
    content = b"\x11" * PAGE + b"\x22" * PAGE
    source = machine.put(content)
    result, error, left = machine.update(vm, 5, source, page_type=page_type, length=2 * PAGE)
    assert (result, error) == (0, UNTOUCHED)
    assert (left.gfn_start, left.uaddr, left.len) == (7, source + 2 * PAGE, 0)
    memory, sev = machine.vm(vm).memory, machine.vm(vm).sev
    assert sev is not None
    pages = [memory.private_page_address(gpa) for gpa in (5 * PAGE, 6 * PAGE)]
    issued = [LaunchUpdate.parse_at(raw, 0) for raw in machine.chip.issued(Command.SNP_LAUNCH_UPDATE)]
    assert [each.page_paddr for each in issued] == pages
    assert [(each.gctx_paddr, each.info.page_type, each.info.page_size) for each in issued] == [
        (sev.gctx, page_type, 0)
    ] * 2
    assert [(each.vmpl1_perms, each.vmpl2_perms, each.vmpl3_perms) for each in issued] == [(0, 0, 0)] * 2
    assert b"".join(machine.memory.read(page, PAGE) for page in pages) == content
    assert [machine.rmp[page].gpa for page in pages] == [5 * PAGE, 6 * PAGE]
    assert [machine.rmp[page].asid for page in pages] == [1, 1]
    assert {machine.rmp.state(page) for page in pages} == {PageState.GUEST_VALID}


def test_update_zero_pages(machine: Machine) -> None:
    """LAUNCH_UPDATE ZERO: the source address is neither read nor advanced."""
    vm = machine.started()
    result, _, left = machine.update(vm, 2, BAD_ADDRESS, page_type=3, length=3 * PAGE)
    assert (result, left.gfn_start, left.uaddr, left.len) == (0, 5, BAD_ADDRESS, 0)


def test_update_stops_at_the_slot(machine: Machine) -> None:
    """LAUNCH_UPDATE: one call never crosses the end of the memslot; the caller goes on with the rest."""
    vm = machine.create_vm()
    machine.init2(vm)
    machine.start(vm)
    memfd = machine.memfd(vm, 8 * PAGE)
    for number in (0, 1):
        place = {
            "slot": number,
            "guest_phys_addr": number * 4 * PAGE,
            "guest_memfd_offset": number * 4 * PAGE,
        }
        assert machine.slot(vm, memfd=memfd, size=4 * PAGE, **place) == 0
    assert machine.attributes(vm, 0, 8 * PAGE) == 0
    result, _, left = machine.update(vm, 2, bytes(4 * PAGE))
    assert (result, left.gfn_start, left.len) == (0, 4, 2 * PAGE)
    result, _, left = machine.update(vm, left.gfn_start, left.uaddr, length=left.len)
    assert (result, left.gfn_start, left.len) == (0, 6, 0)


def _shared_attribute(machine: Machine, vm: int) -> None:
    machine.attributes(vm, 0, PAGE, 0)


def _already_assigned(machine: Machine, vm: int) -> None:
    machine.update(vm, 0, bytes(PAGE))


def _closed_memfd(machine: Machine, vm: int) -> None:
    memory = machine.vm(vm).memory
    slot = memory.slot_at(0)
    assert slot is not None
    for fd in range(3, 20):
        if machine.task.descriptor(fd) is slot.memfd:
            machine.task.close(fd)
            return


@pytest.mark.parametrize("spoil", [_shared_attribute, _already_assigned, _closed_memfd])
def test_update_first_page_fails(machine: Machine, spoil: Any) -> None:
    """LAUNCH_UPDATE: every cause on the first page is -EIO with `error` 0; the structure stays."""
    vm = machine.started()
    spoil(machine, vm)
    result, error, left = machine.update(vm, 0, bytes(PAGE))
    assert (result, error) == (EIO, 0)
    assert (left.gfn_start, left.len) == (0, PAGE)


@pytest.mark.parametrize("source", [0, BAD_ADDRESS])
def test_update_without_source(machine: Machine, source: int) -> None:
    """LAUNCH_UPDATE: address 0 is no source, another may be unmapped: -EIO."""
    assert machine.update(machine.started(), 0, source)[:2] == (EIO, 0)


def test_update_bad_descriptor(machine: Machine) -> None:
    """LAUNCH_UPDATE goes through the descriptor in its own envelope; a bad one is -EIO with `error` 0."""
    vm = machine.started()
    wanted = kvm.KvmSevSnpLaunchUpdate(gfn_start=0, uaddr=machine.put(bytes(PAGE)), len=PAGE, type=1)
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_UPDATE, wanted, sev_fd=99) == (EIO, 0)
    assert machine.rmp.state(machine.vm(vm).memory.private_page_address(0)) is PageState.HYPERVISOR


def test_update_refused_by_firmware(machine: Machine) -> None:
    """LAUNCH_UPDATE: the status reaches `error`, the page is reclaimed and shared again."""
    vm = machine.started()
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_GUEST_STATE)
    assert machine.update(vm, 0, bytes(PAGE))[:2] == (EIO, FirmwareStatus.INVALID_GUEST_STATE)
    assert machine.rmp.state(machine.vm(vm).memory.private_page_address(0)) is PageState.HYPERVISOR
    assert not machine.vm(vm).bugged


def test_update_hides_a_later_failure(machine: Machine) -> None:
    """LAUNCH_UPDATE: failing later than the first page is success; the next call reports it."""
    vm = machine.started()
    machine.chip.answer(
        Command.SNP_LAUNCH_UPDATE, 0, FirmwareStatus.INVALID_PARAM, FirmwareStatus.INVALID_PARAM
    )
    result, error, left = machine.update(vm, 0, bytes(3 * PAGE))
    assert (result, error, left.gfn_start, left.len) == (0, UNTOUCHED, 1, 2 * PAGE)
    assert machine.update(vm, 1, bytes(PAGE))[:2] == (EIO, FirmwareStatus.INVALID_PARAM)


def test_update_interrupted(machine: Machine) -> None:
    """LAUNCH_UPDATE: a pending signal stops the loop; on the first page that is -EIO."""
    vm = machine.started()
    machine.task.signal_pending = True
    assert machine.update(vm, 0, bytes(PAGE))[:2] == (EIO, 0)
    assert machine.chip.issued(Command.SNP_LAUNCH_UPDATE) == []


@pytest.mark.parametrize(
    ("status", "page_type", "shown"),
    [
        (FirmwareStatus.INVALID_PARAM, 6, True),
        (FirmwareStatus.INVALID_PAGE_STATE, 6, False),
        (FirmwareStatus.INVALID_PARAM, 1, False),
    ],
)
def test_update_cpuid_page_is_copied_back(
    machine: Machine, status: FirmwareStatus, page_type: int, shown: bool
) -> None:
    """LAUNCH_UPDATE CPUID refused with INVALID_PARAM: the source holds the page as the firmware left it."""
    vm = machine.started()
    machine.chip.cpuid_correction = b"\x77" * PAGE
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, status)
    source = machine.put(b"\x01" * PAGE)
    assert machine.update(vm, 0, source, page_type=page_type)[0] == EIO
    assert machine.task.read(source, PAGE) == (b"\x77" if shown else b"\x01") * PAGE


def test_update_page_lost(machine: Machine) -> None:
    """KVM: a page that SNP_PAGE_RECLAIM does not give back is lost, and the VM is dead: every ioctl -EIO."""
    vm = machine.started(vcpus=1)
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_PARAM)
    machine.chip.answer(Command.SNP_PAGE_RECLAIM, FirmwareStatus.INVALID_PAGE_STATE)
    assert machine.update(vm, 0, bytes(PAGE))[0] == EIO
    assert machine.vm(vm).bugged
    assert machine.host.driver.leaked == [machine.vm(vm).memory.private_page_address(0)]
    assert machine.ioctl(vm, Ioctl.KVM_CHECK_EXTENSION, 136) == EIO
    assert machine.start(vm)[0] == EIO
    vcpu = max(fd for fd in range(3, 30) if machine.task.descriptor(fd))
    assert machine.ioctl(vcpu, Ioctl.KVM_RUN) == EIO


def test_update_rmpupdate_fails(machine: Machine) -> None:
    """LAUNCH_UPDATE: a page that RMPUPDATE refuses (HV-Fixed) is -EIO; the firmware is not asked."""
    vm = machine.started()
    machine.rmp.rmpupdate(machine.vm(vm).memory.private_page_address(0), RmpUpdate(immutable=True))
    assert machine.update(vm, 0, bytes(PAGE))[:2] == (EIO, 0)
    assert machine.chip.issued(Command.SNP_LAUNCH_UPDATE) == []


def test_update_structure_not_writable(machine: Machine) -> None:
    """LAUNCH_UPDATE: -EFAULT when the progress cannot be stored; the pages are loaded all the same."""
    vm = machine.started()
    wanted = kvm.KvmSevSnpLaunchUpdate(uaddr=machine.put(bytes(PAGE)), len=PAGE, type=1)
    at = machine.put(wanted)
    machine.host.driver.make_firmware(machine.task.translate(at))
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_UPDATE, at)[0] == EFAULT
    assert len(machine.chip.issued(Command.SNP_LAUNCH_UPDATE)) == 1


def test_update_cpuid_source_not_writable(machine: Machine) -> None:
    """LAUNCH_UPDATE CPUID: a source that cannot take the corrected page changes nothing else."""
    vm = machine.started()
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_PARAM)
    source = machine.put(bytes(PAGE))
    machine.host.driver.make_firmware(machine.task.translate(source))
    assert machine.update(vm, 0, source, page_type=6)[:2] == (EIO, FirmwareStatus.INVALID_PARAM)


def test_update_interrupted_later(machine: Machine) -> None:
    """LAUNCH_UPDATE: a signal after some pages ends the call with success; the structure tells the rest."""
    vm = machine.started()
    effect = machine.chip._effect

    def interrupt(command: int, raw: bytes, buffer: int) -> None:
        effect(command, raw, buffer)
        machine.task.signal_pending = len(machine.chip.issued(Command.SNP_LAUNCH_UPDATE)) == 2

    machine.chip._effect = interrupt  # type: ignore[method-assign]
    source = machine.put(bytes(5 * PAGE))
    result, error, left = machine.update(vm, 3, source, length=5 * PAGE)
    assert (result, error) == (0, UNTOUCHED)
    assert (left.gfn_start, left.uaddr, left.len) == (5, source + 2 * PAGE, 3 * PAGE)
    machine.task.signal_pending = False
    result, _, left = machine.update(vm, left.gfn_start, left.uaddr, length=left.len)
    assert (result, left.gfn_start, left.len) == (0, 8, 0)
    assert len(machine.chip.issued(Command.SNP_LAUNCH_UPDATE)) == 5


def test_update_cpuid_page_later(machine: Machine) -> None:
    """LAUNCH_UPDATE CPUID: a second page refused is copied back too; its status waits for the next call."""
    vm = machine.started()
    machine.chip.cpuid_correction = b"\x77" * PAGE
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, 0, FirmwareStatus.INVALID_PARAM)
    source = machine.put(b"\x01" * 2 * PAGE)
    result, error, left = machine.update(vm, 0, source, page_type=6, length=2 * PAGE)
    assert (result, error, left.gfn_start) == (0, UNTOUCHED, 1)
    assert machine.task.read(source, 2 * PAGE) == b"\x01" * PAGE + b"\x77" * PAGE


def test_update_stops_before_a_shared_page(machine: Machine) -> None:
    """LAUNCH_UPDATE: a page that is not private ends the call; success, since pages before it were loaded."""
    vm = machine.started()
    machine.attributes(vm, 2 * PAGE, PAGE, 0)
    result, error, left = machine.update(vm, 0, bytes(4 * PAGE))
    assert (result, error, left.gfn_start, left.len) == (0, UNTOUCHED, 2, 2 * PAGE)
    assert machine.update(vm, 2, bytes(2 * PAGE))[:2] == (EIO, 0)
