"""A processor that runs machine code starts from its VMSA page; one that runs Python has no registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.unit.hypervisor_run.conftest import CBIT, PAGE, ScriptedProcessor

from swsnp.abi.kvm import EXIT_UNION, ExitIo, ExitMmio, ExitReason, Ioctl
from swsnp.hardware.exits import MmioAccess, PortAccess
from swsnp.hardware.time_slices import TimeSlices
from swsnp.hypervisor.vcpu import Vcpu

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

    from swsnp.hardware import GuestExit


class MachineCode(ScriptedProcessor):
    """What the real processor has beside the built-in one."""

    rip = 0x1000

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[bytes] = []
        self.completed: list[bytes] = []

    def load(self, vmsa: bytes) -> None:
        self.loaded.append(vmsa)

    def complete(self, data: bytes) -> None:
        self.completed.append(data)

    def interrupt(self) -> None:
        raise AssertionError


def vcpu_with(world: World, processor: ScriptedProcessor) -> Vcpu:
    vcpu = Vcpu(world.vm, 1, processor, cbit=CBIT)
    vcpu.measured = True
    vcpu.mp_state = world.vcpu.mp_state
    world.vm.vcpus[1] = vcpu
    return vcpu


def test_machine_code_starts_from_its_vmsa(world: MakeWorld) -> None:
    """AMD 24593, VMRUN: registers come from the VMSA page, once; later entries go on where it was left."""
    vm = world("linux-7.2")
    processor = MachineCode()
    vcpu = vcpu_with(vm, processor)
    vcpu.vmsa_page = vm.system.allocate_page()
    vm.system.write(vcpu.vmsa_page, b"\x5a" * PAGE)
    assert vcpu.waits
    vcpu.ioctl(Ioctl.KVM_RUN, 0)
    assert processor.loaded == [b"\x5a" * PAGE]
    vcpu.mp_state = vm.vcpu.mp_state
    vcpu.ioctl(Ioctl.KVM_RUN, 0)
    assert len(processor.loaded) == 1


def test_the_built_in_processor_has_none(world: MakeWorld) -> None:
    """The guest in Python starts at its program, whatever the page says."""
    vm = world("linux-7.2")
    vcpu = vcpu_with(vm, ScriptedProcessor())
    vcpu.vmsa_page = vm.system.allocate_page()
    assert not vcpu.waits


ACCESSES = [
    (PortAccess(read=True, port=0x60, size=2), ExitReason.IO, b"\x34\x12"),
    (PortAccess(read=False, port=0x80, size=1, data=b"\x07"), ExitReason.IO, b""),
    (MmioAccess(0xFEC00000, 4), ExitReason.MMIO, b"\x78\x56\x34\x12"),
    (MmioAccess(0xFEC00000, 4, b"\x01\x02\x03\x04"), ExitReason.MMIO, b""),
]


@pytest.mark.parametrize(("access", "reason", "answer"), ACCESSES, ids=["in", "out", "read", "write"])
def test_accesses_leave_to_userspace(
    world: MakeWorld, access: PortAccess | MmioAccess, reason: ExitReason, answer: bytes
) -> None:
    """Linux, KVM_EXIT_IO and KVM_EXIT_MMIO: `kvm_run` tells the access, the next KVM_RUN takes the data."""
    vm = world("linux-7.2")
    processor = MachineCode()
    vcpu = vcpu_with(vm, processor)
    vcpu.vmsa_page = vm.system.allocate_page()
    processor.exits.append(access)
    assert vcpu.ioctl(Ioctl.KVM_RUN, 0) == 0
    run = vcpu.run
    assert run.exit_reason == reason
    if isinstance(access, MmioAccess):
        told = ExitMmio.parse_at(run.memory, EXIT_UNION)
        assert (told.phys_addr, told.len, told.is_write) == (access.gpa, 4, access.data is not None)
        assert told.data[:4] == (access.data or bytes(4))
        run.memory[EXIT_UNION + 8 : EXIT_UNION + 8 + len(answer)] = answer
    else:
        io = ExitIo.parse_at(run.memory, EXIT_UNION)
        assert (io.port, io.size, io.count, io.direction) == (access.port, access.size, 1, not access.read)
        assert access.read or run.memory[io.data_offset] == 7
        run.memory[io.data_offset : io.data_offset + len(answer)] = answer
    vcpu.ioctl(Ioctl.KVM_RUN, 0)
    assert processor.completed == [answer]


class Watching(ScriptedProcessor):
    """Notes how many of the host's processors are free while it runs."""

    def __init__(self, host_cpus: TimeSlices) -> None:
        super().__init__()
        self.host_cpus = host_cpus
        self.free: list[int] = []

    def run(self) -> GuestExit:
        self.free.append(len(self.host_cpus._places))
        return super().run()


class WatchingMachineCode(Watching, MachineCode):
    """The same with machine code."""

    def __init__(self, host_cpus: TimeSlices) -> None:
        Watching.__init__(self, host_cpus)
        self.loaded, self.completed = [], []


@pytest.mark.parametrize(("kind", "free"), [(Watching, 1), (WatchingMachineCode, 2)])
def test_a_guest_in_python_runs_on_one_of_the_hosts_processors(
    world: MakeWorld, kind: type[Watching], free: int
) -> None:
    """It has its place in KVM_RUN and nowhere else; KVM itself finds a processor for machine code."""
    vm, host_cpus = world("linux-7.2"), TimeSlices(2)
    processor = kind(host_cpus)
    vcpu = Vcpu(vm.vm, 1, processor, cbit=CBIT, host_cpus=host_cpus)
    vcpu.measured, vcpu.mp_state = True, vm.vcpu.mp_state
    vcpu.ioctl(Ioctl.KVM_RUN, 0)
    assert processor.free == [free]
    assert len(host_cpus._places) == 2
