"""A guest of the host's KVM without SEV-SNP: one plane of memory, no C-bit, the host's own CPUID.

What an SNP guest costs is told by what the same VMM needs for the same kernel without SNP.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import weakref
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import Ioctl, RunOffset
from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
from swsnp.abi.vmsa_registers import X86_PAT
from swsnp.cpu.plain_kvm.cpuid import leaves_of_vcpu, ordinary_leaves, pack_leaves, supported_leaves
from swsnp.cpu.plain_kvm.exit_times import ExitTimes
from swsnp.cpu.plain_kvm.host import address_of, checked_ioctl
from swsnp.cpu.plain_kvm.ioctls import HostIoctl, KvmUserspaceMemoryRegion
from swsnp.cpu.plain_kvm.vcpu_state import vcpu_state
from swsnp.cpu.plain_kvm.vm import (
    check_host,
    close_all,
    create_interrupt_controller,
    interrupt_line,
    open_device,
    set_memory_types,
)
from swsnp.errors import UsageError
from swsnp.hardware.memory import MAP_NORESERVE, BusError, passable_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.cpu.plain_kvm.host import HostKvm
    from swsnp.cpu.plain_kvm.vcpu_state import VcpuState

__all__ = ["OrdinaryHostVm"]

_RUN: Final = int(Ioctl.KVM_RUN)
_U32: Final = struct.Struct("<I")


class OrdinaryHostVm:
    """A VM on the host's KVM, as its VMM sees it: memory, descriptors and ioctls with results or -errno.

    Args:
        host: the host's KVM.
        areas: GPA and bytes of each range of RAM.
        vcpus: how many; vCPU 0 starts with the registers given, the others wait to be started (SIPI).
        start: vCPU 0's registers; what `KvmSregs` leaves out of a reset vCPU's stays.
        passable: its memory can be given to other processes.

    Raises:
        HostError: the host cannot do it. Nothing stays open.

    Attributes:
        vcpus: descriptor of each vCPU and the memory that `kvm_run` starts.
        entries: how often KVM_RUN was called, by descriptor.
        times: what the exits cost, by descriptor.
    """

    def __init__(
        self,
        host: HostKvm,
        areas: tuple[tuple[int, int], ...],
        *,
        vcpus: int,
        start: tuple[KvmRegs, KvmSregs],
        passable: bool = False,
    ) -> None:
        self._host = host
        self._fds: list[int] = []
        self._memfds: list[int] = []
        """Of passable memory, by area."""
        self._end: Final = weakref.finalize(self, _give_back, host, self._fds, self._memfds)
        self._threads: dict[int, int] = {}
        """Who runs a vCPU, by descriptor."""
        self._areas: dict[int, memoryview] = {}
        self.entries: dict[int, int] = {}
        self.times: dict[int, ExitTimes] = {}
        try:
            self._kvm = self._keep(open_device(host))
            check_host(host, self._kvm)
            leaves = ordinary_leaves(supported_leaves(host, self._kvm))
            self._vm = self._keep(checked_ioctl(host, self._kvm, Ioctl.KVM_CREATE_VM))
            create_interrupt_controller(host, self._kvm, self._vm)
            self._ram = tuple(
                (gpa, self._memory(n, gpa, size, passable=passable)) for n, (gpa, size) in enumerate(areas)
            )
            self.vcpus = [
                self._create(n, pack_leaves(leaves_of_vcpu(leaves, n, vcpus))) for n in range(vcpus)
            ]
            self._start(self.vcpus[0][0], *start)
        except BaseException:
            self.close()
            raise

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _memory(self, number: int, gpa: int, size: int, *, passable: bool) -> mmap.mmap:
        if passable:
            area, fd = passable_memory(size)
            self._memfds.append(fd)
        else:
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        region = KvmUserspaceMemoryRegion(
            slot=number, guest_phys_addr=gpa, memory_size=size, userspace_addr=address_of(memoryview(area))
        )
        checked_ioctl(self._host, self._vm, HostIoctl.KVM_SET_USER_MEMORY_REGION, bytearray(bytes(region)))
        return area

    def _create(self, number: int, leaves: bytearray) -> tuple[int, memoryview]:
        host = self._host
        fd = self._keep(checked_ioctl(host, self._vm, Ioctl.KVM_CREATE_VCPU, number))
        checked_ioctl(host, fd, HostIoctl.KVM_SET_CPUID2, leaves)
        self.entries[fd], self.times[fd] = 0, ExitTimes()
        area = host.map(fd, checked_ioctl(host, self._kvm, Ioctl.KVM_GET_VCPU_MMAP_SIZE))
        self._areas[fd] = area
        return fd, area

    def _start(self, fd: int, regs: KvmRegs, sregs: KvmSregs) -> None:
        for request, state in ((Ioctl.KVM_SET_SREGS, sregs), (Ioctl.KVM_SET_REGS, regs)):
            checked_ioctl(self._host, fd, request, bytearray(bytes(state)))
        set_memory_types(self._host, fd, X86_PAT)

    # what the VMM's run loop asks

    def ioctl(self, fd: int, request: int, arg: int | bytearray | memoryview = 0) -> int:
        """An ioctl on a vCPU: its result, or -errno."""
        if request == _RUN:
            return self._enter(fd)
        try:
            return self._host.ioctl(fd, request, arg if isinstance(arg, int | bytearray) else bytearray(arg))
        except OSError as error:
            return -(error.errno or 1)

    def _enter(self, fd: int) -> int:
        self._threads[fd] = threading.get_ident()
        self.entries[fd] += 1
        times = self.times[fd]
        times.enter()
        try:
            result = self._host.ioctl(fd, _RUN)
        except OSError as error:
            times.left(-1)
            return -(error.errno or 1)
        times.left(_U32.unpack_from(self._areas[fd], RunOffset.EXIT_REASON)[0])
        return result

    def interrupt_vcpu(self, fd: int) -> None:
        """A signal to the thread that runs a vCPU."""
        if (thread := self._threads.get(fd)) is not None:
            self._host.interrupt(thread)

    def rip(self, fd: int) -> int:
        """Where a vCPU was left."""
        argument = bytearray(KvmRegs.SIZE)
        checked_ioctl(self._host, fd, Ioctl.KVM_GET_REGS, argument)
        return KvmRegs.parse(argument).rip

    def state(self, fd: int) -> VcpuState:
        """What a vCPU waits for, for people."""
        return vcpu_state(self._host, fd)

    def interrupt_line(self, number: int) -> Callable[[bool], None]:
        """A line of the interrupt controller: called with its level, by any thread."""
        return interrupt_line(self._host, self._vm, number)

    # memory

    def read(self, gpa: int, size: int) -> bytes:
        """Guest memory; BusError where there is none."""
        area, at = self._place(gpa, size)
        return area[at : at + size]

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Guest memory; BusError where there is none."""
        size = len(data)
        area, at = self._place(gpa, size)
        area[at : at + size] = data

    def read_shared(self, gpa: int, size: int) -> bytes:
        """As `read`, for devices: all memory is the host's, too."""
        return self.read(gpa, size)

    def write_shared(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """As `write`, for devices."""
        self.write(gpa, data)

    def passable(self) -> tuple[tuple[int, int, int], ...]:
        """GPA, bytes and descriptor of each range of RAM, for a process that is a device.

        Raises:
            UsageError: the VM was not made so.
        """
        if not self._memfds:
            raise UsageError("ordinary guest: wanted a VM with passable memory")
        ranges = zip(self._ram, self._memfds, strict=True)
        return tuple((gpa, len(area), fd) for (gpa, area), fd in ranges)

    def _place(self, gpa: int, size: int) -> tuple[mmap.mmap, int]:
        """The mapping, and where in it: threads copy from and to it at once, as `SystemMemory` has it."""
        for start, area in self._ram:
            if start <= gpa and gpa + size <= start + len(area):
                return area, gpa - start
        raise BusError(f"gpa {gpa:#x}: no memory holds {size} bytes from there")

    def close(self) -> None:
        """Give the descriptors back; the guest is gone. Again is allowed."""
        self._end()


def _give_back(host: HostKvm, fds: list[int], memfds: list[int]) -> None:
    close_all(host, fds)
    while memfds:
        os.close(memfds.pop())
