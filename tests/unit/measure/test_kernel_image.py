"""Kernel files: every form that is read, and every refusal by the file's name."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import struct
import sys
from typing import TYPE_CHECKING

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.linux_boot import SetupHeader
from swsnp.errors import HostError, InputError
from swsnp.measure.kernel_image import parse_kernel, read_kernel
from swsnp.testing.tiny_kernel import ENTRY, bz_image, elf_image, tiny_kernel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CODE = bytes.fromhex("90 f3 0f 01 d9 f4")
ELF = elf_image(CODE)


def with_size(data: bytes) -> bytes:
    """The kernel's build puts the expanded size behind all but gzip."""
    return data + len(ELF).to_bytes(4, "little")


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def lz4_legacy(data: bytes) -> bytes:
    block = bytes(lz4.block.compress(data, store_size=False))
    return b"\x02\x21\x4c\x18" + len(block).to_bytes(4, "little") + block


@pytest.mark.parametrize(
    "compress",
    [
        bytes,
        lambda data: gzip.compress(data, mtime=0),
        lambda data: with_size(lzma.compress(data)),
        lambda data: with_size(lzma.compress(data, format=lzma.FORMAT_ALONE)),
        lambda data: with_size(bz2.compress(data)),
        lambda data: with_size(zstandard.ZstdCompressor().compress(data)),
        lambda data: with_size(lz4_legacy(data)),
    ],
    ids=["none", "gzip", "xz", "lzma", "bzip2", "zstd", "lz4"],
)
def test_compression(compress: Callable[[bytes], bytes]) -> None:
    """Linux, CONFIG_KERNEL_*: whatever form the kernel was built with, the same image comes out."""
    kernel = parse_kernel(bz_image(compress(ELF)), "k")
    (segment,) = kernel.segments
    assert (segment.gpa, segment.data, segment.size) == (ENTRY, CODE, len(CODE) + 0x1000)
    assert (kernel.entry, kernel.start, kernel.end) == (ENTRY, ENTRY, ENTRY + len(CODE) + 0x1000)
    assert kernel.code == (range(ENTRY, ENTRY + len(CODE)),)


def sectioned(flags: int) -> bytes:
    """The image with one section of 5 bytes from offset 0x1001 on."""
    elf = bytearray(ELF)
    struct.pack_into("<Q", elf, 40, len(elf))
    struct.pack_into("<HH", elf, 58, 64, 1)
    return bytes(elf) + struct.pack("<IIQQQQIIQQ", 0, 1, flags, 0, 0x1001, 5, 0, 0, 1, 0)


def test_code_is_what_sections_say() -> None:
    """ELF: SHF_EXECINSTR tells code from data in one segment; data is never rewritten."""
    assert parse_kernel(bz_image(sectioned(4)), "k").code == (range(ENTRY + 1, ENTRY + 6),)
    assert parse_kernel(bz_image(sectioned(2)), "k").code == (range(ENTRY, ENTRY + 6),)


def changed(offset: int, form: str, value: int) -> bytes:
    elf = bytearray(ELF)
    struct.pack_into(form, elf, offset, value)
    return bz_image(bytes(elf))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "0 bytes, wanted a bzImage"),
        (bytes(4096), "not a bzImage (no HdrS at 0x202"),
        (ELF, "an ELF file; wanted the bzImage made from it"),
        (bytes(0x1F1 + SetupHeader.SIZE), "not a bzImage (no HdrS at 0x202"),
        (bz_image(ELF, boot_flag=0), "not a bzImage"),
        (bz_image(ELF, header=0), "not a bzImage"),
        (bz_image(ELF, version=0x20B), "boot protocol 2.11, wanted a 64-bit kernel of protocol 2.12"),
        (bz_image(ELF, xloadflags=0), "wanted a 64-bit kernel"),
        (bz_image(ELF)[:-1], "truncated: the header places 4102 bytes of kernel at 0x400, the file has 4101"),
        (bz_image(b""), "truncated"),
        (bz_image(b"LZOP" + bytes(64)), "kernel begins with 4c 5a 4f 50, wanted one of gzip, xz"),
        (bz_image(gzip.compress(ELF)[:-9]), "damaged: its gzip data cannot be expanded: it ends early"),
        (bz_image(b"\xfd7zXZ\0" + bytes(64)), "damaged: its xz data"),
        (bz_image(bz2.compress(ELF)[:-9]), "damaged: its bzip2 data cannot be expanded: it ends early"),
        (bz_image(b"\x28\xb5\x2f\xfd" + b"\xff" * 64), "damaged: its zstd data"),
        (bz_image(lzma.compress(ELF)[:-9]), "damaged: its xz data cannot be expanded: it ends early"),
        (bz_image(zstd(ELF)[:-9]), "damaged: its zstd data cannot be expanded: it ends early"),
        (
            bz_image(b"\x02\x21\x4c\x18\xff\0\0\0" + bytes(8)),
            "cannot be expanded: block of 255 bytes",
        ),
        (bz_image(with_size(b"\x02\x21\x4c\x18")), f"it has 0 bytes, wanted {len(ELF)}"),
        (
            bz_image(lz4_legacy(ELF) + b"\0\0\0\x40"),
            "it would have 1073741824 bytes, which no real one has",
        ),
        (bz_image(gzip.compress(b"MZ")), "the kernel inside is no 64-bit ELF image"),
        (bz_image(gzip.compress(b"MZ" + ELF[2:])), "the kernel inside is no 64-bit ELF image"),
        (bz_image(ELF[:63]), "the kernel inside is no 64-bit ELF image"),
        (bz_image(ELF[:64]), "ELF program headers end behind the file"),
        (bz_image(ELF[:120]), "ELF segment 0: 6 bytes at 0x1000, the image has 120"),
        (changed(16, "<H", 3), "ELF type 3, machine 62; wanted an x86-64 kernel"),
        (changed(18, "<H", 183), "ELF type 2, machine 183"),
        (changed(32, "<Q", 1 << 40), "ELF program headers end behind the file"),
        (changed(64 + 32, "<Q", 1 << 20), "ELF segment 0: 1048576 bytes at 0x1000"),
        (changed(64 + 8, "<Q", len(ELF) - 5), f"ELF segment 0: 6 bytes at {len(ELF) - 5:#x}"),
        (changed(64 + 40, "<Q", 1), "ELF segment 0: 6 bytes"),
        (changed(24, "<Q", 0x1234), "ELF entry 0x1234 is in no segment"),
        (bz_image(elf_image(b"\x90" * 16)), "wanted one built with CONFIG_AMD_MEM_ENCRYPT=y"),
    ],
)
def test_refusals(raw: bytes, text: str) -> None:
    """A file that cannot be started is refused by its name, with what is wrong."""
    with pytest.raises(InputError) as caught:
        parse_kernel(raw, "some/vmlinuz")
    assert str(caught.value).startswith("some/vmlinuz: ")
    assert text in str(caught.value)


def test_what_is_just_taken() -> None:
    """Boot protocol 2.12 is the first with a 64-bit entry; ELF: a segment need not have zeros behind it."""
    assert parse_kernel(bz_image(ELF, version=0x20C), "k").entry == ENTRY
    assert parse_kernel(changed(64 + 40, "<Q", len(CODE)), "k").end == ENTRY + len(CODE)


@pytest.mark.parametrize(
    ("compress", "library"),
    [(zstandard.ZstdCompressor().compress, "zstandard"), (lz4_legacy, "lz4")],
    ids=["zstd", "lz4"],
)
def test_missing_library(
    monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes], library: str
) -> None:
    """A kernel whose form needs an extra: no word about damage, but which package to install."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.block", None)
    with pytest.raises(HostError, match=f"'{library}' is missing; remedy: pip install 'swsnp\\[guest\\]'"):
        parse_kernel(bz_image(with_size(compress(ELF))), "k")


def test_unreadable(tmp_path: Path) -> None:
    """A file that is not there, or is a directory, is named."""
    with pytest.raises(InputError, match="nothing: cannot be read: No such file"):
        read_kernel(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_kernel(tmp_path)
    good = tmp_path / "good"
    good.write_bytes(tiny_kernel())
    assert read_kernel(good).entry == ENTRY


WHOLE = tiny_kernel(compressed=False)


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=8))
def test_any_damage(at: int, bytes_: bytes) -> None:
    """Whatever a file holds, it is read or refused with an InputError, nothing else."""
    with contextlib.suppress(InputError):
        parse_kernel(WHOLE[:at] + bytes_ + WHOLE[at + len(bytes_) :], "k")
