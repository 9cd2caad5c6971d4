"""`python -m tests.real_guest.request_ratio [ROUNDS]`: a Linux guest's report requests and those in process.

A static program in a Debian 13 kernel asks for 200 reports in a row by `/dev/sev-guest`. In the same place,
in turn with it, a built-in guest asks for as many in process, and KVM_RUN is called for as many VMGEXITs of
which nothing is made: the exit's own cost. Figures are the least of all rounds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from tests.real_guest.builds import build_static
from tests.real_guest.guests import COMMAND_LINE, MEMORY, Guest
from tests.real_guest.lanes import run_lanes
from tests.real_guest.place import BUILD, here_or_nested

from swsnp.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.real_guest.lanes import Lane

__all__ = ["main"]

_KERNEL: Final = "debian-13"
_COUNT: Final = 200
_WARM: Final = 10
_LONGEST_S: Final = 3600
_SOURCE: Final = Path(__file__).with_name("requests.c")


def main(arguments: Sequence[str]) -> int:
    """Print the figures; 1 when a guest or a measurement failed."""
    if arguments == ["here"]:
        print(json.dumps(_measured()))
        return 0
    rounds = int(arguments[0]) if arguments else 2
    with tempfile.TemporaryDirectory(prefix="request-ratio.") as folder:
        job = Path(folder)
        build_static(_SOURCE, job / "requests", _cannot_run)
        lane: Lane = {}
        for number in range(rounds):
            lane[f"guest.{number}"] = _command(number)
            lane[f"here.{number}"] = [sys.executable, "-m", "tests.real_guest.request_ratio", "here"]
        ended = run_lanes(here_or_nested(), job, [lane], timeout_s=_LONGEST_S)
    bad = {name: ended.get(name) for name in lane if name not in ended or ended[name].status != 0}
    if bad:
        print(bad)
        return 1
    inside = min(float(ended[f"guest.{number}"].out) / 1e3 for number in range(rounds))
    found = [json.loads(ended[f"here.{number}"].out) for number in range(rounds)]
    in_process, bare = (min(each[what] for each in found) for what in ("in-process", "exit"))
    print(f"a report: {inside:.0f} us in the guest, {in_process:.0f} us in process; an exit {bare:.0f} us")
    print(f"ratio without the exit: {(inside - bare) / in_process:.2f}")
    return 0


def _cannot_run(reason: str, remedy: str, *, avoidable: bool = True) -> NoReturn:
    sys.exit(f"{reason}; remedy: {remedy}")


def _command(number: int) -> list[str]:
    line = [sys.executable, "-m", "swsnp", "vm", "--stats", f"$JOB/{number}.json", "-m", MEMORY]
    line += ["-kernel", str(Guest(_KERNEL, "linux-7.2").image), "-append", COMMAND_LINE]
    return [*line, "--modules", str(BUILD / _KERNEL), "--exec", "$JOB/requests", str(_COUNT)]


def _measured() -> dict[str, float]:
    """Microseconds of each, in this process."""
    from bench.jobs import plain
    from bench.real_vcpu import bare_exit

    with ExitStack() as stack:
        machine = Machine()
        guest, other = (stack.enter_context(machine.create_vm()) for _ in range(2))
        for each in (guest, other):
            each.boot()
        return {"in-process": _microseconds(plain(guest)), "exit": _microseconds(bare_exit(stack, other))}


def _microseconds(call: Callable[[], object]) -> float:
    for _ in range(_WARM):
        call()
    start = time.perf_counter()
    for _ in range(_COUNT):
        call()
    return (time.perf_counter() - start) * 1e6 / _COUNT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
