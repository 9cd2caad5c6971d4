"""QEMU's options for virtio devices and what is behind them.

These are -device and -nic; -drive, -blockdev, -chardev and -netdev for what a device names by its id.

What is modelled is virtio over MMIO: `if=virtio` means a `virtio-blk-device`. Devices come in the order of
the command line; what they name may come before or after them, but a port's bus comes before it.

Source: the manual page qemu(1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from swsnp.cli.qemu_chardevs import STDIO, Chardev, chardev_of
from swsnp.cli.qemu_drives import Drive, block_node, drive_of, serial_value
from swsnp.cli.qemu_folders import FOLDER, FOLDER_PROPERTIES, FolderDevice, folder_of
from swsnp.cli.qemu_netdevs import Netdev, NetDevice, default_mac, mac_value, netdev_of, nic_of
from swsnp.cli.qemu_ports import PORTS, SERIAL_DEVICES, Bus, SerialDevice, bus_of, with_input
from swsnp.cli.qemu_values import Parts, convert_all, kind_and_rest, text_value
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from swsnp.cli.qemu_values import Converter

__all__ = [
    "DEVICE_OPTIONS",
    "AnyDevice",
    "DiskDevice",
    "EntropyDevice",
    "devices_of",
    "uses_stdio",
    "with_program_input",
]

DEVICE_OPTIONS: Final = ("drive", "blockdev", "chardev", "netdev", "nic", "device")
"""Options that may be given several times."""


@dataclass(frozen=True, slots=True)
class DiskDevice:
    """A virtio-blk-device; `serial` is its identification for the guest."""

    drive: Drive
    serial: str = ""


@dataclass(frozen=True, slots=True)
class EntropyDevice:
    """A virtio-rng-device."""


AnyDevice: TypeAlias = DiskDevice | EntropyDevice | SerialDevice | NetDevice | FolderDevice


_DEVICES: Final[Mapping[str, Mapping[str, Converter]]] = {
    "virtio-blk-device": {"id": text_value, "drive": text_value, "serial": serial_value},
    "virtio-net-device": {"id": text_value, "netdev": text_value, "mac": mac_value},
    "virtio-rng-device": {"id": text_value},
    FOLDER: FOLDER_PROPERTIES,
    **SERIAL_DEVICES,
}


class _Backends:
    """What devices name, by its id."""

    def __init__(self) -> None:
        self.drives: Parts[Drive] = Parts("drive", "-device virtio-blk-device,drive")
        self.chardevs: Parts[Chardev] = Parts("chardev", "-device virtserialport,chardev")
        self.netdevs: Parts[Netdev] = Parts("netdev", "-device virtio-net-device,netdev")


_Found: TypeAlias = "AnyDevice | Bus | tuple[str, dict[str, Any]]"
"""A device, a bus that gets ports, or a driver with properties that name a backend."""


def devices_of(given: Iterable[tuple[str, str]], *, snapshot: bool = False) -> tuple[AnyDevice, ...]:
    """What the options mean together.

    Args:
        given: option without its dash, and its value, in order.
        snapshot: for every -drive that does not say it itself.

    Raises:
        UsageError: an unknown property, a value that is not modelled, a backend that no device uses, that two
            use or that is not there: option, got, wanted.
    """
    backends = _Backends()
    found: list[_Found] = []
    for option, text in given:
        match option:
            case "device":
                _add_device(text, found)
            case "nic":
                _add_nic(text, found)
            case "netdev":
                backends.netdevs.add("-netdev", *netdev_of(text))
            case "chardev":
                chardev = chardev_of(text)
                backends.chardevs.add("-chardev", chardev.id, chardev)
            case "blockdev":
                backends.drives.add("-blockdev", *block_node(text))
            case _:
                identity, drive, values = drive_of(text, snapshot=snapshot)
                if values["if"] == "virtio":
                    found.append(DiskDevice(drive, values.get("serial", "")))
                else:
                    backends.drives.add("-drive", identity, drive)
    devices = _numbered(_whole(each, backends) for each in found)
    for each in (backends.drives, backends.chardevs, backends.netdevs):
        each.refuse_unused()
    if sum(map(uses_stdio, devices)) > 1:
        raise UsageError("-chardev stdio: wanted one of them at most")
    return devices


def uses_stdio(device: AnyDevice) -> int:
    """How many ports of a device have the standard input and output."""
    ports = device.ports if isinstance(device, SerialDevice) else ()
    return sum(each.chardev.kind == STDIO for each in ports)


def with_program_input(devices: Iterable[AnyDevice]) -> tuple[AnyDevice, ...]:
    """The devices of a guest for --exec: where a port has the standard output another has the input.

    Raises:
        UsageError: no room for it.
    """
    return tuple(with_input(each) if isinstance(each, SerialDevice) else each for each in devices)


def _numbered(devices: Iterable[AnyDevice]) -> tuple[AnyDevice, ...]:
    """Network devices without an address get one by their order."""
    found: list[AnyDevice] = []
    for each in devices:
        if isinstance(each, NetDevice) and not each.mac:
            before = sum(isinstance(other, NetDevice) for other in found)
            found.append(NetDevice(each.netdev, default_mac(before)))
        else:
            found.append(each)
    return tuple(found)


def _whole(found: _Found, backends: _Backends) -> AnyDevice:
    """A device with what it names."""
    match found:
        case Bus():
            return found.device(backends.chardevs)
        case ("virtio-net-device" as driver, values):
            return NetDevice(backends.netdevs.take(f"-device {driver}", values), values.get("mac", b""))
        case ("vhost-user-fs-device" as driver, values):
            return folder_of(backends.chardevs.take(f"-device {driver}", values), values)
        case (driver, values):
            return DiskDevice(backends.drives.take(f"-device {driver}", values), values.get("serial", ""))
        case _:
            return found


def _add_device(text: str, found: list[_Found]) -> None:
    """One -device; a port joins its bus, which is there already."""
    driver, properties = kind_and_rest(text, "driver", _DEVICES, "-device", word="driver")
    where = f"-device {driver}"
    values = convert_all(properties, _DEVICES[driver], where)
    if driver == "virtio-rng-device":
        found.append(EntropyDevice())
    elif driver == "virtio-serial-device":
        found.append(Bus(values.get("id", ""), values.get("max_ports")))
    elif driver in PORTS:
        bus_of(where, values, found).ports.append((driver, values))
    else:
        found.append((driver, values))


def _add_nic(text: str, found: list[_Found]) -> None:
    """One -nic: network and device at once; `none` is what there is without."""
    if (nic := nic_of(text)) is not None:
        netdev, mac = nic
        found.append(NetDevice(netdev, mac or b""))
