"""What the guest's exits cost in this process: how many of each kind, and the time until the next entry."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swsnp.abi.kvm import ExitReason

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ExitTimes", "Spent"]


@dataclass(slots=True)
class Spent:
    """Exits of one kind; nanoseconds that passed outside KVM_RUN after them."""

    count: int = 0
    ns: int = 0


class ExitTimes:
    """One vCPU's. `left` ends an entry, `enter` begins the next; one thread at a time.

    What lies between is this process's own: hypervisor, VMM and firmware, and waiting for each other's locks.

    Attributes:
        kinds: by the exit's name.
        inside_ns: nanoseconds in KVM_RUN, the guest's own work and the host's KVM.
    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.kinds: dict[str, Spent] = {}
        self.inside_ns = 0
        self._clock = clock
        self._last = ""
        """The exit whose time has not come to its end, "" before the first and in KVM_RUN."""
        self._since = clock()

    def enter(self) -> None:
        """KVM_RUN comes next."""
        now = self._clock()
        if self._last:
            self._count(now - self._since)
        self._since = now

    def left(self, reason: int) -> None:
        """KVM_RUN has ended; a negative reason stands for an error, such as a signal."""
        now = self._clock()
        self.inside_ns += now - self._since
        self._since = now
        self._last = _NAMES.get(reason) or ("signal" if reason < 0 else str(reason))

    def call_it(self, kind: str) -> None:
        """The last exit was one of this kind, whatever KVM called it."""
        self._last = kind

    def _count(self, ns: int) -> None:
        found = self.kinds.get(self._last)
        if found is None:
            found = self.kinds[self._last] = Spent()
        found.count += 1
        found.ns += ns
        self._last = ""

    def as_json(self) -> dict[str, object]:
        """For programs: seconds and counts; kinds that cost most come first. The vCPU has stopped."""
        if self._last:
            self._count(0)
        kinds = sorted(self.kinds.items(), key=lambda each: -each[1].ns)
        return {
            "kvm_run_seconds": round(self.inside_ns / 1e9, 6),
            "exits": {
                kind: {"count": spent.count, "seconds": round(spent.ns / 1e9, 6)} for kind, spent in kinds
            },
        }


_NAMES = {int(each): each.name.lower() for each in ExitReason}
