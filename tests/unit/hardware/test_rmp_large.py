"""RMP: 2 MiB entries, PSMASH, joining, RMPQUERY, and every transition of the page states."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.hardware.rmp import PageState, PvalidateCode, Rmp, RmpEntry, RmpUpdate, RmpUpdateCode

AT = 0x1_0000_0000
PAGE = 4096
LARGE = 2 << 20
GPA = 0x4020_0000
GUEST_2M = RmpUpdate(assigned=True, asid=3, gpa=GPA, page_size=1)
OK = RmpUpdateCode.SUCCESS


@pytest.fixture
def rmp() -> Rmp:
    """One 2 MiB page of guest 3."""
    table = Rmp()
    assert table.rmpupdate(AT, GUEST_2M) is OK
    return table


def test_one_entry_answers_for_all_pages(rmp: Rmp) -> None:
    """A 2 MiB entry stands for its 512 frames, and for no other."""
    first = rmp[AT]
    assert (first.page_size, first.gpa) == (1, GPA)
    assert rmp[AT + PAGE] is rmp[AT + LARGE - 1] is first
    assert rmp.state(AT + 77 * PAGE) is PageState.GUEST_INVALID
    assert rmp[AT - PAGE] == rmp[AT + LARGE] == RmpEntry()
    assert rmp.pages_of(3) == 1
    assert len(rmp._entries) == 1


def test_two_processors_split_one_page(rmp: Rmp, monkeypatch: pytest.MonkeyPatch) -> None:
    """RMP instructions are atomic: what follows a PSMASH on another processor is not undone by this one's."""

    def other() -> None:
        rmp.psmash(AT)
        assert rmp.rmpupdate(AT + PAGE, RmpUpdate()) is OK

    second = threading.Thread(target=other)

    def slowly(**fields: Any) -> RmpEntry:
        if second.ident is None:
            second.start()
            second.join(0.05)
        return RmpEntry(**fields)

    monkeypatch.setattr("swsnp.hardware.rmp.RmpEntry", slowly)
    assert rmp.psmash(AT) is OK
    second.join()
    assert rmp.state(AT + PAGE) is PageState.HYPERVISOR
    assert rmp.state(AT + 2 * PAGE) is PageState.GUEST_INVALID
    assert rmp.pages_of(3) == 511


def test_2_mib_with_an_entry() -> None:
    """A page that is no longer the hypervisor's is an entry of its 2 MiB, until it is given back."""
    rmp = Rmp()
    last = AT + LARGE - PAGE
    rmp[AT] = RmpEntry()
    assert not rmp.has_entries(AT)
    for address in (AT, last):
        rmp[address] = RmpEntry(immutable=True)
        rmp[address] = RmpEntry(assigned=True)
    assert rmp.has_entries(AT)
    assert not rmp.has_entries(AT - PAGE)
    assert not rmp.has_entries(AT + LARGE)
    rmp[AT] = RmpEntry()
    assert rmp.has_entries(AT)
    assert rmp.rmpupdate(AT, GUEST_2M) is RmpUpdateCode.FAIL_OVERLAP
    rmp[last] = RmpEntry()
    assert not rmp.has_entries(AT)
    assert rmp.rmpupdate(AT, GUEST_2M) is OK
    assert rmp.has_entries(last)
    rmp.clear()
    assert not rmp.has_entries(AT)


def test_2_mib_over_entries_of_its_pages(rmp: Rmp) -> None:
    """The firmware's privilege: an entry of 2 MiB that is written over small ones takes their place."""
    assert rmp.psmash(AT) is OK
    rmp.unsmash(AT)
    assert len(rmp._entries) == 1
    assert rmp.rmpupdate(AT, RmpUpdate(page_size=1)) is OK
    assert not rmp.has_entries(AT)


@pytest.mark.parametrize(
    ("address", "update", "code"),
    [
        (AT + PAGE, GUEST_2M, RmpUpdateCode.FAIL_INPUT),  # not aligned to its size
        (AT, RmpUpdate(assigned=True, asid=3, gpa=GPA), RmpUpdateCode.FAIL_OVERLAP),
        (AT + PAGE, RmpUpdate(assigned=True, asid=3, gpa=GPA + PAGE), RmpUpdateCode.FAIL_OVERLAP),
        (AT + PAGE, RmpUpdate(), RmpUpdateCode.FAIL_OVERLAP),
        (AT + LARGE - PAGE, RmpUpdate(immutable=True), RmpUpdateCode.FAIL_OVERLAP),
    ],
)
def test_small_updates_of_a_large_page(
    rmp: Rmp, address: int, update: RmpUpdate, code: RmpUpdateCode
) -> None:
    """RMPUPDATE: 4 KiB inside an assigned 2 MiB page overlaps; nothing changes."""
    before = rmp[AT]
    assert rmp.rmpupdate(address, update) is code
    assert rmp[AT] is rmp[address] is before


@pytest.mark.parametrize("number", [0, 1, 511])
@pytest.mark.parametrize(
    "small", [RmpUpdate(assigned=True, asid=4), RmpUpdate(assigned=True, asid=4, gpa=PAGE)]
)
def test_a_large_update_over_small_pages(number: int, small: RmpUpdate) -> None:
    """RMPUPDATE: 2 MiB over a region with an entry of 4 KiB overlaps."""
    rmp = Rmp()
    assert rmp.rmpupdate(AT + number * PAGE, small) is OK
    assert rmp.rmpupdate(AT, GUEST_2M) is RmpUpdateCode.FAIL_OVERLAP
    assert rmp.rmpupdate(AT + number * PAGE, RmpUpdate()) is OK
    assert rmp.rmpupdate(AT, GUEST_2M) is OK


def test_large_pages_that_are_immutable(rmp: Rmp) -> None:
    """RMPUPDATE on an immutable 2 MiB entry: FAIL_PERMISSION, also through a page inside it."""
    assert rmp.rmpupdate(AT, replace(GUEST_2M, immutable=True)) is OK
    assert rmp.state(AT + PAGE) is PageState.PRE_GUEST
    assert rmp.rmpupdate(AT, RmpUpdate(page_size=1)) is RmpUpdateCode.FAIL_PERMISSION
    assert rmp.rmpupdate(AT + PAGE, RmpUpdate()) is RmpUpdateCode.FAIL_PERMISSION
    assert rmp.psmash(AT) is RmpUpdateCode.FAIL_PERMISSION


def test_a_large_page_given_back_leaves_nothing(rmp: Rmp) -> None:
    """A 2 MiB page back in the hypervisor's hands has no entry any more."""
    assert rmp.rmpupdate(AT, RmpUpdate(page_size=1)) is OK
    assert rmp[AT] == rmp[AT + PAGE] == RmpEntry()
    assert (rmp._entries, rmp._large, rmp.pages_of(3)) == ({}, {}, 0)


def test_clearing_the_table(rmp: Rmp) -> None:
    """A full initialisation of SNP forgets 2 MiB pages too."""
    rmp.clear()
    assert rmp.state(AT + PAGE) is PageState.HYPERVISOR


def test_psmash(rmp: Rmp) -> None:
    """PSMASH: 512 entries in the same state, guest addresses counting up."""
    assert rmp.pvalidate(AT, asid=3, gpa=GPA, validate=True, page_size=1) == (PvalidateCode.SUCCESS, False)
    rmp.rmpadjust(AT, asid=3, gpa=GPA, vmpl=1, permissions=5, vmsa=False, page_size=1)
    before = rmp[AT]
    assert rmp.psmash(AT) is OK
    for number in range(512):
        assert rmp[AT + number * PAGE] == replace(before, page_size=0, gpa=GPA + number * PAGE)
    assert rmp.pages_of(3) == 512
    assert rmp.psmash(AT) is RmpUpdateCode.FAIL_INPUT
    assert rmp.rmpupdate(AT + PAGE, RmpUpdate()) is OK


def test_psmash_of_pages_without_owner() -> None:
    """A 2 MiB page in Reclaim becomes 512 pages in Reclaim: there is no guest address to count."""
    rmp = Rmp()
    assert rmp.rmpupdate(AT, RmpUpdate(assigned=True, page_size=1)) is OK
    assert rmp.psmash(AT) is OK
    assert {rmp[AT + number * PAGE] for number in range(512)} == {RmpEntry(assigned=True)}


def test_psmash_makes_no_entries_that_nobody_wants(rmp: Rmp) -> None:
    """Own rule: entries of 4 KiB are made when they are looked at, and then stay the same until written."""
    assert rmp.psmash(AT) is OK
    assert len(rmp._entries) == 1
    assert rmp.first_assigned(range(AT + PAGE, AT + LARGE, PAGE)) == AT + PAGE
    assert rmp.has_entries(AT + LARGE - 1)
    assert len(rmp._entries) == 1
    looked_at = rmp[AT + 7 * PAGE + 5]
    assert (looked_at.gpa, looked_at.page_size) == (GPA + 7 * PAGE, 0)
    assert rmp[AT + 7 * PAGE] is looked_at
    assert len(rmp._entries) == 2


def test_a_page_taken_back_after_psmash_stays_the_hypervisors(rmp: Rmp) -> None:
    """RMPUPDATE of a page that was not looked at: what was split does not come back."""
    assert rmp.psmash(AT) is OK
    last = AT + LARGE - PAGE
    for _ in range(2):
        assert rmp.rmpupdate(last, RmpUpdate()) is OK
        assert rmp[last] == RmpEntry()
        assert rmp.pages_of(3) == 511
    assert rmp.first_assigned(range(last, last + PAGE, PAGE)) is None
    assert rmp.rmpupdate(last, RmpUpdate(assigned=True, asid=4)) is OK
    assert (rmp.pages_of(3), rmp.pages_of(4)) == (511, 1)
    assert rmp.rmpupdate(AT, GUEST_2M) is RmpUpdateCode.FAIL_OVERLAP


def test_split_pages_given_back_one_by_one(rmp: Rmp) -> None:
    """The last one leaves nothing in the table, and 2 MiB can be assigned at once again."""
    assert rmp.psmash(AT) is OK
    for page in range(AT, AT + LARGE, PAGE):
        assert rmp.has_entries(AT)
        assert rmp.rmpupdate(page, RmpUpdate()) is OK
    assert (rmp._entries, rmp._split, rmp.pages_of(3)) == ({}, {}, 0)
    assert not rmp.has_entries(AT)
    assert rmp.rmpupdate(AT, GUEST_2M) is OK


def test_clearing_the_table_forgets_what_was_split(rmp: Rmp) -> None:
    """A full initialisation of SNP: pages that nobody looked at are the hypervisor's, too."""
    assert rmp.psmash(AT) is OK
    rmp.clear()
    assert rmp[AT + PAGE] == RmpEntry()


NUMBERS = st.sampled_from([0, 1, 2, 300, 511])
STEPS = st.one_of(
    st.tuples(st.just("update"), NUMBERS, st.sampled_from([0, 3, 4])),
    st.tuples(st.just("validate"), NUMBERS, st.booleans()),
    st.tuples(st.just("write"), NUMBERS, st.booleans()),
    st.tuples(st.just("read"), NUMBERS, st.none()),
    st.tuples(st.just("all back"), NUMBERS, st.none()),
    st.tuples(st.sampled_from(["psmash", "unsmash", "large"]), st.just(0), st.none()),
)


def step(rmp: Rmp, kind: str, number: int, value: int | None) -> object:
    """One step: what it answers."""
    at, gpa = AT + number * PAGE, GPA + number * PAGE
    match kind:
        case "update":
            return rmp.rmpupdate(at, RmpUpdate(assigned=bool(value), asid=value or 0, gpa=gpa * bool(value)))
        case "validate":
            return rmp.pvalidate(at, asid=3, gpa=gpa, validate=bool(value))
        case "write":  # the firmware's privilege
            rmp[at] = RmpEntry(assigned=bool(value), immutable=True) if value is not None else RmpEntry()
        case "read":
            return rmp[at]
        case "all back":
            return [rmp.rmpupdate(page, RmpUpdate()) for page in range(AT, AT + LARGE, PAGE)]
        case "psmash":
            return rmp.psmash(AT)
        case "large":
            return rmp.rmpupdate(AT, GUEST_2M)
        case "unsmash" if rmp[AT].assigned and not rmp[AT].page_size:
            rmp.unsmash(AT)
    return None


@given(st.lists(STEPS, max_size=12))
def test_entries_not_looked_at_are_as_if_they_were(steps: list[tuple[str, int, Any]]) -> None:
    """PSMASH writes 512 entries: a table in which all are looked at after each step answers the same."""
    rmp, watched = Rmp(), Rmp()
    for each in (rmp, watched):
        each.rmpupdate(AT, GUEST_2M)
        each.psmash(AT)
    pages = range(AT, AT + LARGE, PAGE)
    for kind, number, value in steps:
        assert step(rmp, kind, number, value) == step(watched, kind, number, value)
        entries = [watched[page] for page in pages]
        assert rmp.first_assigned(pages) == next((at for at in pages if watched[at].assigned), None)
        assert rmp.has_entries(AT) == any(entry != RmpEntry() for entry in entries)
        assert [rmp.pages_of(asid) for asid in (3, 4)] == [watched.pages_of(asid) for asid in (3, 4)]
    assert [rmp[page] for page in pages] == [watched[page] for page in pages]


@pytest.mark.parametrize("address", [AT + PAGE, AT + LARGE, AT + 5])
def test_psmash_wants_the_start_of_a_large_page(rmp: Rmp, address: int) -> None:
    """PSMASH: not aligned, or no 2 MiB entry: FAIL_INPUT."""
    assert rmp.psmash(address) is RmpUpdateCode.FAIL_INPUT


def test_joining_is_the_reverse(rmp: Rmp) -> None:
    """SNP_PAGE_UNSMASH: the 511 other entries are gone, the first answers for all."""
    before = rmp[AT]
    rmp.psmash(AT)
    rmp.unsmash(AT)
    assert rmp[AT] == rmp[AT + LARGE - PAGE] == before
    assert (len(rmp._entries), rmp.pages_of(3)) == (1, 1)


@pytest.mark.parametrize(
    ("offset", "gpa", "size", "answer"),
    [
        (0, GPA, 0, (PvalidateCode.FAIL_SIZEMISMATCH, False)),
        (PAGE, GPA + PAGE, 0, (PvalidateCode.FAIL_SIZEMISMATCH, False)),
        (PAGE, GPA + PAGE, 1, (PvalidateCode.FAIL_INPUT, False)),
        (PAGE, GPA, 1, None),  # the guest's page tables lead elsewhere
        (PAGE, GPA + 2 * PAGE, 0, None),
        (0, GPA, 1, (PvalidateCode.SUCCESS, False)),
    ],
)
def test_pvalidate_sizes(rmp: Rmp, offset: int, gpa: int, size: int, answer: Any) -> None:
    """PVALIDATE: 4 KiB of a 2 MiB entry is FAIL_SIZEMISMATCH; the address inside the page counts."""
    assert rmp.pvalidate(AT + offset, asid=3, gpa=gpa, validate=True, page_size=size) == answer


def test_pvalidate_of_a_small_page_as_a_large_one() -> None:
    """PVALIDATE: 2 MiB of a 4 KiB entry is FAIL_SIZEMISMATCH."""
    rmp = Rmp()
    rmp[AT] = RmpEntry(assigned=True, asid=3, gpa=GPA)
    answer = rmp.pvalidate(AT, asid=3, gpa=GPA, validate=True, page_size=1)
    assert answer == (PvalidateCode.FAIL_SIZEMISMATCH, False)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"page_size": 1, "gpa": GPA + PAGE}, PvalidateCode.FAIL_INPUT),
        ({"asid": 4}, None),
        ({"vmpl": 1}, PvalidateCode.FAIL_PERMISSION),
        ({"vmpl": 0}, PvalidateCode.FAIL_PERMISSION),
        ({"page_size": 1}, PvalidateCode.FAIL_SIZEMISMATCH),
        ({"permissions": 8}, PvalidateCode.FAIL_PERMISSION),  # VMPL1 cannot execute itself
        ({"vmsa": True}, PvalidateCode.FAIL_PERMISSION),
        ({"vmsa": True, "current_vmpl": 0}, PvalidateCode.SUCCESS),
        ({"permissions": 0x20, "current_vmpl": 0}, PvalidateCode.FAIL_PERMISSION),
        ({}, PvalidateCode.SUCCESS),
    ],
)
def test_rmpadjust_codes(change: dict[str, Any], code: PvalidateCode | None) -> None:
    """RMPADJUST from VMPL1 for VMPL2: only below, only what the caller has, VMSA from VMPL0 only."""
    rmp = Rmp()
    rmp[AT] = RmpEntry(assigned=True, asid=3, gpa=GPA, validated=True, permissions=(0x1F, 3, 0, 0))
    call: dict[str, Any] = {
        "asid": 3,
        "gpa": GPA,
        "vmpl": 2,
        "permissions": 1,
        "vmsa": False,
        "current_vmpl": 1,
    }
    assert rmp.rmpadjust(AT, **(call | change)) is code


def test_rmpquery(rmp: Rmp) -> None:
    """RMPQUERY: the permissions of a VMPL below the caller's, and the size of the entry."""
    assert rmp.rmpquery(AT, asid=3, gpa=GPA, vmpl=1) is None  # not validated
    rmp.pvalidate(AT, asid=3, gpa=GPA, validate=True, page_size=1)
    rmp.rmpadjust(AT, asid=3, gpa=GPA, vmpl=2, permissions=3, vmsa=False, page_size=1)
    assert rmp.rmpquery(AT + PAGE, asid=3, gpa=GPA + PAGE, vmpl=2) == (PvalidateCode.SUCCESS, 3, 1)
    assert rmp.rmpquery(AT, asid=3, gpa=GPA, vmpl=3, current_vmpl=2) == (PvalidateCode.SUCCESS, 0, 1)
    for vmpl, current in ((1, 1), (0, 0), (4, 0)):
        refused = rmp.rmpquery(AT, asid=3, gpa=GPA, vmpl=vmpl, current_vmpl=current)
        assert refused == (PvalidateCode.FAIL_PERMISSION, 0, 0)
    assert rmp.rmpquery(AT, asid=4, gpa=GPA, vmpl=2) is None


def test_first_assigned(rmp: Rmp) -> None:
    """The first page of a range that is not the hypervisor's, inside 2 MiB pages too."""
    assert rmp.first_assigned(range(AT - 2 * PAGE, AT + LARGE, PAGE)) == AT
    assert rmp.first_assigned(range(AT + PAGE, AT + LARGE, PAGE)) == AT + PAGE
    assert rmp.first_assigned(range(AT + LARGE, AT + LARGE + PAGE, PAGE)) is None
    rmp.clear()
    rmp[AT] = RmpEntry(immutable=True)
    rmp[AT + PAGE] = RmpEntry(assigned=True)
    assert rmp.first_assigned(range(AT, AT + 3 * PAGE, PAGE)) == AT + PAGE


HYPERVISOR = RmpEntry()
VALID = RmpEntry(assigned=True, asid=3, gpa=GPA, validated=True)
INVALID = replace(VALID, validated=False)
RECLAIM = RmpEntry(assigned=True)


@pytest.mark.parametrize(
    ("before", "update", "after"),
    [
        (HYPERVISOR, RmpUpdate(assigned=True, immutable=True), PageState.FIRMWARE),
        (HYPERVISOR, RmpUpdate(assigned=True, asid=3, gpa=GPA, immutable=True), PageState.PRE_GUEST),
        (HYPERVISOR, RmpUpdate(assigned=True, asid=3, gpa=GPA), PageState.GUEST_INVALID),
        (VALID, RmpUpdate(), PageState.HYPERVISOR),
        (INVALID, RmpUpdate(), PageState.HYPERVISOR),
        (RECLAIM, RmpUpdate(), PageState.HYPERVISOR),
        (VALID, RmpUpdate(assigned=True, asid=3, gpa=GPA, immutable=True), PageState.PRE_SWAP),
        (INVALID, RmpUpdate(assigned=True, asid=3, gpa=GPA, immutable=True), PageState.PRE_GUEST),
    ],
)
@pytest.mark.parametrize("page_size", [0, 1])
def test_transitions_by_rmpupdate(
    before: RmpEntry, update: RmpUpdate, after: PageState, page_size: int
) -> None:
    """AMD 56860, page states: what RMPUPDATE does, for both sizes of pages."""
    rmp = Rmp()
    if before != HYPERVISOR:
        rmp[AT] = replace(before, page_size=page_size)
    assert rmp.rmpupdate(AT, replace(update, page_size=page_size)) is OK
    assert rmp.state(AT) is after
