"""SNP launch commands of KVM: order of checks, results per profile, what the firmware is given."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import Ioctl, SevCommand
from swsnp.abi.snp_command import (
    Activate,
    Command,
    FirmwareStatus,
    LaunchFinish,
    LaunchStart,
    LaunchUpdate,
)
from swsnp.abi.snp_launch import VMSA_GPA
from swsnp.abi.snp_report import GuestPolicy
from swsnp.abi.vmsa import Vmsa
from swsnp.hardware import PageState, RmpUpdate, SystemMemory
from swsnp.hypervisor.launch import initial_vmsa
from swsnp.hypervisor.profiles import PROFILES
from swsnp.trace import LaunchStep

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

    from swsnp.abi.record import Record
    from swsnp.hardware import GuestExit

PAGE = 4096
POLICY = 0x30000
BAD_ADDRESS = 0x1000
EPERM, EINVAL, EFAULT, EIO = -errno.EPERM, -errno.EINVAL, -errno.EFAULT, -errno.EIO
ENOTTY, EBUSY, EBADF = -errno.ENOTTY, -errno.EBUSY, -errno.EBADF
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
        assert Vmsa.parse(machine.memory.read(each.page_paddr, PAGE)) == initial_vmsa(
            0, 1, signature=0x00800F12
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
    raw = bytes(initial_vmsa(0, 1, signature=0x00A00F11))
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


def test_initial_vmsa_of_a_reset_block() -> None:
    """A processor that starts elsewhere: CS base holds the upper half of EIP, RIP the lower."""
    state = initial_vmsa(1, 1, signature=0, eip=0x0080B004)
    assert (state.cs.base, state.rip) == (0x00800000, 0xB004)


# Commands out of order


ORDER = [
    (SevCommand.SEV_INIT2, (0, EPERM, EPERM, EPERM)),
    (SevCommand.SNP_ENABLE_REQ_CERTS, (EINVAL, 0, 0, EINVAL)),
    (SevCommand.SNP_LAUNCH_START, (ENOTTY, 0, EINVAL, EINVAL)),
    (SevCommand.SNP_LAUNCH_UPDATE, (EINVAL, EINVAL, 0, EIO)),
    (SevCommand.SNP_LAUNCH_FINISH, (ENOTTY, EINVAL, 0, EINVAL)),
]


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("command", "results"), ORDER)
def test_out_of_order(machine: Machine, command: SevCommand, results: tuple[int, ...], stage: int) -> None:
    """KVM: results before INIT2, after INIT2, after LAUNCH_START, after LAUNCH_FINISH with one vCPU."""
    vm = machine.create_vm()
    machine.ram(vm)
    if stage >= 1:
        machine.init2(vm)
    if stage >= 2:
        machine.start(vm)
    if stage >= 3:
        machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
        machine.finish(vm)
        machine.chip.answer(Command.SNP_LAUNCH_UPDATE, FirmwareStatus.INVALID_GUEST_STATE)
    data: dict[int, bytes | Record] = {
        22: kvm.KvmSevInit(),
        100: kvm.KvmSevSnpLaunchStart(policy=GuestPolicy(POLICY)),
        101: kvm.KvmSevSnpLaunchUpdate(uaddr=machine.put(bytes(PAGE)), len=PAGE, type=1),
        102: kvm.KvmSevSnpLaunchFinish(),
        103: b"\0",
    }
    assert machine.encrypt_op(vm, command, data[command])[0] == results[stage]


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


# RMPUPDATE refuses, userspace memory that cannot be written


def test_start_without_a_firmware_page(machine: Machine) -> None:
    """LAUNCH_START: no page for the context is -ENOTTY too, with `error` 0."""
    vm = machine.create_vm()
    machine.init2(vm)
    machine.host.driver._snp_host = False
    assert machine.start(vm) == (ENOTTY, 0)
    assert machine.chip.issued(Command.SNP_GCTX_CREATE) == []


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
