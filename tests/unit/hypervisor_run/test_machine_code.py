"""A processor that runs machine code starts from its VMSA page; one that runs Python has no registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.unit.hypervisor_run.conftest import CBIT, PAGE, ScriptedProcessor

from swsnp.abi.kvm import Ioctl
from swsnp.hypervisor.vcpu import Vcpu

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World


class MachineCode(ScriptedProcessor):
    """What the real processor has beside the built-in one."""

    rip = 0x1000

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[bytes] = []

    def load(self, vmsa: bytes) -> None:
        self.loaded.append(vmsa)

    def complete(self, data: bytes) -> None:
        raise AssertionError(data)

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
