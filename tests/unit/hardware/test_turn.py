"""The mutex over the secure processor: one at a time, nobody forgotten, and free once it is released."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque

import pytest
from tests.unit.hardware.conftest import WAIT_S, Interrupted, interrupt_after, until

from swsnp.hardware.turn import Turn


def test_one_at_a_time() -> None:
    """A command of the secure processor is never interleaved with another's."""
    turn, inside, most, done = Turn(), [0], [0], [0]

    def work() -> None:
        for _ in range(200):
            with turn:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)  # a place to be interrupted at
                done[0] += 1
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert (most[0], done[0]) == (1, 12 * 200)
    assert not turn.locked()


def test_a_release_leaves_it_free_although_somebody_waits() -> None:
    """The running thread may take it again: a waiter is woken, and has to try like everybody."""
    turn, alarm = Turn(), threading.Lock()
    alarm.acquire()
    turn.acquire()
    turn._waiting.append(alarm)
    turn.release()
    assert not turn.locked()
    assert alarm.acquire(blocking=False)  # it was woken


def test_a_release_wakes_one_of_them() -> None:
    """The others sleep on: each wakes the next when it lets go."""
    turn, alarms = Turn(), [threading.Lock(), threading.Lock()]
    turn.acquire()
    for alarm in alarms:
        alarm.acquire()
        turn._waiting.append(alarm)
    turn.release()
    assert [each.locked() for each in alarms] == [False, True]


def test_nobody_is_forgotten() -> None:
    """Every waiter gets its turn after the one who held it has gone."""
    turn, served = Turn(), []
    turn.acquire()

    def wait(number: int) -> None:
        with turn:
            served.append(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: len(turn._waiting) == 20)
    turn.release()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(served) == list(range(20))
    assert not turn._waiting


def test_a_release_by_nobody_is_an_error() -> None:
    """As with every mutex."""
    with pytest.raises(RuntimeError):
        Turn().release()


@pytest.mark.usefixtures("alarm_clock")
def test_an_interrupted_waiter_leaves_the_queue() -> None:
    """Ctrl-C while waiting: its entry is gone, so no later wake-up is spent on it."""
    turn = Turn()
    turn.acquire()
    interrupt_after(0.02)
    with pytest.raises(Interrupted):
        turn.acquire()
    assert not turn._waiting
    assert turn.locked()  # still the first one's


@pytest.mark.usefixtures("alarm_clock")
def test_an_interrupted_waiter_passes_its_wake_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C just after a release chose it: somebody else is woken instead."""
    turn, other = Turn(), threading.Lock()
    other.acquire()
    turn.acquire()
    genuine = Turn._withdraw

    def release_first(self: Turn, alarm: threading.Lock) -> bool:
        if self._waiting:  # the release takes the interrupted one's entry; another has queued up behind it
            self._waiting.popleft()
            self._waiting.append(other)
        return genuine(self, alarm)

    monkeypatch.setattr(Turn, "_withdraw", release_first)
    interrupt_after(0.02)
    with pytest.raises(Interrupted):
        turn.acquire()
    assert not other.locked()


@pytest.mark.usefixtures("alarm_clock")
def test_a_release_just_before_one_waits_is_seen() -> None:
    """It found nobody in the queue, so nobody is woken: who queues up has to look once more."""
    turn = Turn()

    class ReleasedBefore(deque[threading.Lock]):
        def append(self, alarm: threading.Lock) -> None:
            turn.release()
            super().append(alarm)

    turn._waiting = ReleasedBefore()
    turn.acquire()
    interrupt_after(1)
    turn.acquire()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert turn.locked()
    assert not turn._waiting
