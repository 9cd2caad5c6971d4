"""Commands out of order: every command of a VM's launch at every stage of it, per profile."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import ExitReason, Ioctl, SevCommand
from swsnp.abi.snp_command import Command, FirmwareStatus
from swsnp.abi.snp_report import GuestPolicy
from swsnp.hypervisor.profiles import PROFILES

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

    from swsnp.abi.record import Record

PAGE = 4096
POLICY = 0x30000
EPERM, EINVAL, EIO, ENOTTY = -errno.EPERM, -errno.EINVAL, -errno.EIO, -errno.ENOTTY
STAGES = ("created", "INIT2", "LAUNCH_START", "LAUNCH_FINISH")
ALL = sorted(PROFILES)
BEFORE_7_2 = ALL[:-1]

Row = tuple[SevCommand, bool, tuple[int, int, int, int]]
ORDER: list[Row] = [
    # command, a vCPU exists, results at each stage
    (SevCommand.SEV_INIT2, False, (0, EPERM, EPERM, EPERM)),
    (SevCommand.SEV_INIT2, True, (EINVAL, EPERM, EPERM, EPERM)),
    (SevCommand.SNP_ENABLE_REQ_CERTS, False, (EINVAL, 0, 0, 0)),
    (SevCommand.SNP_ENABLE_REQ_CERTS, True, (EINVAL, EINVAL, EINVAL, EINVAL)),
    (SevCommand.SNP_LAUNCH_START, False, (ENOTTY, 0, EINVAL, EINVAL)),
    (SevCommand.SNP_LAUNCH_START, True, (ENOTTY, 0, EINVAL, EINVAL)),
    (SevCommand.SNP_LAUNCH_UPDATE, False, (EINVAL, EINVAL, 0, EIO)),
    (SevCommand.SNP_LAUNCH_UPDATE, True, (EINVAL, EINVAL, 0, EIO)),
    (SevCommand.SNP_LAUNCH_FINISH, False, (ENOTTY, EINVAL, 0, EIO)),
    (SevCommand.SNP_LAUNCH_FINISH, True, (ENOTTY, EINVAL, 0, EINVAL)),
]


def at_stage(machine: Machine, stage: int, *, vcpu: bool) -> tuple[int, int]:
    """A VM with memory that went so far, and its vCPU's descriptor (-1 for none)."""
    vm = machine.create_vm()
    machine.ram(vm)
    fd = -1
    if not stage and vcpu:
        fd = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    if stage >= 1:
        assert machine.init2(vm) == 0
        fd = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0) if vcpu else -1
    if stage >= 2:
        assert machine.start(vm) == (0, 0)
    if stage >= 3:
        assert machine.finish(vm) == (0, 0)
        # KVM keeps no "launched" state: the firmware's own refusal
        for command in (Command.SNP_LAUNCH_UPDATE, Command.SNP_LAUNCH_FINISH):
            machine.chip.answer(command, FirmwareStatus.INVALID_GUEST_STATE)
    return vm, fd


def argument(machine: Machine, command: int) -> bytes | Record:
    arguments: dict[int, bytes | Record] = {
        22: kvm.KvmSevInit(),
        100: kvm.KvmSevSnpLaunchStart(policy=GuestPolicy(POLICY)),
        101: kvm.KvmSevSnpLaunchUpdate(uaddr=machine.put(bytes(PAGE)), len=PAGE, type=1),
        102: kvm.KvmSevSnpLaunchFinish(),
        103: b"\0",
    }
    return arguments[command]


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("stage", range(4), ids=STAGES)
@pytest.mark.parametrize(("command", "vcpu", "results"), ORDER)
def test_out_of_order(
    boot: MakeMachine, command: SevCommand, vcpu: bool, results: tuple[int, ...], stage: int, profile: str
) -> None:
    """KVM: each command after each stage, without and with a vCPU; 103 is unknown before Linux 7.2."""
    machine = boot(profile)
    wanted = results[stage]
    if command == SevCommand.SNP_ENABLE_REQ_CERTS and profile in BEFORE_7_2:
        wanted = EINVAL
    vm, _ = at_stage(machine, stage, vcpu=vcpu)
    result, error = machine.encrypt_op(vm, command, argument(machine, command))
    assert result == wanted
    if wanted == EIO:
        assert error == FirmwareStatus.INVALID_GUEST_STATE


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(("stage", "result"), [(0, EINVAL), (1, 0), (2, 0), (3, -errno.EINTR)], ids=STAGES)
def test_run_out_of_order(boot: MakeMachine, profile: str, stage: int, result: int) -> None:
    """KVM_RUN: -EINVAL before INIT2; VMRUN fails before LAUNCH_FINISH (reason UNVERIFIED); then it runs."""
    machine = boot(profile)
    _, vcpu = at_stage(machine, stage, vcpu=True)
    area = machine.task.map_vcpu(vcpu)
    assert machine.ioctl(vcpu, Ioctl.KVM_RUN) == result
    if not result:
        assert int.from_bytes(area[8:12], "little") == ExitReason.FAIL_ENTRY


@pytest.mark.parametrize("after_init2", [False, True])
def test_vcpu_before_init2(machine: Machine, after_init2: bool) -> None:
    """KVM: a vCPU before INIT2 makes INIT2 fail with -EINVAL, and so KVM_RUN."""
    vm = machine.create_vm()
    if after_init2:
        assert machine.init2(vm) == 0
    vcpu = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    if not after_init2:
        assert machine.init2(vm) == EINVAL
        assert machine.ioctl(vcpu, Ioctl.KVM_RUN) == EINVAL


@pytest.mark.parametrize("capability", [197, 206])
@pytest.mark.parametrize("profile", ALL)
def test_no_mirror_and_no_move(boot: MakeMachine, profile: str, capability: int) -> None:
    """KVM: an SNP context is neither copied to a mirror VM nor moved to another (migration): -EINVAL."""
    machine = boot(profile)
    source = machine.started()
    wanted = kvm.KvmEnableCap(cap=capability, args=(source, 0, 0, 0))
    assert machine.ioctl(machine.create_vm(), Ioctl.KVM_ENABLE_CAP, wanted) == EINVAL
    for send_or_receive in range(9, 20):
        assert machine.encrypt_op(source, send_or_receive)[0] == EPERM
