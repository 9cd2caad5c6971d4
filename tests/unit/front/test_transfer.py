"""Where the bytes of read and write calls come from and go to."""

from __future__ import annotations

import errno
import struct

import pytest

from swsnp.front.wrap.transfer import Transfer, one_buffer, vector
from swsnp.guest.caller import BufferMemory, CallerFault

HERE = 0x10_0F00
"""256 bytes before the end of a page."""


@pytest.fixture
def memory() -> BufferMemory:
    """One page's last 256 bytes, and at 0x20_0000 eight bytes that end a mapping; nothing else."""
    made = BufferMemory()
    made.map(HERE, bytearray(range(256)))
    made.map(0x20_0000, bytearray(b"abcdefgh"))
    return made


def refusal(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.RaisesExc(OSError, check=lambda error: error.errno == code)


@pytest.mark.parametrize(
    ("size", "offset"), [(1 << 63, None), ((1 << 64) - 1, None), (1, 1 << 63), (1, (1 << 64) - 1)]
)
def test_negative(memory: BufferMemory, size: int, offset: int | None) -> None:
    """Linux, rw_verify_area, ksys_pread64: EINVAL."""
    with refusal(errno.EINVAL):
        one_buffer(memory, HERE, size, offset)


def test_size() -> None:
    """Linux, MAX_RW_COUNT: what is above 7FFFF000h is not moved."""
    assert one_buffer(BufferMemory(), HERE, 0x8000_0000).size == 0x7FFF_F000
    assert one_buffer(BufferMemory(), HERE, 5, 7).offset == 7


def test_bad_vectors(memory: BufferMemory) -> None:
    """Linux, import_iovec: more than 1,024 buffers or a negative length EINVAL, a bad array EFAULT."""
    with refusal(errno.EINVAL):
        vector(memory, HERE, 1025)
    with pytest.raises(CallerFault):
        vector(memory, HERE, 17)
    address = memory.place(struct.pack("<QQ", HERE, 1 << 63))
    with refusal(errno.EINVAL):
        vector(memory, address, 1)


@pytest.mark.parametrize(("sizes", "nothing"), [((), True), ((0, 0), True), ((0, 1), False)])
def test_several_empty_buffers(memory: BufferMemory, sizes: tuple[int, ...], nothing: bool) -> None:
    """Linux, vfs_readv: over before the file is asked, unlike a read of no bytes."""
    array = b"".join(struct.pack("<QQ", HERE, size) for size in sizes)
    address = memory.place(array) if array else 0
    assert vector(memory, address, len(sizes)).nothing is nothing
    assert not one_buffer(memory, HERE, 0).nothing


@pytest.mark.parametrize(
    ("buffers", "limit", "taken"),
    [
        (((HERE, 3),), 9, b"\0\1\2"),
        (((HERE, 3),), 2, b"\0\1"),
        (((HERE, 0),), 9, b""),
        (((0x20_0000, 8), (HERE, 1)), 9, b"abcdefgh\0"),
        (((0x20_0000, 8), (HERE, 1)), 8, b"abcdefgh"),
        # as far as the program itself can read, page by page
        (((HERE, 300),), 4096, bytes(range(256))),
        (((0x30_0000, 4),), 4096, b""),
        (((0x20_0000, 4), (0x30_0000, 4), (HERE, 4)), 4096, b"abcd"),
    ],
)
def test_take(memory: BufferMemory, buffers: tuple[tuple[int, int], ...], limit: int, taken: bytes) -> None:
    """Linux, copy_from_iter: what comes before a fault is taken."""
    assert Transfer(memory, buffers).take(limit) == taken


def test_pages_that_can_be_read_one_by_one() -> None:
    """What one access cannot reach may still be reached page by page."""
    memory = BufferMemory()
    memory.map(0x1000, bytearray(b"a" * 4096))
    memory.map(0x2000, bytearray(b"b" * 4096))
    assert Transfer(memory, ((0x1FFE, 4),)).take(100) == b"aabb"


@pytest.mark.parametrize(
    ("buffers", "data", "done"),
    [
        (((HERE, 9),), b"xyz", 3),
        (((HERE, 2), (0x20_0000, 8)), b"12345", 5),
        (((HERE, 300),), b"\xee" * 290, 256),
        (((0x20_0000, 4), (0x30_0000, 4)), b"12345678", 4),
        (((0x30_0000, 4),), b"", 0),
    ],
)
def test_put(memory: BufferMemory, buffers: tuple[tuple[int, int], ...], data: bytes, done: int) -> None:
    """Linux, copy_to_iter: what comes before a fault is written."""
    assert Transfer(memory, buffers).put(data) == done
    written = b"".join(memory.read(at, min(size, 256)) for at, size in buffers if at != 0x30_0000)
    assert written.startswith(data[:done])


def test_put_nowhere(memory: BufferMemory) -> None:
    """Linux, copy_to_iter: nothing written is EFAULT."""
    with pytest.raises(CallerFault):
        Transfer(memory, ((0x30_0000, 4),)).put(b"1234")
