"""A VM whose guest is a Linux kernel on the host's own processor."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from swsnp.abi.snp_launch import CpuidFunction
from swsnp.cpu.plain_kvm.cpuid import c_bit_of, cpuid_page, leaves_of_vcpu, snp_leaves, supported_leaves
from swsnp.cpu.plain_kvm.host import LinuxKvm
from swsnp.cpu.plain_kvm.processor import PlainKvmProcessor
from swsnp.cpu.plain_kvm.vm import HostVm, check_host, open_device
from swsnp.measure.direct_boot import DirectBoot
from swsnp.measure.vmsa_pages import CPU_SIGNATURES
from swsnp.vmm.config import LaunchPage, memory_map
from swsnp.vmm.launch import launch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swsnp.abi.acpi import VirtioPlace
    from swsnp.cpu.plain_kvm.host import HostKvm
    from swsnp.cpu.plain_kvm.ioctls import KvmCpuidEntry
    from swsnp.hypervisor.memory import NestedPaging
    from swsnp.hypervisor.neighbours import Processor
    from swsnp.hypervisor.task import HostTask
    from swsnp.measure.kernel_image import KernelImage
    from swsnp.trace import Trace
    from swsnp.vmm.config import VmConfig
    from swsnp.vmm.ram import GuestRam
    from swsnp.vmm.run import IoBus
    from swsnp.vmm.stop import PowerSwitch, StopReason

__all__ = ["HostProcessor", "KernelVm", "host_processor"]

_MANY: Final = 255
_MODEL: Final = "EPYC-Milan"
"""Whose signature application processors have at reset, where the configuration names none."""


@dataclass(frozen=True, slots=True)
class HostProcessor:
    """What the host's KVM offers: where the C-bit is, and the CPUID leaves of an SNP guest."""

    host: HostKvm
    c_bit: int
    leaves: tuple[KvmCpuidEntry, ...]

    def shown(self) -> tuple[CpuidFunction, ...]:
        """The leaves as the firmware would have them from a CPU that shows all that a guest may be told."""
        page = cpuid_page(leaves_of_vcpu(self.leaves, 0, _MANY))
        size = CpuidFunction.SIZE
        return tuple(CpuidFunction.parse_at(page.functions, number * size) for number in range(page.count))

    def cpuid(self, function: int) -> tuple[int, int, int, int]:
        """Sub-leaf 0 of a function, zeros for one that is not there: for the GHCB MSR protocol."""
        for leaf in self.leaves:
            if leaf.function == function and not leaf.index:
                return leaf.eax, leaf.ebx, leaf.ecx, leaf.edx
        return 0, 0, 0, 0


def host_processor(host: HostKvm | None = None) -> HostProcessor:
    """Ask the host's KVM.

    Raises:
        HostError: there is none, or it lacks something.
    """
    host = host if host is not None else LinuxKvm()
    kvm = open_device(host)
    try:
        check_host(host, kvm)
        leaves = snp_leaves(supported_leaves(host, kvm))
    finally:
        host.close(kvm)
    return HostProcessor(host, c_bit_of(leaves), leaves)


class KernelVm:
    """A launched kernel; a context manager that ends it. `Machine.launch_kernel` makes it.

    Attributes:
        boot: how kernel, initial RAM disk and command line lie in memory, and what was measured.
        processors: one per vCPU.
    """

    def __init__(
        self,
        task: HostTask,
        config: VmConfig,
        kernel: KernelImage,
        *,
        initrd: bytes,
        cmdline: str,
        devices: Sequence[VirtioPlace],
        processor: HostProcessor,
        bus: IoBus,
        power: PowerSwitch,
        makers: dict[str, Callable[[NestedPaging, int], Processor]],
        dialect: str,
        trace: Trace,
    ) -> None:
        """Launch.

        Args:
            task: the VMM's process.
            config: the VM; `start` is set here.
            kernel: what is started.
            initrd: its initial RAM disk, empty for none.
            cmdline: its command line.
            devices: where virtio devices are that ACPI tells the kernel.
            processor: what the host's KVM offers.
            bus: the devices, which may still be attached before `run`.
            power: what they switch the VM off with.
            makers: where the machine looks up who makes a VM's processors, by the VM's name.
            dialect: which certificate exit the kernel model has, by its profile's name.
            trace: where events go.
        """
        signature = CPU_SIGNATURES[_MODEL] if config.cpu_signature is None else config.cpu_signature
        self.config, self.name = replace(config, cpu_signature=signature), config.name
        self._signature = signature
        self._processor = processor
        self.boot = DirectBoot(
            kernel,
            initrd=initrd,
            cmdline=cmdline,
            memory=memory_map(config.memory_size, ()),
            vcpus=config.vcpus,
            c_bit=processor.c_bit,
            cpuid=cpuid_page(leaves_of_vcpu(processor.leaves, 0, config.vcpus)),
            devices=devices,
        )
        self._host_vm: HostVm | None = None
        self.processors: dict[int, PlainKvmProcessor] = {}
        with ExitStack() as undo:
            undo.callback(task.exit)
            makers[self.name] = self._make_processor
            undo.callback(makers.pop, self.name)
            undo.callback(self._close_host_vm)
            image = tuple(LaunchPage(run.page_type, run.gpa, run.data) for run in self.boot.runs())
            self._running = launch(
                task,
                replace(self.config, start=self.boot.registers()),
                image,
                dialect=dialect if config.certs is not None else None,
                trace=trace,
                bus=bus,
                power=power,
            )
            undo.callback(self._running.close)
            for part in self.boot.parts:
                self._running.forget(part.gpa, len(part.data))
            self._undo = undo.pop_all()

    def _make_processor(self, memory: NestedPaging, vcpu: int) -> Processor:
        if self._host_vm is None:
            self._host_vm = HostVm(
                self._processor.host,
                memory,
                self.boot.executable,
                vcpus=self.config.vcpus,
                whole_kernel=True,
            )
        self.processors[vcpu] = processor = PlainKvmProcessor(self._host_vm, memory, vcpu=vcpu)
        return processor

    def _close_host_vm(self) -> None:
        if self._host_vm is not None:
            self._host_vm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the VM. Again is allowed."""
        self._undo.close()

    @property
    def measurement(self) -> bytes:
        """The launch digest that the guest's reports carry, computed from what was launched."""
        return self.boot.digest(signature=self._signature)

    @property
    def ram(self) -> GuestRam:
        """Guest memory, shared side, for devices."""
        return self._running.ram

    def interrupt_line(self, number: int) -> Callable[[bool], None]:
        """An interrupt line for a device."""
        assert self._host_vm is not None  # noqa: S101  # the launch made vCPUs
        return self._host_vm.interrupt_line(number)

    def run(self, timeout_s: float | None = None) -> StopReason:
        """Run until the guest has ended, all vCPUs in threads of their own."""
        return self._running.run_all(timeout_s)
