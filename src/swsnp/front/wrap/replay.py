"""Answers that a signal kept from their program, for kernels before 5.19.

There a signal calls a program away from a call that the supervisor has already taken up; the answer finds
nobody, and the program, with SA_RESTART, makes the call again. The device must not be asked twice for one
request: each costs a sequence number, and the second report would be another one. So the finished call is
kept with what it read and wrote, and is played back when the same thread makes the same call over the same
bytes.

One window cannot be closed from here: when the signal is taken while the answer is being sent, the kernel
reports it as sent and drops it all the same. The call then comes again like any new one.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from swsnp.guest.caller import CallerFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.guest.caller import CallerMemory

__all__ = ["CallKey", "Finished", "LostAnswers", "Transcript"]

CallKey: TypeAlias = tuple[int, int, tuple[int, ...]]
"""Thread, call number, arguments."""
_Piece: TypeAlias = tuple[int, bytes]


class Finished(NamedTuple):
    """A call that was carried out, and what passed between the device and the program's memory."""

    result: int
    reads: tuple[_Piece, ...]
    writes: tuple[_Piece, ...]


class Transcript:
    """A `CallerMemory` that remembers what passes; a write to a thread that was called away is only kept."""

    def __init__(self, caller: CallerMemory, waits: Callable[[], bool]) -> None:
        self._caller = caller
        self._waits = waits
        self.reads: list[_Piece] = []
        self.writes: list[_Piece] = []

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes; raises CallerFault."""
        data = self._caller.read(address, size)
        self.reads.append((address, data))
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write all of `data`, now or at the play-back; raises CallerFault."""
        if self._waits():
            self._caller.write(address, data)
        self.writes.append((address, data))

    def finish(self, result: int) -> Finished:
        """The call as a whole, with its result."""
        return Finished(result, tuple(self.reads), tuple(self.writes))


def _overlay(piece: _Piece, writes: tuple[_Piece, ...]) -> bytes:
    """What `piece` reads as after `writes`."""
    start, data = piece[0], bytearray(piece[1])
    for address, new in writes:
        first, last = max(start, address), min(start + len(data), address + len(new))
        if first < last:
            data[first - start : last - start] = new[first - address : last - address]
    return bytes(data)


class LostAnswers:
    """Calls whose answers found nobody.

    A thread's calls take turns: it makes one at a time, so a second one while the first is still being
    carried out is the first one made again.
    """

    _MOST_KEPT = 64

    def __init__(self) -> None:
        self._kept: dict[CallKey, Finished] = {}
        self._busy: set[int] = set()
        self._turns = threading.Condition()

    @contextmanager
    def turn(self, tid: int) -> Iterator[None]:
        """Wait until no call of that thread is being carried out, then be the one."""
        with self._turns:
            while tid in self._busy:
                self._turns.wait()
            self._busy.add(tid)
        try:
            yield
        finally:
            with self._turns:
                self._busy.discard(tid)
                self._turns.notify_all()

    def keep(self, key: CallKey, finished: Finished) -> None:
        """Remember a call whose answer could not be sent."""
        with self._turns:
            self._kept.pop(key, None)
            self._kept[key] = finished
            while len(self._kept) > self._MOST_KEPT:
                del self._kept[next(iter(self._kept))]

    def play_back(self, key: CallKey, caller: CallerMemory, waits: Callable[[], bool]) -> Finished | None:
        """Forget a kept call and repeat its write-back, unless the thread has been called away again.

        Returns:
            The call, to be kept again if its answer is lost again; None when there is none or the program
            asks for something new.
        """
        with self._turns:
            kept = self._kept.pop(key, None)
        if kept is None:
            return None
        try:
            for piece in kept.reads:
                # the write-back may have been done already, or not
                if caller.read(piece[0], len(piece[1])) not in (piece[1], _overlay(piece, kept.writes)):
                    return None
            if waits():
                for address, data in kept.writes:
                    caller.write(address, data)
        except CallerFault:
            return None
        return kept
