"""Threads for device calls, so that a slow one does not keep other calls of the program waiting."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Workers"]

_T = TypeVar("_T")


class Workers(Generic[_T]):
    """As many threads as there were jobs at once, up to `most`; further jobs wait. `work` must not raise."""

    def __init__(self, work: Callable[[_T], None], *, most: int = 8) -> None:
        self._work = work
        self._most = most
        self._jobs: SimpleQueue[_T | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._unfinished = 0

    def put(self, job: _T) -> None:
        """Have a job done; returns at once."""
        with self._lock:
            self._unfinished += 1
            grow = self._threads < min(self._unfinished, self._most)
            self._threads += grow
        self._jobs.put(job)
        if grow:
            threading.Thread(target=self._run, name="swsnp device call", daemon=True).start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._work(job)
            with self._lock:
                self._unfinished -= 1

    def stop(self) -> bool:
        """End the threads when they have done their jobs, without waiting; True when all jobs are done."""
        with self._lock:
            for _ in range(self._threads):
                self._jobs.put(None)
            return not self._unfinished
