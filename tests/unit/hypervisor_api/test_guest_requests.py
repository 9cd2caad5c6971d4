"""Guest requests over the whole of KVM: descriptors, timeouts, conversions, and the RMP.

Source: GHCB 2.0; Linux, arch/x86/kvm/svm/sev.c and drivers/crypto/ccp/sev-dev.c; the series of June 2024.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING

import pytest

from swsnp.abi import kvm
from swsnp.abi.ghcb import ExitCode, GhcbField, valid_mask
from swsnp.abi.kvm import Ioctl
from swsnp.abi.snp_command import Command, FirmwareStatus
from swsnp.hardware import GuestAccessFault, Halt, NestedPageFault, PageState, Vmgexit
from swsnp.hypervisor.profiles import PROFILES

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

    from swsnp.hardware import GuestExit

PAGE = 4096
ALL = sorted(PROFILES)
V1, BOUNCE = ALL[:2], ALL[2:]
GHCB, REQUEST, RESPONSE, DATA = (number * PAGE for number in (32, 33, 34, 35))
EIO, EBADF, EBUSY, ETIMEDOUT = -errno.EIO, -errno.EBADF, -errno.EBUSY, -errno.ETIMEDOUT
GENERIC_V1 = 0x80000000 << 32


class Guest:
    """Asks once for each `Vmgexit` in `exits`, then halts."""

    def __init__(self) -> None:
        self.ghcb_msr = 0
        self.exits: deque[GuestExit] = deque()

    def run(self) -> GuestExit:
        return self.exits.popleft() if self.exits else Halt()


class Running:
    """A launched VM; GPAs from page 32 on are shared."""

    def __init__(self, machine: Machine, guest: Guest, *, certificates: bool = False) -> None:
        self.machine, self.guest, self.task = machine, guest, machine.task
        self.fd = machine.create_vm()
        assert machine.init2(self.fd) == 0
        assert machine.start(self.fd) == (0, 0)
        self.memory = machine.ram(self.fd)
        assert machine.attributes(self.fd, GHCB, 32 * PAGE, 0) == 0
        if certificates:
            assert machine.encrypt_op(self.fd, 103)[0] == 0
        self.vcpu = machine.ioctl(self.fd, Ioctl.KVM_CREATE_VCPU, 0)
        assert machine.finish(self.fd) == (0, 0)
        machine.vm(self.fd).vcpus[0].registered_ghcb = GHCB
        self.area = machine.task.map_vcpu(self.vcpu)

    def request(self, code: int = ExitCode.GUEST_REQUEST) -> int:
        """KVM_RUN with a request of a report in the GHCB."""
        self.memory.host_write(REQUEST + 0x34, b"\5")
        page = self.memory.host_view(GHCB, PAGE)
        fields = {
            GhcbField.SW_EXIT_CODE: code,
            GhcbField.SW_EXIT_INFO_1: REQUEST,
            GhcbField.SW_EXIT_INFO_2: RESPONSE,
            GhcbField.RAX: DATA,
            GhcbField.RBX: 1,
        }
        for offset, value in fields.items():
            page[offset : offset + 8] = value.to_bytes(8, "little")
        page[0x3F0:0x400] = valid_mask(*fields).to_bytes(16, "little")
        self.guest.ghcb_msr = GHCB
        self.guest.exits.append(Vmgexit())
        return self.run()

    def run(self) -> int:
        return self.machine.ioctl(self.vcpu, Ioctl.KVM_RUN)

    @property
    def info2(self) -> int:
        return int.from_bytes(self.memory.host_read(GHCB + GhcbField.SW_EXIT_INFO_2, 8), "little")


def running(boot: MakeMachine, profile: str, *, certificates: bool = False) -> Running:
    guest = Guest()
    return Running(boot(profile, processors=lambda *_: guest), guest, certificates=certificates)


def outcome(vm: Running, result: int) -> tuple[int, int]:
    """What KVM_RUN and the guest see; -EINTR is the guest's halt after its request."""
    return (0, vm.info2) if result == -errno.EINTR else (result, 0)


# The descriptor of /dev/sev


def closed(vm: Running) -> None:
    vm.task.close(vm.machine.sev)


def reused_by_kvm(vm: Running) -> None:
    vm.task.close(vm.machine.sev)
    assert vm.task.open("/dev/kvm") == vm.machine.sev


def reused_by_a_memfd(vm: Running) -> None:
    vm.task.close(vm.machine.sev)
    assert vm.machine.memfd(vm.fd, PAGE) == vm.machine.sev


@pytest.mark.parametrize("spoil", [closed, reused_by_kvm, reused_by_a_memfd])
@pytest.mark.parametrize("profile", ALL)
def test_descriptor_lost(boot: MakeMachine, profile: str, spoil: object) -> None:
    """The number given at LAUNCH_START is looked up at each request: closed or another file is -EBADF.

    The revised first patch of the series tells the guest instead.
    """
    vm = running(boot, profile)
    assert callable(spoil)
    spoil(vm)
    sent = len(vm.machine.chip.commands)
    wanted = (0, GENERIC_V1) if profile == "coco-v1-revised" else (EBADF, 0)
    assert outcome(vm, vm.request()) == wanted
    requests = [command for command, _ in vm.machine.chip.commands[sent:]]
    assert Command.SNP_GUEST_REQUEST not in requests


@pytest.mark.parametrize("profile", ALL)
def test_descriptor_reused_by_dev_sev(boot: MakeMachine, profile: str) -> None:
    """Another open file of /dev/sev under the same number serves as well."""
    vm = running(boot, profile)
    vm.task.close(vm.machine.sev)
    assert vm.task.open("/dev/sev") == vm.machine.sev
    assert outcome(vm, vm.request()) == (0, 0)


def test_descriptor_of_the_launch_counts(boot: MakeMachine) -> None:
    """A second descriptor of /dev/sev does not replace the one that LAUNCH_START was given."""
    vm = running(boot, "linux-7.2")
    assert vm.task.open("/dev/sev") != vm.machine.sev
    vm.task.close(vm.machine.sev)
    assert outcome(vm, vm.request()) == (EBADF, 0)


# The secure processor


@pytest.mark.parametrize("profile", BOUNCE)
def test_timeout(boot: MakeMachine, profile: str) -> None:
    """No answer: -ETIMEDOUT once, then -EBUSY for every VM of the host; guest and page see nothing."""
    guest = Guest()
    machine = boot(profile, processors=lambda *_: guest)
    one, two = Running(machine, guest), Running(machine, guest)
    one.memory.host_write(RESPONSE, b"before")
    machine.chip.answer(Command.SNP_GUEST_REQUEST, TimeoutError())
    assert one.request() == ETIMEDOUT
    assert one.request() == EBUSY
    assert two.request() == EBUSY
    assert one.memory.host_read(RESPONSE, 6) == b"before"


@pytest.mark.parametrize(("profile", "wanted"), [("coco-v1", (ETIMEDOUT, 0)), ("coco-v1-revised", (EIO, 0))])
def test_timeout_of_the_series(boot: MakeMachine, profile: str, wanted: tuple[int, int]) -> None:
    """The series: the page stays the dead firmware's; the revision cannot take it back either: -EIO."""
    vm = running(boot, profile)
    vm.machine.chip.answer(Command.SNP_GUEST_REQUEST, TimeoutError())
    assert outcome(vm, vm.request()) == wanted
    assert vm.machine.rmp.state(vm.memory.host_page_address(RESPONSE)) is PageState.FIRMWARE


@pytest.mark.parametrize(
    ("profile", "wanted"),
    [
        ("coco-v1", (EIO, 0)),
        ("coco-v1-revised", (0, GENERIC_V1 | 0x16)),
        ("linux-6.12", (0, 0x16)),
        ("linux-7.2", (0, 0x16)),
    ],
)
def test_firmware_status(boot: MakeMachine, profile: str, wanted: tuple[int, int]) -> None:
    """A status of the firmware: to the guest; in the first series to the VMM, and the page leaks."""
    vm = running(boot, profile)
    vm.machine.chip.answer(Command.SNP_GUEST_REQUEST, FirmwareStatus.INVALID_PARAM)
    assert outcome(vm, vm.request()) == wanted
    state = vm.machine.rmp.state(vm.memory.host_page_address(RESPONSE))
    assert state is (PageState.FIRMWARE if profile == "coco-v1" else PageState.HYPERVISOR)


@pytest.mark.parametrize("profile", BOUNCE)
def test_response_page_of_the_vm_stays_the_firmwares(boot: MakeMachine, profile: str) -> None:
    """The bounce page for responses is in the Firmware state over all requests; guest pages never are."""
    vm = running(boot, profile)
    sev = vm.machine.vm(vm.fd).sev
    assert sev is not None
    for _ in range(3):
        assert outcome(vm, vm.request()) == (0, 0)
        assert vm.machine.rmp.state(sev.response_page) is PageState.FIRMWARE
        assert vm.machine.rmp.state(vm.memory.host_page_address(RESPONSE)) is PageState.HYPERVISOR
    for fd in range(5, 20):
        vm.task.close(fd)
    assert vm.machine.rmp._entries == {}


# Conversions while the exit is open


@pytest.mark.parametrize("page", [RESPONSE, DATA])
def test_converted_before_the_completion(boot: MakeMachine, page: int) -> None:
    """A page made private during a certificate exit: KVM reports success, the guest does not see the data."""
    vm = running(boot, "linux-7.2", certificates=True)
    assert vm.request(ExitCode.EXT_GUEST_REQUEST) == 0
    vm.memory.host_write(page, b"from the host")
    assert vm.machine.attributes(vm.fd, page, PAGE) == 0
    assert outcome(vm, vm.run()) == (0, 0)
    assert vm.memory.pvalidate(page, validate=True) == (0, False)
    assert vm.memory.read(page, 13, private=True) == bytes(13)
    with pytest.raises(GuestAccessFault) as caught:
        vm.memory.read(page, 13, private=False)
    assert caught.value.reason == NestedPageFault(page, private=False, write=False)


def test_memory_removed_before_the_completion(boot: MakeMachine) -> None:
    """The slot under the pages deleted during the exit: -EIO, and a further KVM_RUN shows false success."""
    vm = running(boot, "linux-7.2", certificates=True)
    assert vm.request(ExitCode.EXT_GUEST_REQUEST) == 0
    assert vm.machine.slot(vm.fd, size=0) == 0
    assert vm.run() == EIO
    assert vm.machine.chip.issued(Command.SNP_GUEST_REQUEST) == []
    assert vm.run() == -errno.EINTR


@pytest.mark.parametrize("profile", ALL)
def test_pages_may_be_private(boot: MakeMachine, profile: str) -> None:
    """KVM does not look whether request and response pages are shared: it uses the VMM's mapping."""
    vm = running(boot, profile)
    assert vm.machine.attributes(vm.fd, REQUEST, 2 * PAGE) == 0
    assert outcome(vm, vm.request()) == (0, 0)


@pytest.mark.parametrize("profile", ALL)
def test_empty_table_without_the_exit(boot: MakeMachine, profile: str) -> None:
    """A host without certificates: the exit is not enabled and KVM writes the empty table itself."""
    vm = running(boot, profile)
    vm.memory.host_write(DATA, b"\x77" * 32)
    assert outcome(vm, vm.request(ExitCode.EXT_GUEST_REQUEST)) == (0, 0)
    assert vm.memory.host_read(DATA, 32) == bytes(24) + b"\x77" * 8


def test_exit_is_the_vms_own(boot: MakeMachine) -> None:
    """Two VMs of one host: the exit that one enabled is not the other's."""
    guest = Guest()
    machine = boot("linux-7.2", processors=lambda *_: guest)
    one, two = Running(machine, guest, certificates=True), Running(machine, guest)
    assert one.request(ExitCode.EXT_GUEST_REQUEST) == 0
    assert int.from_bytes(one.area[8:12], "little") == kvm.ExitReason.SNP_REQ_CERTS
    assert outcome(two, two.request(ExitCode.EXT_GUEST_REQUEST)) == (0, 0)
