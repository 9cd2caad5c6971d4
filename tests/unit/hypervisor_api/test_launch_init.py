"""KVM_MEMORY_ENCRYPT_OP: the envelope, KVM_SEV_INIT2, KVM_SEV_SNP_ENABLE_REQ_CERTS."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import Ioctl, SevCommand
from swsnp.abi.snp_command import (
    Command,
    FirmwareStatus,
)
from swsnp.hardware import PageState, SystemMemory
from swsnp.hypervisor.profiles import PROFILES
from swsnp.trace import LaunchStep

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine


BAD_ADDRESS = 0x1000
EPERM = -errno.EPERM
EINVAL = -errno.EINVAL
EFAULT = -errno.EFAULT
EIO = -errno.EIO
ENOTTY = -errno.ENOTTY
EBUSY = -errno.EBUSY
UNTOUCHED = 0xEEEE
ALL = sorted(PROFILES)


# The envelope


def test_without_sev_the_ioctl_is_unknown(boot: MakeMachine) -> None:
    """KVM: KVM_MEMORY_ENCRYPT_OP on a host without SEV is -ENOTTY, even with a null pointer."""
    machine = boot(snp_enabled=False)
    vm = machine.create_vm(kvm.VmType.DEFAULT)
    assert machine.ioctl(vm, Ioctl.KVM_MEMORY_ENCRYPT_OP, 0) == ENOTTY


@pytest.mark.parametrize(("arg", "result"), [(0, 0), (BAD_ADDRESS, EFAULT), (bytearray(23), EFAULT)])
def test_envelope_pointer(machine: Machine, arg: int | bytearray, result: int) -> None:
    """KVM: a null pointer succeeds, an unreadable envelope is -EFAULT."""
    assert machine.task.ioctl(machine.create_vm(), Ioctl.KVM_MEMORY_ENCRYPT_OP, arg) == result


@pytest.mark.parametrize("command", [2, 21, 23, 99, 104, 0xFFFFFFFF])
def test_unknown_command(machine: Machine, command: int) -> None:
    """KVM: an unknown id is -EINVAL and the envelope is not copied back."""
    assert machine.encrypt_op(machine.create_vm(), command) == (EINVAL, UNTOUCHED)


@pytest.mark.parametrize("command", [0, 1, 2, 21, SevCommand.SEV_INIT2, 99])
def test_snp_vm_takes_only_snp_commands(machine: Machine, command: int) -> None:
    """KVM: after INIT2 every id below 100 is -EPERM, a second INIT2 too."""
    vm = machine.create_vm()
    assert machine.init2(vm) == 0
    assert machine.encrypt_op(vm, command, kvm.KvmSevInit()) == (EPERM, UNTOUCHED)


def test_each_command_is_traced(machine: Machine) -> None:
    """A LaunchStep carries the VM's name, the ioctl's result and the firmware's status."""
    vm = machine.create_vm()
    machine.init2(vm)
    machine.chip.answer(Command.SNP_LAUNCH_START, FirmwareStatus.POLICY_FAILURE)
    machine.start(vm)
    steps = [event for event in machine.events if isinstance(event, LaunchStep)]
    assert steps == [
        LaunchStep(vm="vm0", command=22, result=0, error=UNTOUCHED),
        LaunchStep(vm="vm0", command=100, result=EIO, error=FirmwareStatus.POLICY_FAILURE),
    ]


# KVM_SEV_INIT2


@pytest.mark.parametrize(
    ("fields", "result"),
    [
        ({"flags": 1}, EINVAL),
        ({"vmsa_features": 1}, EINVAL),  # SNP_ACTIVE is KVM's to add
        ({"vmsa_features": 1 << 9}, EINVAL),  # Secure TSC, which this host does not offer
        ({"vmsa_features": 1 << 63}, EINVAL),
        ({"vmsa_features": 1 << 5}, 0),
        ({"ghcb_version": 3}, EINVAL),
        ({"ghcb_version": 2}, 0),
        ({"ghcb_version": 0}, 0),
    ],
)
@pytest.mark.parametrize("profile", ALL)
def test_init2_fields(boot: MakeMachine, profile: str, fields: dict[str, int], result: int) -> None:
    """KVM_SEV_INIT2: flags, unknown features and a GHCB version above 2 are -EINVAL."""
    machine = boot(profile)
    assert machine.init2(machine.create_vm(), **fields) == result


@pytest.mark.parametrize(
    ("profile", "result"), [("coco-v1", 0), ("coco-v1-revised", 0), ("linux-6.12", 0), ("linux-7.2", EINVAL)]
)
def test_init2_ghcb_version_1(boot: MakeMachine, profile: str, result: int) -> None:
    """KVM_SEV_INIT2: Linux 7.2 refuses GHCB version 1 for SNP, 6.12 takes it."""
    machine = boot(profile)
    vm = machine.create_vm()
    assert machine.init2(vm, ghcb_version=1) == result
    if result == 0:
        assert machine.vm(vm).sev is not None
        assert machine.vm(vm).sev.ghcb_version == 1  # type: ignore[union-attr]  # asserted above


def test_init2_result(boot: MakeMachine) -> None:
    """KVM_SEV_INIT2: version 0 means 2, SNP_ACTIVE is added, the lowest ASID is taken."""
    machine = boot(vmsa_features=1 << 5 | 1 << 9)
    vm = machine.create_vm()
    assert machine.init2(vm, vmsa_features=1 << 9) == 0
    sev = machine.vm(vm).sev
    assert sev is not None
    assert (sev.asid, sev.vmsa_features, sev.ghcb_version, sev.gctx) == (1, 0x201, 2, None)
    assert machine.vm(vm).memory.asid == 1


def test_init2_needs_its_vm_type(machine: Machine) -> None:
    """KVM_SEV_INIT2 on a VM of the default type: -EINVAL, before the argument is read."""
    vm = machine.create_vm(kvm.VmType.DEFAULT)
    assert machine.encrypt_op(vm, SevCommand.SEV_INIT2, BAD_ADDRESS) == (EINVAL, UNTOUCHED)


def test_init2_unreadable(machine: Machine) -> None:
    """KVM_SEV_INIT2: unreadable argument -EFAULT, before the vCPUs are looked at."""
    vm = machine.create_vm()
    machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    assert machine.encrypt_op(vm, SevCommand.SEV_INIT2, BAD_ADDRESS)[0] == EFAULT
    assert machine.init2(vm) == EINVAL


def test_asids(boot: MakeMachine) -> None:
    """KVM: no ASID range is -ENOTTY, all in use -EBUSY; one given back needs a data fabric flush."""
    none = boot(max_asid=0)
    assert none.init2(none.create_vm()) == ENOTTY
    machine = boot(max_asid=1)
    first, second = machine.create_vm(), machine.create_vm()
    assert machine.init2(first) == 0
    assert machine.init2(second) == EBUSY
    machine.task.close(first)
    flushes = len(machine.chip.issued(Command.SNP_DF_FLUSH))
    machine.chip.answer(Command.SNP_DF_FLUSH, FirmwareStatus.WBINVD_REQUIRED)
    assert machine.init2(second) == EBUSY
    assert machine.init2(second) == 0
    assert len(machine.chip.issued(Command.SNP_DF_FLUSH)) == flushes + 2


def test_init2_reports_failed_platform_init(boot: MakeMachine) -> None:
    """KVM_SEV_INIT2: a failing firmware initialisation gives errno and `error`; a retry works."""
    machine = boot(prepare=lambda chip: chip.answer(Command.SNP_INIT_EX, 3, 3))
    vm = machine.create_vm()
    assert machine.encrypt_op(vm, SevCommand.SEV_INIT2, kvm.KvmSevInit()) == (
        EIO,
        FirmwareStatus.INVALID_CONFIG,
    )
    assert machine.vm(vm).sev is None
    assert machine.init2(vm) == 0


class FullMemory(SystemMemory):
    """Has no page left once `full` is set."""

    full = False

    def allocate_page(self) -> int:
        if self.full:
            raise OSError(errno.ENOMEM, "no page left")
        return super().allocate_page()


def test_init2_request_pages(boot: MakeMachine) -> None:
    """KVM: no request page -ENOMEM, no response page -EIO; both undo INIT2."""
    memory = FullMemory()
    machine = boot(memory=memory)
    vm = machine.create_vm()
    memory.full = True
    assert machine.init2(vm) == -errno.ENOMEM
    memory.full = False
    machine.host.driver._snp_host = False  # RMPUPDATE of the response page fails
    assert machine.init2(vm) == EIO
    machine.host.driver._snp_host = True
    assert machine.init2(vm) == 0


@pytest.mark.parametrize("profile", ["linux-6.12", "linux-7.2"])
def test_bounce_pages(boot: MakeMachine, profile: str) -> None:
    """KVM: a zeroed normal page for requests, one in Firmware state for responses."""
    machine = boot(profile)
    vm = machine.create_vm()
    machine.init2(vm)
    sev = machine.vm(vm).sev
    assert sev is not None
    assert machine.rmp.state(sev.request_page) is PageState.HYPERVISOR
    assert machine.rmp.state(sev.response_page) is PageState.FIRMWARE


@pytest.mark.parametrize("profile", ["coco-v1", "coco-v1-revised"])
def test_series_has_no_bounce_pages(boot: MakeMachine, profile: str) -> None:
    """The series hands the guest's own pages to the firmware."""
    machine = boot(profile)
    vm = machine.create_vm()
    machine.init2(vm)
    sev = machine.vm(vm).sev
    assert sev is not None
    assert (sev.request_page, sev.response_page) == (0, 0)


# KVM_SEV_SNP_ENABLE_REQ_CERTS


def test_enable_req_certs(machine: Machine) -> None:
    """Linux 7.2: allowed from INIT2 until the first vCPU, also again and after LAUNCH_START."""
    vm = machine.create_vm()
    assert machine.encrypt_op(vm, 103)[0] == EINVAL
    machine.init2(vm)
    assert not machine.vm(vm).req_certs
    assert machine.encrypt_op(vm, 103)[0] == 0
    assert machine.vm(vm).req_certs
    machine.start(vm)
    assert machine.encrypt_op(vm, 103)[0] == 0
    machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    assert machine.encrypt_op(vm, 103)[0] == EINVAL
    assert machine.vm(vm).req_certs


def test_enable_req_certs_is_for_snp(machine: Machine) -> None:
    """Linux 7.2: -EINVAL for a VM of another type."""
    assert machine.encrypt_op(machine.create_vm(kvm.VmType.DEFAULT), 103) == (EINVAL, UNTOUCHED)


@pytest.mark.parametrize("profile", ["coco-v1", "coco-v1-revised", "linux-6.12"])
def test_enable_req_certs_is_unknown_before(boot: MakeMachine, profile: str) -> None:
    """Command 103 came with the upstream certificate exit; before it is an unknown id."""
    machine = boot(profile)
    vm = machine.create_vm()
    machine.init2(vm)
    assert machine.encrypt_op(vm, 103) == (EINVAL, UNTOUCHED)
    assert not machine.vm(vm).req_certs
