"""Modules out of a kernel package: found by name, with what they depend on, expanded.

Source: Linux, scripts/mod/modpost.c (`depends=` in the section .modinfo) and kernel/module/main.c; System V
ABI, ELF-64.

Packages hold no modules.dep: depmod writes it when they are installed. Each module names its own
dependencies, so a package that was only unpacked serves as well.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.errors import HostError, InputError
from swsnp.measure.compression import expand_gzip, expand_xz, expand_zstd

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KernelModule", "find_modules", "module_info"]

_COMPRESSIONS: Final = {".gz": expand_gzip, ".xz": expand_xz, ".zst": expand_zstd}
_SUFFIXES: Final = (".ko", *(f".ko{each}" for each in _COMPRESSIONS))
_LARGEST: Final = 256 << 20
_ELF_MAGIC: Final = b"\x7fELF\2\1"
_EHDR: Final = struct.Struct("<40xQ10xHHH")
_SHDR: Final = struct.Struct("<II8x8xQQ24x")
_SHT_NOBITS: Final = 8


@dataclass(frozen=True, slots=True)
class KernelModule:
    """One module: its name with underscores, the kernel release it is for, an ELF object, what it needs."""

    name: str
    release: str
    data: bytes = field(repr=False)
    depends: tuple[str, ...] = ()


def find_modules(
    where: Path, names: tuple[str, ...], *, if_there: tuple[str, ...] = ()
) -> list[KernelModule]:
    """The modules of these names and all that they depend on, each after what it depends on.

    What the kernel has built in is left out.

    Args:
        where: lib/modules/RELEASE, or a directory that holds exactly one of it, as an unpacked package does.
        names: with `-` or `_`, as modprobe takes them.
        if_there: names too, which come first; those that the directory does not have are left out.

    Raises:
        InputError: not such a directory; no such module; one that is damaged, or depends on itself.
        HostError: it is compressed with zstd, and its library is missing.
    """
    base = _release_directory(where)
    files = {_plain(path): path for path in sorted((base / "kernel").rglob("*.ko*")) if _is_module(path)}
    files |= {_plain(path): path for path in sorted((base / "updates").rglob("*.ko*")) if _is_module(path)}
    found: dict[str, KernelModule] = {}
    plain = tuple(name.replace("-", "_") for name in (*if_there, *names))
    for name in plain:
        if name in plain[: len(if_there)] and name not in files:
            continue
        _add(name, (), base, files, _built_in(base), found)
    return list(found.values())


def _add(
    name: str,
    asked_by: tuple[str, ...],
    base: Path,
    files: dict[str, Path],
    built_in: frozenset[str],
    found: dict[str, KernelModule],
) -> None:
    if name in found or name in built_in:
        return
    chain = " -> ".join((*asked_by, name))
    if name in asked_by:
        raise InputError(f"{base}: modules depend on each other: {chain}")
    if name not in files:
        raise InputError(f"{base}: no module {chain}, and modules.builtin does not name it")
    module = _read(name, files[name])
    for needed in module.depends:
        _add(needed, (*asked_by, name), base, files, built_in, found)
    found[name] = module


def module_info(elf: bytes, name: str) -> dict[str, str]:
    """What a module says of itself in .modinfo; of a key that comes several times the first.

    Raises:
        InputError: not an ELF object with a section .modinfo.
    """
    try:
        section = _section(elf, b".modinfo")
    except (struct.error, IndexError, OverflowError):
        raise InputError(
            f"{name}: damaged: section headers lie outside the {len(elf)} bytes of file"
        ) from None
    if section is None:
        raise InputError(f"{name}: wanted a kernel module: an ELF-64 object with a section .modinfo")
    info: dict[str, str] = {}
    for each in section.split(b"\0"):
        key, equals, value = each.decode(errors="replace").partition("=")
        if equals:
            info.setdefault(key, value)
    return info


def _section(elf: bytes, wanted: bytes) -> bytes | None:
    if not elf.startswith(_ELF_MAGIC):
        return None
    start, size, count, names_at = _EHDR.unpack_from(elf)
    headers = [_SHDR.unpack_from(elf, start + size * number) for number in range(count)]
    if not headers:
        return None
    _, _, names, names_size = headers[names_at]
    strings = elf[names : names + names_size]
    for name, kind, offset, length in headers:
        if kind != _SHT_NOBITS and strings[name : name + len(wanted) + 1] == wanted + b"\0":
            return elf[offset : offset + length]
    return None


def _read(name: str, path: Path) -> KernelModule:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    data = _expanded(raw, path)
    info = module_info(data, str(path))
    release = info.get("vermagic", "").partition(" ")[0]
    depends = tuple(each.replace("-", "_") for each in info.get("depends", "").split(",") if each)
    return KernelModule(name, release, data, depends)


def _expanded(raw: bytes, path: Path) -> bytes:
    """As the kernel takes it whatever it was built with."""
    try:
        if (expand := _COMPRESSIONS.get(path.suffix)) is not None:
            return expand(raw, _LARGEST)
    except HostError:
        raise
    except Exception as error:  # each library has its own
        raise InputError(f"{path}: damaged: it cannot be expanded: {error}") from None
    return raw


# Where they lie


def _release_directory(where: Path) -> Path:
    if (where / "kernel").is_dir():
        return where
    found = sorted(
        path.parent
        for pattern in ("kernel", "*/kernel", "lib/modules/*/kernel", "usr/lib/modules/*/kernel")
        for path in where.glob(pattern)
        if path.is_dir()
    )
    kinds = sorted({path.resolve() for path in found})
    if len(kinds) != 1:
        names = ", ".join(path.name for path in kinds) or "none"
        raise InputError(f"{where}: wanted lib/modules/RELEASE of one kernel; found {names}")
    return kinds[0]


def _is_module(path: Path) -> bool:
    return path.name.endswith(_SUFFIXES) and path.is_file()


def _plain(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _built_in(base: Path) -> frozenset[str]:
    try:
        lines = (base / "modules.builtin").read_text().splitlines()
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise InputError(f"{base / 'modules.builtin'}: cannot be read: {error}") from None
    return frozenset(line.rpartition("/")[2].partition(".ko")[0].replace("-", "_") for line in lines)
