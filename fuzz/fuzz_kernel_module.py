"""Kernel module: says what it is and needs, as text by key, or InputError, nothing else."""

from __future__ import annotations

import struct

from fuzz.outcome import attempt
from swsnp.errors import InputError
from swsnp.vmm.kernel_modules import module_info

__all__ = ["one", "seeds"]

_NAMES = b"\0.modinfo\0.shstrtab\0"


def seeds() -> list[bytes]:
    """A module with two keys, one with none, an ELF object without sections."""
    return [_module(b"depends=tsm\0name=sev_guest\0"), _module(b""), _module(b"")[:64]]


def one(data: bytes) -> object:
    """Each key with its value is in the file as it is."""
    found, refusal = attempt(lambda: module_info(data, "module"), InputError)
    if refusal:
        return refusal
    for key, value in found.items():
        text = f"{key}={value}"
        assert "�" in text or text.encode() in data
    return len(found)


def _module(modinfo: bytes) -> bytes:
    names_at = 64 + len(modinfo)
    sections = bytes(64)
    for name, kind, offset, size in ((1, 1, 64, len(modinfo)), (10, 3, names_at, len(_NAMES))):
        sections += struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)
    start = names_at + len(_NAMES)
    header = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, start, 0, 64, 0, 0, 64, 3, 2)
    return header + modinfo + _NAMES + sections
