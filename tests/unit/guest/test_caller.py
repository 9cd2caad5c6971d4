"""The in-process caller memory."""

from __future__ import annotations

import pytest

from swsnp.errors import UsageError
from swsnp.guest.caller import BufferMemory, CallerFault


def test_read_and_write_within_a_buffer() -> None:
    """A mapped bytearray is the caller's own memory: writes are seen in it."""
    memory = BufferMemory()
    mine = bytearray(b"0123456789")
    memory.map(0x5000, mine)
    assert memory.read(0x5003, 4) == b"3456"
    memory.write(0x5008, b"xy")
    assert mine == b"01234567xy"
    assert memory.read(0x5000, 10) == b"01234567xy"


@pytest.mark.parametrize(
    ("address", "size"),
    [(0, 1), (0x4FFF, 1), (0x4FFF, 2), (0x500A, 1), (0x5009, 2), (0x5000, 11), (0x6000, 1), (1 << 63, 8)],
)
def test_everything_else_faults(address: int, size: int) -> None:
    """An access has to lie within one buffer; it is done wholly or not at all."""
    memory = BufferMemory()
    mine = bytearray(b"0123456789")
    memory.map(0x5000, mine)
    with pytest.raises(CallerFault, match="not mapped"):
        memory.read(address, size)
    with pytest.raises(CallerFault, match="not mapped"):
        memory.write(address, b"z" * size)
    assert mine == b"0123456789"


def test_empty_memory_faults() -> None:
    """Nothing is mapped at first."""
    with pytest.raises(CallerFault):
        BufferMemory().read(0x1000, 1)


def test_read_only_buffers() -> None:
    """A read-only buffer can be read; a write faults."""
    memory = BufferMemory()
    address = memory.place(b"abc", writable=False)
    assert memory.read(address, 3) == b"abc"
    with pytest.raises(CallerFault, match="read-only"):
        memory.write(address, b"x")
    assert memory.read(address, 3) == b"abc"


def test_place_leaves_a_hole_behind_each_buffer() -> None:
    """Placed buffers are page aligned, and one byte too many faults even after a full page."""
    memory = BufferMemory()
    first, second = memory.place(bytes(4096)), memory.place(bytearray(b"b"))
    assert first % 4096 == 0
    assert second % 4096 == 0
    assert second >= first + 2 * 4096
    with pytest.raises(CallerFault):
        memory.read(first, 4097)


def test_buffers_do_not_overlap() -> None:
    """Two buffers cannot share an address; neighbours may touch, but an access spans only one."""
    memory = BufferMemory()
    memory.map(0x5000, bytearray(16))
    for address, size in ((0x5000, 1), (0x500F, 1), (0x4FFF, 2), (0x4FF0, 64)):
        with pytest.raises(UsageError, match="overlaps"):
            memory.map(address, bytearray(size))
    memory.map(0x5010, bytearray(16))
    with pytest.raises(CallerFault):
        memory.read(0x500F, 2)


def test_unmap() -> None:
    """What was unmapped faults, and its address is free again, writable if so mapped."""
    memory = BufferMemory()
    memory.map(0x5000, bytearray(16), writable=False)
    memory.unmap(0x5000)
    with pytest.raises(CallerFault):
        memory.read(0x5000, 1)
    with pytest.raises(UsageError, match="no buffer at"):
        memory.unmap(0x5000)
    memory.map(0x5000, bytearray(16))
    memory.write(0x5000, b"x")
