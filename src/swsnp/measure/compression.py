"""What Linux's build compresses kernels, modules and configurations with, expanded as a whole or not at all.

Source: RFC 1952 (gzip), RFC 8878 (zstd); Linux, scripts/Makefile.lib (what is called with which options).

Bytes behind the compressed data are left alone: the kernel's build puts the expanded size there.
"""

from __future__ import annotations

from typing import Final

from swsnp.errors import HostError

__all__ = ["expand_bzip2", "expand_gzip", "expand_xz", "expand_zstd", "missing_library"]

_PIECE: Final = 4096
"""Of zstd at a time: what one piece can become is bounded, at 128 KiB for each 4 bytes."""


def expand_gzip(raw: bytes, largest: int) -> bytes:
    """Expand one member.

    Raises:
        ValueError: it ends early, or has `largest` bytes or more; `zlib.error` where it is damaged.
    """
    import zlib

    expander = zlib.decompressobj(wbits=31)
    return _whole(expander.decompress(raw, largest), largest, ended=expander.eof)


def expand_xz(raw: bytes, largest: int) -> bytes:
    """Expand .xz or .lzma; see `expand_gzip`, but `lzma.LZMAError`."""
    import lzma

    expander = lzma.LZMADecompressor()
    return _whole(expander.decompress(raw, largest), largest, ended=expander.eof)


def expand_bzip2(raw: bytes, largest: int) -> bytes:
    """Expand one stream; see `expand_gzip`, but OSError where it is damaged."""
    import bz2

    expander = bz2.BZ2Decompressor()
    return _whole(expander.decompress(raw, largest), largest, ended=expander.eof)


def expand_zstd(raw: bytes, largest: int) -> bytes:
    """Expand one frame; see `expand_gzip`, but `zstandard.ZstdError`.

    Raises:
        HostError: its library is missing.
    """
    try:
        import zstandard
    except ImportError:
        raise missing_library("zstd", "zstandard") from None
    expander = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    pieces, size, at = [], 0, 0
    while at < len(raw) and size < largest and not expander.eof:
        pieces.append(expander.decompress(raw[at : at + _PIECE]))
        size += len(pieces[-1])
        at += _PIECE
    return _whole(b"".join(pieces), largest, ended=expander.eof)


def missing_library(kind: str, library: str) -> HostError:
    """What to raise where a library of the extra is missing."""
    return HostError(f"{kind}: Python package {library!r} is missing; remedy: pip install 'swsnp[guest]'")


def _whole(data: bytes, largest: int, *, ended: bool) -> bytes:
    if len(data) >= largest:
        raise ValueError(f"it has {largest} bytes or more, which no real one has")
    if not ended:
        raise ValueError("it ends early")
    return data
