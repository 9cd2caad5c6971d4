"""Threads that wait for each other, and an interrupt in the middle."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 10


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Interrupted(Exception):
    """What the signal handler raises."""


def interrupt_after(seconds: float) -> None:
    """Raise in the main thread.

    Again and again until it was seen: a free-threaded interpreter (3.14) that takes a signal on its way to
    sleep on a lock sleeps on.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


@pytest.fixture
def alarm_clock() -> Iterator[None]:
    """SIGALRM raises in the main thread, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
