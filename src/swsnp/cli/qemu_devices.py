"""QEMU's options for disks and virtio devices: -drive, -blockdev and -device.

What is modelled is virtio over MMIO: `if=virtio` means a `virtio-blk-device`. Devices come in the order of
the command line.

Source: the manual page qemu(1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from swsnp.cli.qemu_values import boolean, comma_list, convert_all, kind_and_rest, path_value, text_value
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from swsnp.cli.qemu_values import Converter

__all__ = ["DEVICE_OPTIONS", "DiskDevice", "Drive", "EntropyDevice", "devices_of"]

DEVICE_OPTIONS: Final = ("drive", "blockdev", "device")
"""Options that may be given several times."""
_SERIAL_SIZE: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A file that becomes a disk.

    `format_given`: the user said that it is raw. `snapshot`: what the guest writes is forgotten.
    """

    file: Path
    read_only: bool
    format_given: bool
    snapshot: bool = False


@dataclass(frozen=True, slots=True)
class DiskDevice:
    """A virtio-blk-device; `serial` is its identification for the guest."""

    drive: Drive
    serial: str = ""


@dataclass(frozen=True, slots=True)
class EntropyDevice:
    """A virtio-rng-device."""


def _one_of(*words: str) -> Converter:
    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(" or ".join(words))
        return text

    return convert


def _serial(text: str) -> str:
    if not text.isascii() or len(text) > _SERIAL_SIZE:
        raise ValueError(f"at most {_SERIAL_SIZE} ASCII characters")
    return text


_DRIVE: Final[Mapping[str, Converter]] = {
    "file": path_value,
    "format": _one_of("raw"),
    "if": _one_of("virtio", "none"),
    "id": text_value,
    "readonly": boolean,
    "snapshot": boolean,
    "serial": _serial,
}
_BLOCKDEV: Final[Mapping[str, Converter]] = {
    "driver": _one_of("raw", "file"),
    "node-name": text_value,
    "filename": path_value,
    "file.driver": _one_of("file"),
    "file.filename": path_value,
    "read-only": boolean,
}
_DEVICES: Final[Mapping[str, Mapping[str, Converter]]] = {
    "virtio-blk-device": {"id": text_value, "drive": text_value, "serial": _serial},
    "virtio-rng-device": {"id": text_value},
}


def devices_of(
    given: Iterable[tuple[str, str]], *, snapshot: bool = False
) -> tuple[DiskDevice | EntropyDevice, ...]:
    """What the options mean together.

    Args:
        given: option without its dash, and its value, in order.
        snapshot: for every -drive that does not say it itself.

    Raises:
        UsageError: an unknown property, a value that is not modelled, a drive that no device uses, that two
            use or that is not there: option, got, wanted.
    """
    drives: dict[str, Drive] = {}
    found: list[DiskDevice | EntropyDevice | tuple[str, dict[str, Any]]] = []
    for option, text in given:
        if option == "device":
            found.append(_device(text))
        elif option == "blockdev":
            _add(drives, f"-{option}", *_block_node(text))
        else:
            identity, drive, values = _drive(text, snapshot=snapshot)
            if values.get("if", "none") == "virtio":
                found.append(DiskDevice(drive, values.get("serial", "")))
            else:
                _add(drives, f"-{option}", identity, drive)
    devices = tuple(_with_drive(*each, drives) if isinstance(each, tuple) else each for each in found)
    if drives:
        unused = next(iter(drives))
        raise UsageError(f"drive {unused!r}: wanted a -device virtio-blk-device,drive={unused} that has it")
    return devices


def _add(drives: dict[str, Drive], option: str, identity: str, drive: Drive) -> None:
    if identity in drives:
        raise UsageError(f"{option}: id {identity!r} is taken")
    drives[identity] = drive


def _drive(text: str, *, snapshot: bool) -> tuple[str, Drive, dict[str, Any]]:
    values = convert_all(comma_list(text, "", "-drive"), _DRIVE, "-drive")
    if "file" not in values:
        raise UsageError("-drive: property 'file' is missing")
    if "if" not in values:
        raise UsageError("-drive: property 'if' is missing, wanted virtio, or none and a -device")
    if values["if"] == "none" and "id" not in values:
        raise UsageError("-drive: property 'id' is missing, which a -device names")
    if values["if"] == "none" and "serial" in values:
        raise UsageError("-drive: property 'serial': wanted it at the -device")
    drive = Drive(
        file=values["file"],
        read_only=values.get("readonly", False),
        format_given="format" in values,
        snapshot=values.get("snapshot", snapshot),
    )
    return values.get("id", ""), drive, values


def _block_node(text: str) -> tuple[str, Drive]:
    if text.startswith("{"):
        raise UsageError("-blockdev: got JSON, wanted driver=raw,key=value,...")
    values = convert_all(comma_list(text, "driver", "-blockdev"), _BLOCKDEV, "-blockdev")
    name = "filename" if values.get("driver") == "file" else "file.filename"
    for wanted in ("driver", "node-name", name):
        if wanted not in values:
            raise UsageError(f"-blockdev: property {wanted!r} is missing")
    if extra := {"filename", "file.filename"} & set(values) - {name}:
        raise UsageError(f"-blockdev: property {extra.pop()!r}: wanted {name!r}, by the driver")
    drive = Drive(file=values[name], read_only=values.get("read-only", False), format_given=True)
    return values["node-name"], drive


def _device(text: str) -> EntropyDevice | tuple[str, dict[str, Any]]:
    driver, found = kind_and_rest(text, "driver", _DEVICES, "-device", word="driver")
    where = f"-device {driver}"
    values = convert_all(found, _DEVICES[driver], where)
    if driver == "virtio-rng-device":
        return EntropyDevice()
    if "drive" not in values:
        raise UsageError(f"{where}: property 'drive' is missing")
    return where, values


def _with_drive(where: str, values: Mapping[str, Any], drives: dict[str, Drive]) -> DiskDevice:
    """Takes the drive away: it can be one device's only."""
    name = values["drive"]
    if name not in drives:
        there = ", ".join(drives) or "none"
        raise UsageError(f"{where}: property 'drive': got {name!r}, there are {there} that are free")
    return DiskDevice(drives.pop(name), values.get("serial", ""))
