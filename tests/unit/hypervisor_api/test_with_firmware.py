"""A launch against the firmware model: what KVM does to pages and buffers is what the firmware wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import Ioctl
from swsnp.abi.psp_sev import SEV_ISSUE_CMD, SevIssueCmd, SevUserCommand, SevUserDataGetId2
from swsnp.abi.snp_command import FirmwareStatus, PlatformStatusBuffer
from swsnp.abi.snp_launch import SecretsPage
from swsnp.abi.snp_report import Product
from swsnp.firmware.chip import Chip
from swsnp.firmware.mailbox import Mailbox
from swsnp.hardware import PageState, Rmp, SystemMemory
from swsnp.hypervisor.kvm_api import HostKernelModel
from swsnp.hypervisor.profiles import PROFILES
from swsnp.trace import Trace

if TYPE_CHECKING:
    from swsnp.firmware.context import GuestContext
    from swsnp.hardware import GuestExit
    from swsnp.hypervisor.task import HostTask
    from swsnp.hypervisor.vm import Vm

PAGE = 4096
NORMAL_ZEROS_AT_0 = (
    "9d13634b6014bb21cf059b2dc694e7bff01a8a7137041100cd2b695f3d10fb687267b97808b27f8f471d943bc6f53a20"
)


class Silent:
    """A processor that is never run."""

    ghcb_msr = 0

    def run(self) -> GuestExit:
        raise NotImplementedError


class Rig:
    """A chip, a host kernel on it, and one SNP VM with 16 pages of memory."""

    def __init__(self, profile: str) -> None:
        self.memory, self.rmp, trace = SystemMemory(), Rmp(), Trace()
        chip = Chip(product=Product.MILAN, secret=bytes(32))
        self.mailbox = Mailbox(chip, memory=self.memory, rmp=self.rmp, trace=trace)
        self.host = HostKernelModel(
            profile=PROFILES[profile],
            mailbox=self.mailbox,
            memory=self.memory,
            rmp=self.rmp,
            trace=trace,
            processors=lambda *_: Silent(),
            max_asid=1,
        )
        self.task: HostTask = self.host.task("vm0")
        self.kvm, self.sev = self.task.open("/dev/kvm"), self.task.open("/dev/sev")
        self.launch_begin()

    def launch_begin(self) -> None:
        self.vm_fd = self.task.ioctl(self.kvm, Ioctl.KVM_CREATE_VM, kvm.VmType.SNP)
        vm = self.task.descriptor(self.vm_fd)
        assert vm is not None
        self.vm: Vm = vm  # type: ignore[assignment]  # the descriptor of a VM is the VM
        assert self.command(22, bytes(48)) == (0, 0)
        assert self.command(100, (0x30000).to_bytes(8, "little") + bytes(56)) == (0, 0)
        memfd = bytearray(bytes(kvm.KvmCreateGuestMemfd(size=16 * PAGE)))
        self.memfd = self.task.ioctl(self.vm_fd, Ioctl.KVM_CREATE_GUEST_MEMFD, memfd)
        slot = kvm.KvmUserspaceMemoryRegion2(
            flags=4,
            memory_size=16 * PAGE,
            userspace_addr=self.task.allocate(16 * PAGE),
            guest_memfd=self.memfd,
        )
        arg = bytearray(bytes(slot))
        assert self.task.ioctl(self.vm_fd, Ioctl.KVM_SET_USER_MEMORY_REGION2, arg) == 0
        attributes = bytearray(bytes(kvm.KvmMemoryAttributes(size=16 * PAGE, attributes=8)))
        assert self.task.ioctl(self.vm_fd, Ioctl.KVM_SET_MEMORY_ATTRIBUTES, attributes) == 0

    def put(self, data: bytes) -> int:
        address = self.task.allocate(len(data))
        self.task.write(address, data)
        return address

    def command(self, number: int, data: bytes) -> tuple[int, int]:
        arg = bytearray(bytes(kvm.KvmSevCmd(id=number, data=self.put(data), sev_fd=self.sev)))
        result = self.task.ioctl(self.vm_fd, Ioctl.KVM_MEMORY_ENCRYPT_OP, arg)
        return result, kvm.KvmSevCmd.parse(arg).error

    def update(self, gfn: int, data: bytes, page_type: int) -> tuple[int, int]:
        wanted = kvm.KvmSevSnpLaunchUpdate(gfn_start=gfn, uaddr=self.put(data), len=len(data), type=page_type)
        return self.command(101, bytes(wanted))

    def finish(self) -> tuple[int, int]:
        return self.command(102, bytes(kvm.KvmSevSnpLaunchFinish(host_data=b"h" * 32)))

    @property
    def context(self) -> GuestContext:
        (context,) = self.mailbox.platform.guests.values()
        return context

    def issue(self, command: int, data: int = 0) -> tuple[int, int]:
        arg = bytearray(bytes(SevIssueCmd(cmd=command, data=data)))
        result = self.task.ioctl(self.sev, SEV_ISSUE_CMD, arg)
        return result, SevIssueCmd.parse(arg).error

    def status(self) -> PlatformStatusBuffer:
        at = self.put(bytes(32))
        assert self.issue(SevUserCommand.SNP_PLATFORM_STATUS, at) == (0, 0)
        return PlatformStatusBuffer.parse(self.task.read(at, 32))


@pytest.fixture(params=sorted(PROFILES))
def rig(request: pytest.FixtureRequest) -> Rig:
    """One rig per profile."""
    return Rig(request.param)


def test_known_digest(rig: Rig) -> None:
    """One NORMAL page of zeros at GPA 0 gives the launch digest that AMD 56860 and public tools give."""
    assert rig.update(0, bytes(PAGE), 1) == (0, 0)
    assert rig.context.ld.hex() == NORMAL_ZEROS_AT_0


def test_launch_and_end(rig: Rig) -> None:
    """A launch with every page type but CPUID and two vCPUs runs through; its end leaves nothing behind."""
    for vcpu in (0, 1):
        assert rig.task.ioctl(rig.vm_fd, Ioctl.KVM_CREATE_VCPU, vcpu) > 0
    for gfn, page_type in ((1, 1), (2, 3), (3, 4), (4, 5)):
        assert rig.update(gfn, b"\x42" * PAGE, page_type) == (0, 0)
    assert rig.finish() == (0, 0)
    memory = rig.vm.memory
    assert memory.read(PAGE, 4, private=True) == b"\x42" * 4
    assert memory.read(2 * PAGE, 4, private=True) == bytes(4)
    secrets = SecretsPage.parse(memory.read(4 * PAGE, PAGE, private=True))
    assert secrets.version == 3
    vmsa = rig.vm.vcpus[1].vmsa_page
    assert vmsa is not None
    assert rig.rmp[vmsa].vmsa
    assert rig.context.host_data == b"h" * 32
    assert rig.update(5, bytes(PAGE), 1) == (-5, FirmwareStatus.INVALID_GUEST_STATE)
    assert rig.rmp.state(memory.private_page_address(5 * PAGE)) is PageState.HYPERVISOR
    assert rig.status().guest_count == 1
    rig.task.exit()
    assert rig.mailbox.platform.guests == {}
    assert rig.rmp._entries == {}
    assert rig.host.driver.leaked == []


def test_asid_is_used_again(rig: Rig) -> None:
    """The only ASID serves a second VM once the first is gone: decommission, flush, activate."""
    rig.task.close(rig.vm_fd)
    rig.task.close(rig.memfd)
    rig.launch_begin()
    assert rig.update(0, bytes(PAGE), 1) == (0, 0)
    assert rig.finish() == (0, 0)


def test_operator(rig: Rig) -> None:
    """/dev/sev: status, commit, settings and the chip's id."""
    assert rig.status().state == 1
    assert rig.issue(SevUserCommand.SNP_COMMIT) == (0, 0)
    masked = (0).to_bytes(8, "little") + (1).to_bytes(4, "little") + bytes(52)
    assert rig.issue(SevUserCommand.SNP_SET_CONFIG, rig.put(masked)) == (0, 0)
    assert rig.status().flags & 1
    target = rig.put(bytes(PAGE))
    at = rig.put(bytes(SevUserDataGetId2(address=target, length=0)))
    assert rig.issue(SevUserCommand.SEV_GET_ID2, at) == (-5, FirmwareStatus.INVALID_LENGTH)
    length = SevUserDataGetId2.parse(rig.task.read(at, 12)).length
    at = rig.put(bytes(SevUserDataGetId2(address=target, length=length)))
    assert rig.issue(SevUserCommand.SEV_GET_ID2, at) == (0, 0)
    assert rig.task.read(target, 64) == rig.mailbox.platform.chip.chip_ids[0]
