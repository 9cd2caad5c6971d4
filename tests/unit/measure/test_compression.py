"""Compressed data is expanded as a whole and within a limit, or refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from typing import TYPE_CHECKING, Final

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from swsnp.measure.compression import expand_bzip2, expand_gzip, expand_xz, expand_zstd

if TYPE_CHECKING:
    from collections.abc import Callable

    Form = tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]


def from_a_pipe(data: bytes) -> bytes:
    """As `zstd` writes what it has no size of."""
    writer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return writer.compress(data) + writer.flush()


FORMS: Final[dict[str, Form]] = {
    "gzip": (gzip.compress, expand_gzip),
    "xz": (lzma.compress, expand_xz),
    "lzma": (lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE), expand_xz),
    "bzip2": (bz2.compress, expand_bzip2),
    "zstd": (zstandard.ZstdCompressor().compress, expand_zstd),
    "zstd-pipe": (from_a_pipe, expand_zstd),
}
NOISE: Final = random.Random(1).randbytes(3 * 4096)
"""Becomes no smaller, so that it is read in several pieces."""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


@pytest.mark.parametrize("data", [b"", b"x", bytes(100_000), NOISE], ids=["empty", "one", "zeros", "noise"])
def test_whole(form: Form, data: bytes) -> None:
    """What went in comes out, whatever stands behind it, as long as it is below the limit."""
    compress, expand = form
    assert expand(compress(data), len(data) + 1) == data
    assert expand(compress(data) + b"size", len(data) + 1) == data


@given(st.sampled_from(sorted(FORMS)), st.integers(1, 5000))
def test_ends_early(name: str, lost: int) -> None:
    """Data of which any part is missing at its end is never taken for the whole."""
    compress, expand = FORMS[name]
    with pytest.raises(ValueError, match="it ends early"):
        expand(compress(NOISE)[:-lost], 1 << 20)


@pytest.mark.parametrize("name", FORMS)
def test_nothing(name: str) -> None:
    """No bytes are no compressed data."""
    with pytest.raises(ValueError, match="it ends early"):
        FORMS[name][1](b"", 1 << 20)


@pytest.mark.parametrize("limit", [10_000, len(NOISE)])
@pytest.mark.parametrize("data", [bytes(1 << 20), NOISE, NOISE * 4], ids=["zeros", "noise", "more-noise"])
def test_too_large(form: Form, data: bytes, limit: int) -> None:
    """A small file that would fill the memory is refused at the limit, and not called cut off."""
    compress, expand = form
    with pytest.raises(ValueError, match=f"it has {limit} bytes or more"):
        expand(compress(data), limit)
    assert expand(compress(data), len(data) + 1) == data
