"""Page state changes through the page, and scratch areas. Source: GHCB 2.0; Linux, snp_begin_psc."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode, PscEntry, PscHeader
from swsnp.abi.kvm import ExitReason

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

ALL = ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]
PRIVATE, SHARED = 1, 2
GENERIC, INVALID_HEADER, INVALID_ENTRY = 0x0000010000000000, 0x0000000100000001, 0x0000000100000002
BUFFER = 0x800


def entry(operation: int, gfn: int, *, cur_page: int = 0, pagesize: int = 0) -> PscEntry:
    return PscEntry.of(operation=operation, gfn=gfn, cur_page=cur_page, pagesize=pagesize)


def put(
    vm: World, entries: list[PscEntry], *, cur: int = 0, end: int | None = None, at: int = BUFFER
) -> None:
    """Write header and entries into the GHCB's shared buffer."""
    header = PscHeader(cur_entry=cur, end_entry=len(entries) - 1 if end is None else end)
    data = bytes(header) + b"".join(each.to_bytes(8, "little") for each in entries)
    vm.page[at : at + len(data)] = data


def start(vm: World, *, at: int = BUFFER) -> int:
    return vm.ask_run(ExitCode.PSC, scratch=vm.GHCB + at)


def asked(vm: World) -> tuple[int, int, int]:
    """Frame, pages and attributes of a MAP_GPA_RANGE exit."""
    assert vm.exit_reason == ExitReason.HYPERCALL
    assert vm.u64(32) == 12
    return vm.u64(40) >> 12, vm.u64(48), vm.u64(56)


def answer(vm: World, ret: int = 0) -> int:
    vm.poke(88, ret, 64)
    return vm.run()


def header(vm: World) -> tuple[int, int]:
    read = PscHeader.parse(vm.page[BUFFER : BUFFER + 8])
    return read.cur_entry, read.end_entry


def cur_page(vm: World, index: int) -> int:
    word = PscEntry(int.from_bytes(vm.page[BUFFER + 8 + 8 * index : BUFFER + 16 + 8 * index], "little"))
    read: int = word.cur_page
    return read


# Scratch area


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    "scratch",
    [
        0,
        (1 << 64) - 8,
        (1 << 64) - 1,
        0x1000 + 0x7FF,
        0x1000,
        0x1000 + 0xFE9,
        0x1000 + 0xFF0,
        0x5000,
        0x10_0000_0000,
    ],
)
def test_bad_scratch(world: MakeWorld, profile: str, scratch: int) -> None:
    """Address 0, wrap-around, outside 0x800..0xFEF of the GHCB, elsewhere (version 2): info1=2, info2=3."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(ExitCode.PSC, scratch=scratch))
    assert vm.reply == (2, 3)


@pytest.mark.parametrize(("scratch", "result"), [(0x5000, 0), (0x10_0000_0000, -errno.EFAULT)])
def test_scratch_of_version_1(world: MakeWorld, scratch: int, result: int) -> None:
    """Version 1 allows a scratch area elsewhere; it is copied, and a failing read is -EFAULT.

    Only the 8 bytes of the header are taken, so that no entry fits: invalid header.
    """
    vm = world("linux-6.12")
    vm.sev.ghcb_version = 1
    got = vm.ask_run(ExitCode.PSC, scratch=scratch)
    if result:
        assert got == result
    else:
        assert vm.resumed(got)
        assert vm.reply == (0, INVALID_HEADER)


@pytest.mark.parametrize(("at", "info2"), [(0x800, 0), (0x801, 0), (0xFE0, 0), (0xFE8, INVALID_HEADER)])
def test_good_scratch(world: MakeWorld, at: int, info2: int) -> None:
    """The area may begin anywhere between 0x800 and 0xFE8: 8 bytes are the least, and hold no entry."""
    vm = world()
    assert vm.resumed(start(vm, at=at))
    assert vm.reply == (0, info2)


# Header and entries


def test_not_enabled(world: MakeWorld) -> None:
    """Without KVM_CAP_EXIT_HYPERCALL: generic error, before the header is looked at."""
    vm = world()
    vm.vm.exit_hypercall_mask = ~(1 << 12)
    put(vm, [], end=0xFFFF)
    assert vm.resumed(start(vm))
    assert vm.reply == (0, GENERIC)


@pytest.mark.parametrize(
    ("at", "end", "refused"),
    [
        (0x800, 252, False),
        (0x800, 253, True),
        (0x800, 0xFFFF, True),
        (0xFE0, 0, False),
        (0xFE0, 1, True),
        (0xFE8, 0, True),
    ],
)
def test_end_entry(world: MakeWorld, at: int, end: int, refused: bool) -> None:
    """end_entry must lie inside the buffer behind the scratch address: 253 entries from 0x800."""
    vm = world()
    put(vm, [entry(SHARED, 5)], end=end, at=at)
    assert (start(vm, at=at) == 0) is not refused
    assert vm.reply == (0, INVALID_HEADER if refused else 0)


@pytest.mark.parametrize("profile", ALL)
def test_cur_behind_end(world: MakeWorld, profile: str) -> None:
    """cur_entry > end_entry: done, with 0."""
    vm = world(profile)
    put(vm, [entry(SHARED, 5)], cur=1)
    assert vm.resumed(start(vm))
    assert vm.reply == (0, 0)
    assert header(vm) == (1, 0)


@pytest.mark.parametrize(
    "bad",
    [
        entry(SHARED, 5, cur_page=2),
        entry(SHARED, 0x200, cur_page=513, pagesize=1),
        entry(SHARED, 0x201, pagesize=1),
        entry(PRIVATE, 0x1FF, pagesize=1),
    ],
)
def test_invalid_entry(world: MakeWorld, bad: PscEntry) -> None:
    """cur_page beyond the page, or a 2 MiB entry at an odd frame: invalid entry."""
    vm = world()
    put(vm, [bad])
    assert vm.resumed(start(vm))
    assert vm.reply == (0, INVALID_ENTRY)


def test_invalid_entry_later(world: MakeWorld) -> None:
    """An invalid entry is met when its turn comes; the header tells how far it went."""
    vm = world()
    put(vm, [entry(SHARED, 5), entry(SHARED, 0x201, pagesize=1)])
    assert start(vm) == 0
    assert asked(vm) == (5, 1, 0)
    assert vm.resumed(answer(vm))
    assert vm.reply == (0, INVALID_ENTRY)
    assert header(vm) == (1, 1)


# Ranges


@pytest.mark.parametrize("profile", ALL)
def test_ranges_and_progress(world: MakeWorld, profile: str) -> None:
    """Entries that continue each other are one exit; progress is written to entries and header."""
    vm = world(profile)
    put(
        vm,
        [
            entry(SHARED, 5),
            entry(SHARED, 6),
            entry(PRIVATE, 7),
            entry(PRIVATE, 0x400, pagesize=1),
            entry(PRIVATE, 0x600, pagesize=1),
        ],
    )
    assert start(vm) == 0
    assert asked(vm) == (5, 2, 0x00)
    assert answer(vm) == 0
    assert [cur_page(vm, index) for index in range(5)] == [1, 1, 0, 0, 0]
    assert header(vm) == (2, 4)
    assert asked(vm) == (7, 1, 0x10)
    assert answer(vm) == 0
    assert asked(vm) == (0x400, 1024, 0x11)
    assert vm.processor.entries == 1
    assert vm.resumed(answer(vm))
    assert [cur_page(vm, index) for index in range(5)] == [1, 1, 1, 512, 512]
    assert header(vm) == (5, 4)
    assert vm.reply == (0, 0)


@pytest.mark.parametrize(
    "second",
    [
        entry(PRIVATE, 6),
        entry(SHARED, 7),
        entry(SHARED, 4),
        entry(SHARED, 6, cur_page=1),
        entry(SHARED, 6, pagesize=1),
    ],
)
def test_what_is_not_merged(world: MakeWorld, second: PscEntry) -> None:
    """Another operation, a gap, progress of its own, or another page size ends the range."""
    vm = world()
    put(vm, [entry(SHARED, 5), second])
    assert start(vm) == 0
    assert asked(vm) == (5, 1, 0)


def test_partly_done_large_entry(world: MakeWorld) -> None:
    """The rest of a 2 MiB entry goes by 4 KiB pages; the exit still says 2 MiB (a hint)."""
    vm = world()
    put(vm, [entry(PRIVATE, 0x200, cur_page=500, pagesize=1), entry(PRIVATE, 0x400, pagesize=1)])
    assert start(vm) == 0
    assert asked(vm) == (0x200 + 500, 12, 0x11)
    assert answer(vm) == 0
    assert cur_page(vm, 0) == 512
    assert asked(vm) == (0x400, 512, 0x11)


def test_done_entries_are_skipped(world: MakeWorld) -> None:
    """Entries that are done are passed over; the header counts them."""
    vm = world()
    put(vm, [entry(SHARED, 5, cur_page=1), entry(SHARED, 0x200, cur_page=512, pagesize=1), entry(SHARED, 6)])
    assert start(vm) == 0
    assert header(vm) == (2, 2)
    assert asked(vm) == (6, 1, 0)


@pytest.mark.parametrize("profile", ALL)
def test_all_done(world: MakeWorld, profile: str) -> None:
    """Nothing left to do: 0, cur_entry behind the end."""
    vm = world(profile)
    put(vm, [entry(SHARED, 5, cur_page=1), entry(SHARED, 6, cur_page=1)])
    assert vm.resumed(start(vm))
    assert vm.reply == (0, 0)
    assert header(vm) == (2, 1)


@pytest.mark.parametrize("profile", ALL)
def test_other_operations(world: MakeWorld, profile: str) -> None:
    """Operations such as PSMASH are marked done without asking userspace."""
    vm = world(profile)
    put(vm, [entry(3, 0x200, pagesize=1), entry(4, 9), entry(SHARED, 10)])
    assert start(vm) == 0
    assert [cur_page(vm, 0), cur_page(vm, 1)] == [512, 1]
    assert asked(vm) == (10, 1, 0)
    assert vm.resumed(answer(vm))
    assert vm.reply == (0, 0)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("ret", [errno.EINVAL, errno.EAGAIN])
def test_userspace_refuses(world: MakeWorld, profile: str, ret: int) -> None:
    """EINVAL and EAGAIN: generic error, no progress."""
    vm = world(profile)
    put(vm, [entry(SHARED, 5)])
    start(vm)
    assert vm.resumed(answer(vm, ret))
    assert vm.reply == (0, GENERIC)
    assert cur_page(vm, 0) == 0


@pytest.mark.parametrize("ret", [1, 14, (1 << 64) - errno.EINVAL])
def test_other_results(world: MakeWorld, ret: int) -> None:
    """Another result: KVM_RUN -EINVAL in 7.2, generic error before."""
    for profile in ALL:
        vm = world(profile)
        put(vm, [entry(SHARED, 5)])
        start(vm)
        result = answer(vm, ret)
        if profile == "linux-7.2":
            assert result == -errno.EINVAL
            assert vm.resumed(vm.run()), "the completion was consumed"
            assert vm.reply == (0, 0)
        else:
            assert vm.resumed(result)
            assert vm.reply == (0, GENERIC)


@pytest.mark.parametrize(("profile", "more"), [(each, True) for each in ALL[:3]] + [("linux-7.2", False)])
def test_header_changed_meanwhile(world: MakeWorld, profile: str, more: bool) -> None:
    """end_entry changed during an exit: read again before 7.2, not in 7.2."""
    vm = world(profile)
    put(vm, [entry(SHARED, 5), entry(SHARED, 50)], end=0)
    assert start(vm) == 0
    vm.page[BUFFER + 2] = 1
    result = answer(vm)
    assert (result == 0) is more
    if more:
        assert asked(vm) == (50, 1, 0)


def test_every_entry(world: MakeWorld) -> None:
    """253 entries fill the buffer; contiguous ones are one exit of 253 pages."""
    vm = world()
    put(vm, [entry(SHARED, 0x100 + index) for index in range(253)])
    assert start(vm) == 0
    assert asked(vm) == (0x100, 253, 0)
    assert vm.resumed(answer(vm))
    assert header(vm) == (253, 252)


def test_immediate_exit_during_a_change(world: MakeWorld) -> None:
    """With immediate_exit the completion runs; a further range is a new exit with result 0."""
    vm = world()
    put(vm, [entry(SHARED, 5), entry(PRIVATE, 9)])
    start(vm)
    vm.immediate_exit(1)
    assert answer(vm) == 0
    assert asked(vm) == (9, 1, 0x10)
    assert answer(vm) == -errno.EINTR
    assert vm.reply == (0, 0)
