"""QEMU's vhost-user-fs-device: a folder that a daemon such as virtiofsd shares with the guest.

Source: the manual page qemu(1); QEMU, hw/virtio/vhost-user-fs.c, for properties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.virtio import FS_TAG_SIZE
from swsnp.cli.qemu_values import name_value, number, text_value
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from swsnp.cli.qemu_chardevs import Chardev
    from swsnp.cli.qemu_values import Converter

__all__ = ["FOLDER", "FOLDER_PROPERTIES", "FolderDevice", "folder_of"]

FOLDER: Final = "vhost-user-fs-device"
_QUEUE_SIZE: Final = 128
_LARGEST_QUEUE: Final = 1024


@dataclass(frozen=True, slots=True)
class FolderDevice:
    """A vhost-user-fs-device: its name for the guest in UTF-8, and where its daemon listens."""

    tag: bytes
    path: Path
    queue_size: int = _QUEUE_SIZE


def _queue_size(text: str) -> int:
    wanted = f"a power of two up to {_LARGEST_QUEUE}"
    try:
        found: int = number(1, _LARGEST_QUEUE)(text)
    except ValueError:
        raise ValueError(wanted) from None
    if found & found - 1:
        raise ValueError(wanted)
    return found


FOLDER_PROPERTIES: Final[Mapping[str, Converter]] = {
    "id": text_value,
    "chardev": text_value,
    "tag": name_value(FS_TAG_SIZE),
    "queue-size": _queue_size,
}


def folder_of(chardev: Chardev, values: Mapping[str, Any]) -> FolderDevice:
    """The device, with what its properties say beside the chardev.

    Raises:
        UsageError: no tag; a chardev that is not a UNIX socket at which the daemon listens.
    """
    where = f"-device {FOLDER}"
    if "tag" not in values:
        raise UsageError(f"{where}: property 'tag' is missing")
    if chardev.path is None or chardev.kind != "socket" or chardev.server:
        raise UsageError(
            f"{where}: property 'chardev': {chardev.id!r}: wanted -chardev socket,path=S without server=on: "
            "the daemon listens at S"
        )
    tag = values["tag"].encode(errors="surrogateescape")
    return FolderDevice(tag, chardev.path, values.get("queue-size", _QUEUE_SIZE))
