"""One virtual machine of KVM: its descriptor's ioctls, memslots, attributes, vCPUs, life and end.

Source: Linux, virt/kvm/kvm_main.c, arch/x86/kvm/x86.c, include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import errno
import logging
import threading
from typing import TYPE_CHECKING, Final, TypeVar

from swsnp.abi.kvm import (
    GUEST_MEMFD_SLOT,
    MAP_GPA_RANGE,
    Capability,
    Ioctl,
    KvmCreateGuestMemfd,
    KvmEnableCap,
    KvmMemoryAttributes,
    KvmUserspaceMemoryRegion2,
    MemoryAttribute,
    VmType,
)
from swsnp.abi.record import Record
from swsnp.hardware.memory import PAGE
from swsnp.hypervisor.guest_memfd import GuestMemfd
from swsnp.hypervisor.launch import SevState, memory_encrypt_op, tear_down
from swsnp.hypervisor.memory import MemorySlot, NestedPaging
from swsnp.hypervisor.vcpu import Vcpu
from swsnp.hypervisor.vcpu_file import VcpuFile

if TYPE_CHECKING:
    from swsnp.hypervisor.kvm_api import HostKernelModel
    from swsnp.hypervisor.profiles import Profile
    from swsnp.hypervisor.psp_driver import PspDriver
    from swsnp.hypervisor.task import HostTask
    from swsnp.trace import Trace

__all__ = ["APIC_BUS_CYCLES_NS", "MAX_VCPUS", "MAX_VCPU_ID", "Vm", "copy_in"]

_logger = logging.getLogger(__name__)

MAX_VCPUS: Final = 1024
MAX_VCPU_ID: Final = 4 * MAX_VCPUS - 1
APIC_BUS_CYCLES_NS: Final = 237
"""KVM_CAP_X86_APIC_BUS_CYCLES_NS: upstream's use of the series' number for KVM_CAP_EXIT_COCO."""
_HYPERCALL_MASK: Final = 1 << MAP_GPA_RANGE
_COCO_MASK: Final = 1
"""Bit 0: KVM_EXIT_COCO_REQ_CERTS."""
_LOG_DIRTY, _READ_ONLY = 1, 2
_MAX_SLOTS: Final = 32764
_MAX_SLOT_PAGES: Final = (1 << 31) - 1
_USER_END: Final = 0x7FFF_FFFF_F000
_U64_END: Final = 1 << 64
_PRIVATE: Final = int(MemoryAttribute.PRIVATE)
_ATTRIBUTES: Final = KvmMemoryAttributes.packing()
_R = TypeVar("_R", bound=Record)


def copy_in(kind: type[_R], arg: int | bytearray | memoryview) -> _R | None:
    """The structure behind an ioctl's argument; None (-EFAULT) when it is not one of that size."""
    if isinstance(arg, int) or len(arg) != kind.SIZE:
        return None
    return kind.parse(arg)


class Vm:
    """A VM and the open file of its descriptor; it lives until that, vCPUs and guest_memfds are closed."""

    def __init__(self, host: HostKernelModel, task: HostTask, vm_type: int) -> None:
        self.name = task.name
        self.host = host
        self.profile: Profile = host.profile
        self.trace: Trace = host.trace
        self.driver: PspDriver = host.driver
        self.task = task
        self.vm_type = vm_type
        self.memory = NestedPaging(system=host.memory, rmp=host.rmp, user=task)
        self.bugged = False
        self.lock = threading.RLock()
        self.sev: SevState | None = None
        self.exit_hypercall_mask = 0
        self.coco_mask = 0
        self.req_certs = False
        self.vcpus: dict[int, Vcpu] = {}
        self.created_vcpus = 0
        """vCPUs created or being created."""
        self.vmsa_pages: dict[int, int] = {}
        """System address of the VMSA page that KVM owns, by vCPU id."""
        self._users = 1
        self._end_of_notices = task.on_unmap(self.memory.drop_mapping)
        self._commands = {
            Ioctl.KVM_CHECK_EXTENSION: self._check_extension,
            Ioctl.KVM_ENABLE_CAP: self._enable_cap,
            Ioctl.KVM_CREATE_VCPU: self._create_vcpu,
            Ioctl.KVM_SET_USER_MEMORY_REGION2: self._set_user_memory_region2,
            Ioctl.KVM_SET_MEMORY_ATTRIBUTES: self._set_memory_attributes,
            Ioctl.KVM_CREATE_GUEST_MEMFD: self._create_guest_memfd,
            Ioctl.KVM_MEMORY_ENCRYPT_OP: self._memory_encrypt_op,
        }

    @property
    def is_private(self) -> bool:
        """Whether guests of this type have private memory."""
        return self.vm_type == VmType.SNP

    def ioctl(self, request: int, arg: int | bytearray | memoryview) -> int:
        """An ioctl on the VM's descriptor: -EIO once the VM is dead, -ENOTTY for one that is not modelled."""
        if self.bugged:
            return -errno.EIO
        run = self._commands.get(request)  # type: ignore[call-overload]  # any int may be asked for
        return -errno.ENOTTY if run is None else int(run(arg))

    def bug(self) -> None:
        """KVM_BUG: every later ioctl on the VM and its vCPUs fails."""
        self.bugged = True
        _logger.info("%s: the VM is dead", self.name)

    def reclaim(self, spa: int) -> bool:
        """Take a page back from the firmware and make it shared; False when it is lost and the VM dead."""
        if self.driver.reclaim(spa) == 0:
            return True
        self.bug()
        return False

    # Life

    def hold(self) -> None:
        """One more open file refers to this VM."""
        with self.lock:
            self._users += 1

    def release(self) -> None:
        """One file less; the last one ends the VM."""
        with self.lock:
            self._users -= 1
            if self._users:
                return
        self._end_of_notices()
        for slot in self.memory.slots():
            self.memory.remove_slot(slot)
        tear_down(self)

    # Capabilities

    def _check_extension(self, arg: int | bytearray | memoryview) -> int:
        return self.host.check_extension(arg, self)

    def _enable_cap(self, arg: int | bytearray | memoryview) -> int:
        wanted = copy_in(KvmEnableCap, arg)
        if wanted is None:
            return -errno.EFAULT
        if wanted.flags:
            return -errno.EINVAL
        value = wanted.args[0]
        if wanted.cap == Capability.EXIT_HYPERCALL:
            if value & ~_HYPERCALL_MASK:
                return -errno.EINVAL
            self.exit_hypercall_mask = value
            return 0
        if wanted.cap == Capability.EXIT_COCO and self.profile.cap_exit_coco:
            if value & ~_COCO_MASK:
                return -errno.EINVAL
            self.coco_mask = value
            return 0
        if wanted.cap == APIC_BUS_CYCLES_NS and value:
            return -errno.ENXIO  # no in-kernel interrupt controller in this model
        return -errno.EINVAL

    # vCPUs

    def _create_vcpu(self, arg: int | bytearray | memoryview) -> int:
        if not isinstance(arg, int) or not 0 <= arg <= MAX_VCPU_ID:
            return -errno.EINVAL
        with self.lock:
            if self.created_vcpus >= MAX_VCPUS:
                return -errno.EINVAL
            if arg in self.vcpus:
                return -errno.EEXIST
            self.created_vcpus += 1
        try:
            processor = self.host.processors(self.memory, self.name, arg)
            vcpu = Vcpu(
                self,
                arg,
                processor,
                cbit=self.host.cbit,
                cpuid=self.host.cpuid,
                signature=self.host.vcpu_signature,
                host_cpus=self.host.host_cpus,
            )
        except BaseException:
            with self.lock:
                self.created_vcpus -= 1
            raise
        with self.lock:
            if arg in self.vcpus:
                self.created_vcpus -= 1
                return -errno.EEXIST
            self.vcpus[arg] = vcpu
        self.hold()
        return self.task.install(VcpuFile(self, vcpu))

    # Memory

    def _set_user_memory_region2(self, arg: int | bytearray | memoryview) -> int:
        wanted = copy_in(KvmUserspaceMemoryRegion2, arg)
        if wanted is None:
            return -errno.EFAULT
        with self.lock:
            return self._check_region(wanted) or self._apply_region(wanted)

    def _check_region(self, wanted: KvmUserspaceMemoryRegion2) -> int:
        has_memfd = wanted.flags & GUEST_MEMFD_SLOT
        valid_flags = GUEST_MEMFD_SLOT if has_memfd and self.is_private else _LOG_DIRTY | _READ_ONLY
        size, gpa, offset = wanted.memory_size, wanted.guest_phys_addr, wanted.guest_memfd_offset
        refused = (
            wanted.flags & ~valid_flags
            or (size | gpa | wanted.userspace_addr) % PAGE
            or wanted.userspace_addr + size > _USER_END
            or (has_memfd and (offset % PAGE or offset + size >= _U64_END))
            or wanted.slot >= _MAX_SLOTS
            or gpa + size >= _U64_END
            or size // PAGE > _MAX_SLOT_PAGES
        )
        return -errno.EINVAL if refused else 0

    def _apply_region(self, wanted: KvmUserspaceMemoryRegion2) -> int:
        old = self.memory.slot_numbered(wanted.slot)
        gpa, size = wanted.guest_phys_addr, wanted.memory_size
        if not size:
            if old is None:
                return -errno.EINVAL
            self.memory.remove_slot(old)
            return 0
        if old is not None and not _may_change(old, wanted):
            return -errno.EINVAL
        if self.memory.overlaps(gpa, size, besides=old):
            return -errno.EEXIST
        memfd: GuestMemfd | None = None
        if wanted.flags & GUEST_MEMFD_SLOT:
            found = self._bind_memfd(wanted)
            if isinstance(found, int):
                return found
            memfd = found
        if old is not None:
            self.memory.remove_slot(old)
        self.memory.add_slot(
            MemorySlot(
                number=wanted.slot,
                flags=wanted.flags,
                gpa=gpa,
                size=size,
                user_address=wanted.userspace_addr,
                memfd=memfd,
                memfd_offset=wanted.guest_memfd_offset,
                read_only=bool(wanted.flags & _READ_ONLY),
                has_memfd=memfd is not None,
            )
        )
        return 0

    def _bind_memfd(self, wanted: KvmUserspaceMemoryRegion2) -> GuestMemfd | int:
        file = self.task.descriptor(wanted.guest_memfd)
        if file is None:
            return -errno.EBADF
        if not isinstance(file, GuestMemfd) or file.owner is not self:
            return -errno.EINVAL
        return file.bind(wanted.slot, wanted.guest_memfd_offset, wanted.memory_size) or file

    def _set_memory_attributes(self, arg: int | bytearray | memoryview) -> int:
        # a record would be longer in the making than all the rest, and a kernel converts page by page
        if isinstance(arg, int) or len(arg) != _ATTRIBUTES.size:
            return -errno.EFAULT
        address, size, attributes, flags = _ATTRIBUTES.unpack(arg)
        supported = _PRIVATE if self.is_private else 0
        end = address + size
        if flags or attributes & ~supported or not size or end >= _U64_END or (address | size) % PAGE:
            return -errno.EINVAL
        with self.lock:
            self.memory.set_attributes(address // PAGE, end // PAGE, attributes)
        return 0

    def _create_guest_memfd(self, arg: int | bytearray | memoryview) -> int:
        wanted = copy_in(KvmCreateGuestMemfd, arg)
        if wanted is None:
            return -errno.EFAULT
        # the flags of newer kernels serve mappings of the file, which this model does not have
        if wanted.flags or not 0 < wanted.size < _U64_END // 2 or wanted.size % PAGE:
            return -errno.EINVAL
        memfd = GuestMemfd(
            wanted.size,
            owner=self,
            memory=self.host.memory,
            rmp=self.host.rmp,
            on_release=self._memfd_closed,
        )
        self.hold()
        return self.task.install(memfd)

    def _memfd_closed(self, memfd: GuestMemfd) -> None:
        self.memory.drop_memfd(memfd)
        self.release()

    def _memory_encrypt_op(self, arg: int | bytearray | memoryview) -> int:
        return memory_encrypt_op(self, arg)


def _may_change(old: MemorySlot, wanted: KvmUserspaceMemoryRegion2) -> bool:
    """A slot may be moved; one with a guest_memfd can only be deleted."""
    return not (
        old.has_memfd
        or wanted.userspace_addr != old.user_address
        or wanted.memory_size != old.size
        or (wanted.flags ^ old.flags) & (_READ_ONLY | GUEST_MEMFD_SLOT)
    )
