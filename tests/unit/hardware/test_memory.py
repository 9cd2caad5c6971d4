"""Memory by system physical address."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from swsnp.errors import UsageError
from swsnp.hardware.memory import PAGE, BusError, SystemMemory, passable_memory


def test_regions_are_separate_and_bounded() -> None:
    """A range that is not wholly inside one region has no memory behind it."""
    memory = SystemMemory()
    first = memory.allocate(PAGE)
    second = memory.allocate(3 * PAGE - 1)
    memory.write(second + 2 * PAGE, b"last page")
    assert memory.read(second + 2 * PAGE, 9) == b"last page"
    assert memory.read(first, 4) == bytes(4)
    for address, size in ((first - 1, 1), (first + PAGE - 1, 2), (second + 3 * PAGE, 1), (0, 1)):
        with pytest.raises(BusError, match=f"{address:#x}"):
            memory.read(address, size)


def test_a_large_region_costs_nothing_until_touched() -> None:
    """64 GiB can be mapped; only touched pages take memory."""
    memory = SystemMemory()
    base = memory.allocate(64 << 30)
    memory.write(base + (63 << 30), b"x")
    assert memory.read(base + (63 << 30), 2) == b"x\0"


def test_pages_come_zeroed_and_are_used_again() -> None:
    """A freed page is given out again, as zeros."""
    memory = SystemMemory()
    page = memory.allocate_page()
    memory.write(page, b"old")
    memory.free_page(page)
    assert memory.allocate_page() == page
    assert memory.read(page, 3) == bytes(3)
    pages = {memory.allocate_page() for _ in range(600)}
    assert len(pages) == 600


def test_discard_gives_zeros() -> None:
    """Discarded pages read as zeros; their neighbours keep their bytes."""
    memory = SystemMemory()
    base = memory.allocate(3 * PAGE)
    for at in range(3):
        memory.write(base + at * PAGE, b"data")
    memory.discard(base + PAGE, PAGE)
    assert [memory.read(base + at * PAGE, 4) for at in range(3)] == [b"data", bytes(4), b"data"]


def test_released_region_answers_no_more() -> None:
    """After release, the addresses have no memory and are not given to anyone else."""
    memory = SystemMemory()
    base = memory.allocate(PAGE)
    memory.release(base)
    with pytest.raises(BusError):
        memory.view(base, 1)
    assert memory.allocate(PAGE) != base


def test_which_pages_are_memory() -> None:
    """A page counts when all of it is memory: one of the kernel's own, or one inside a region."""
    memory = SystemMemory()
    own, region = memory.allocate_page(), memory.allocate(2 * PAGE)
    assert memory.has_page(own + 0xFFF)
    assert [memory.has_page(region + offset) for offset in (0, PAGE + 1, 2 * PAGE)] == [True, True, False]
    assert not memory.has_page(0)
    memory.release(region)
    assert not memory.has_page(region)


def _map_again(fd: int, size: int) -> mmap.mmap:
    """As another process would that has got the descriptor."""
    return mmap.mmap(fd, size)


def test_passable_memory() -> None:
    """memfd_create(2): who has the descriptor sees the same pages; a program that is started has it not."""
    memory = SystemMemory(shareable=True)
    other, base = memory.allocate(PAGE), memory.allocate(2 * PAGE + 1, passable=True)
    fd = memory.descriptor(base)
    assert fd is not None
    assert memory.descriptor(other) is None
    assert not os.get_inheritable(fd)
    assert os.fstat(fd).st_size == 3 * PAGE
    seen = _map_again(fd, 3 * PAGE)
    memory.write(base + PAGE, b"there")
    assert seen[PAGE : PAGE + 5] == b"there"
    seen[0] = 7
    assert memory.read(base, 1) == b"\7"
    memory.discard(base + PAGE, PAGE)
    assert seen[PAGE : PAGE + 5] == bytes(5)
    memory.release(base)
    assert memory.descriptor(base) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_passable_memory_of_a_machine_that_is_dropped() -> None:
    """Its descriptors go with it."""
    memory = SystemMemory(shareable=True)
    fd = memory.descriptor(memory.allocate(PAGE, passable=True))
    assert fd is not None
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_that_cannot_be_passed() -> None:
    """Private mappings are nobody else's."""
    with pytest.raises(UsageError, match="passable memory: wanted the memory to be shareable"):
        SystemMemory().allocate(PAGE, passable=True)


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that cannot give so much: no descriptor stays open."""
    opened: list[int] = []

    def refuse(fd: int, size: int) -> None:
        opened.append(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "truncate", refuse)
    with pytest.raises(OSError, match="No space left"):
        passable_memory(PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
