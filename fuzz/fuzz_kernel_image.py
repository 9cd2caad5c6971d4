"""Kernel file: entry and code lie in bytes that are loaded, or InputError, nothing else."""

from __future__ import annotations

from fuzz.outcome import attempt
from swsnp.errors import InputError
from swsnp.measure.kernel_image import parse_kernel
from swsnp.testing.tiny_kernel import bz_image, elf_image, tiny_kernel

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """A compressed kernel, one that is not, one without SNP's instructions, no kernel."""
    return [tiny_kernel(), tiny_kernel(compressed=False), bz_image(elf_image(b"\x90" * 64)), bytes(1024)]


def one(data: bytes) -> object:
    """Parse; the entry is in a segment, and code lies where bytes were loaded."""
    kernel, refusal = attempt(lambda: parse_kernel(data, "kernel"), InputError)
    if refusal:
        return refusal
    loaded = [range(each.gpa, each.gpa + len(each.data)) for each in kernel.segments]
    assert any(kernel.entry in each for each in loaded)
    assert all(any(code.start in each and code.stop - 1 in each for each in loaded) for code in kernel.code)
    return len(kernel.code)
