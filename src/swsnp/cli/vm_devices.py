"""`swsnp vm -kernel …`: the virtio devices that its command line asks for."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from swsnp.cli.qemu_chardevs import STDIN, STDIO
from swsnp.cli.qemu_devices import DiskDevice
from swsnp.cli.qemu_folders import FolderDevice
from swsnp.cli.qemu_netdevs import NetDevice, StreamNet, UserNet
from swsnp.cli.qemu_ports import SerialDevice
from swsnp.measure.direct_boot import virtio_places
from swsnp.vmm.devices.block import Block
from swsnp.vmm.devices.console import Console, Port
from swsnp.vmm.devices.entropy import Entropy
from swsnp.vmm.devices.network import Network
from swsnp.vmm.devices.power import attach_power
from swsnp.vmm.devices.raw_file import RawFile
from swsnp.vmm.devices.snapshot import Snapshot
from swsnp.vmm.devices.vhost_fs import VhostFs
from swsnp.vmm.devices.vhost_mmio import VhostMmio
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swsnp.cli.qemu_chardevs import Chardev
    from swsnp.cli.qemu_devices import AnyDevice
    from swsnp.machine.kernel_vm import KernelVm
    from swsnp.machine.ordinary_vm import OrdinaryVm
    from swsnp.vmm.devices.bus import Bus
    from swsnp.vmm.devices.host_end import HostStream, InputEnd, Nobody
    from swsnp.vmm.devices.virtio_mmio import VirtioDevice
    from swsnp.vmm.stop import PowerSwitch

__all__ = ["VmDevices"]


class VmDevices:
    """Open files and what is made of them; a context manager. They outlast a guest that resets.

    Args:
        wanted: the devices, in order.

    Raises:
        InputError: a file cannot be a disk, or is in use; the host's end of a port cannot be opened; nobody
            serves a folder.
        HostError: a user network lacks its program; a folder's daemon does not do what is needed.
        UsageError: too many devices.

    Attributes:
        places: where they are for the guest.
        passable_memory: one of them is another process, which gets the guest's shared memory.
        stdio: the port that has the standard output, and shall have the standard input; or None.
        input: the end that shall have the standard input of a program; or None.
        on_output: called when the guest has said something to that port.
    """

    def __init__(self, wanted: Sequence[AnyDevice]) -> None:
        self.places: Final = virtio_places(len(wanted))
        self.passable_memory: Final = any(isinstance(each, FolderDevice) for each in wanted)
        self.stdio: Port | None = None
        self.input: InputEnd | None = None
        self.on_output: Callable[[], None] = lambda: None
        self._consoles: list[Console] = []
        self._attached: list[VirtioMmio | VhostMmio] = []
        with ExitStack() as files:
            self._makers = [self._maker(each, files) for each in wanted]
            self._files = files.pop_all()

    def _maker(self, wanted: AnyDevice, files: ExitStack) -> Callable[[], VirtioDevice | VhostFs]:
        if isinstance(wanted, SerialDevice):
            console = self._console(wanted, files)
            return lambda: console
        if isinstance(wanted, NetDevice):
            network = _network(wanted, files)
            return lambda: network
        if isinstance(wanted, FolderDevice):
            folder = _folder(wanted, files)
            return lambda: folder
        if not isinstance(wanted, DiskDevice):
            return lambda: Entropy(os.urandom)
        drive = wanted.drive
        read_only = drive.read_only or drive.snapshot
        file = files.enter_context(RawFile(drive.file, read_only=read_only, format_given=drive.format_given))
        disk = Snapshot(file) if drive.snapshot and not drive.read_only else file
        return lambda: Block(disk, serial=wanted.serial.encode())

    def _console(self, wanted: SerialDevice, files: ExitStack) -> Console:
        """A console device with its ports' ends, which it keeps over resets of the guest."""
        ports = []
        for each in wanted.ports:
            end = self._end(each.chardev)
            files.callback(end.close)
            port = Port(each.number, end, name=each.name, is_console=each.is_console)
            end.attach(port)
            ports.append(port)
            if each.chardev.kind == STDIO:
                self.stdio = port
        console = Console(ports, most=wanted.most)
        self._consoles.append(console)
        return console

    def _end(self, wanted: Chardev) -> HostStream | InputEnd | Nobody:
        if wanted.kind != STDIN:
            return _host_end(wanted, lambda: self.on_output())
        from swsnp.vmm.devices.host_end import InputEnd

        self.input = InputEnd()
        return self.input

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def attach(self, vm: KernelVm | OrdinaryVm, bus: Bus, power: PowerSwitch) -> None:
        """Put the devices of one boot on its bus, and what ACPI promises beside them."""
        for place, make in zip(self.places, self._makers, strict=True):
            device = _attached(make(), vm, vm.interrupt_line(place.interrupt))
            bus.attach_memory(place.registers, device)
            self._attached.append(device)
        if self.places:
            attach_power(bus, power)
        if self.stdio is not None:
            self.stdio.go()

    def detach(self) -> None:
        """The guest has ended, and its memory is about to go; what it said before is taken.

        Again is allowed.
        """
        for each in self._consoles:
            each.finish()
        for device in self._attached:
            device.stop()
        self._attached.clear()


def _attached(
    made: VirtioDevice | VhostFs, vm: KernelVm | OrdinaryVm, line: Callable[[bool], None]
) -> VirtioMmio | VhostMmio:
    """A device with the registers that it needs."""
    if isinstance(made, VhostFs):
        return VhostMmio(made, vm.ram, line)
    device = VirtioMmio(made, vm.ram, line)
    if isinstance(made, Console | Network):
        made.connect(device.kick)
    return device


def _folder(wanted: FolderDevice, files: ExitStack) -> VhostFs:
    """A shared folder with its daemon, which serves it over resets of the guest."""
    from swsnp.vmm.devices.vhost_user import connect_to_daemon

    daemon = files.enter_context(connect_to_daemon(wanted.path))
    return VhostFs(wanted.tag, daemon, queue_size=wanted.queue_size)


def _network(wanted: NetDevice, files: ExitStack) -> Network:
    """A network device with its peer, which it keeps over resets of the guest."""
    from swsnp.vmm.devices import host_peers
    from swsnp.vmm.devices.host_end import HostStream
    from swsnp.vmm.devices.passt import Passt

    match wanted.netdev:
        case UserNet(forwards):
            passt = files.enter_context(Passt(wanted.mac, forwards))
            stream = HostStream(host_peers.socket_end(passt.socket))
        case StreamNet(address, True):
            listener = host_peers.Listener(address, wait=False)
            _tell(f"a network listens at {listener.where}")
            stream = HostStream(listener)
        case StreamNet(address, _):
            stream = HostStream(host_peers.connect_to(address))
    files.callback(stream.close)
    network = Network(wanted.mac, stream)
    stream.attach(network)
    return network


def _host_end(wanted: Chardev, on_output: Callable[[], None]) -> HostStream | Nobody:
    """Open the host's end of a port; where somebody has to be told how to reach it, stderr tells.

    Args:
        wanted: who is there.
        on_output: called when the guest has said something to the standard output.
    """
    from swsnp.vmm.devices import host_peers
    from swsnp.vmm.devices.host_end import HostStream, Nobody

    match wanted.kind, wanted.path:
        case "null", _:
            return Nobody()
        case "stdio", _:
            return HostStream(host_peers.standard_output(), on_send=on_output)
        case "pty", _:
            terminal = host_peers.Pseudoterminal()
            _tell(f"chardev {wanted.id} is {terminal.name}")
            return HostStream(terminal)
        case "file", Path() as path:
            return HostStream(host_peers.file_end(path, append=wanted.append))
        case "pipe", Path() as path:
            return HostStream(host_peers.pipe_end(path))
    address = wanted.path or (wanted.host, wanted.port)
    if not wanted.server:
        return HostStream(host_peers.connect_to(address))
    listener = host_peers.Listener(address, wait=wanted.wait)
    _tell(f"chardev {wanted.id} {'waits for a connection' if wanted.wait else 'listens'} at {listener.where}")
    return HostStream(listener)


def _tell(text: str) -> None:
    print(f"swsnp vm: {text}", file=sys.stderr, flush=True)
