"""QEMU's -drive and -blockdev: files that become disks.

Source: the manual page qemu(1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from swsnp.cli.qemu_values import boolean, comma_list, convert_all, one_of, path_value, text_value
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from swsnp.cli.qemu_values import Converter

__all__ = ["Drive", "block_node", "drive_of", "serial_value"]

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


def serial_value(text: str) -> str:
    """A disk's identification for the guest."""
    if not text.isascii() or len(text) > _SERIAL_SIZE:
        raise ValueError(f"at most {_SERIAL_SIZE} ASCII characters")
    return text


_DRIVE: Final[Mapping[str, Converter]] = {
    "file": path_value,
    "format": one_of("raw"),
    "if": one_of("virtio", "none"),
    "id": text_value,
    "readonly": boolean,
    "snapshot": boolean,
    "serial": serial_value,
}
_BLOCKDEV: Final[Mapping[str, Converter]] = {
    "driver": one_of("raw", "file"),
    "node-name": text_value,
    "filename": path_value,
    "file.driver": one_of("file"),
    "file.filename": path_value,
    "read-only": boolean,
}


def drive_of(text: str, *, snapshot: bool) -> tuple[str, Drive, dict[str, Any]]:
    """A -drive: its id, the file, and all that was given; UsageError as `qemu_devices.devices_of`."""
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


def block_node(text: str) -> tuple[str, Drive]:
    """A -blockdev: its name and the file; UsageError as `qemu_devices.devices_of`."""
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
