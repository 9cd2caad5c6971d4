"""A disk that forgets what is written to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.vmm.devices.raw_file import RawFile
from swsnp.vmm.devices.snapshot import Snapshot

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 3 * 4096 + 512
CONTENT = bytes(number % 251 for number in range(SIZE))


class Base:
    """Read only; every write is a mistake."""

    size = SIZE
    read_only = True

    def read(self, at: int, size: int) -> bytes:
        assert at >= 0
        assert at + size <= SIZE
        return CONTENT[at : at + size]

    def write(self, at: int, data: bytes | memoryview) -> None:
        pytest.fail("the disk was written")

    def flush(self) -> None:
        pytest.fail("the disk was flushed")


RANGES = st.integers(0, SIZE - 1).flatmap(
    lambda at: st.tuples(st.just(at), st.integers(0, min(6000, SIZE - at)))
)


@given(writes=st.lists(st.tuples(RANGES, st.integers(0, 255))), reads=st.lists(RANGES))
def test_as_memory(writes: list[tuple[tuple[int, int], int]], reads: list[tuple[int, int]]) -> None:
    """What was written is there, all else is the disk's, and the disk stays as it was."""
    disk, memory = Snapshot(Base()), bytearray(CONTENT)
    for (at, size), byte in writes:
        disk.write(at, memoryview(bytes([byte]) * size))
        memory[at : at + size] = bytes([byte]) * size
    disk.flush()
    for at, size in [*reads, (0, SIZE)]:
        assert disk.read(at, size) == memory[at : at + size]
    assert (disk.size, disk.read_only) == (SIZE, False)


def test_many_from_one_image(tmp_path: Path) -> None:
    """Several may boot from one file at once, each with its own changes."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    with RawFile(path, read_only=True) as first, RawFile(path, read_only=True) as second:
        one, other = Snapshot(first), Snapshot(second)
        one.write(0, b"1" * 512)
        other.write(512, b"2" * 512)
        assert one.read(0, 1024) == b"1" * 512 + bytes(512)
        assert other.read(0, 1024) == bytes(512) + b"2" * 512
    assert path.read_bytes() == bytes(8192)


def test_trouble_goes_through(tmp_path: Path) -> None:
    """A disk that cannot be read is an I/O error of the guest's, and nothing is half written."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    with RawFile(path, read_only=True) as file:
        disk = Snapshot(file)
        path.write_bytes(b"")
        with pytest.raises(OSError, match="shorter"):
            disk.read(0, 512)
        with pytest.raises(OSError, match="shorter"):
            disk.write(0, b"x" * 512)
