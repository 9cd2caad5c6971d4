"""`swsnp vm -kernel …`: the virtio devices that its command line asks for."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from swsnp.cli.qemu_devices import DiskDevice
from swsnp.measure.direct_boot import virtio_places
from swsnp.vmm.devices.block import Block
from swsnp.vmm.devices.entropy import Entropy
from swsnp.vmm.devices.power import attach_power
from swsnp.vmm.devices.raw_file import RawFile
from swsnp.vmm.devices.snapshot import Snapshot
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swsnp.cli.qemu_devices import EntropyDevice
    from swsnp.machine.kernel_vm import KernelVm
    from swsnp.machine.ordinary_vm import OrdinaryVm
    from swsnp.vmm.devices.bus import Bus
    from swsnp.vmm.devices.virtio_mmio import VirtioDevice
    from swsnp.vmm.stop import PowerSwitch

__all__ = ["VmDevices"]


class VmDevices:
    """Open files and what is made of them; a context manager. They outlast a guest that resets.

    Args:
        wanted: the devices, in order.

    Raises:
        InputError: a file cannot be a disk, or is in use.
        UsageError: too many devices.
    """

    def __init__(self, wanted: Sequence[DiskDevice | EntropyDevice]) -> None:
        self.places = virtio_places(len(wanted))
        with ExitStack() as files:
            self._makers = [self._maker(each, files) for each in wanted]
            self._files = files.pop_all()

    @staticmethod
    def _maker(wanted: DiskDevice | EntropyDevice, files: ExitStack) -> Callable[[], VirtioDevice]:
        if not isinstance(wanted, DiskDevice):
            return lambda: Entropy(os.urandom)
        drive = wanted.drive
        read_only = drive.read_only or drive.snapshot
        file = files.enter_context(RawFile(drive.file, read_only=read_only, format_given=drive.format_given))
        disk = Snapshot(file) if drive.snapshot and not drive.read_only else file
        return lambda: Block(disk, serial=wanted.serial.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def attach(self, vm: KernelVm | OrdinaryVm, bus: Bus, power: PowerSwitch) -> None:
        """Put the devices of one boot on its bus, and what ACPI promises beside them."""
        for place, make in zip(self.places, self._makers, strict=True):
            device = VirtioMmio(make(), vm.ram, vm.interrupt_line(place.interrupt))
            bus.attach_memory(place.registers, device)
        if self.places:
            attach_power(bus, power)
