"""Memory attributes kept as runs."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.hypervisor.attributes import AttributeMap

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0, 8])), max_size=25)


@settings(derandomize=True, max_examples=150)
@given(RANGES, st.integers(0, 45), st.integers(0, 45))
def test_as_a_table_by_frame(changes: list[tuple[int, int, int]], start: int, end: int) -> None:
    """KVM keeps one value per frame; runs answer the same, for one frame and for a range."""
    runs, table = AttributeMap(), dict.fromkeys(range(50), 0)
    for low, high, value in changes:
        runs.set(low, high, value)
        table.update(dict.fromkeys(range(low, high), value))
    assert [runs.get(gfn) for gfn in range(50)] == list(table.values())
    for value in (0, 8):
        assert runs.all_equal(start, end, value) == all(table[gfn] == value for gfn in range(start, end))
    first, behind, found = runs.run(start)
    assert first <= start < behind
    assert {table.get(gfn, 0) for gfn in range(first, min(behind, 50))} == {found}


def test_neighbouring_runs_of_one_value_join() -> None:
    """One run holds what is equal, however it was set."""
    runs = AttributeMap()
    for gfn in (3, 1, 2, 4):
        runs.set(gfn, gfn + 1, 8)
    assert runs.run(2) == (1, 5, 8)
    runs.set(1, 5, 0)
    assert runs.run(0) == (0, 1 << 64, 0)


def test_a_large_range_costs_no_more_than_a_page() -> None:
    """4 GiB (1,048,576 frames) are one run."""
    runs = AttributeMap()
    began = time.perf_counter()
    runs.set(0, 1 << 20, 8)
    assert runs.all_equal(0, 1 << 20, 8)
    assert not runs.all_equal(0, (1 << 20) + 1, 8)
    assert runs.run(5) == (0, 1 << 20, 8)
    assert time.perf_counter() - began < 0.05
