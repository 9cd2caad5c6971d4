"""QEMU's options for virtio devices and what is behind them: -device, -drive, -blockdev and -chardev.

What is modelled is virtio over MMIO: `if=virtio` means a `virtio-blk-device`. Devices come in the order of
the command line; what they name may come before or after them, but a port's bus comes before it.

Source: the manual page qemu(1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from swsnp.cli.qemu_chardevs import STDIO, Chardev, chardev_of
from swsnp.cli.qemu_drives import Drive, block_node, drive_of, serial_value
from swsnp.cli.qemu_ports import PORTS, SERIAL_DEVICES, Bus, SerialDevice, bus_of
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
]

DEVICE_OPTIONS: Final = ("drive", "blockdev", "chardev", "device")
"""Options that may be given several times."""


@dataclass(frozen=True, slots=True)
class DiskDevice:
    """A virtio-blk-device; `serial` is its identification for the guest."""

    drive: Drive
    serial: str = ""


@dataclass(frozen=True, slots=True)
class EntropyDevice:
    """A virtio-rng-device."""


AnyDevice: TypeAlias = DiskDevice | EntropyDevice | SerialDevice


_DEVICES: Final[Mapping[str, Mapping[str, Converter]]] = {
    "virtio-blk-device": {"id": text_value, "drive": text_value, "serial": serial_value},
    "virtio-rng-device": {"id": text_value},
    **SERIAL_DEVICES,
}


def devices_of(given: Iterable[tuple[str, str]], *, snapshot: bool = False) -> tuple[AnyDevice, ...]:
    """What the options mean together.

    Args:
        given: option without its dash, and its value, in order.
        snapshot: for every -drive that does not say it itself.

    Raises:
        UsageError: an unknown property, a value that is not modelled, a backend that no device uses, that two
            use or that is not there: option, got, wanted.
    """
    drives: Parts[Drive] = Parts("drive", "-device virtio-blk-device,drive")
    chardevs: Parts[Chardev] = Parts("chardev", "-device virtserialport,chardev")
    found: list[AnyDevice | Bus | tuple[str, dict[str, Any]]] = []
    for option, text in given:
        match option:
            case "device":
                _add_device(text, found)
            case "chardev":
                chardev = chardev_of(text)
                chardevs.add("-chardev", chardev.id, chardev)
            case "blockdev":
                drives.add("-blockdev", *block_node(text))
            case _:
                identity, drive, values = drive_of(text, snapshot=snapshot)
                if values["if"] == "virtio":
                    found.append(DiskDevice(drive, values.get("serial", "")))
                else:
                    drives.add("-drive", identity, drive)
    devices = tuple(_whole(each, drives, chardevs) for each in found)
    drives.refuse_unused()
    chardevs.refuse_unused()
    if sum(map(uses_stdio, devices)) > 1:
        raise UsageError("-chardev stdio: wanted one of them at most")
    return devices


def uses_stdio(device: AnyDevice) -> int:
    """How many ports of a device have the standard input and output."""
    ports = device.ports if isinstance(device, SerialDevice) else ()
    return sum(each.chardev.kind == STDIO for each in ports)


def _whole(
    found: AnyDevice | Bus | tuple[str, dict[str, Any]], drives: Parts[Drive], chardevs: Parts[Chardev]
) -> AnyDevice:
    """A device with what it names."""
    if isinstance(found, tuple):
        where, values = found
        return DiskDevice(drives.take(where, values), values.get("serial", ""))
    if isinstance(found, Bus):
        return found.device(chardevs)
    return found


def _add_device(text: str, found: list[AnyDevice | Bus | tuple[str, dict[str, Any]]]) -> None:
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
        found.append((where, values))
