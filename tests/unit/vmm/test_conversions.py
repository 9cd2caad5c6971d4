"""What a conversion throws away, and when: a guest that shares page by page is served in rows."""

from __future__ import annotations

import errno

from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.kvm import KvmMemoryAttributes
from swsnp.trace import Trace
from swsnp.vmm.ram import Broken, Converted, GuestRam, RamSlot

PAGE = 4096
LARGE = 2 << 20
LOW, HIGH = 0x10_0000, 4 << 20
"""Two slots, the second right behind the first; its guest_memfd is another."""
SLOTS = (
    RamSlot(gpa=LOW, size=HIGH - LOW, address=0x7000_0000, memfd=5),
    RamSlot(gpa=HIGH, size=LARGE, address=0x8000_0000, memfd=6),
)


class Host:
    """Keeps what it is asked, in order; by GPA."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.fails = False

    def ioctl(self, _fd: int, _request: int, arg: bytearray) -> int:
        wanted = KvmMemoryAttributes.parse(arg)
        self.asked.append(("private" if wanted.attributes else "shared", wanted.address, wanted.size))
        return 0

    def discard(self, address: int, size: int) -> int:
        slot = next(each for each in SLOTS if each.address <= address < each.address + each.size)
        self.asked.append(("no shared side", slot.gpa + address - slot.address, size))
        return 0

    def discard_memfd(self, fd: int, offset: int, size: int) -> int:
        slot = next(each for each in SLOTS if each.memfd == fd)
        assert offset + size <= slot.size
        self.asked.append(("no private side", slot.gpa + offset, size))
        return -errno.ENOMEM if self.fails else 0


def ram(host: Host) -> GuestRam:
    return GuestRam(host, 3, SLOTS, "vm", Trace())  # type: ignore[arg-type]  # no more is asked for


def discarded(host: Host) -> list[tuple[int, int]]:
    """What went of the private sides since the last time."""
    found = [(gpa, size) for what, gpa, size in host.asked if what == "no private side"]
    host.asked.clear()
    return found


def test_pages_in_a_row() -> None:
    """The first goes at once; those behind it go together when something else is converted."""
    host = Host()
    memory = ram(host)
    for page in range(4):
        assert memory.convert(LOW + page * PAGE, 1, private=False) == Converted()
    assert discarded(host) == [(LOW, PAGE)]
    memory.convert(LOW + 9 * PAGE, 1, private=False)
    assert discarded(host) == [(LOW + PAGE, 3 * PAGE), (LOW + 9 * PAGE, PAGE)]
    memory.convert(LOW + 10 * PAGE, 2, private=False)
    assert discarded(host) == [(LOW + 10 * PAGE, 2 * PAGE)]


def test_row_that_becomes_private_again() -> None:
    """What the guest gets back as private reads as zeros: the row goes before KVM is told."""
    host = Host()
    memory = ram(host)
    for page in range(3):
        memory.convert(LOW + page * PAGE, 1, private=False)
    host.asked.clear()
    memory.convert(LOW + PAGE, 1, private=True)
    assert host.asked == [
        ("no private side", LOW + PAGE, 2 * PAGE),
        ("private", LOW + PAGE, PAGE),
        ("no shared side", LOW + PAGE, PAGE),
    ]


def test_longest_row() -> None:
    """At most 2 MiB wait."""
    host = Host()
    memory = ram(host)
    for page in range(LARGE // PAGE + 2):
        memory.convert(LOW + page * PAGE, 1, private=False)
    assert discarded(host) == [(LOW, PAGE), (LOW + PAGE, LARGE), (LOW + PAGE + LARGE, PAGE)]


def test_row_ends_with_its_slot() -> None:
    """Each slot has a file of its own."""
    host = Host()
    memory = ram(host)
    for page in range(-2, 2):
        memory.convert(HIGH + page * PAGE, 1, private=False)
    assert discarded(host) == [(HIGH - 2 * PAGE, PAGE), (HIGH - PAGE, PAGE), (HIGH, PAGE)]


def test_row_that_cannot_be_thrown_away() -> None:
    """It is told at the conversion that would have done it, which is not made."""
    for private in (True, False):
        host = Host()
        memory = ram(host)
        for page in range(3):
            memory.convert(LOW + page * PAGE, 1, private=False)
        host.fails = True
        host.asked.clear()
        done = memory.convert(LOW + 7 * PAGE, 1, private=private)
        assert done == Broken(errno.ENOMEM, "discarding the side that the range no longer uses")
        assert ("private", LOW + 7 * PAGE, PAGE) not in host.asked


PAGES = range(HIGH // PAGE - 6, HIGH // PAGE + 6)


@given(st.lists(st.tuples(st.sampled_from(PAGES), st.integers(1, 3), st.booleans()), max_size=25))
def test_nothing_private_is_lost_and_nothing_old_comes_back(steps: list[tuple[int, int, bool]]) -> None:
    """A page's private side goes between its becoming shared and its becoming private, and never else."""
    host = Host()
    memory = ram(host)
    private, stale = set(PAGES), set[int]()
    for page, count, to_private in steps:
        memory.convert(page * PAGE, count, private=to_private)
        for what, gpa, size in host.asked:
            pages = set(range(gpa // PAGE, (gpa + size) // PAGE))
            match what:
                case "shared":
                    stale |= pages & private
                    private -= pages
                case "private":
                    assert not pages & stale
                    private |= pages
                case "no private side":
                    assert not pages & private
                    stale -= pages
        host.asked.clear()
