"""The mutex over one device that many threads share."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Turn"]


class Turn:
    """A mutex that is free when it has been released, also while others wait for it.

    `threading.Lock` belongs to the woken waiter at once. That one has no interpreter lock yet, and the thread
    that has it runs into the mutex with its next command: from then on every command costs two changes of
    threads. Here a waiter is woken and tries again, so that whoever runs goes on until the interpreter makes
    it stop. Nobody is promised to be next, and nobody is forgotten: a release wakes one who waits.

    Not reentrant.
    """

    __slots__ = ("_lock", "_waiting")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        """Wait until it is this thread's."""
        if not self._lock.acquire(blocking=False):
            self._wait()

    def release(self) -> None:
        """Let it go.

        Raises:
            RuntimeError: nobody has it.
        """
        self._lock.release()
        if self._waiting:
            self._wake()

    def locked(self) -> bool:
        """Whether somebody has it."""
        return self._lock.locked()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _wait(self) -> None:
        alarm = threading.Lock()
        alarm.acquire()
        while True:
            self._waiting.append(alarm)
            # tried again now that a release would see the entry: one just before would not have
            if self._lock.acquire(blocking=False):
                self._withdraw(alarm)
                return
            try:
                alarm.acquire()
            except BaseException:  # an interrupt: the wake-up may be on its way, and is another's then
                if not self._withdraw(alarm):
                    self._wake()
                raise
            if self._lock.acquire(blocking=False):
                return

    def _withdraw(self, alarm: threading.Lock) -> bool:
        """Take one's entry back; False when a release has taken it already."""
        try:
            self._waiting.remove(alarm)
        except ValueError:
            return False
        return True

    def _wake(self) -> None:
        try:
            alarm = self._waiting.popleft()
        except IndexError:  # another release was faster
            return
        alarm.release()
