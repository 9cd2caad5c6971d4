"""KVM_SEV_SNP_LAUNCH_FINISH: vCPUs measured, ID block, the VMSA at reset."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.kvm import Ioctl, SevCommand
from swsnp.abi.kvm_registers import KvmRegs, KvmSegment, KvmSregs
from swsnp.abi.snp_command import (
    Command,
    FirmwareStatus,
    LaunchFinish,
    LaunchUpdate,
)
from swsnp.abi.snp_launch import VMSA_GPA
from swsnp.abi.vmsa import SevFeatures, Vmsa
from swsnp.hardware import PageState, RmpUpdate
from swsnp.hypervisor.registers import Registers

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

    from swsnp.hardware import GuestExit

PAGE = 4096
BAD_ADDRESS = 0x1000
EINVAL = -errno.EINVAL
EFAULT = -errno.EFAULT
EIO = -errno.EIO
ENOTTY = -errno.ENOTTY
EBUSY = -errno.EBUSY
EBADF = -errno.EBADF
UNTOUCHED = 0xEEEE


# KVM_SEV_SNP_LAUNCH_FINISH


def test_finish_order(machine: Machine) -> None:
    """LAUNCH_FINISH: not SNP -ENOTTY, no context -EINVAL, unreadable -EFAULT, flags -EINVAL, vCPUs."""
    vm = machine.create_vm()
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_FINISH, BAD_ADDRESS)[0] == ENOTTY
    machine.init2(vm)
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_FINISH, BAD_ADDRESS)[0] == EINVAL
    machine.start(vm)
    machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_FINISH, BAD_ADDRESS)[0] == EFAULT
    assert machine.finish(vm, flags=1)[0] == EINVAL
    assert not machine.vm(vm).vcpus[0].measured


def test_finish_measures_vcpus_in_order_of_creation(machine: Machine) -> None:
    """LAUNCH_FINISH: one VMSA page per vCPU, immutable under GPA FFFFFFFFF000h, type 2, in creation order."""
    vm = machine.started()
    for number in (2, 0, 1):
        assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, number) > 0
    assert machine.finish(vm) == (0, 0)
    vcpus = machine.vm(vm).vcpus
    issued = [LaunchUpdate.parse_at(raw, 0) for raw in machine.chip.issued(Command.SNP_LAUNCH_UPDATE)]
    assert list(vcpus) == [2, 0, 1]
    assert [each.page_paddr for each in issued] == [vcpu.vmsa_page for vcpu in vcpus.values()]
    assert {each.info.page_type for each in issued} == {2}
    for each in issued:
        assert (machine.rmp[each.page_paddr].gpa, machine.rmp[each.page_paddr].asid) == (VMSA_GPA, 1)
        assert Vmsa.parse(machine.memory.read(each.page_paddr, PAGE)) == Registers(0x00800F12).vmsa(
            SevFeatures(1)
        )
    assert all(vcpu.measured for vcpu in vcpus.values())


def test_finish_twice(machine: Machine) -> None:
    """LAUNCH_FINISH: a vCPU whose state is protected already is -EINVAL."""
    vm = machine.started(vcpus=1)
    assert machine.finish(vm) == (0, 0)
    assert machine.finish(vm) == (EINVAL, UNTOUCHED)
    assert len(machine.chip.issued(Command.SNP_LAUNCH_FINISH)) == 1


def test_finish_twice_without_vcpus(machine: Machine) -> None:
    """KVM keeps no "launched" state: without vCPUs only the firmware refuses the second LAUNCH_FINISH."""
    vm = machine.started()
    assert machine.finish(vm) == (0, 0)
    machine.chip.answer(Command.SNP_LAUNCH_FINISH, FirmwareStatus.INVALID_GUEST_STATE)
    assert machine.finish(vm) == (EIO, FirmwareStatus.INVALID_GUEST_STATE)


class Silent:
    """A processor that is never run."""

    ghcb_msr = 0

    def run(self) -> GuestExit:
        raise NotImplementedError


def test_finish_while_a_vcpu_is_created(boot: MakeMachine) -> None:
    """LAUNCH_FINISH: -EBUSY while a vCPU is being created."""
    seen: list[tuple[int, int]] = []

    def make(*_: Any) -> Silent:
        seen.append(machine.finish(vm))
        return Silent()

    machine = boot(processors=make)
    vm = machine.started()
    assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0) > 0
    assert seen == [(EBUSY, UNTOUCHED)]


def test_finish_measuring_fails(machine: Machine) -> None:
    """LAUNCH_FINISH: a VMSA page refused is reclaimed; earlier vCPUs stay measured, so a retry is -EINVAL."""
    vm = machine.started(vcpus=2)
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, 0, FirmwareStatus.INVALID_PAGE_SIZE)
    assert machine.finish(vm) == (EIO, FirmwareStatus.INVALID_PAGE_SIZE)
    assert [vcpu.measured for vcpu in machine.vm(vm).vcpus.values()] == [True, False]
    page = LaunchUpdate.parse_at(machine.chip.issued(Command.SNP_LAUNCH_UPDATE)[1], 0).page_paddr
    assert machine.rmp.state(page) is PageState.HYPERVISOR
    assert machine.finish(vm)[0] == EINVAL


def test_finish_measuring_may_be_repeated(machine: Machine) -> None:
    """LAUNCH_FINISH: when the first vCPU was refused, the same VMSA page serves again."""
    vm = machine.started(vcpus=1)
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_PARAM)
    assert machine.finish(vm)[0] == EIO
    assert machine.finish(vm) == (0, 0)
    pages = {
        LaunchUpdate.parse_at(raw, 0).page_paddr for raw in machine.chip.issued(Command.SNP_LAUNCH_UPDATE)
    }
    assert len(pages) == 1


def test_finish_refused_by_firmware(machine: Machine) -> None:
    """LAUNCH_FINISH: -EIO with the status."""
    vm = machine.started()
    machine.chip.answer(Command.SNP_LAUNCH_FINISH, FirmwareStatus.BAD_MEASUREMENT)
    assert machine.finish(vm) == (EIO, FirmwareStatus.BAD_MEASUREMENT)


def test_finish_descriptors(machine: Machine) -> None:
    """LAUNCH_FINISH: VMSA pages go through the envelope's descriptor, the command through LAUNCH_START's."""
    vm = machine.started()
    assert machine.finish(vm, sev_fd=99) == (0, 0)
    other = machine.started(vcpus=1)
    assert machine.finish(other, sev_fd=99) == (EBADF, 0)
    machine.task.close(machine.sev)
    assert machine.finish(vm) == (EBADF, 0)


def test_finish_buffer(machine: Machine) -> None:
    """LAUNCH_FINISH without ID block: auth_key_en is ignored, host data and VCEK_DIS are passed on."""
    vm = machine.started()
    machine.finish(vm, auth_key_en=1, vcek_disabled=1, host_data=bytes(range(32)))
    sent = LaunchFinish.parse(machine.chip.issued(Command.SNP_LAUNCH_FINISH)[0])
    assert (sent.flags, sent.id_block_paddr, sent.id_auth_paddr) == (4, 0, 0)
    assert sent.host_data == bytes(range(32))
    sev = machine.vm(vm).sev
    assert sev is not None
    assert sent.gctx_paddr == sev.gctx


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"vcek_disabled": 2}, 1),
        ({"vcek_disabled": 3}, 5),
        ({"auth_key_en": 7}, 3),
        ({"id_block_en": 255}, 1),
    ],
)
def test_finish_flags(machine: Machine, given: dict[str, int], flags: int) -> None:
    """LAUNCH_FINISH: vcek_disabled is a one-bit field, the others count as true when not 0."""
    vm = machine.started()
    block, auth = machine.put(b"b" * 96), machine.put(b"a" * PAGE)
    fields = {"id_block_en": 1, "id_block_uaddr": block, "id_auth_uaddr": auth, **given}
    assert machine.finish(vm, **fields) == (0, 0)
    assert LaunchFinish.parse(machine.chip.issued(Command.SNP_LAUNCH_FINISH)[0]).flags == flags


def test_finish_id_block_content(machine: Machine) -> None:
    """LAUNCH_FINISH: exactly 96 bytes of ID block and 4,096 of authentication reach the firmware."""
    vm = machine.started()
    seen: list[bytes] = []
    effect = machine.chip.command

    def look(command: int, buffer: int) -> int:
        if command == Command.SNP_LAUNCH_FINISH:
            sent = LaunchFinish.parse(machine.memory.read(buffer, 64))
            seen.append(machine.memory.read(sent.id_block_paddr, 97))
            seen.append(machine.memory.read(sent.id_auth_paddr, PAGE))
        return effect(command, buffer)

    machine.chip.command = look  # type: ignore[method-assign]
    block, auth = machine.put(b"b" * 200), machine.put(b"a" * PAGE)
    assert machine.finish(vm, id_block_en=1, id_block_uaddr=block, id_auth_uaddr=auth) == (0, 0)
    assert seen == [b"b" * 96 + b"\0", b"a" * PAGE]


@pytest.mark.parametrize(
    ("block", "auth", "result"),
    [(0, 1, EINVAL), (1, 0, EINVAL), (BAD_ADDRESS, 1, EFAULT), (1, BAD_ADDRESS, EFAULT)],
)
def test_finish_id_block_addresses(machine: Machine, block: int, auth: int, result: int) -> None:
    """LAUNCH_FINISH: address 0 is -EINVAL, an unreadable one -EFAULT; vCPUs were measured before."""
    vm = machine.started(vcpus=1)
    good = machine.put(bytes(PAGE))
    fields = {
        "id_block_uaddr": good if block == 1 else block,
        "id_auth_uaddr": good if auth == 1 else auth,
    }
    assert machine.finish(vm, id_block_en=1, **fields)[0] == result
    assert machine.vm(vm).vcpus[0].measured
    assert machine.chip.issued(Command.SNP_LAUNCH_FINISH) == []


def test_initial_vmsa() -> None:
    """QEMU's registers at reset with SEV_FEATURES 1: the fields that are not zero, AMD 24593 offsets."""
    raw = bytes(Registers(0x00A00F11).vmsa(SevFeatures(1)))
    expected = bytearray(PAGE)
    for at, value, size in (
        *((at, 0x93 << 16 | 0xFFFF << 32, 8) for at in (0x000, 0x020, 0x030, 0x040, 0x050)),
        (0x010, 0xF000 | 0x9B << 16 | 0xFFFF << 32 | 0xFFFF0000 << 64, 16),
        (0x064, 0xFFFF, 4),
        (0x070, 0x82 << 16 | 0xFFFF << 32, 8),
        (0x084, 0xFFFF, 4),
        (0x090, 0x8B << 16 | 0xFFFF << 32, 8),
        (0x0D0, 0x1000, 8),
        (0x148, 0x40, 8),
        (0x158, 0x10, 8),
        (0x160, 0x400, 8),
        (0x168, 0xFFFF0FF0, 8),
        (0x170, 2, 8),
        (0x178, 0xFFF0, 8),
        (0x268, 0x0007040600070406, 8),
        (0x310, 0x00A00F11, 8),
        (0x3B0, 1, 8),
        (0x3E8, 1, 8),
        (0x408, 0x1F80, 4),
        (0x410, 0x37F, 2),
    ):
        expected[at : at + size] = value.to_bytes(size, "little")
    assert raw == bytes(expected)


def vcpu_fd(machine: Machine, vm: int) -> int:
    fd = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 1)
    assert fd > 0
    return fd


def test_registers_before_the_measurement(machine: Machine) -> None:
    """KVM_SET_REGS and KVM_SET_SREGS: what the VMM sets is what LAUNCH_FINISH measures."""
    vm = machine.started()
    fd = vcpu_fd(machine, vm)
    regs, sregs = bytearray(KvmRegs.SIZE), bytearray(KvmSregs.SIZE)
    assert machine.task.ioctl(fd, Ioctl.KVM_GET_REGS, regs) == 0
    assert machine.task.ioctl(fd, Ioctl.KVM_GET_SREGS, sregs) == 0
    changed = KvmRegs.parse(regs).but(rip=0xB004, rdx=0xA00F11, r8_to_r15=tuple(range(8)))
    assert machine.task.ioctl(fd, Ioctl.KVM_SET_REGS, bytearray(bytes(changed))) == 0
    segments = KvmSregs.parse(sregs)
    segments = segments.but(cs=segments.cs.but(base=0x800000), cr3=0x1000, gdt=segments.gdt.but(base=7))
    assert machine.task.ioctl(fd, Ioctl.KVM_SET_SREGS, bytearray(bytes(segments))) == 0
    assert machine.finish(vm) == (0, 0)
    page = machine.vm(vm).vcpus[1].vmsa_page
    assert page is not None
    before = Registers().vmsa(SevFeatures(1))
    assert Vmsa.parse(machine.memory.read(page, PAGE)) == before.but(
        cs=before.cs.but(base=0x800000),
        gdtr=before.gdtr.but(base=7),
        cr3=0x1000,
        rip=0xB004,
        rdx=0xA00F11,
        r8_to_r15=tuple(range(8)),
    )


def test_registers_at_reset() -> None:
    """QEMU, at reset: general registers and segments as KVM's structures have them."""
    registers = Registers(0xA00F11)
    assert registers.get_regs() == KvmRegs(rip=0xFFF0, rflags=2, rdx=0xA00F11)
    sregs = registers.get_sregs()
    data = KvmSegment(limit=0xFFFF, type=3, present=1, s=1)
    assert (sregs.ds, sregs.ss) == (data, data)
    assert sregs.cs == data.but(selector=0xF000, base=0xFFFF0000, type=0xB)
    assert sregs.ldt == KvmSegment(limit=0xFFFF, type=2, present=1)
    assert sregs.tr == KvmSegment(limit=0xFFFF, type=0xB, present=1)
    assert (sregs.cr0, sregs.cr4, sregs.efer, sregs.gdt.limit) == (0x10, 0x40, 0x1000, 0xFFFF)


def test_registers_round_trip() -> None:
    """Every attribute bit of a segment has its place; what is not usable has none."""
    registers = Registers()
    flat = KvmSegment(base=1, limit=2, selector=3, type=0xA, present=1, dpl=2, db=1, s=1, l=1, g=1, avl=1)
    registers.set_sregs(registers.get_sregs().but(fs=flat, gs=flat.but(unusable=1)))
    assert registers.vmsa(SevFeatures(0)).fs.attrib == 0xFDA
    assert registers.vmsa(SevFeatures(0)).gs.attrib == 0
    assert registers.get_sregs().fs == flat
    assert registers.get_sregs().gs == KvmSegment(base=1, limit=2, selector=3, unusable=1)


@pytest.mark.parametrize(
    "request_", [Ioctl.KVM_GET_REGS, Ioctl.KVM_SET_REGS, Ioctl.KVM_GET_SREGS, Ioctl.KVM_SET_SREGS]
)
def test_registers_out_of_reach(machine: Machine, request_: Ioctl) -> None:
    """Registers: no structure -EFAULT; a vCPU whose state is protected -EINVAL."""
    vm = machine.started()
    fd = vcpu_fd(machine, vm)
    size = request_ >> 16 & 0x3FFF
    assert machine.task.ioctl(fd, request_, 0) == EFAULT
    assert machine.task.ioctl(fd, request_, bytearray(size - 1)) == EFAULT
    assert machine.finish(vm) == (0, 0)
    assert machine.task.ioctl(fd, request_, bytearray(size)) == EINVAL


def test_finish_rmpupdate_fails(machine: Machine) -> None:
    """LAUNCH_FINISH: a VMSA page that RMPUPDATE refuses is its -EFAULT."""
    vm = machine.started(vcpus=1)
    page = machine.vm(vm).vmsa_pages[0] = machine.memory.allocate_page()
    machine.rmp.rmpupdate(page, RmpUpdate(immutable=True))
    assert machine.finish(vm)[0] == EFAULT
    assert not machine.vm(vm).vcpus[0].measured


def test_finish_vmsa_page_lost(machine: Machine) -> None:
    """LAUNCH_FINISH: a refused VMSA page that cannot be reclaimed is lost, and the VM dead."""
    vm = machine.started(vcpus=1)
    machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_PARAM)
    machine.chip.answer(Command.SNP_PAGE_RECLAIM, FirmwareStatus.INVALID_PARAM)
    assert machine.finish(vm)[0] == EIO
    assert machine.vm(vm).bugged
    assert machine.vm(vm).vmsa_pages == {}
    assert len(machine.host.driver.leaked) == 1
