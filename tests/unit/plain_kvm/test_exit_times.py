"""What exits cost, by kind, on a clock that the test winds."""

from __future__ import annotations

from swsnp.abi.kvm import ExitReason
from swsnp.cpu.plain_kvm.exit_times import ExitTimes, Spent


class Clock:
    """Nanoseconds, set by hand."""

    now = 0

    def __call__(self) -> int:
        return self.now


def test_time_goes_to_the_exit_before() -> None:
    """What passes in KVM_RUN is inside; what passes until the next entry is the last exit's."""
    clock = Clock()
    times = ExitTimes(clock)
    clock.now = 5
    times.enter()  # what was before the first entry is nobody's
    for reason, inside, outside in (
        (ExitReason.IO, 100, 7),
        (ExitReason.IO, 10, 8),
        (ExitReason.MMIO, 1, 20),
    ):
        clock.now += inside
        times.left(reason)
        clock.now += outside
        times.enter()
    assert times.inside_ns == 111
    assert times.kinds == {"io": Spent(2, 15), "mmio": Spent(1, 20)}


def test_sites_have_names_of_their_own() -> None:
    """A rewritten PVALIDATE leaves as a port access, and is not counted as one."""
    clock = Clock()
    times = ExitTimes(clock)
    times.left(ExitReason.IO)
    times.call_it("pvalidate")
    clock.now = 2_000_000
    times.enter()
    times.left(-1)
    times.enter()
    times.left(77)
    assert times.as_json() == {
        "kvm_run_seconds": 0.0,
        "exits": {
            "pvalidate": {"count": 1, "seconds": 0.002},
            "signal": {"count": 1, "seconds": 0.0},
            "77": {"count": 1, "seconds": 0.0},
        },
    }
