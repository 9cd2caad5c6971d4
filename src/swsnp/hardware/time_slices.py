"""How many threads go on at a time, and for how long before another one's turn comes.

A thread for each of many vCPUs, on few processors: left to themselves they wake each other for every lock
that one of them lets go, and change threads more often than they do anything. A host's scheduler gives each
a slice of time instead; so does this.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SLICE_S", "TimeSlices"]

SLICE_S: Final = 0.02
"""Seconds that those inside go on although somebody waits."""
# what the place that becomes free next is for
_WHOEVER_COMES: Final = 0
_SOON_WAITER: Final = 1  # for whoever comes; but nobody is expected to come back to one left for good
_WAITER: Final = 2


class TimeSlices:
    """Places for a number of threads; whoever comes back to its place finds it free until a slice is over.

    `pause` leaves a place to which one will be back: no waiter is woken for it. The first of those who wait
    looks again after a slice, and is given the next place that is left from then on; the others wait behind
    it. `leave` gives a place away at once.

    Places are not numbered, and not bound to a thread.

    Args:
        count: places, at least 1.
        slice_s: seconds.
        patience_s: the first waiter comes in beside the others when it was not let in for so long after its
            slice; None: never. With it, the places keep threads from crowding and can never lock one out.
    """

    __slots__ = ("_beside", "_first", "_lock", "_next_is_for", "_patience_s", "_places", "_slice_s", "_woken")

    def __init__(self, count: int, *, slice_s: float = SLICE_S, patience_s: float | None = None) -> None:
        self._places: deque[None] = deque([None] * count)
        self._slice_s = slice_s
        self._patience_s = -1.0 if patience_s is None else patience_s
        self._first = threading.Lock()
        """Held by the one waiter that looks for a place."""
        self._lock = threading.Lock()
        """Held where a place is handed over."""
        self._woken = threading.Lock()
        """Released to the first waiter with a place that is its own."""
        self._woken.acquire()
        self._next_is_for = _WHOEVER_COMES
        self._beside = 0
        """How many came in beside the others: so many places are not to be used again."""

    def try_enter(self) -> bool:
        """Take a place if one is free now; whether it was."""
        try:
            self._places.pop()
        except IndexError:
            return False
        return True

    def enter(self) -> None:
        """Take a place, when one is free."""
        try:
            self._places.pop()
        except IndexError:
            self._wait()

    def pause(self) -> None:
        """Leave one's place for a moment."""
        self._places.append(None)
        if self._next_is_for == _WAITER or self._beside:
            self._hand_over()

    def leave(self) -> None:
        """Leave one's place: a waiter has it at once."""
        self._places.append(None)
        if self._next_is_for or self._beside:
            self._hand_over()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leave one's place, and be in one again afterwards: around whatever waits for something else."""
        self.leave()
        try:
            yield
        finally:
            self.enter()

    def _hand_over(self) -> None:
        """The place just left goes to the first waiter; or to nobody, when there is one too many."""
        with self._lock:
            if not (self._next_is_for or self._beside) or not self.try_enter():
                return  # served meanwhile; or somebody was faster, and will see the same when leaving
            if self._beside:
                self._beside -= 1
                return
            self._next_is_for = _WHOEVER_COMES
            self._woken.release()

    def _wait(self) -> None:
        with self._first:
            try:
                if self._ask(_SOON_WAITER, self._slice_s) or self._ask(_WAITER, self._patience_s):
                    return
                with self._lock:
                    if not self._served():
                        self._next_is_for = _WHOEVER_COMES
                        self._beside += 1
            except BaseException:  # an interrupt: what is handed over now is another's
                with self._lock:
                    handed = self._served()
                    self._next_is_for = _WHOEVER_COMES
                if handed:
                    self.pause()
                raise

    def _ask(self, next_is_for: int, seconds: float) -> bool:
        """Say what the next place is for and wait for it; whether there was one. Negative: without an end."""
        with self._lock:
            if next_is_for == _WAITER and self._served():
                return True
            self._next_is_for = next_is_for
            # after it was said: a place left just before went to nobody
            if self.try_enter():
                self._next_is_for = _WHOEVER_COMES
                return True
        return self._woken.acquire(timeout=seconds)

    def _served(self) -> bool:
        """Whether a place was handed over although the waiter waits no more; asked under the lock."""
        return self._woken.acquire(blocking=False)
