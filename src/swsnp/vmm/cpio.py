"""Archives as a kernel unpacks them into its first file system: cpio, format "newc".

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst; init/initramfs.c.

The same entries give the same bytes: no time, no inode numbers of the host, no owner but root. A launch
digest that covers the archive therefore depends on nothing but its content.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["CpioEntry", "device", "directory", "link", "pack_cpio", "program", "tree_entries"]

_MAGIC: Final = "070701"
_TRAILER: Final = "TRAILER!!!"
_ALIGNMENT: Final = 4
_LARGEST: Final = 0xFFFFFFFF
"""Sizes are eight hexadecimal digits."""
_PATH_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class CpioEntry:
    """One file. `path` has no leading slash; `mode` holds type and permissions; `rdev` is major and minor."""

    path: str
    mode: int
    data: bytes = field(default=b"", repr=False)
    rdev: tuple[int, int] = (0, 0)


def directory(path: str) -> CpioEntry:
    """A directory that everybody may enter."""
    return CpioEntry(path, stat.S_IFDIR | 0o755)


def program(path: str, data: bytes) -> CpioEntry:
    """A file that everybody may execute."""
    return CpioEntry(path, stat.S_IFREG | 0o755, data)


def link(path: str, target: str) -> CpioEntry:
    """A symbolic link."""
    return CpioEntry(path, stat.S_IFLNK | 0o777, target.encode())


def device(path: str, major: int, minor: int) -> CpioEntry:
    """A character device of root's."""
    return CpioEntry(path, stat.S_IFCHR | 0o600, rdev=(major, minor))


def pack_cpio(entries: Iterable[CpioEntry]) -> bytes:
    """The archive; a later entry replaces an earlier one of the same path, unless both are directories.

    Directories that entries lie in are added where none says so.

    Raises:
        UsageError: an entry that the kernel could not unpack.
    """
    wanted: dict[str, CpioEntry] = {}
    for entry in entries:
        _judge(entry)
        wanted[entry.path] = entry
    for parent in sorted({parent for path in wanted for parent in _parents(path)}):
        if not stat.S_ISDIR(wanted.setdefault(parent, directory(parent)).mode):
            raise UsageError(f"archive: {parent}: something lies below it; wanted a directory")
    packed = bytearray()
    for number, path in enumerate(sorted(wanted), 1):  # a directory sorts before what lies in it
        _append(packed, wanted[path], number)
    _append(packed, CpioEntry(_TRAILER, 0), 0)
    return bytes(packed)


def tree_entries(root: Path) -> list[CpioEntry]:
    """A host's directory with all below it; links stay links, owners become root.

    Raises:
        InputError: something in it cannot be read, or is neither file, directory nor link.
    """
    if not root.is_dir():
        raise InputError(f"{root}: wanted a directory")
    return list(_walk(root, root))


def _walk(root: Path, where: Path) -> Iterator[CpioEntry]:
    try:
        found = sorted(where.iterdir())
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror or error}") from None
    for path in found:
        yield _entry(root, path)
        if path.is_dir() and not path.is_symlink():
            yield from _walk(root, path)


def _entry(root: Path, path: Path) -> CpioEntry:
    name = path.relative_to(root).as_posix()
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return link(name, str(path.readlink()))
        if stat.S_ISDIR(mode):
            return CpioEntry(name, mode)
        if stat.S_ISREG(mode):
            return CpioEntry(name, mode, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    raise InputError(f"{path}: mode {mode:#o}; wanted a file, a directory or a symbolic link")


def _judge(entry: CpioEntry) -> None:
    parts = entry.path.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\0" in entry.path or entry.path == _TRAILER:
        raise UsageError(f"archive: path {entry.path!r}: wanted names joined by single slashes")
    if len(_name(entry.path)) > _PATH_MAX:
        raise UsageError(
            f"archive: path of {len(_name(entry.path)) - 1} bytes, wanted at most {_PATH_MAX - 1}"
        )
    if len(entry.data) > _LARGEST:
        raise UsageError(f"archive: {entry.path}: {len(entry.data)} bytes, wanted at most {_LARGEST} (newc)")


def _parents(path: str) -> Iterator[str]:
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _name(path: str) -> bytes:
    """With its NUL; names that are no UTF-8 on the host keep their bytes."""
    return path.encode(errors="surrogateescape") + b"\0"


def _append(packed: bytearray, entry: CpioEntry, inode: int) -> None:
    name = _name(entry.path)
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    owner, time, device_of_archive, checksum = (0, 0), 0, (0, 0), 0
    fields = (
        *(inode, entry.mode, *owner, links, time, len(entry.data)),
        *(*device_of_archive, *entry.rdev, len(name), checksum),
    )
    packed += _MAGIC.encode() + b"".join(b"%08X" % each for each in fields)
    for piece in (name, entry.data):
        packed += piece
        packed += bytes(-len(packed) % _ALIGNMENT)
