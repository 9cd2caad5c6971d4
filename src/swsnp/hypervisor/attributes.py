"""Memory attributes of a VM by guest frame number, kept as runs of equal value.

Source: Linux, virt/kvm/kvm_main.c, KVM_SET_MEMORY_ATTRIBUTES (an xarray per frame there).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

__all__ = ["AttributeMap"]

_END: Final = 1 << 64


class AttributeMap:
    """One integer per guest frame, zero at first. The cost grows with the number of runs, not of frames.

    The runs are replaced as a whole, so that a reader beside a writer sees the state before or after.
    """

    __slots__ = ("_runs",)

    def __init__(self) -> None:
        self._runs: tuple[list[int], list[int]] = ([0], [0])

    def get(self, gfn: int) -> int:
        """The value of one frame."""
        starts, values = self._runs
        return values[bisect_right(starts, gfn) - 1]

    def run(self, gfn: int) -> tuple[int, int, int]:
        """The run that a frame lies in: first frame, frame behind the last, value."""
        starts, values = self._runs
        at = bisect_right(starts, gfn) - 1
        return starts[at], starts[at + 1] if at + 1 < len(starts) else _END, values[at]

    def runs(self) -> tuple[list[int], list[int]]:
        """Every run's first frame, rising, and its value: lists that are never changed."""
        return self._runs

    def all_equal(self, gfn_start: int, gfn_end: int, value: int) -> bool:
        """Whether every frame of `gfn_start <= gfn < gfn_end` has this value; an empty range has."""
        if gfn_start >= gfn_end:
            return True
        # neighbouring runs differ, so one run must hold the whole range
        _, end, found = self.run(gfn_start)
        return found == value and gfn_end <= end

    def set(self, gfn_start: int, gfn_end: int, value: int) -> None:
        """Give every frame of `gfn_start <= gfn < gfn_end` this value."""
        if gfn_start >= gfn_end:
            return
        starts, values = self._runs
        low, high = bisect_left(starts, gfn_start), bisect_right(starts, gfn_end)
        before = values[low - 1] if low else None
        after = values[high - 1]
        starts, values = starts.copy(), values.copy()
        begins, continues = before != value, after != value
        starts[low:high] = [gfn_start] * begins + [gfn_end] * continues
        values[low:high] = [value] * begins + [after] * continues
        self._runs = starts, values
