"""A VM whose processor, memory and firmware driver do what a test says."""

from __future__ import annotations

import errno
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol

import pytest

from swsnp.abi.ghcb import GhcbField, valid_mask
from swsnp.abi.kvm import Ioctl, MpState, VmType
from swsnp.hardware import BusError, GuestExit, Halt, Rmp, RmpUpdate, SystemMemory, Vmgexit
from swsnp.hypervisor.profiles import profile as profile_named
from swsnp.hypervisor.psp_driver import DriverResult, SevFile
from swsnp.hypervisor.vcpu import Vcpu
from swsnp.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.hypervisor.profiles import Profile
    from swsnp.trace import TraceEvent

PAGE = 4096
PAGES = 64
GHCB, REQUEST, RESPONSE, DATA = 0x1000, 0x3000, 0x4000, 0x5000
UNMAPPED = 0x10_0000_0000
SEV_FD = 7
GCTX = 0x77_0000
CBIT = 51
ZEROS = (0, 0, 0, 0)
REGISTERS = {
    "rax": GhcbField.RAX,
    "rbx": GhcbField.RBX,
    "rcx": GhcbField.RCX,
    "rdx": GhcbField.RDX,
    "scratch": GhcbField.SW_SCRATCH,
    "xcr0": GhcbField.XCR0,
    "cpl": GhcbField.CPL,
}


class ScriptedProcessor:
    """Leaves the guest as told; halts when nothing is left. `before` runs as guest code at each entry."""

    def __init__(self) -> None:
        self.ghcb_msr = 0
        self.exits: deque[GuestExit] = deque()
        self.before: deque[Callable[[], object]] = deque()
        self.entries = 0

    def run(self) -> GuestExit:
        self.entries += 1
        if self.before:
            self.before.popleft()()
        return self.exits.popleft() if self.exits else Halt()


class FlatMemory:
    """64 pages at guest address 0: shared ones anybody reaches, private ones behind them."""

    def __init__(self, system: SystemMemory) -> None:
        self.system = system
        self.base = system.allocate(PAGES * PAGE)
        self.private = system.allocate(PAGES * PAGE)
        self.read_only: set[int] = set()

    def _address(self, gpa: int, size: int, *, write: bool = False) -> int:
        if gpa + size > PAGES * PAGE:
            raise BusError(f"GPA {gpa:#x}: no memory")
        if write and gpa // PAGE in self.read_only:
            raise BusError(f"GPA {gpa:#x}: read-only")
        return self.base + gpa

    def host_read(self, gpa: int, size: int) -> bytes:
        return self.system.read(self._address(gpa, size), size)

    def host_write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.system.write(self._address(gpa, len(data), write=True), data)

    def host_view(self, gpa: int, size: int) -> memoryview:
        view = self.system.view(self._address(gpa, size), size)
        return view.toreadonly() if gpa // PAGE in self.read_only else view

    def host_page_address(self, gpa: int) -> int:
        return self._address(gpa & -PAGE, PAGE)

    def private_page_address(self, gpa: int) -> int:
        self._address(gpa, 1)
        return self.private + (gpa & -PAGE)


class Task:
    """The calling process: descriptor 7 is /dev/sev."""

    def descriptor(self, fd: int) -> object | None:
        return SevFile() if fd == SEV_FD else None


@dataclass
class Issued:
    """One command, as the driver was given it."""

    fd: int
    command: int
    gctx: int
    request: int
    response: int
    request_page: bytes


class ScriptedDriver:
    """Answers guest requests: the response page gets `fill` unless the scripted result has no answer."""

    def __init__(self, memory: SystemMemory, rmp: Rmp) -> None:
        self.memory = memory
        self.rmp = rmp
        self.results: deque[DriverResult] = deque()
        self.issued: list[Issued] = []
        self.fill = b"\xaa" * PAGE
        self.reclaim_result = 0
        self.reclaimed: list[int] = []
        self.during: Callable[[], object] | None = None

    def issue_by_fd(self, task: object, fd: int, command: int, buffer: bytes) -> DriverResult:
        assert isinstance(task, Task)
        gctx, request, response = struct.unpack("<QQQ", buffer)
        self.issued.append(Issued(fd, command, gctx, request, response, self.memory.read(request, PAGE)))
        if self.during is not None:
            self.during()
        if task.descriptor(fd) is None:
            return DriverResult(-errno.EBADF, 0)
        result = self.results.popleft() if self.results else DriverResult(0, 0)
        if not result.ret:
            self.memory.write(response, self.fill)
        return result

    def make_firmware(self, spa: int) -> int:
        return -errno.EFAULT if self.rmp.rmpupdate(spa, RmpUpdate(assigned=True, immutable=True)) else 0

    def reclaim(self, spa: int) -> int:
        self.reclaimed.append(spa)
        if not self.reclaim_result:
            del self.rmp._entries[spa >> 12]
        return self.reclaim_result


@dataclass
class Sev:
    """See `neighbours.SevContext`."""

    request_page: int
    response_page: int
    vmsa_features: int = 1
    ghcb_version: int = 2
    ap_jump_table: int = 0
    gctx: int | None = GCTX
    sev_fd: int = SEV_FD
    request_mutex: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class FakeVm:
    """See `neighbours.VirtualMachine`."""

    profile: Profile
    memory: FlatMemory
    driver: ScriptedDriver
    sev: Sev | None
    name: str = "vm"
    trace: Trace = field(default_factory=Trace)
    task: Task = field(default_factory=Task)
    vm_type: int = VmType.SNP
    bugged: bool = False
    exit_hypercall_mask: int = 1 << 12
    coco_mask: int = 0
    req_certs: bool = False
    vcpus: dict[int, Vcpu] = field(default_factory=dict)


_P = ParamSpec("_P")


def _and_run(ask: Callable[Concatenate[World, _P], None]) -> Callable[Concatenate[World, _P], int]:
    """The same request, then KVM_RUN."""

    def asked(vm: World, /, *args: _P.args, **kwargs: _P.kwargs) -> int:
        ask(vm, *args, **kwargs)
        return vm.run()

    return asked


class World:
    """One VM with one vCPU that was launched, its GHCB registered. `enable` switches certificate exits on."""

    GHCB, REQUEST, RESPONSE, DATA = GHCB, REQUEST, RESPONSE, DATA
    UNMAPPED, SEV_FD, GCTX = UNMAPPED, SEV_FD, GCTX

    def __init__(
        self,
        profile: str,
        *,
        vm_type: int = VmType.SNP,
        enable: bool = False,
        system: SystemMemory | None = None,
    ) -> None:
        self.system = system or SystemMemory()
        self.rmp = Rmp()
        self.memory = FlatMemory(self.system)
        self.driver = ScriptedDriver(self.system, self.rmp)
        self.cpuid: dict[int, tuple[int, int, int, int]] = {}
        self.sev = Sev(self.system.allocate_page(), self.system.allocate_page())
        self.vm = FakeVm(profile_named(profile), self.memory, self.driver, self.sev, vm_type=vm_type)
        self.vm.coco_mask = self.vm.req_certs = enable
        self.vcpu = self.add_vcpu(0)
        self.vcpu.registered_ghcb = GHCB
        self.events: list[TraceEvent] = []

    def leaf(self, function: int) -> tuple[int, int, int, int]:
        """CPUID of every vCPU."""
        return self.cpuid.get(function, ZEROS)

    def add_vcpu(self, vcpu_id: int) -> Vcpu:
        vcpu = Vcpu(self.vm, vcpu_id, ScriptedProcessor(), cbit=CBIT, cpuid=self.leaf)
        vcpu.measured = True
        self.vm.vcpus[vcpu_id] = vcpu
        return vcpu

    @property
    def processor(self) -> ScriptedProcessor:
        processor = self.vcpu.processor
        assert isinstance(processor, ScriptedProcessor)
        return processor

    @property
    def area(self) -> memoryview:
        return self.vcpu.run_area

    # The VMM

    def run(self) -> int:
        """KVM_RUN."""
        return self.vcpu.ioctl(Ioctl.KVM_RUN, 0)

    def resumed(self, result: int) -> bool:
        """Whether KVM_RUN went on into the guest, which then had nothing to do."""
        return result == -errno.EINTR and self.exit_reason == 10 and self.mp_state == MpState.HALTED

    @property
    def exit_reason(self) -> int:
        return self.u32(8)

    @property
    def mp_state(self) -> int:
        state = bytearray(4)
        assert self.vcpu.ioctl(Ioctl.KVM_GET_MP_STATE, state) == 0
        return int.from_bytes(state, "little")

    def u32(self, offset: int) -> int:
        return int.from_bytes(self.area[offset : offset + 4], "little")

    def u64(self, offset: int) -> int:
        return int.from_bytes(self.area[offset : offset + 8], "little")

    def poke(self, offset: int, value: int, width: int) -> None:
        """Write a number of `width` bits into kvm_run."""
        self.area[offset : offset + width // 8] = value.to_bytes(width // 8, "little")

    def set_mp_state(self, state: int, vcpu: Vcpu | None = None) -> int:
        """KVM_SET_MP_STATE."""
        return (vcpu or self.vcpu).ioctl(Ioctl.KVM_SET_MP_STATE, bytearray(state.to_bytes(4, "little")))

    def immediate_exit(self, value: int) -> None:
        self.area[1] = value

    def answer_certs(self, ret: int, npages: int | None = None) -> None:
        """Write `ret`, and `npages` when given, where the profile has them."""
        layout = self.vm.profile.cert_exit
        assert layout is not None
        self.poke(layout.ret_offset, ret, layout.ret_width)
        if npages is not None:
            self.poke(layout.npages_offset, npages, layout.npages_width)

    # The guest

    @property
    def page(self) -> memoryview:
        return self.memory.host_view(GHCB, PAGE)

    def put(self, offset: int, value: int, width: int = 64) -> None:
        self.page[offset : offset + width // 8] = value.to_bytes(width // 8, "little")

    def get(self, offset: int) -> int:
        return int.from_bytes(self.page[offset : offset + 8], "little")

    def ask(
        self,
        /,
        code: int,
        info1: int = 0,
        info2: int = 0,
        *,
        usage: int = 0,
        unmarked: tuple[int, ...] = (),
        **registers: int,
    ) -> None:
        """Fill the GHCB and let the processor leave with VMGEXIT; every field given is marked valid."""
        fields = {REGISTERS[name]: value for name, value in registers.items()}
        exits = (GhcbField.SW_EXIT_CODE, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2)
        fields.update(zip(exits, (code, info1, info2), strict=True))
        for offset, value in fields.items():
            self.put(offset, value)
        marked = valid_mask(*(each for each in fields if each not in unmarked))
        self.put(GhcbField.VALID_BITMAP, marked, 128)
        self.put(GhcbField.GHCB_USAGE, usage, 32)
        self.processor.ghcb_msr = GHCB
        self.processor.exits.append(Vmgexit())

    def ask_vmgexit(self, msr: int) -> None:
        """Leave with VMGEXIT and this value, which may be a request, in the GHCB MSR."""
        self.processor.ghcb_msr = msr
        self.processor.exits.append(Vmgexit())

    ask_run, ask_msr = _and_run(ask), _and_run(ask_vmgexit)

    def message(self, msg_type: int, *, at: int = REQUEST) -> bytes:
        """Put a request page of this type into guest memory."""
        page = bytearray(b"\x11" * PAGE)
        page[0x34] = msg_type
        self.memory.host_write(at, page)
        return bytes(page)

    @property
    def reply(self) -> tuple[int, int]:
        """Exit info 1 and 2 as they are in the GHCB."""
        return self.get(GhcbField.SW_EXIT_INFO_1), self.get(GhcbField.SW_EXIT_INFO_2)

    @property
    def valid(self) -> int:
        return int.from_bytes(self.page[0x3F0:0x400], "little")

    def response(self) -> bytes:
        return self.memory.host_read(RESPONSE, PAGE)


class MakeWorld(Protocol):
    """`world("linux-7.2", enable=True)`."""

    def __call__(
        self, profile: str = ..., *, vm_type: int = ..., enable: bool = ..., system: SystemMemory | None = ...
    ) -> World: ...


def _world(
    profile: str = "linux-7.2",
    *,
    vm_type: int = VmType.SNP,
    enable: bool = False,
    system: SystemMemory | None = None,
) -> World:
    return World(profile, vm_type=vm_type, enable=enable, system=system)


@pytest.fixture(scope="session")
def world() -> MakeWorld:
    """Makes a launched VM."""
    return _world
