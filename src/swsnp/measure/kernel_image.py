"""A Linux kernel file: the bzImage around an ELF image, taken apart and judged before anything is started.

Source: Linux, Documentation/arch/x86/boot.rst; System V ABI, ELF-64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from swsnp.abi.linux_boot import BOOT_FLAG, HEADER_MAGIC, SETUP_HEADER_OFFSET, SetupHeader
from swsnp.errors import HostError, InputError
from swsnp.measure.compression import expand_bzip2, expand_gzip, expand_xz, expand_zstd, missing_library

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["KernelImage", "Segment", "parse_kernel", "read_kernel"]

_OLDEST_PROTOCOL: Final = 0x20C
"""2.12, Linux 3.8: the first with XLF_KERNEL_64."""
_XLF_KERNEL_64: Final = 1
_SECTOR: Final = 512
_ELF_MAGIC: Final = b"\x7fELF\2\1"
_EHDR: Final = struct.Struct("<16xHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_SHDR: Final = struct.Struct("<IIQQQQIIQQ")
_ET_EXEC, _X86_64, _PT_LOAD, _PF_X, _SHT_PROGBITS, _SHF_EXECINSTR = 2, 62, 1, 1, 1, 4
_VMGEXIT: Final = b"\xf3\x0f\x01\xd9"
_LONGEST_VERSION: Final = 256
_LARGEST: Final = 1 << 30
"""No kernel is that large: a payload that claims more is refused before memory is spent on it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes at a physical address; `size` counts the zeros behind them too."""

    gpa: int
    data: bytes = field(repr=False)
    size: int


@dataclass(frozen=True, slots=True)
class KernelImage:
    """What is loaded of a kernel; `entry` and the ranges of `code` are physical addresses.

    `release` is what `uname -r` says there, "" when the file does not tell.
    """

    header: SetupHeader = field(repr=False)
    entry: int
    segments: tuple[Segment, ...]
    code: tuple[range, ...]
    release: str = ""

    @property
    def start(self) -> int:
        """Lowest physical address."""
        return min(each.gpa for each in self.segments)

    @property
    def end(self) -> int:
        """First physical address behind the kernel."""
        return max(each.gpa + each.size for each in self.segments)


def read_kernel(path: Path) -> KernelImage:
    """Read a kernel file.

    Raises:
        InputError: it cannot be read, or is not a kernel that can be started; the text names the file.
        HostError: it is compressed in a way for which a library is missing.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    return parse_kernel(raw, str(path))


def parse_kernel(raw: bytes, name: str) -> KernelImage:
    """Take a kernel file's bytes apart; errors as `read_kernel`."""
    header = _header(raw, name)
    start = ((header.setup_sects or 4) + 1) * _SECTOR + header.payload_offset
    payload = raw[start : start + header.payload_length]
    if len(payload) != header.payload_length or not payload:
        raise InputError(
            f"{name}: truncated: the header places {header.payload_length} bytes of kernel at {start:#x}, "
            f"the file has {max(0, len(raw) - start)} there"
        )
    elf = _decompressed(payload, name)
    image = replace(_loaded(elf, header, name), release=_release(raw, header))
    if not any(_VMGEXIT in elf[at : at + size] for at, size in _code_in_file(elf)):
        raise InputError(
            f"{name}: the kernel has no VMGEXIT instruction; wanted one built with "
            "CONFIG_AMD_MEM_ENCRYPT=y (Linux 5.19 or later for SEV-SNP)"
        )
    return image


def _header(raw: bytes, name: str) -> SetupHeader:
    end = SETUP_HEADER_OFFSET + SetupHeader.SIZE
    if len(raw) < end:
        raise InputError(f"{name}: {len(raw)} bytes, wanted a bzImage (Linux boot protocol)")
    header = SetupHeader.parse(raw[SETUP_HEADER_OFFSET:end])
    if header.boot_flag != BOOT_FLAG or header.header != HEADER_MAGIC:
        what = "an ELF file; wanted the bzImage made from it" if raw[:4] == b"\x7fELF" else "not a bzImage"
        raise InputError(f"{name}: {what} (no HdrS at 0x202; Linux boot protocol)")
    if header.version < _OLDEST_PROTOCOL or not header.xloadflags & _XLF_KERNEL_64:
        version = f"{header.version >> 8}.{header.version & 0xFF:02}"
        raise InputError(f"{name}: boot protocol {version}, wanted a 64-bit kernel of protocol 2.12 or later")
    return header


def _release(raw: bytes, header: SetupHeader) -> str:
    """The first word of the version text, whose offset counts from the second sector."""
    if not header.kernel_version:
        return ""
    start = header.kernel_version + _SECTOR
    words = raw[start : start + _LONGEST_VERSION].partition(b"\0")[0].split()
    return words[0].decode(errors="replace") if words else ""


# Compression


def _decompressed(payload: bytes, name: str) -> bytes:
    for magic, (kind, expand) in _FORMATS.items():
        if payload.startswith(magic):
            try:
                return expand(payload, _LARGEST)
            except HostError:
                raise
            except Exception as error:  # each library has its own
                raise InputError(f"{name}: damaged: its {kind} data cannot be expanded: {error}") from None
    known = ", ".join(kind for kind, _ in _FORMATS.values())
    raise InputError(f"{name}: kernel begins with {payload[:4].hex(' ')}, wanted one of {known}")


def _lz4(payload: bytes, largest: int) -> bytes:
    """The "legacy" form: magic, then blocks of up to 8 MiB with their compressed size before each.

    It has no end of its own; the four bytes that the kernel's build puts behind it say what it expands to.
    """
    try:
        import lz4.block
    except ImportError:
        raise missing_library("lz4", "lz4") from None
    pieces, at, end = [], 4, len(payload) - 4
    wanted = int.from_bytes(payload[end:], "little")
    if wanted >= largest:
        raise ValueError(f"it would have {wanted} bytes, which no real one has")
    while at < end:
        (size,) = struct.unpack_from("<I", payload, at)
        piece = payload[at + 4 : at + 4 + size]
        if len(piece) != size:
            raise ValueError(f"block of {size} bytes at {at:#x}")
        pieces.append(lz4.block.decompress(piece, uncompressed_size=8 << 20))
        at += 4 + size
    data = b"".join(pieces)
    if len(data) != wanted:
        raise ValueError(f"it has {len(data)} bytes, wanted {wanted}")
    return data


_FORMATS: Final[dict[bytes, tuple[str, Callable[[bytes, int], bytes]]]] = {
    b"\x1f\x8b\x08": ("gzip", expand_gzip),
    b"\xfd7zXZ\0": ("xz", expand_xz),
    b"BZh": ("bzip2", expand_bzip2),
    b"\x28\xb5\x2f\xfd": ("zstd", expand_zstd),
    b"\x02\x21\x4c\x18": ("lz4", _lz4),
    b"\x5d\0\0": ("lzma", expand_xz),
    _ELF_MAGIC: ("no compression", lambda payload, _: payload),
}

# The ELF image


def _loaded(elf: bytes, header: SetupHeader, name: str) -> KernelImage:
    if len(elf) < 64 or not elf.startswith(_ELF_MAGIC):
        raise InputError(f"{name}: the kernel inside is no 64-bit ELF image")
    kind, machine, _, entry, phoff, _, _, _, phsize, phnum, *_ = _EHDR.unpack_from(elf)
    if (kind, machine, phsize) != (_ET_EXEC, _X86_64, _PHDR.size):
        raise InputError(f"{name}: ELF type {kind}, machine {machine}; wanted an x86-64 kernel (2, 62)")
    if phoff + phnum * _PHDR.size > len(elf):
        raise InputError(f"{name}: ELF program headers end behind the file")
    segments, code = [], []
    for number in range(phnum):
        what, flags, offset, _, gpa, filesz, memsz, _ = _PHDR.unpack_from(elf, phoff + number * _PHDR.size)
        if what != _PT_LOAD or not memsz:
            continue
        if offset + filesz > len(elf) or filesz > memsz:
            raise InputError(
                f"{name}: ELF segment {number}: {filesz} bytes at {offset:#x}, the image has {len(elf)}"
            )
        segments.append(Segment(gpa, elf[offset : offset + filesz], memsz))
        if flags & _PF_X:
            code += [
                range(gpa + start - offset, gpa + start - offset + size)
                for start, size in _code_in_file(elf)
                if offset <= start and start + size <= offset + filesz
            ]
    if not any(each.gpa <= entry < each.gpa + len(each.data) for each in segments):
        raise InputError(f"{name}: ELF entry {entry:#x} is in no segment")
    return KernelImage(header, entry, tuple(segments), tuple(code))


def _code_in_file(elf: bytes) -> list[tuple[int, int]]:
    """Offset and size of every section of instructions; of every executable segment where none is listed."""
    _, _, _, _, phoff, shoff, _, _, phsize, phnum, shsize, shnum, _ = _EHDR.unpack_from(elf)
    found = []
    if shsize == _SHDR.size and shnum and shoff + shnum * shsize <= len(elf):
        for number in range(shnum):
            _, kind, flags, _, offset, size, *_ = _SHDR.unpack_from(elf, shoff + number * shsize)
            if kind == _SHT_PROGBITS and flags & _SHF_EXECINSTR and offset + size <= len(elf):
                found.append((offset, size))
    if not found:
        for number in range(phnum):
            kind, flags, offset, _, _, size, *_ = _PHDR.unpack_from(elf, phoff + number * phsize)
            if kind == _PT_LOAD and flags & _PF_X:
                found.append((offset, size))
    return found
