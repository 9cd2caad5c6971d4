"""Time that a test owns."""

from __future__ import annotations

__all__ = ["FakeClock"]


class FakeClock:
    """Time that passes only when somebody sleeps, so that a minute's wait costs nothing.

    It fits wherever swsnp takes a clock: `Machine(clock=...)` for the guest driver's pauses, and
    `BlobFile(sleep=clock.sleep, monotonic=clock.monotonic)` for a VMM that waits for a lock.

    Attributes:
        now: seconds since the clock's start; a test may set it.
        slept: every pause in seconds, in order.
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def monotonic(self) -> float:
        """Seconds since the clock's start."""
        return self.now

    def sleep(self, seconds: float, /) -> None:
        """Let `seconds` pass at once."""
        self.slept.append(seconds)
        self.now += seconds
