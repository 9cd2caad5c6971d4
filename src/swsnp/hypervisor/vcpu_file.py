"""The descriptor of a vCPU: its own ioctls, and KVM_PRE_FAULT_MEMORY. Source: Linux, virt/kvm/kvm_main.c."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import Ioctl, KvmPreFaultMemory
from swsnp.hardware.memory import PAGE

if TYPE_CHECKING:
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.hypervisor.vm import Vm

__all__ = ["VcpuFile"]

_U64_END: Final = 1 << 64


class VcpuFile:
    """The open file of a vCPU."""

    def __init__(self, vm: Vm, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.run_area = vcpu.run_area
        self._vm = vm

    def ioctl(self, request: int, arg: int | bytearray | memoryview) -> int:
        """The vCPU's own ioctls, and KVM_PRE_FAULT_MEMORY, which is about the VM's memory."""
        if self._vm.bugged:
            return -errno.EIO
        if request == Ioctl.KVM_PRE_FAULT_MEMORY:
            return self._pre_fault(arg)
        return self.vcpu.ioctl(request, arg)

    def _pre_fault(self, arg: int | bytearray | memoryview) -> int:
        """KVM_PRE_FAULT_MEMORY: 0 when at least one page was mapped; the structure tells what is left."""
        if isinstance(arg, int) or len(arg) != KvmPreFaultMemory.SIZE:
            return -errno.EFAULT
        wanted = KvmPreFaultMemory.parse(arg)
        gpa, size = wanted.gpa, wanted.size
        if wanted.flags or (gpa | size) % PAGE or not size or gpa + size >= _U64_END:
            return -errno.EINVAL
        with self.vcpu.mutex:
            done, error = self._pre_fault_pages(gpa, size)
        arg[:] = bytes(wanted.but(gpa=gpa + done, size=size - done))
        return 0 if done else error

    def _pre_fault_pages(self, gpa: int, size: int) -> tuple[int, int]:
        """How many bytes were mapped, and why no more."""
        vm = self._vm
        if vm.is_private and not (vm.sev and vm.sev.pre_fault_allowed):
            return 0, -errno.EOPNOTSUPP
        for done in range(0, size, PAGE):
            error = -errno.EINTR if vm.task.signal_pending else vm.memory.pre_fault(gpa + done)
            if error:
                return done, error
        return size, 0

    def interrupt(self) -> None:
        """A signal to the thread in KVM_RUN."""
        self.vcpu.interrupt()

    def release(self) -> None:
        """Close: the VM keeps the vCPU, but is held by one file less."""
        self._vm.release()
