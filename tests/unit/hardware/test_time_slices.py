"""Places for a few threads of many: kept for a moment, given away in the end, and nobody is locked out."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
from tests.unit.hardware.conftest import WAIT_S, Interrupted, interrupt_after, until

from swsnp.hardware.time_slices import TimeSlices
from swsnp.machine.guest_waits import GuestClock, GuestMutex

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER_S = 1000.0
"""A slice that no test sees the end of."""


def started(work: Callable[[], object]) -> threading.Thread:
    """A thread that does it."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def ended(*threads: threading.Thread) -> None:
    """All of them come to their end."""
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)


def waits(slices: TimeSlices) -> bool:
    """Whether somebody has asked for the next place."""
    return bool(slices._next_is_for)


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_than_there_are_places(count: int) -> None:
    """Many threads that come and go in both ways: never more of them inside than places."""
    slices, inside, most, done = TimeSlices(count, slice_s=0.001), [0], [0], [0]
    counting = threading.Lock()

    def work(leave: Callable[[], None]) -> None:
        for _ in range(100):
            slices.enter()
            with counting:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0)  # a place to be interrupted at
            with counting:
                inside[0] -= 1
                done[0] += 1
            leave()

    ended(
        *[started(lambda: work(slices.pause)) for _ in range(6)],
        *[started(lambda: work(slices.leave)) for _ in range(6)],
    )
    assert done[0] == 12 * 100
    assert 1 <= most[0] <= count
    assert len(slices._places) == count


def test_a_pause_keeps_the_place_although_somebody_waits() -> None:
    """Within its slice the thread that comes back finds it free: the waiter sleeps on."""
    slices = TimeSlices(1, slice_s=NEVER_S)
    slices.enter()
    waiter = started(slices.enter)
    until(lambda: waits(slices))
    slices.pause()
    assert slices.try_enter()
    assert not slices.try_enter()
    slices.leave()
    ended(waiter)


def test_after_its_slice_a_place_goes_to_who_waits() -> None:
    """The waiter has looked once more; from then on the next place left is its own."""
    slices = TimeSlices(1, slice_s=0.001)
    slices.enter()
    waiter = started(slices.enter)
    until(lambda: slices._next_is_for == 2)
    slices.pause()
    assert not slices.try_enter()  # not for a moment was it free
    ended(waiter)


def test_a_place_paused_for_good_is_found() -> None:
    """Nobody comes back to it: the waiter looks after a slice."""
    slices = TimeSlices(1, slice_s=0.02)
    slices.enter()
    waiter = started(slices.enter)
    until(lambda: waits(slices))
    slices.pause()
    ended(waiter)
    assert not slices.try_enter()


def test_a_place_left_is_given_at_once() -> None:
    """No slice is waited for."""
    slices = TimeSlices(1, slice_s=NEVER_S)
    slices.enter()
    waiter = started(slices.enter)
    until(lambda: waits(slices))
    slices.leave()
    ended(waiter)
    assert not slices.try_enter()


def test_a_place_that_came_free_before_it_was_asked_for_is_taken() -> None:
    """Between finding none and saying so: the waiter tries again, since that one was given to nobody."""
    slices = TimeSlices(1, slice_s=NEVER_S)
    assert slices._ask(1, NEVER_S)
    assert (waits(slices), len(slices._places)) == (False, 0)


def test_a_place_handed_over_as_the_slice_ended_is_not_lost() -> None:
    """The wake-up came between the end of the wait and the next question."""
    slices = TimeSlices(1, slice_s=0)
    slices.enter()
    assert not slices._ask(1, 0)
    slices.leave()
    assert slices._ask(2, NEVER_S)
    assert not slices._woken.acquire(blocking=False)


def test_one_served_meanwhile_leaves_the_place_to_others() -> None:
    """Two leave at a time, one waits: the second place stays free."""
    slices = TimeSlices(2, slice_s=NEVER_S)
    slices.enter()
    slices.enter()
    waiter = started(slices.enter)
    until(lambda: waits(slices))
    slices.leave()
    slices.leave()
    ended(waiter)
    assert len(slices._places) == 1
    slices._hand_over()  # as of one who looked when somebody still waited
    assert len(slices._places) == 1


def test_a_faster_thread_takes_the_place_before_it_is_handed_over() -> None:
    """Then the waiter is served when that one leaves."""
    slices = TimeSlices(1, slice_s=NEVER_S)
    slices.enter()
    waiter = started(slices.enter)
    until(lambda: waits(slices))
    slices._hand_over()  # the place just left is taken already
    assert waits(slices)
    slices.leave()
    ended(waiter)


def test_without_patience_a_waiter_waits() -> None:
    """A mutex: two inside would be wrong, however long it takes."""
    slices = TimeSlices(1, slice_s=0.001)
    slices.enter()
    waiter = started(slices.enter)
    until(lambda: slices._next_is_for == 2)
    time.sleep(0.05)
    assert waiter.is_alive()
    slices.pause()
    ended(waiter)


@pytest.mark.parametrize("leave", [TimeSlices.pause, TimeSlices.leave])
def test_with_patience_nobody_is_locked_out(leave: Callable[[TimeSlices], None]) -> None:
    """All inside are blocked: the waiter comes in beside them, and one place is then taken away again."""
    slices = TimeSlices(1, slice_s=0.001, patience_s=0.001)
    slices.enter()
    ended(started(slices.enter))
    leave(slices)
    assert not slices.try_enter()
    leave(slices)
    assert slices.try_enter()
    assert not slices.try_enter()


def test_one_served_at_the_end_of_its_patience_is_not_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The place was handed over as the waiter gave up: it is the one place, and no further one is made."""
    slices = TimeSlices(1, slice_s=0, patience_s=0)
    slices.enter()
    genuine = TimeSlices._ask

    def leave_after(self: TimeSlices, next_is_for: int, seconds: float) -> bool:
        found = genuine(self, next_is_for, seconds)
        if next_is_for == 2:
            self.leave()
        return found

    monkeypatch.setattr(TimeSlices, "_ask", leave_after)
    slices.enter()
    assert (slices._beside, len(slices._places), slices._next_is_for) == (0, 0, 0)
    assert slices._woken.locked()


def test_away_gives_the_place_and_takes_one_again() -> None:
    """Around whatever waits, also when that fails."""
    slices = TimeSlices(1)
    slices.enter()

    def fail() -> None:
        with slices.away():
            assert slices.try_enter()
            slices.pause()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not slices.try_enter()


# What a guest waits for


def test_a_guest_that_sleeps_lets_another_run() -> None:
    """The pause between two tries of the driver (guest.md 3.4) takes no processor."""
    slices, seen = TimeSlices(1), []

    class Clock:
        def monotonic(self) -> float:
            return 12.5

        def sleep(self, seconds: float, /) -> None:
            seen.append((seconds, len(slices._places)))

    slices.enter()
    clock = GuestClock(Clock(), slices)
    clock.sleep(2)
    assert seen == [(2, 1)]
    assert clock.monotonic() == 12.5
    assert not slices.try_enter()


def test_a_free_mutex_is_taken_without_a_wait() -> None:
    """The processor is kept."""
    slices = TimeSlices(1)
    slices.enter()
    mutex = GuestMutex(slices)
    for _ in range(2):
        with mutex:
            assert not slices.try_enter()
            assert not mutex._turns.try_enter()
    assert mutex._turns.try_enter()


def test_who_waits_for_the_mutex_lets_another_run() -> None:
    """The one who has the mutex needs a processor to come to its end, and there is only this one."""
    slices = TimeSlices(1, slice_s=NEVER_S)
    mutex, done = GuestMutex(slices), []

    def work(name: str) -> None:
        slices.enter()
        with mutex:
            done.append(name)
        slices.leave()

    with mutex:  # held over an exit to userspace: the holder has no processor now
        waiter = started(lambda: work("waiter"))
        until(lambda: waits(mutex._turns))
        slices.enter()  # its next KVM_RUN
        done.append("holder")
        slices.leave()
    ended(waiter)
    assert done == ["holder", "waiter"]


# Interrupts


@pytest.mark.usefixtures("alarm_clock")
@pytest.mark.parametrize("slice_s", [0.001, NEVER_S], ids=["after its slice", "in its slice"])
def test_an_interrupted_waiter_wants_nothing_any_more(slice_s: float) -> None:
    """Ctrl-C while waiting: the next place left is anybody's."""
    slices = TimeSlices(1, slice_s=slice_s)
    slices.enter()
    interrupt_after(0.05)
    with pytest.raises(Interrupted):
        slices.enter()
    assert not waits(slices)
    slices.leave()
    assert slices.try_enter()


@pytest.mark.usefixtures("alarm_clock")
def test_an_interrupted_waiter_gives_back_what_it_was_handed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C just after a place was handed over."""
    slices = TimeSlices(1, slice_s=NEVER_S)
    slices.enter()

    def hand_over_and_interrupt(self: TimeSlices, next_is_for: int, seconds: float) -> bool:
        self._next_is_for = next_is_for
        self.leave()
        raise Interrupted

    monkeypatch.setattr(TimeSlices, "_ask", hand_over_and_interrupt)
    with pytest.raises(Interrupted):
        slices.enter()
    assert len(slices._places) == 1
    assert slices._woken.locked()
