"""Which pages of a guest_memfd the RMP may show as the guest's: a set in which 2 MiB may be one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swsnp.hypervisor.guest_memfd import AssignedPages

LARGE = 512
FRAMES = 4
PAGES = st.integers(0, FRAMES * LARGE - 1)
STEPS = st.one_of(
    st.tuples(st.just("add"), PAGES),
    st.tuples(st.just("add_large"), st.integers(0, FRAMES - 1).map(LARGE.__mul__)),
    st.tuples(st.just("take"), PAGES, st.one_of(PAGES, st.just(LARGE), st.just(2 * LARGE))),
)


@given(st.lists(STEPS, max_size=12))
def test_same_as_a_plain_set(steps: list[tuple[str, int] | tuple[str, int, int]]) -> None:
    """What was added and not taken is there, once and rising; what is taken was there, wholly or singly."""
    pages, plain = AssignedPages(), set[int]()
    for step in steps:
        match step:
            case "add", page:
                pages.add(page)
                plain.add(page)
            case "add_large", page:
                pages.add_large(page)
                plain.update(range(page, page + LARGE))
            case _, first, size:
                large, small = pages.take(first, first + size)
                assert len(set(small)) == len(small)
                taken = {each for start in large for each in range(start, start + LARGE)}.union(small)
                assert taken == {each for each in plain if first <= each < first + size}
                plain -= taken
        assert list(pages) == sorted(plain)


def test_large_pages_stay_one() -> None:
    """2 MiB that lie wholly in what is taken come back as one; the pages of others come back singly."""
    pages = AssignedPages()
    for frame in range(4):
        pages.add_large(frame * LARGE)
    assert pages.take(511, 3 * LARGE + 1) == ([LARGE, 2 * LARGE], [511, 3 * LARGE])
    assert pages.take(0, 4 * LARGE) == ([], [*range(511), *range(3 * LARGE + 1, 4 * LARGE)])
    assert pages.take(0, 4 * LARGE) == ([], [])
