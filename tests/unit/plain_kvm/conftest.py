"""A KVM that does what a test tells it, and a guest's memory beside it."""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import pytest

from swsnp.abi.kvm import Ioctl, MemoryAttribute, RunOffset
from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
from swsnp.cpu.plain_kvm.ioctls import (
    LAPIC_SIZE,
    HostCapability,
    HostIoctl,
    KvmCpuidEntry,
    KvmTranslation,
    KvmUserspaceMemoryRegion,
    OptionalCapability,
)
from swsnp.cpu.plain_kvm.longmode import FlatStart
from swsnp.cpu.plain_kvm.processor import PlainKvmProcessor
from swsnp.cpu.plain_kvm.vm import HostVm
from swsnp.hypervisor.attributes import AttributeMap

if TYPE_CHECKING:
    from collections.abc import Callable

C_BIT = 47
RUN_SIZE = 12288
SYNC_REGS = 304  # offset of kvm_run's `s`


class ScriptedKvm:
    """Answers from its attributes, and keeps what it was asked."""

    def __init__(self) -> None:
        self.open_error: int | None = None
        self.refuse: dict[int, int] = {}
        self.version = 12
        self.capabilities: dict[int, int] = dict.fromkeys(HostCapability, 1) | {
            OptionalCapability.IRQCHIP: 1,
            OptionalCapability.PIT2: 1,
        }
        self.msrs_set = 2
        self.leaves = [
            KvmCpuidEntry(function=0, eax=0x10),
            KvmCpuidEntry(function=0x40000000, eax=0x40000001),
            KvmCpuidEntry(function=0x80000000, eax=0x80000008),
            KvmCpuidEntry(function=0x80000008, eax=0x3000 | (C_BIT + 1)),
        ]
        self.regs = KvmRegs()
        self.sregs = KvmSregs(apic_base=0xFEE00900)
        self.mp_state = 0
        self.lapic = bytearray(LAPIC_SIZE)
        self.not_mapped: set[int] = set()
        self.run_page = memoryview(bytearray(RUN_SIZE))
        self.exits: deque[Callable[[memoryview], None]] = deque()
        self.asked: list[tuple[int, bytes | int]] = []
        self.regions: dict[int, KvmUserspaceMemoryRegion] = {}
        self.open_fds: set[int] = set()
        self.interrupted: list[int] = []
        self.aliases: list[tuple[int, int, int]] = []

    def _descriptor(self) -> int:
        fd = 100 + len(self.open_fds)
        self.open_fds.add(fd)
        return fd

    def open(self) -> int:
        if self.open_error is not None:
            raise OSError(self.open_error, os.strerror(self.open_error))
        return self._descriptor()

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)

    def map(self, fd: int, size: int) -> memoryview:
        assert fd in self.open_fds
        assert size == RUN_SIZE
        return self.run_page

    def interrupt(self, thread: int) -> None:
        self.interrupted.append(thread)

    def alias(self, source: int, size: int, target: int) -> None:
        self.aliases.append((source, size, target))

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        assert fd in self.open_fds
        self.asked.append((request, argument if isinstance(argument, int) else bytes(argument)))
        if request in self.refuse:
            number = self.refuse[request]
            raise OSError(number, os.strerror(number))
        if isinstance(argument, int):
            return self._number(request, argument)
        self._structure(request, argument)
        return self.msrs_set if request == HostIoctl.KVM_SET_MSRS else 0

    def _number(self, request: int, argument: int) -> int:
        match request:
            case Ioctl.KVM_GET_API_VERSION:
                return self.version
            case Ioctl.KVM_CHECK_EXTENSION:
                return self.capabilities.get(argument, 0)
            case HostIoctl.KVM_SET_TSS_ADDR | HostIoctl.KVM_CREATE_IRQCHIP:
                return 0
            case Ioctl.KVM_CREATE_VM | Ioctl.KVM_CREATE_VCPU:
                return self._descriptor()
            case Ioctl.KVM_GET_VCPU_MMAP_SIZE:
                return RUN_SIZE
            case Ioctl.KVM_RUN:
                self._enter()
                return 0
        raise OSError(errno.ENOTTY, f"unexpected {request:#x}")

    def _enter(self) -> None:
        """One KVM_RUN; the general registers lie in `kvm_run` where they are shared."""
        shared = self.run_page[SYNC_REGS : SYNC_REGS + KvmRegs.SIZE]
        dirty = self.run_page[RunOffset.DIRTY_REGS : RunOffset.DIRTY_REGS + 8]
        if any(dirty):
            self.regs = KvmRegs.parse(bytes(shared))
            dirty[:] = bytes(8)
        self.exits.popleft()(self.run_page)
        if any(self.run_page[RunOffset.VALID_REGS : RunOffset.VALID_REGS + 8]):
            shared[:] = bytes(self.regs)

    def _structure(self, request: int, argument: bytearray) -> None:
        match request:
            case HostIoctl.KVM_GET_SUPPORTED_CPUID:
                answer = len(self.leaves).to_bytes(8, "little") + b"".join(map(bytes, self.leaves))
                argument[: len(answer)] = answer
            case Ioctl.KVM_GET_MP_STATE:
                argument[:] = self.mp_state.to_bytes(4, "little")
            case HostIoctl.KVM_GET_LAPIC:
                argument[:] = self.lapic
            case Ioctl.KVM_GET_REGS:
                argument[:] = bytes(self.regs)
            case Ioctl.KVM_SET_REGS:
                self.regs = KvmRegs.parse(argument)
            case Ioctl.KVM_GET_SREGS:
                argument[:] = bytes(self.sregs)
            case Ioctl.KVM_SET_SREGS:
                self.sregs = KvmSregs.parse(argument)
            case HostIoctl.KVM_TRANSLATE:
                linear = KvmTranslation.parse(argument).linear_address
                found = KvmTranslation(
                    linear_address=linear,
                    physical_address=linear | 1 << C_BIT,
                    valid=linear & ~0xFFF not in self.not_mapped,
                )
                argument[:] = bytes(found)
            case HostIoctl.KVM_SET_USER_MEMORY_REGION:
                region = KvmUserspaceMemoryRegion.parse(argument)
                self.regions[region.slot] = region
            case HostIoctl.KVM_SET_CPUID2 | HostIoctl.KVM_X86_SET_MSR_FILTER | Ioctl.KVM_ENABLE_CAP:
                pass
            case HostIoctl.KVM_SET_IDENTITY_MAP_ADDR | HostIoctl.KVM_CREATE_PIT2 | HostIoctl.KVM_IRQ_LINE:
                pass
            case HostIoctl.KVM_SET_MSRS | Ioctl.KVM_SET_MP_STATE:
                pass
            case _:
                raise OSError(errno.ENOTTY, f"unexpected {request:#x}")

    def arguments(self, request: int) -> list[bytes | int]:
        """What this request was asked with, in order."""
        return [argument for each, argument in self.asked if each == request]


@dataclass(frozen=True)
class Slot:
    gpa: int
    size: int
    shared_view: memoryview | None
    private_view: memoryview | None


@dataclass
class ScriptedMemory:
    """One slot of 64 KiB, private; instructions and checked accesses answer as told and are kept."""

    size: int = 0x10000
    asked: list[tuple[object, ...]] = field(default_factory=list)
    answers: deque[object] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._generation = 0
        self.attributes = AttributeMap()
        self.attributes.set(0, self.size >> 12, MemoryAttribute.PRIVATE)
        self.shared = memoryview(mmap.mmap(-1, self.size))
        self.private = memoryview(mmap.mmap(-1, self.size))
        self.current: tuple[Slot, ...] = (Slot(0, self.size, self.shared, self.private),)

    def lay(self, *parts: tuple[int, int]) -> None:
        """New slots: GPA and size of each."""
        self.current = tuple(
            Slot(gpa, size, self.shared[gpa : gpa + size], self.private[gpa : gpa + size])
            for gpa, size in parts
        )

    @property
    def generation(self) -> int:
        """Another one each time: whatever a test has changed is looked at."""
        self._generation += 1
        return self._generation

    def share(self, gpa: int, size: int = 0x1000) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: shared."""
        self.attributes.set(gpa >> 12, gpa + size >> 12, 0)

    def _answer(self, *asked: object) -> object:
        self.asked.append(asked)
        answer = self.answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        answer = self._answer("read", gpa, size, private)
        assert isinstance(answer, bytes)
        return answer

    def write(self, gpa: int, data: bytes, *, private: bool) -> None:
        self._answer("write", gpa, data, private)

    def pvalidate(self, gpa: int, *, validate: bool, page_size: int = 0) -> tuple[int, bool]:
        answer = self._answer("pvalidate", gpa, validate, *([page_size] if page_size else []))
        assert isinstance(answer, tuple)
        return answer

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool, page_size: int = 0) -> int:
        answer = self._answer("rmpadjust", gpa, vmpl, permissions, vmsa)
        assert isinstance(answer, int)
        return answer

    def slots(self) -> tuple[Slot, ...]:
        return self.current


class MakeProcessor(Protocol):
    def __call__(self, *executable: range) -> PlainKvmProcessor: ...


@pytest.fixture
def kvm() -> ScriptedKvm:
    return ScriptedKvm()


@pytest.fixture
def memory() -> ScriptedMemory:
    return ScriptedMemory()


@pytest.fixture
def processor(kvm: ScriptedKvm, memory: ScriptedMemory) -> MakeProcessor:
    def make(*executable: range) -> PlainKvmProcessor:
        start = FlatStart(entry=0x8000, tables=0x1000, stack=0xA000)
        return PlainKvmProcessor(HostVm(kvm, memory, executable), memory, start=start)

    return make
