"""What a verifier remembers: a bounded table of answers.

`functools.lru_cache` does more, but one for each verifier costs as much to make as reading two certificates.
"""

from __future__ import annotations

from threading import Lock
from typing import Generic, TypeVar

__all__ = ["Memory"]

_Key = TypeVar("_Key")
_Answer = TypeVar("_Answer")


class Memory(Generic[_Key, _Answer]):
    """The latest `size` answers, found by all of their question; safe for threads."""

    __slots__ = ("_answers", "_lock", "_size")

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, Lock()
        self._answers: dict[_Key, _Answer] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: _Key) -> _Answer | None:
        """The answer, unless it is not known or was forgotten."""
        return self._answers.get(key)

    def keep(self, key: _Key, answer: _Answer) -> None:
        """Remember one more; beyond `size`, forget the one that was kept first."""
        with self._lock:
            self._answers[key] = answer
            if len(self._answers) > self._size:
                del self._answers[next(iter(self._answers))]
