"""/dev/kvm: numbers, capabilities and device attributes of each profile, and how exits are enabled."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi import kvm
from swsnp.abi.kvm import Capability, Ioctl, KvmDeviceAttr, KvmEnableCap
from swsnp.hypervisor.profiles import PROFILES

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

    from swsnp.hardware import GuestExit

EINVAL, EFAULT, ENXIO, ENOTTY = -errno.EINVAL, -errno.EFAULT, -errno.ENXIO, -errno.ENOTTY
ALL = sorted(PROFILES)
COCO = ["coco-v1", "coco-v1-revised"]
UPSTREAM = ["linux-6.12", "linux-7.2"]
SNP, DEFAULT = kvm.VmType.SNP, kvm.VmType.DEFAULT


def test_version_and_mmap_size(machine: Machine) -> None:
    """KVM: API version 12; the vCPU mapping is three pages; neither takes an argument."""
    assert machine.ioctl(machine.kvm, Ioctl.KVM_GET_API_VERSION) == 12
    assert machine.ioctl(machine.kvm, Ioctl.KVM_GET_VCPU_MMAP_SIZE) == 12288
    assert machine.ioctl(machine.kvm, Ioctl.KVM_GET_API_VERSION, 1) == EINVAL
    assert machine.ioctl(machine.kvm, Ioctl.KVM_GET_VCPU_MMAP_SIZE, 1) == EINVAL


@pytest.mark.parametrize(
    "request_number", [Ioctl.KVM_RUN, Ioctl.KVM_CREATE_VCPU, Ioctl.KVM_ENABLE_CAP, 0, 0xAE99]
)
def test_unknown_on_the_system(machine: Machine, request_number: int) -> None:
    """KVM: a request of another scope is -ENOTTY on /dev/kvm."""
    assert machine.ioctl(machine.kvm, request_number) == ENOTTY


@pytest.mark.parametrize(
    "request_number", [Ioctl.KVM_RUN, Ioctl.KVM_CREATE_VM, Ioctl.KVM_PRE_FAULT_MEMORY, 0]
)
def test_unknown_on_a_vm(machine: Machine, request_number: int) -> None:
    """KVM: a request of another scope is -ENOTTY on a VM; KVM_PRE_FAULT_MEMORY belongs to vCPUs."""
    assert machine.ioctl(machine.create_vm(), request_number) == ENOTTY


@pytest.mark.parametrize(
    ("vm_type", "snp", "good"),
    [(0, True, True), (4, True, True), (0, False, True), (4, False, False)]
    + [(each, True, False) for each in (1, 2, 3, 5, 6, 63, 64, 1 << 40, -1)],
)
def test_vm_types(boot: MakeMachine, vm_type: int, snp: bool, good: bool) -> None:
    """KVM_CREATE_VM: an unsupported type is -EINVAL; SEV, SEV-ES and TDX guests are not modelled."""
    machine = boot(snp_enabled=snp)
    result = machine.ioctl(machine.kvm, Ioctl.KVM_CREATE_VM, vm_type)
    assert result > 0 if good else result == EINVAL
    types = machine.ioctl(machine.kvm, Ioctl.KVM_CHECK_EXTENSION, Capability.VM_TYPES)
    assert types == (0b10001 if snp else 1)


CAPABILITIES = [
    (Capability.IMMEDIATE_EXIT, 1, 1, 1),
    (Capability.EXIT_HYPERCALL, 0x1000, 0x1000, 0x1000),
    (Capability.SYS_ATTRIBUTES, 1, 1, 1),
    (Capability.SYSTEM_EVENT_DATA, 1, 1, 1),
    (Capability.USER_MEMORY2, 1, 1, 1),
    (Capability.MEMORY_FAULT_INFO, 1, 1, 1),
    (Capability.MEMORY_ATTRIBUTES, 8, 8, 0),
    (Capability.GUEST_MEMFD, 1, 1, 0),
    (Capability.EXIT_COCO, 1, 1, 1),
    (Capability.PRE_FAULT_MEMORY, 1, 1, 1),
    (239, 0, 0, 0),
    (99999, 0, 0, 0),
]


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(("capability", "system", "snp", "default"), CAPABILITIES)
def test_capabilities(
    boot: MakeMachine, profile: str, capability: int, system: int, snp: int, default: int
) -> None:
    """KVM_CHECK_EXTENSION on the system, on an SNP VM and on a default VM; 0 for what is not there.

    237 is EXIT_COCO with mask 1 in the series, on any descriptor and VM type; upstream the number is
    X86_APIC_BUS_CYCLES_NS, whose value is 1 as well: a probe cannot tell them apart.
    """
    machine = boot(profile)
    request = Ioctl.KVM_CHECK_EXTENSION
    assert machine.ioctl(machine.kvm, request, capability) == system
    assert machine.ioctl(machine.create_vm(SNP), request, capability) == snp
    assert machine.ioctl(machine.create_vm(DEFAULT), request, capability) == default


def _enable(machine: Machine, vm: int, cap: int, value: int, flags: int = 0) -> int:
    return machine.ioctl(vm, Ioctl.KVM_ENABLE_CAP, KvmEnableCap(cap=cap, flags=flags, args=(value, 0, 0, 0)))


@pytest.mark.parametrize("profile", ALL)
def test_enable_exit_hypercall(boot: MakeMachine, profile: str) -> None:
    """KVM_CAP_EXIT_HYPERCALL: only bit 12; the mask is replaced and 0 switches it off."""
    machine = boot(profile)
    vm = machine.create_vm()
    assert _enable(machine, vm, 201, 0x1000) == 0
    assert machine.vm(vm).exit_hypercall_mask == 0x1000
    assert _enable(machine, vm, 201, 0x1001) == EINVAL
    assert _enable(machine, vm, 201, 0x1000, flags=1) == EINVAL
    assert machine.vm(vm).exit_hypercall_mask == 0x1000
    assert _enable(machine, vm, 201, 0) == 0
    assert machine.vm(vm).exit_hypercall_mask == 0


@pytest.mark.parametrize("profile", COCO)
@pytest.mark.parametrize("vm_type", [SNP, DEFAULT])
def test_enable_exit_coco(boot: MakeMachine, profile: str, vm_type: int) -> None:
    """The series: any VM type, also after vCPUs; only bit 0, no flags; 0 switches it off."""
    machine = boot(profile)
    vm = machine.create_vm(vm_type)
    machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0)
    assert _enable(machine, vm, 237, 1) == 0
    assert machine.vm(vm).coco_mask == 1
    for value, flags in ((2, 0), (3, 0), (1 << 63, 0), (0, 1), (1, 1)):
        assert _enable(machine, vm, 237, value, flags) == EINVAL
    assert machine.vm(vm).coco_mask == 1
    assert _enable(machine, vm, 237, 0) == 0
    assert machine.vm(vm).coco_mask == 0


@pytest.mark.parametrize("profile", UPSTREAM)
def test_237_is_another_capability_upstream(boot: MakeMachine, profile: str) -> None:
    """Linux: 237 is X86_APIC_BUS_CYCLES_NS: 0 -EINVAL, -ENXIO without in-kernel interrupt controller."""
    machine = boot(profile)
    vm = machine.create_vm()
    assert _enable(machine, vm, 237, 0) == EINVAL
    assert _enable(machine, vm, 237, 1) == ENXIO
    assert machine.vm(vm).coco_mask == 0


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("capability", [0, 136, 239, 1 << 31])
def test_enable_unknown(boot: MakeMachine, profile: str, capability: int) -> None:
    """KVM_ENABLE_CAP: -EINVAL for what cannot be enabled; upstream has none for certificate exits."""
    machine = boot(profile)
    assert _enable(machine, machine.create_vm(), capability, 1) == EINVAL


@pytest.mark.parametrize("arg", [0, bytearray(103), bytearray(105)])
def test_enable_cap_unreadable(machine: Machine, arg: int | bytearray) -> None:
    """KVM_ENABLE_CAP: an argument that is not the structure is -EFAULT."""
    assert machine.task.ioctl(machine.create_vm(), Ioctl.KVM_ENABLE_CAP, arg) == EFAULT


ATTRIBUTES = [
    # group, attribute, value in coco-v1, coco-v1-revised, linux-6.12, linux-7.2; None: -ENXIO
    (0, 0, (0x207, 0x207, 0x207, 0x207)),
    (0, 1, (None, None, None, None)),
    (1, 0, (0x20, 0x20, 0x20, 0x20)),
    (1, 1, (None, None, None, 0x1BFFFF)),
    (1, 2, (None, None, None, 1)),
    (1, 3, (None, None, None, None)),
    (2, 0, (None, None, None, None)),
]


@pytest.mark.parametrize(
    ("at", "profile"), list(enumerate(["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]))
)
@pytest.mark.parametrize(("group", "attribute", "values"), ATTRIBUTES)
def test_device_attributes(
    boot: MakeMachine, group: int, attribute: int, values: tuple[int | None, ...], at: int, profile: str
) -> None:
    """KVM_HAS/GET_DEVICE_ATTR on /dev/kvm: the value as u64 at `addr`; unknown group or attribute -ENXIO."""
    machine = boot(profile)
    result = machine.put(b"\xff" * 16)
    wanted = KvmDeviceAttr(group=group, attr=attribute, addr=result)
    expected = values[at]
    ret = ENXIO if expected is None else 0
    assert machine.ioctl(machine.kvm, Ioctl.KVM_HAS_DEVICE_ATTR, wanted) == ret
    assert machine.task.read(result, 16) == b"\xff" * 16
    assert machine.ioctl(machine.kvm, Ioctl.KVM_GET_DEVICE_ATTR, wanted) == ret
    written = b"\xff" * 8 if expected is None else expected.to_bytes(8, "little")
    assert machine.task.read(result, 16) == written + b"\xff" * 8


def test_req_certs_attribute_without_snp(boot: MakeMachine) -> None:
    """Linux 7.2: the attribute is there with value 0 on a host without SNP."""
    machine = boot(snp_enabled=False)
    at = machine.put(b"\xff" * 8)
    wanted = KvmDeviceAttr(group=1, attr=2, addr=at)
    assert machine.ioctl(machine.kvm, Ioctl.KVM_HAS_DEVICE_ATTR, wanted) == 0
    assert machine.ioctl(machine.kvm, Ioctl.KVM_GET_DEVICE_ATTR, wanted) == 0
    assert machine.task.read(at, 8) == bytes(8)


def test_device_attribute_bad_pointers(machine: Machine) -> None:
    """KVM_GET_DEVICE_ATTR: -EFAULT for a bad result pointer, which HAS_DEVICE_ATTR does not look at."""
    wanted = KvmDeviceAttr(group=1, attr=0, addr=0x1000)
    assert machine.ioctl(machine.kvm, Ioctl.KVM_GET_DEVICE_ATTR, wanted) == EFAULT
    assert machine.ioctl(machine.kvm, Ioctl.KVM_HAS_DEVICE_ATTR, wanted) == 0
    assert machine.task.ioctl(machine.kvm, Ioctl.KVM_GET_DEVICE_ATTR, bytearray(8)) == EFAULT


# vCPUs


def test_create_vcpu(machine: Machine) -> None:
    """KVM_CREATE_VCPU: an id twice -EEXIST, an id above the maximum -EINVAL; made by `processors`."""
    vm = machine.create_vm()
    fd = machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 7)
    assert len(machine.task.map_vcpu(fd)) == 12288
    assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 7) == -errno.EEXIST
    for number in (4096, 1 << 32, -1):
        assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, number) == EINVAL
    assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 4095) > fd
    assert list(machine.vm(vm).vcpus) == [7, 4095]


def test_processors_are_asked_with_memory_name_and_id(boot: MakeMachine) -> None:
    """`processors` gets memory, the task's name and the vCPU id; its failure leaves no vCPU behind."""
    asked: list[tuple[object, str, int]] = []

    def refuse(*given: object) -> object:
        asked.append(given)  # type: ignore[arg-type]  # three of them
        raise LookupError

    machine = boot(processors=refuse)
    vm = machine.create_vm()
    with pytest.raises(LookupError):
        machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 3)
    assert asked == [(machine.vm(vm).memory, "vm0", 3)]
    assert machine.vm(vm).vcpus == {}
    assert machine.init2(vm) == 0


def test_vcpu_limit(machine: Machine) -> None:
    """KVM_CREATE_VCPU: -EINVAL once the VM has as many vCPUs as KVM allows."""
    vm = machine.create_vm()
    machine.vm(vm).created_vcpus = 1024
    assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 0) == EINVAL


def test_vcpu_created_meanwhile(boot: MakeMachine) -> None:
    """KVM_CREATE_VCPU: of two that create the same id at once, one gets -EEXIST."""
    results: list[int] = []

    class Silent:
        ghcb_msr = 0

        def run(self) -> GuestExit:
            raise NotImplementedError

    def make(*_: object) -> Silent:
        if not results:
            results.append(0)
            results.append(machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 5))
        return Silent()

    machine = boot(processors=make)
    vm = machine.create_vm()
    assert machine.ioctl(vm, Ioctl.KVM_CREATE_VCPU, 5) == -errno.EEXIST
    assert results[1] > 0
    assert machine.vm(vm).created_vcpus == 1
