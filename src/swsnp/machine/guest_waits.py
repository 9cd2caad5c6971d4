"""What a guest in Python waits with: its vCPU has no processor of the host's meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swsnp.hardware.time_slices import TimeSlices

if TYPE_CHECKING:
    from types import TracebackType

    from swsnp.guest.exchange import Clock

__all__ = ["GuestClock", "GuestMutex"]


class GuestClock:
    """A guest's time: it is the host's, and a vCPU that lets time pass lets another have its processor.

    Args:
        clock: the host's.
        processors: on which the caller has a place.
    """

    __slots__ = ("_clock", "_processors", "monotonic")

    def __init__(self, clock: Clock, processors: TimeSlices) -> None:
        self._clock, self._processors = clock, processors
        self.monotonic = clock.monotonic

    def sleep(self, seconds: float, /) -> None:
        """Let time pass."""
        with self._processors.away():
            self._clock.sleep(seconds)


class GuestMutex:
    """A mutex of a guest's kernel, over calls that many vCPUs make.

    The vCPU that comes back to it at once finds it free, as with the kernel's own mutex; one that has to wait
    lets another vCPU have its processor.

    Args:
        processors: on which the caller has a place.
    """

    __slots__ = ("_processors", "_turns")

    def __init__(self, processors: TimeSlices) -> None:
        self._processors = processors
        self._turns = TimeSlices(1)

    def __enter__(self) -> None:
        if not self._turns.try_enter():
            with self._processors.away():
                self._turns.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.pause()
