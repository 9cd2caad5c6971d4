"""QEMU's -chardev: what can be at the host's end of a guest's port.

Source: the manual page qemu(1), "Character device options".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from swsnp.cli.qemu_values import boolean, convert_all, kind_and_rest, number, path_value, text_value
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from swsnp.cli.qemu_values import Converter

__all__ = ["STDIN", "STDIO", "Chardev", "chardev_of"]

STDIO: Final = "stdio"
STDIN: Final = "stdin"
"""Of the port that has the input of a program; no option names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chardev:
    """One backend. `kind` is QEMU's name for it; what a kind does not have is as it is here.

    `path` of a file, of named pipes or of a socket; else a socket is at `host` and `port`.
    """

    id: str
    kind: str
    path: Path | None = None
    append: bool = False
    host: str = ""
    port: int = 0
    server: bool = False
    wait: bool = True


_KINDS: Final[Mapping[str, Mapping[str, Converter]]] = {
    "null": {"id": text_value},
    STDIO: {"id": text_value},
    "file": {"id": text_value, "path": path_value, "append": boolean},
    "pipe": {"id": text_value, "path": path_value},
    "pty": {"id": text_value},
    "socket": {
        "id": text_value,
        "path": path_value,
        "host": text_value,
        "port": number(0, 65535),
        "server": boolean,
        "wait": boolean,
    },
}
_NEEDS_PATH: Final = ("file", "pipe")


def chardev_of(text: str) -> Chardev:
    """What one option says.

    Raises:
        UsageError: an unknown backend or property, or one that is missing or too much.
    """
    kind, found = kind_and_rest(text, "backend", _KINDS, "-chardev", word="backend")
    where = f"-chardev {kind}"
    values = convert_all(found, _KINDS[kind], where)
    for name in ("id", "path") if kind in _NEEDS_PATH else ("id",):
        if name not in values:
            raise UsageError(f"{where}: property {name!r} is missing")
    if kind == "socket":
        _judge_socket(values, where)
    return Chardev(kind=kind, **values)


def _judge_socket(values: Mapping[str, Any], where: str) -> None:
    has_address = "host" in values and "port" in values
    if ("path" in values) == has_address or ("path" in values and {"host", "port"} & values.keys()):
        raise UsageError(f"{where}: wanted path, or host and port")
    if "wait" in values and not values.get("server", False):
        raise UsageError(f"{where}: property 'wait': wanted server=on with it")
