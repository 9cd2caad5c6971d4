"""A host kernel over a scripted secure processor, and the calls that a VMM makes on it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from swsnp.abi import kvm
from swsnp.abi.snp_command import (
    Command,
    FeatureInfo,
    GctxAddress,
    LaunchUpdate,
    PageReclaim,
    PageType,
    PlatformStatus,
    PlatformStatusBuffer,
)
from swsnp.abi.snp_report import GuestPolicy
from swsnp.hardware import Halt, Rmp, SystemMemory
from swsnp.hardware.rmp import VMPL0_ALL, RmpEntry
from swsnp.hypervisor.kvm_api import HostKernelModel
from swsnp.hypervisor.profiles import PROFILES
from swsnp.hypervisor.vm import Vm
from swsnp.trace import Trace, TraceEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.record import Record
    from swsnp.hardware import GuestExit
    from swsnp.hypervisor.memory import NestedPaging

PAGE = 4096
POLICY = 0x30000
GUEST_RAM = 64 * PAGE


class Silent:
    """A processor whose guest has nothing to do."""

    ghcb_msr = 0

    def run(self) -> GuestExit:
        return Halt()


class ScriptedChip:
    """Answers every command with success and its effect on the RMP, unless told otherwise.

    `status[command]` holds the answers to come, in order; an exception in it is raised.
    """

    def __init__(self, memory: SystemMemory, rmp: Rmp) -> None:
        self.memory = memory
        self.rmp = rmp
        self.status: dict[int, deque[int | Exception]] = {}
        self.commands: list[tuple[int, bytes]] = []
        self.feature_ecx: int | None = None
        self.api = (1, 58)
        self.cpuid_correction = b""
        self.id_length = 64

    def answer(self, command: int, *answers: int | Exception) -> None:
        self.status.setdefault(command, deque()).extend(answers)

    def issued(self, command: int) -> list[bytes]:
        return [buffer for each, buffer in self.commands if each == command]

    def command(self, command: int, buffer: int) -> int:
        raw = self.memory.read(buffer, 64)
        self.commands.append((command, raw))
        waiting = self.status.get(command)
        if waiting:
            answer = waiting.popleft()
            if isinstance(answer, Exception):
                raise answer
            if answer:
                self._on_failure(command, raw)
                return answer
        self._effect(command, raw, buffer)
        return 0

    def _on_failure(self, command: int, raw: bytes) -> None:
        if command == Command.SNP_LAUNCH_UPDATE:
            wanted = LaunchUpdate.parse_at(raw, 0)
            if wanted.info.page_type == PageType.CPUID and self.cpuid_correction:
                self.memory.write(wanted.page_paddr, self.cpuid_correction)

    def _effect(self, command: int, raw: bytes, buffer: int) -> None:
        if command == Command.SNP_PAGE_RECLAIM:
            self._set(PageReclaim.parse_at(raw, 0).page_paddr, immutable=False)
        elif command == Command.SNP_GCTX_CREATE:
            self._set(GctxAddress.parse_at(raw, 0).gctx_paddr, vmsa=True)
        elif command == Command.SNP_DECOMMISSION:
            self._set(GctxAddress.parse_at(raw, 0).gctx_paddr, vmsa=False)
        elif command == Command.SNP_LAUNCH_UPDATE:
            self._set(LaunchUpdate.parse_at(raw, 0).page_paddr, immutable=False, validated=True)
        elif command == Command.SNP_PLATFORM_STATUS:
            status = PlatformStatusBuffer(
                api_major=self.api[0],
                api_minor=self.api[1],
                state=1,
                flags=0 if self.feature_ecx is None else 8,
            )
            self.memory.write(PlatformStatus.parse_at(raw, 0).status_paddr, bytes(status))
        elif command == Command.SNP_FEATURE_INFO:
            at = FeatureInfo.parse_at(raw, 0).feature_info_paddr
            self.memory.write(at + 8, (self.feature_ecx or 0).to_bytes(4, "little"))
        elif command == Command.GET_ID:
            page = int.from_bytes(raw[:8], "little")
            if page:
                self.memory.write(page, b"\xa5" * self.id_length)
            self.memory.write(buffer + 8, self.id_length.to_bytes(4, "little"))

    def _set(self, address: int, **changes: bool) -> None:
        old = self.rmp[address]
        fields: dict[str, Any] = {
            "assigned": old.assigned,
            "page_size": old.page_size,
            "immutable": old.immutable,
            "asid": old.asid,
            "gpa": old.gpa,
            "vmsa": old.vmsa,
            "validated": old.validated,
            "permissions": VMPL0_ALL,
        }
        self.rmp[address] = RmpEntry(**{**fields, **changes})


@dataclass
class Machine:
    """A host with one process that has /dev/kvm as 3 and /dev/sev as 4 open."""

    host: HostKernelModel
    chip: ScriptedChip
    memory: SystemMemory
    rmp: Rmp
    events: list[TraceEvent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.task = self.host.task("vm0")
        self.kvm = self.task.open("/dev/kvm")
        self.sev = self.task.open("/dev/sev")

    def ioctl(self, fd: int, request: int, arg: int | Record = 0) -> int:
        return self.task.ioctl(fd, request, arg if isinstance(arg, int) else bytearray(bytes(arg)))

    def put(self, data: bytes | Record) -> int:
        raw = bytes(data)
        address = self.task.allocate(len(raw))
        self.task.write(address, raw)
        return address

    def create_vm(self, vm_type: int = kvm.VmType.SNP) -> int:
        fd = self.ioctl(self.kvm, kvm.Ioctl.KVM_CREATE_VM, vm_type)
        assert fd >= 0
        return fd

    def vm(self, fd: int) -> Vm:
        vm = self.task.descriptor(fd)
        assert isinstance(vm, Vm)
        return vm

    def encrypt_op(
        self, vm: int, command: int, data: int | bytes | Record = 0, *, sev_fd: int | None = None
    ) -> tuple[int, int]:
        """Result and `error`, which is 0xEEEE before the call."""
        address = data if isinstance(data, int) else self.put(data)
        envelope = kvm.KvmSevCmd(
            id=command, data=address, error=0xEEEE, sev_fd=self.sev if sev_fd is None else sev_fd
        )
        arg = bytearray(bytes(envelope))
        result = self.task.ioctl(vm, kvm.Ioctl.KVM_MEMORY_ENCRYPT_OP, arg)
        return result, kvm.KvmSevCmd.parse(arg).error

    def init2(self, vm: int, **fields: Any) -> int:
        return self.encrypt_op(vm, kvm.SevCommand.SEV_INIT2, kvm.KvmSevInit(**fields))[0]

    def start(self, vm: int, policy: int = POLICY, **fields: Any) -> tuple[int, int]:
        wanted = kvm.KvmSevSnpLaunchStart(policy=GuestPolicy(policy), **fields)
        return self.encrypt_op(vm, kvm.SevCommand.SNP_LAUNCH_START, wanted)

    def finish(self, vm: int, sev_fd: int | None = None, **fields: Any) -> tuple[int, int]:
        wanted = kvm.KvmSevSnpLaunchFinish(**fields)
        return self.encrypt_op(vm, kvm.SevCommand.SNP_LAUNCH_FINISH, wanted, sev_fd=sev_fd)

    def update(
        self,
        vm: int,
        gfn: int,
        data: bytes | int,
        *,
        page_type: int = 1,
        length: int | None = None,
        **fields: Any,
    ) -> tuple[int, int, kvm.KvmSevSnpLaunchUpdate]:
        """Result, `error` and the structure as KVM left it; `data` as an int is the user address itself."""
        uaddr = data if isinstance(data, int) else self.put(data)
        size = length if length is not None else PAGE if isinstance(data, int) else len(data)
        wanted = kvm.KvmSevSnpLaunchUpdate(gfn_start=gfn, uaddr=uaddr, len=size, type=page_type, **fields)
        at = self.put(wanted)
        result, error = self.encrypt_op(vm, kvm.SevCommand.SNP_LAUNCH_UPDATE, at)
        return result, error, kvm.KvmSevSnpLaunchUpdate.parse(self.task.read(at, wanted.SIZE))

    def memfd(self, vm: int, size: int = GUEST_RAM) -> int:
        return self.ioctl(vm, kvm.Ioctl.KVM_CREATE_GUEST_MEMFD, kvm.KvmCreateGuestMemfd(size=size))

    def slot(self, vm: int, *, memfd: int | None = None, size: int = GUEST_RAM, **fields: Any) -> int:
        given: dict[str, Any] = {
            "flags": 0 if memfd is None else kvm.GUEST_MEMFD_SLOT,
            "guest_memfd": memfd or 0,
            "memory_size": size,
            **fields,
        }
        if "userspace_addr" not in given:
            given["userspace_addr"] = self.task.allocate(max(size, PAGE))
        return self.ioctl(vm, kvm.Ioctl.KVM_SET_USER_MEMORY_REGION2, kvm.KvmUserspaceMemoryRegion2(**given))

    def attributes(self, vm: int, address: int, size: int, attributes: int = 8, flags: int = 0) -> int:
        wanted = kvm.KvmMemoryAttributes(address=address, size=size, attributes=attributes, flags=flags)
        return self.ioctl(vm, kvm.Ioctl.KVM_SET_MEMORY_ATTRIBUTES, wanted)

    def ram(self, vm: int) -> NestedPaging:
        """64 pages from GPA 0 in one slot with guest_memfd, all private."""
        assert self.slot(vm, memfd=self.memfd(vm)) == 0
        assert self.attributes(vm, 0, GUEST_RAM) == 0
        return self.vm(vm).memory

    def started(self, *, vcpus: int = 0) -> int:
        """A VM with memory after LAUNCH_START."""
        vm = self.create_vm()
        assert self.init2(vm) == 0
        assert self.start(vm) == (0, 0)
        self.ram(vm)
        for number in range(vcpus):
            assert self.ioctl(vm, kvm.Ioctl.KVM_CREATE_VCPU, number) > 0
        return vm


class MakeMachine(Protocol):
    """`boot(profile, …)`: keyword arguments of `HostKernelModel`; `prepare` sees the chip first."""

    def __call__(
        self, profile: str = ..., *, prepare: Callable[[ScriptedChip], None] | None = ..., **options: Any
    ) -> Machine: ...


@pytest.fixture
def boot() -> MakeMachine:
    """Makes machines."""

    def make(
        profile: str = "linux-7.2", *, prepare: Callable[[ScriptedChip], None] | None = None, **options: Any
    ) -> Machine:
        memory, rmp, trace = options.pop("memory", None) or SystemMemory(), Rmp(), Trace()
        chip = ScriptedChip(memory, rmp)
        if prepare is not None:
            prepare(chip)
        settings: dict[str, Any] = {"mailbox": chip, "processors": lambda *_: Silent(), **options}
        host = HostKernelModel(profile=PROFILES[profile], memory=memory, rmp=rmp, trace=trace, **settings)
        machine = Machine(host, chip, memory, rmp)
        trace._set(((machine.events.append, True),))
        return machine

    return make


@pytest.fixture
def machine(boot: MakeMachine) -> Machine:
    """The default profile."""
    return boot()
