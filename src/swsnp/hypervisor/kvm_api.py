"""The host kernel of one machine: /dev/kvm, /dev/sev and the processes that open them.

Source: Linux, virt/kvm/kvm_main.c, arch/x86/kvm/x86.c, arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import (
    MAP_GPA_RANGE,
    VCPU_MMAP_SIZE,
    Capability,
    DeviceAttr,
    Ioctl,
    KvmDeviceAttr,
    MemoryAttribute,
    VmType,
)
from swsnp.abi.vmsa import SevFeatures
from swsnp.hardware.memory import BusError
from swsnp.hardware.time_slices import TimeSlices
from swsnp.hypervisor.asid import AsidPool
from swsnp.hypervisor.psp_driver import PspDriver
from swsnp.hypervisor.sev_device import SevDevice
from swsnp.hypervisor.task import HostTask
from swsnp.hypervisor.vm import APIC_BUS_CYCLES_NS, Vm, copy_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.hardware.memory import SystemMemory
    from swsnp.hardware.rmp import Rmp
    from swsnp.hardware.turn import Turn
    from swsnp.hypervisor.memory import NestedPaging
    from swsnp.hypervisor.profiles import Profile
    from swsnp.hypervisor.psp_driver import SecureProcessor
    from swsnp.hypervisor.task import Descriptor
    from swsnp.hypervisor.vcpu import Processor
    from swsnp.trace import Trace

__all__ = ["API_VERSION", "EPYC_SIGNATURE", "HostKernelModel", "KvmDevice", "no_cpuid"]

API_VERSION: Final = 12
EPYC_SIGNATURE: Final = 0x0080_0F12
"""CPUID Fn1 EAX of QEMU's model EPYC, 23/1/2."""
_MORE_VCPUS: Final = 2
"""vCPUs that run beside one for each processor, for those that wait for the secure processor."""
_PATIENCE_S: Final = 0.2
"""Seconds after which a vCPU runs although all places are taken: one of them may be blocked for good."""
_GROUP_XCOMP: Final = 0
_GROUP_SEV: Final = 1
_XCOMP_GUEST_SUPP: Final = 0x207
"""x87, SSE, AVX, PKRU: what the processors of this model offer guests."""
_ALWAYS: Final = {
    Capability.IMMEDIATE_EXIT: 1,
    Capability.EXIT_HYPERCALL: 1 << MAP_GPA_RANGE,
    Capability.SYS_ATTRIBUTES: 1,
    Capability.SYSTEM_EVENT_DATA: 1,
    Capability.USER_MEMORY2: 1,
    Capability.MEMORY_FAULT_INFO: 1,
    Capability.PRE_FAULT_MEMORY: 1,
    APIC_BUS_CYCLES_NS: 1,  # the default period in ns; in the series the number means EXIT_COCO, mask 1
}
_WITH_PRIVATE_MEMORY: Final = {
    Capability.MEMORY_ATTRIBUTES: int(MemoryAttribute.PRIVATE),
    Capability.GUEST_MEMFD: 1,
}


def no_cpuid(_leaf: int) -> tuple[int, int, int, int]:
    """A processor that says nothing about itself."""
    return (0, 0, 0, 0)


class HostKernelModel:
    """A host kernel with KVM and the driver of the secure processor.

    `snp_enabled` False is a host without any SEV: only VMs of the default type, no KVM_MEMORY_ENCRYPT_OP.
    SNP is initialised with the kernel's start; where that fails, KVM_SEV_INIT2 tries again and reports it.
    """

    def __init__(
        self,
        *,
        profile: Profile,
        mailbox: SecureProcessor | None,
        memory: SystemMemory,
        rmp: Rmp,
        trace: Trace,
        processors: Callable[[NestedPaging, str, int], Processor],
        snp_enabled: bool = True,
        max_asid: int = 99,
        cbit: int = 51,
        vcpu_signature: int = EPYC_SIGNATURE,
        vmsa_features: int = SevFeatures.of(debug_swap=1),
        tsc_khz: int = 2_000_000,
        cpuid: Callable[[int], tuple[int, int, int, int]] = no_cpuid,
        psp_mutex: Turn | None = None,
        launch_large: bool = False,
        host_cpus: TimeSlices | None = None,
    ) -> None:
        """Start the kernel.

        Args:
            profile: which KVM this is.
            mailbox: the secure processor; None: the machine has none.
            memory: the machine's memory.
            rmp: the machine's reverse map table.
            trace: where trace events go.
            processors: makes the processor of a vCPU, from the VM's memory, the VM's name and the vCPU's id.
            snp_enabled: whether the host runs with SNP.
            max_asid: SNP guests have ASIDs 1 to this number; 0: none.
            cbit: position of the C-bit in guest physical addresses.
            vcpu_signature: CPUID Fn1 EAX of the CPU model, in RDX of every vCPU at reset and so measured.
            vmsa_features: SEV_FEATURES bits that KVM_SEV_INIT2 accepts.
            tsc_khz: TSC frequency of guests with Secure TSC.
            cpuid: leaf to EAX, EBX, ECX, EDX, for the CPUID requests of the GHCB MSR protocol.
            psp_mutex: held over a command to the secure processor; see `PspDriver`.
            launch_large: load 2 MiB with one command where that can be, which no Linux does.
            host_cpus: for vCPUs of built-in guests; by default for some more than this host has processors.
        """
        self.profile = profile
        self.memory = memory
        self.rmp = rmp
        self.trace = trace
        self.processors = processors
        self.snp_enabled = snp_enabled
        self.cbit = cbit
        self.vcpu_signature = vcpu_signature
        self.vmsa_features = int(vmsa_features)
        self.tsc_khz = tsc_khz
        self.cpuid = cpuid
        self.launch_large = launch_large
        self.host_cpus = host_cpus or TimeSlices((os.cpu_count() or 1) + _MORE_VCPUS, patience_s=_PATIENCE_S)
        """On which vCPUs of built-in guests run; one that runs machine code has KVM's."""
        self.driver = PspDriver(mailbox, memory=memory, rmp=rmp, snp_host=snp_enabled, mutex=psp_mutex)
        self.asids = AsidPool(max_asid, self.driver)
        if snp_enabled:
            self.driver.initialise()

    def task(self, name: str) -> HostTask:
        """Start a process; its name is that of its VMs in trace events."""
        return HostTask(name, memory=self.memory, rmp=self.rmp, open_device=self._open)

    def _open(self, task: HostTask, path: str) -> Descriptor | None:
        if path == "/dev/kvm":
            return KvmDevice(self, task)
        if path == "/dev/sev" and self.driver.present:
            return SevDevice(task, self.driver, self.memory)
        return None

    @property
    def policy_bits(self) -> int:
        """Guest policy bits that LAUNCH_START accepts: this KVM's, as far as the firmware has them."""
        return self.profile.policy_supported_bits & self.driver.policy_bits

    @property
    def vm_types(self) -> int:
        """Bit mask of VM types: default and SNP; SEV, SEV-ES and software-protected are not modelled."""
        return 1 << VmType.DEFAULT | self.snp_enabled << VmType.SNP

    def check_extension(self, extension: int | bytearray | memoryview, vm: Vm | None = None) -> int:
        """KVM_CHECK_EXTENSION on the system's descriptor, or on a VM's: 0 for what is not there."""
        if not isinstance(extension, int):
            return 0
        if extension == Capability.VM_TYPES:
            return self.vm_types
        if extension in _WITH_PRIVATE_MEMORY:
            return _WITH_PRIVATE_MEMORY[Capability(extension)] if vm is None or vm.is_private else 0
        return _ALWAYS.get(extension, 0)

    def device_attribute(self, group: int, attribute: int) -> int | None:
        """Value of an attribute of the system's descriptor; None when group or attribute is unknown."""
        if group == _GROUP_XCOMP and attribute == 0:
            return _XCOMP_GUEST_SUPP
        if group != _GROUP_SEV:
            return None
        if attribute == DeviceAttr.SEV_VMSA_FEATURES:
            return self.vmsa_features
        if attribute == DeviceAttr.SNP_POLICY_BITS and self.profile.device_attr_policy_bits:
            return self.policy_bits
        if attribute == DeviceAttr.SEV_SNP_REQ_CERTS and self.profile.device_attr_req_certs:
            return int(self.snp_enabled)
        return None


class KvmDevice:
    """One open file of /dev/kvm."""

    def __init__(self, host: HostKernelModel, task: HostTask) -> None:
        self._host = host
        self._task = task

    def ioctl(self, request: int, arg: int | bytearray | memoryview) -> int:
        """The system ioctls; -ENOTTY for one that is not modelled."""
        if request == Ioctl.KVM_GET_API_VERSION:
            return API_VERSION if arg == 0 else -errno.EINVAL
        if request == Ioctl.KVM_GET_VCPU_MMAP_SIZE:
            return VCPU_MMAP_SIZE if arg == 0 else -errno.EINVAL
        if request == Ioctl.KVM_CHECK_EXTENSION:
            return self._host.check_extension(arg)
        if request == Ioctl.KVM_CREATE_VM:
            return self._create_vm(arg)
        if request == Ioctl.KVM_HAS_DEVICE_ATTR:
            return self._device_attr(arg, store=False)
        if request == Ioctl.KVM_GET_DEVICE_ATTR:
            return self._device_attr(arg, store=True)
        return -errno.ENOTTY

    def release(self) -> None:
        """Close: VMs live on."""

    def _create_vm(self, arg: int | bytearray | memoryview) -> int:
        if not isinstance(arg, int) or not 0 <= arg < 64 or not self._host.vm_types >> arg & 1:
            return -errno.EINVAL
        return self._task.install(Vm(self._host, self._task, arg))

    def _device_attr(self, arg: int | bytearray | memoryview, *, store: bool) -> int:
        wanted = copy_in(KvmDeviceAttr, arg)
        if wanted is None:
            return -errno.EFAULT
        value = self._host.device_attribute(wanted.group, wanted.attr)
        if value is None:
            return -errno.ENXIO
        if store:
            try:
                self._task.write(wanted.addr, value.to_bytes(8, "little"))
            except BusError:
                return -errno.EFAULT
        return 0
