"""One guest on the host's KVM: the descriptors, the MSRs that leave to us, memory and rewritten code."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import GHCB_MSR
from swsnp.abi.kvm import Ioctl, KvmEnableCap
from swsnp.cpu.plain_kvm.cpuid import c_bit_of, leaves_of_vcpu, pack_leaves, snp_leaves, supported_leaves
from swsnp.cpu.plain_kvm.host import DEVICE, address_of, checked_ioctl
from swsnp.cpu.plain_kvm.ioctls import (
    API_VERSION,
    MSR_EXIT_REASON_FILTER,
    MSR_FILTER_RANGES,
    SYNC_GENERAL_REGS,
    HostCapability,
    HostIoctl,
    KvmIrqLevel,
    KvmMsrEntry,
    KvmMsrFilterRange,
    KvmPitConfig,
    MsrFilterFlag,
    OptionalCapability,
)
from swsnp.cpu.plain_kvm.memory import Planes
from swsnp.cpu.plain_kvm.rewrite import Rewrites
from swsnp.cpu.plain_kvm.whole_planes import WholePlanes
from swsnp.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from swsnp.cpu.plain_kvm.host import HostKvm
    from swsnp.cpu.plain_kvm.ioctls import KvmCpuidEntry
    from swsnp.cpu.plain_kvm.memory import GuestPhysicalMemory, PlanesBase

__all__ = [
    "HostVm",
    "SYSCFG_MSR",
    "c_bit_position",
    "check_host",
    "close_all",
    "create_interrupt_controller",
    "interrupt_line",
    "open_device",
    "set_memory_types",
]

SYSCFG_MSR: Final = 0xC0010010
_TSS_GPA: Final = 0xFFFB_D000
"""Three pages that Intel's virtualization needs in real mode, where no firmware is."""
_IDENTITY_MAP_GPA: Final = 0xFFFB_C000
_PIT_WITH_SPEAKER: Final = 1
_MSR_PAT: Final = 0x277
_MSR_MTRR_DEF_TYPE: Final = 0x2FF
_WRITE_BACK_AND_ENABLED: Final = 0xC06
"""Default type write-back, fixed ranges and MTRRs enabled."""


def check_host(host: HostKvm, kvm: int) -> None:
    """See that the host's KVM has what this processor stands on.

    Raises:
        HostError: another API version, or a capability is missing.
    """
    version = checked_ioctl(host, kvm, Ioctl.KVM_GET_API_VERSION)
    if version != API_VERSION:
        raise HostError(f"{DEVICE}: API version {version}, wanted {API_VERSION}; remedy: a current Linux")
    for wanted in HostCapability:
        if checked_ioctl(host, kvm, Ioctl.KVM_CHECK_EXTENSION, wanted) <= 0:
            remedy = "Linux 5.10 or later on x86-64"
            raise HostError(f"{DEVICE}: no KVM_CAP_{wanted.name} ({wanted.value}); remedy: {remedy}")


def c_bit_position(host: HostKvm) -> int:
    """The C-bit's position on this host, which page tables of a guest image need beforehand.

    Raises:
        HostError: /dev/kvm cannot be opened, or does not say how wide guest addresses are.
    """
    kvm = open_device(host)
    try:
        return c_bit_of(supported_leaves(host, kvm))
    finally:
        host.close(kvm)


def open_device(host: HostKvm) -> int:
    """A descriptor of /dev/kvm; HostError with the remedy when there is none."""
    try:
        return host.open()
    except FileNotFoundError as error:
        remedy = "load kvm_amd or kvm_intel, or give the container the device"
        raise HostError(f"{DEVICE}: no such device; remedy: {remedy}") from error
    except PermissionError as error:
        raise HostError(f"{DEVICE}: permission denied; remedy: join the group kvm") from error
    except OSError as error:
        remedy = "enable virtualization in the firmware or the outer hypervisor"
        raise HostError(f"{DEVICE}: {error.strerror or error}; remedy: {remedy}") from error


def create_interrupt_controller(host: HostKvm, kvm: int, vm: int) -> None:
    """Local APICs, IOAPIC, PICs and the timer, all KVM's own; GPAs below 4 GiB for Intel's needs.

    Raises:
        HostError: the host's KVM has none.
    """
    for capability in (OptionalCapability.IRQCHIP, OptionalCapability.PIT2):
        if checked_ioctl(host, kvm, Ioctl.KVM_CHECK_EXTENSION, capability) <= 0:
            raise HostError(
                f"{DEVICE}: no KVM_CAP_{capability.name} ({capability.value}); remedy: a KVM of x86-64"
            )
    checked_ioctl(host, vm, HostIoctl.KVM_SET_TSS_ADDR, _TSS_GPA)
    identity_map = bytearray(_IDENTITY_MAP_GPA.to_bytes(8, "little"))
    checked_ioctl(host, vm, HostIoctl.KVM_SET_IDENTITY_MAP_ADDR, identity_map)
    checked_ioctl(host, vm, HostIoctl.KVM_CREATE_IRQCHIP)
    pit = bytearray(bytes(KvmPitConfig(flags=_PIT_WITH_SPEAKER)))
    checked_ioctl(host, vm, HostIoctl.KVM_CREATE_PIT2, pit)


def interrupt_line(host: HostKvm, vm: int, number: int) -> Callable[[bool], None]:
    """A line of the interrupt controller: called with its level, by any thread."""

    def line(level: bool) -> None:
        wanted = bytearray(bytes(KvmIrqLevel(irq=number, level=int(level))))
        checked_ioctl(host, vm, HostIoctl.KVM_IRQ_LINE, wanted)

    return line


def set_memory_types(host: HostKvm, vcpu: int, pat: int) -> None:
    """The page attribute table and the MTRRs as firmware leaves them, which Linux checks.

    Raises:
        HostError: the host's KVM does not take them.
    """
    values = {_MSR_PAT: pat, _MSR_MTRR_DEF_TYPE: _WRITE_BACK_AND_ENABLED}
    entries = b"".join(bytes(KvmMsrEntry(index=index, data=value)) for index, value in values.items())
    argument = bytearray(len(values).to_bytes(8, "little") + entries)
    done = checked_ioctl(host, vcpu, HostIoctl.KVM_SET_MSRS, argument)
    if done != len(values):
        raise HostError(f"{DEVICE}: KVM_SET_MSRS: {done} of {len(values)} done; remedy: a KVM of x86-64")


class HostVm:
    """A guest of the host's KVM over one guest's memory.

    Args:
        host: the host's KVM.
        memory: what the hypervisor hands its processors.
        executable: ranges of GPAs in private memory that hold code; they are rewritten before the first run.
        vcpus: how many there will be.
        whole_kernel: for a kernel rather than a few instructions: an interrupt controller and a timer of
            KVM's own, and memory as `WholePlanes` has it.
    """

    def __init__(
        self,
        host: HostKvm,
        memory: GuestPhysicalMemory,
        executable: Iterable[range] = (),
        *,
        vcpus: int = 1,
        whole_kernel: bool = False,
    ) -> None:
        self.host: Final = host
        self.whole_kernel: Final = whole_kernel
        self._fds: list[int] = []
        # nobody closes a vCPU of a VM that was simply dropped
        self._end: Final = weakref.finalize(self, close_all, host, self._fds)
        self._executable = tuple(executable)
        self._rewritten = False
        self._vcpus = vcpus
        self._lock = threading.Lock()
        self.rewrites: Final = Rewrites()
        try:
            self._kvm = self._keep(open_device(host))
            check_host(host, self._kvm)
            self._leaves = snp_leaves(supported_leaves(host, self._kvm))
            self.c_bit: Final = c_bit_of(self._leaves)
            self._vm = self._keep(checked_ioctl(host, self._kvm, Ioctl.KVM_CREATE_VM))
            if whole_kernel:
                create_interrupt_controller(host, self._kvm, self._vm)
            self._leave_for_msrs()
            planes = WholePlanes if whole_kernel else Planes
            self.planes: Final[PlanesBase] = planes(host, self._vm, memory, self.c_bit)
            self._memory = memory
        except BaseException:
            self.close()
            raise

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def interrupt_line(self, number: int) -> Callable[[bool], None]:
        """A line of the interrupt controller: called with its level, by any thread."""
        return interrupt_line(self.host, self._vm, number)

    def _leave_for_msrs(self) -> None:
        """Make the MSRs of SEV exits; every other MSR is KVM's own affair."""
        capability = KvmEnableCap(
            cap=HostCapability.X86_USER_SPACE_MSR, args=(MSR_EXIT_REASON_FILTER, 0, 0, 0)
        )
        checked_ioctl(self.host, self._vm, Ioctl.KVM_ENABLE_CAP, bytearray(bytes(capability)))
        deny = bytearray(8)
        # the GHCB MSR and SEV_STATUS are neighbours
        both = MsrFilterFlag.READ | MsrFilterFlag.WRITE
        ranges = [
            KvmMsrFilterRange(flags=both, nmsrs=2, base=GHCB_MSR, bitmap=address_of(deny)),
            KvmMsrFilterRange(flags=MsrFilterFlag.READ, nmsrs=1, base=SYSCFG_MSR, bitmap=address_of(deny)),
        ]
        ranges += [KvmMsrFilterRange()] * (MSR_FILTER_RANGES - len(ranges))
        argument = bytearray(8) + b"".join(map(bytes, ranges))  # default: allow what no range denies
        checked_ioctl(self.host, self._vm, HostIoctl.KVM_X86_SET_MSR_FILTER, argument)

    @property
    def leaves(self) -> tuple[KvmCpuidEntry, ...]:
        """What CPUID tells the boot processor."""
        return leaves_of_vcpu(self._leaves, 0, self._vcpus)

    def create_vcpu(self, vcpu: int) -> tuple[int, memoryview]:
        """A vCPU with an SNP guest's CPUID: its descriptor, and the memory that kvm_run starts."""
        fd = self._keep(checked_ioctl(self.host, self._vm, Ioctl.KVM_CREATE_VCPU, vcpu))
        leaves = leaves_of_vcpu(self._leaves, vcpu, self._vcpus)
        checked_ioctl(self.host, fd, HostIoctl.KVM_SET_CPUID2, pack_leaves(leaves))
        size = checked_ioctl(self.host, self._kvm, Ioctl.KVM_GET_VCPU_MMAP_SIZE)
        return fd, self.host.map(fd, size)

    def shares_registers(self) -> bool:
        """Whether the host's KVM leaves the general registers in `kvm_run`."""
        found = checked_ioctl(self.host, self._kvm, Ioctl.KVM_CHECK_EXTENSION, OptionalCapability.SYNC_REGS)
        return bool(found & SYNC_GENERAL_REGS)

    def prepare(self) -> None:
        """Before the guest is entered: memory as it is now, and at the first time the code rewritten.

        The launch is over only then, so that what was measured is the code as it was given.
        """
        if self.planes.generation != self._memory.generation:
            self.planes.refresh()
        if not self._rewritten:
            with self._lock:
                if not self._rewritten:
                    for code in self._executable:
                        self.rewrite(code)
                    self._rewritten = True

    def rewrite(self, code: range) -> int:
        """Rewrite code that lies in private memory: for code that appears after the first run, call it again.

        Returns:
            How many instructions were replaced.

        Raises:
            UsageError: part of the range is not private memory.
        """
        private = self.planes.private_bit
        parts = list(self.planes.windows(code.start | private, len(code)))
        if sum(len(part) for _, part in parts) != len(code):
            raise UsageError(
                f"executable range {code.start:#x}..{code.stop:#x}: not all of it is private memory"
            )
        return sum(self.rewrites.rewrite(part, address & ~private) for address, part in parts)

    def close(self) -> None:
        """Give the descriptors back; the guest is gone."""
        self._end()


def close_all(host: HostKvm, fds: list[int]) -> None:
    """Close descriptors, the newest first, and forget them."""
    while fds:
        host.close(fds.pop())
