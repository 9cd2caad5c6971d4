"""Modules as a kernel package holds them, without a kernel: ELF objects that only say what they are."""

from __future__ import annotations

import lzma
import struct
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RELEASE = "6.12.0-test"


def elf_object(info: dict[str, str]) -> bytes:
    """An ELF-64 object with .modinfo and the table of section names."""
    modinfo = b"".join(f"{key}={value}".encode() + b"\0" for key, value in info.items())
    names = b"\0.modinfo\0.shstrtab\0"
    headers = 64 + len(modinfo) + len(names)
    ehdr = b"\x7fELF\2\1\1".ljust(16, b"\0")
    ehdr += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, headers, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    for name, kind, offset, size in ((1, 1, 64, len(modinfo)), (10, 3, 64 + len(modinfo), len(names))):
        sections += struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)
    return ehdr + modinfo + names + sections


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., Path]:
    """Writes a package: names with what each depends on; every second module is compressed."""

    def write(modules: dict[str, str], built_in: str = "") -> Path:
        base = tmp_path / "package" / "lib" / "modules" / RELEASE
        (base / "kernel" / "drivers").mkdir(parents=True)
        for number, (name, depends) in enumerate(modules.items()):
            raw = elf_object({"depends": depends, "name": name, "vermagic": f"{RELEASE} SMP"})
            file = base / "kernel" / "drivers" / (name + (".ko.xz" if number % 2 else ".ko"))
            file.write_bytes(lzma.compress(raw) if number % 2 else raw)
        (base / "modules.builtin").write_text(built_in)
        return tmp_path / "package"

    return write
