"""A VM whose guest is a Linux kernel without SEV-SNP, by the VMM that runs SNP guests: to compare with."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from swsnp.cpu.plain_kvm.ordinary import OrdinaryHostVm
from swsnp.measure.direct_boot import DirectBoot
from swsnp.vmm.config import memory_map
from swsnp.vmm.ram import Conversion, Refused
from swsnp.vmm.run import VcpuRunner
from swsnp.vmm.threads import run_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swsnp.abi.acpi import VirtioPlace
    from swsnp.cpu.plain_kvm.exit_times import ExitTimes
    from swsnp.cpu.plain_kvm.host import HostKvm
    from swsnp.cpu.plain_kvm.vcpu_state import VcpuState
    from swsnp.measure.kernel_image import KernelImage
    from swsnp.vmm.config import VmConfig
    from swsnp.vmm.run import IoBus
    from swsnp.vmm.stop import PowerSwitch, StopReason

__all__ = ["OrdinaryProcessor", "OrdinaryVm"]


@dataclass(frozen=True, slots=True)
class OrdinaryProcessor:
    """A vCPU, for people: what `PlainKvmProcessor` tells, too."""

    host: OrdinaryHostVm
    fd: int
    last_error: str = ""
    """The VMM's own reasons are all there is."""

    @property
    def entries(self) -> int:
        """How often the host's KVM was asked to run the guest."""
        return self.host.entries[self.fd]

    @property
    def times(self) -> ExitTimes:
        """What its exits cost."""
        return self.host.times[self.fd]

    @property
    def rip(self) -> int:
        """Where the guest was left."""
        return self.host.rip(self.fd)

    def state(self) -> VcpuState:
        """What it waits for."""
        return self.host.state(self.fd)

    @property
    def sites(self) -> dict[int, int]:
        """Nothing is rewritten."""
        return {}


class OrdinaryVm:
    """A kernel that is ready to run; a context manager that ends it.

    Args:
        config: the VM: memory and vCPUs; nothing else counts without SNP.
        kernel: what is started.
        host: the host's KVM.
        bus: the devices, which may still be attached before `run`.
        power: what they switch the VM off with.
        initrd: its initial RAM disk, empty for none.
        cmdline: its command line.
        devices: where virtio devices are that ACPI tells the kernel.

    Raises:
        UsageError: what does not fit together.
        HostError: the host's KVM refused.

    Attributes:
        config: as given.
        processors: one per vCPU.
    """

    measurement: Final = b""
    """Nothing is measured."""

    def __init__(
        self,
        config: VmConfig,
        kernel: KernelImage,
        *,
        host: HostKvm,
        bus: IoBus,
        power: PowerSwitch,
        initrd: bytes = b"",
        cmdline: str = "",
        devices: Sequence[VirtioPlace] = (),
    ) -> None:
        self.config = config
        areas = memory_map(config.memory_size, ())
        boot = DirectBoot(
            kernel,
            initrd=initrd,
            cmdline=cmdline,
            memory=areas,
            vcpus=config.vcpus,
            c_bit=None,
            cpuid=None,
            devices=devices,
        )
        self._host = OrdinaryHostVm(
            host, areas, vcpus=config.vcpus, start=boot.registers(), passable=config.passable_memory
        )
        for part in boot.parts:
            self._host.write(part.gpa, part.data)
        self._runners = [
            VcpuRunner(
                self._host,
                vcpu=number,
                fd=fd,
                run_area=area,
                ram=_OnePlane(),
                certificates=None,
                bus=bus,
                power=power,
            )
            for number, (fd, area) in enumerate(self._host.vcpus)
        ]
        self.processors = {
            number: OrdinaryProcessor(self._host, fd) for number, (fd, _) in enumerate(self._host.vcpus)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the VM. Again is allowed."""
        self._host.close()

    @property
    def ram(self) -> OrdinaryHostVm:
        """Guest memory, for devices: `read` and `write`."""
        return self._host

    def interrupt_line(self, number: int) -> Callable[[bool], None]:
        """An interrupt line for a device."""
        return self._host.interrupt_line(number)

    def run(self, timeout_s: float | None = None) -> StopReason:
        """Run until the guest has ended, all vCPUs in threads of their own."""
        return run_all(self._runners, timeout_s)


class _OnePlane:
    """Memory that has no other state: nobody asks, since KVM makes no such exit for these guests."""

    def convert(self, gpa: int, npages: int, *, private: bool) -> Conversion:
        return Refused(errno.EINVAL)
