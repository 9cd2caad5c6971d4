"""KVM_SEV_SNP_LAUNCH_START: order of checks, policy, what the firmware is given."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import SevCommand
from swsnp.abi.snp_command import (
    Activate,
    Command,
    FirmwareStatus,
    LaunchStart,
)
from swsnp.abi.snp_report import GuestPolicy
from swsnp.hardware import PageState
from swsnp.hypervisor.profiles import PROFILES

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine


POLICY = 0x30000
BAD_ADDRESS = 0x1000
EINVAL = -errno.EINVAL
EFAULT = -errno.EFAULT
EIO = -errno.EIO
ENOTTY = -errno.ENOTTY
UNTOUCHED = 0xEEEE
ALL = sorted(PROFILES)


# KVM_SEV_SNP_LAUNCH_START

XTS, PAGE_SWAP = 1 << 22, 1 << 25
OLD = ["coco-v1", "coco-v1-revised", "linux-6.12"]
POLICIES = [
    *[(name, POLICY, 0) for name in ALL],
    *[(name, POLICY | 1 << 19 | 0x0137, 0) for name in ALL],
    *[(name, 1 << 16, EINVAL) for name in ALL],
    *[(name, POLICY | 1 << 18, EINVAL) for name in ALL],
    *[(name, POLICY | 1 << 26, EINVAL) for name in ALL],
    *[(name, POLICY | 1 << 63, EINVAL) for name in ALL],
    *[(name, 1 << 17, EINVAL) for name in OLD],
    *[(name, POLICY | 1 << 20, EINVAL) for name in OLD],
    *[(name, POLICY | XTS, EINVAL) for name in OLD],
    ("linux-7.2", 1 << 17, 0),
    ("linux-7.2", POLICY | 1 << 20, 0),
    ("linux-7.2", POLICY | XTS, 0),
    ("linux-7.2", POLICY | PAGE_SWAP, 0),
    ("linux-7.2", POLICY | 1 << 23, EINVAL),  # the firmware below does not report RAPL
]


@pytest.mark.parametrize(("profile", "policy", "result"), POLICIES)
def test_policy(boot: MakeMachine, profile: str, policy: int, result: int) -> None:
    """KVM: bit 17 must be set, unknown bits are refused; 6.12 also wants SMT and refuses single socket."""

    def prepare(chip: Any) -> None:
        chip.feature_ecx = 1 << 4

    machine = boot(profile, prepare=prepare)
    vm = machine.create_vm()
    machine.init2(vm)
    assert machine.start(vm, policy)[0] == result
    assert len(machine.chip.issued(Command.SNP_GCTX_CREATE)) == (0 if result else 1)


@pytest.mark.parametrize(
    ("ecx", "api", "bits"),
    [
        (None, (1, 58), 0),
        (0, (1, 57), 0),
        (0, (1, 58), 1 << 25),
        (1 << 2, (1, 55), 1 << 23),
        (1 << 3, (1, 55), 1 << 24),
        (1 << 4, (1, 55), 1 << 22),
        (1 << 5, (1, 55), 1 << 21),
        (0x3D, (2, 0), 0x1F << 21),
    ],
)
def test_policy_bits_follow_the_firmware(
    boot: MakeMachine, ecx: int | None, api: tuple[int, int], bits: int
) -> None:
    """Linux 7.2: the newer policy bits are accepted as far as SNP_FEATURE_INFO reports them."""

    def prepare(chip: Any) -> None:
        chip.feature_ecx, chip.api = ecx, api

    assert boot(prepare=prepare).host.policy_bits == 0x1BFFFF | bits


def test_start_order(machine: Machine) -> None:
    """LAUNCH_START: not SNP -ENOTTY, unreadable -EFAULT, context exists -EINVAL, flags -EINVAL."""
    vm = machine.create_vm()
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_START, BAD_ADDRESS)[0] == ENOTTY
    machine.init2(vm)
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_START, BAD_ADDRESS)[0] == EFAULT
    assert machine.start(vm, flags=1)[0] == EINVAL
    assert machine.start(vm) == (0, 0)
    assert machine.start(vm) == (EINVAL, UNTOUCHED)


def test_start_commands(machine: Machine) -> None:
    """LAUNCH_START: context page, policy and GOSVW passed on, ASID bound, descriptor kept."""
    vm = machine.create_vm()
    machine.init2(vm)
    wanted = kvm.KvmSevSnpLaunchStart(policy=GuestPolicy(POLICY), gosvw=b"workaround bits!")
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_START, wanted) == (0, 0)
    sev = machine.vm(vm).sev
    assert sev is not None
    assert sev.gctx is not None
    assert machine.rmp.state(sev.gctx) is PageState.CONTEXT
    start = LaunchStart.parse_at(machine.chip.issued(Command.SNP_LAUNCH_START)[0], 0)
    assert (start.gctx_paddr, start.policy, start.gosvw) == (sev.gctx, POLICY, b"workaround bits!")
    assert (start.flags, start.desired_tsc_khz) == (0, 0)
    activate = Activate.parse_at(machine.chip.issued(Command.SNP_ACTIVATE)[0], 0)
    assert (activate.gctx_paddr, activate.asid) == (sev.gctx, 1)
    assert (sev.policy, sev.sev_fd) == (POLICY, machine.sev)


def test_start_secure_tsc(boot: MakeMachine) -> None:
    """LAUNCH_START of a guest with Secure TSC passes the VM's TSC frequency."""
    machine = boot(vmsa_features=1 << 9, tsc_khz=2_450_000)
    vm = machine.create_vm()
    machine.init2(vm, vmsa_features=1 << 9)
    machine.start(vm)
    start = LaunchStart.parse_at(machine.chip.issued(Command.SNP_LAUNCH_START)[0], 0)
    assert start.desired_tsc_khz == 2_450_000


@pytest.mark.parametrize(
    ("command", "result"),
    [(Command.SNP_GCTX_CREATE, ENOTTY), (Command.SNP_LAUNCH_START, EIO), (Command.SNP_ACTIVATE, EIO)],
)
def test_start_refused_by_firmware(machine: Machine, command: Command, result: int) -> None:
    """LAUNCH_START: a failed context is -ENOTTY, other commands -EIO; `error` is the status."""
    vm = machine.create_vm()
    machine.init2(vm)
    machine.chip.answer(command, FirmwareStatus.INVALID_CONFIG)
    assert machine.start(vm) == (result, FirmwareStatus.INVALID_CONFIG)
    sev = machine.vm(vm).sev
    assert sev is not None
    assert sev.gctx is None
    decommissioned = 0 if command is Command.SNP_GCTX_CREATE else 1
    assert len(machine.chip.issued(Command.SNP_DECOMMISSION)) == decommissioned
    assert machine.host.driver.leaked == []
    assert machine.start(vm) == (0, 0)


@pytest.mark.parametrize("wrong", ["closed", "another file"])
def test_start_needs_dev_sev(machine: Machine, wrong: str) -> None:
    """LAUNCH_START: a descriptor that is not /dev/sev fails the context creation: -ENOTTY, `error` 0."""
    vm = machine.create_vm()
    machine.init2(vm)
    fd = 77 if wrong == "closed" else machine.kvm
    wanted = kvm.KvmSevSnpLaunchStart(policy=GuestPolicy(POLICY))
    assert machine.encrypt_op(vm, SevCommand.SNP_LAUNCH_START, wanted, sev_fd=fd) == (ENOTTY, 0)


def test_start_without_a_firmware_page(machine: Machine) -> None:
    """LAUNCH_START: no page for the context is -ENOTTY too, with `error` 0."""
    vm = machine.create_vm()
    machine.init2(vm)
    machine.host.driver._snp_host = False
    assert machine.start(vm) == (ENOTTY, 0)
    assert machine.chip.issued(Command.SNP_GCTX_CREATE) == []
