"""What a device may touch of guest memory: what the guest shares, as the VMM has seen it change."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.vmm.fake_host import FakeHost

from swsnp.errors import UsageError
from swsnp.hardware import BusError
from swsnp.trace import Trace
from swsnp.vmm.ram import GuestRam, RamSlot, SharedRanges

PAGE = 4096


@given(
    changes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.booleans()), max_size=30),
    asked=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)), min_size=1),
)
def test_ranges(changes: list[tuple[int, int, bool]], asked: list[tuple[int, int]]) -> None:
    """As a table with an entry for every address has it."""
    ranges, table = SharedRanges(), [False] * 64
    for start, size, shared in changes:
        ranges.set(start, start + size, shared=shared)
        table[start : start + size] = [shared] * size
    for start, size in asked:
        assert ranges.hold(start, start + size) is (size > 0 and all(table[start : start + size]))


@pytest.fixture
def ram() -> GuestRam:
    """Four pages at 1 MiB, all private but the third."""
    host = FakeHost()
    slots = tuple(
        RamSlot(gpa=gpa, size=4 * PAGE, address=host.allocate(4 * PAGE), memfd=9)
        for gpa in (1 << 20, 4 << 20)
    )
    found = GuestRam(host, host.open("/dev/kvm"), slots, "vm", Trace())
    assert found.set_private(1 << 20, 4 * PAGE, private=True) == 0
    found.convert((1 << 20) + 2 * PAGE, 1, private=False)
    return found


def test_shared_memory(ram: GuestRam) -> None:
    """Bytes of a shared page; a slot that never was private is shared."""
    at = (1 << 20) + 2 * PAGE
    ram.write_shared(at, b"x" * PAGE)
    assert ram.read_shared(at + PAGE - 2, 2) == b"xx"
    assert ram.read_shared(4 << 20, 8) == bytes(8)


@pytest.mark.parametrize(
    ("at", "size", "text"),
    [
        (1 << 20, 16, "not all shared"),
        ((1 << 20) + 2 * PAGE - 1, 2, "not all shared"),
        ((1 << 20) + 3 * PAGE - 1, 2, "not all shared"),
        ((1 << 20) + 2 * PAGE, 0, "not all shared"),
        ((1 << 20) + 4 * PAGE, 1, "no slot holds"),
        ((4 << 20) + 4 * PAGE - 1, 2, "no slot holds"),
        ((1 << 64) - 1, 2, "no slot holds"),
    ],
)
def test_refusals(ram: GuestRam, at: int, size: int, text: str) -> None:
    """Private pages, also in part, and what is no memory: for reads and writes."""
    with pytest.raises(BusError, match=text):
        ram.read_shared(at, size)
    with pytest.raises(BusError, match=text):
        ram.write_shared(at, bytes(size))


def test_page_that_is_taken_back(ram: GuestRam) -> None:
    """What the guest makes private again is refused again."""
    at = (1 << 20) + 2 * PAGE
    ram.convert(at, 1, private=True)
    with pytest.raises(BusError, match="not all shared"):
        ram.read_shared(at, 1)


def test_change_that_kvm_refused() -> None:
    """KVM_SET_MEMORY_ATTRIBUTES failed: nothing has changed."""
    host = FakeHost()
    slot = RamSlot(gpa=0, size=PAGE, address=host.allocate(PAGE), memfd=9)
    found = GuestRam(host, host.open("/dev/kvm"), (slot,), "vm", Trace())
    host.answers["KVM_SET_MEMORY_ATTRIBUTES"] = -12
    found.set_private(0, PAGE, private=True)
    assert found.read_shared(0, 1) == b"\0"


def test_passable(ram: GuestRam) -> None:
    """A process that is a device gets the shared side of every slot, or there is none."""
    with pytest.raises(UsageError, match="memory at 0x100000: wanted a VM with passable memory"):
        ram.passable()
    host: Any = ram._host
    host.memfds = {slot.address: 20 + number for number, slot in enumerate(ram.slots)}
    assert ram.passable() == ((1 << 20, 4 * PAGE, 20), (4 << 20, 4 * PAGE, 21))
