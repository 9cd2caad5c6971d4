"""Commands in lanes that run side by side, each lane a shell script; with all that each of them prints."""

from __future__ import annotations

import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.real_guest.outer_machine import MachineLostError

from swsnp.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.real_guest.place import Place

__all__ = ["Ended", "Lane", "run_lanes"]

Lane = dict[str, list[str]]
"""Commands by name, in order. `$JOB` in an argument stands for the job's folder."""

_MACHINES: Final = 3
"""Which may be lost or not, for one lane: what an emulator does to them says nothing about what is tested."""

_RUN = """
run() {
    name=$1; shift
    from=$(cut -d. -f1 /proc/uptime)
    "$@" > "$JOB/$name.out" 2> "$JOB/$name.err" < /dev/null
    echo $? > "$JOB/$name.ended"
    mv "$JOB/$name.ended" "$JOB/$name.status"
    to=$(cut -d. -f1 /proc/uptime)
    echo "$name: status $(cat "$JOB/$name.status") after $((to - from)) s"
}
"""


@dataclass(frozen=True)
class Ended:
    """What became of a command."""

    status: int
    out: bytes
    err: str


def run_lanes(place: Place, job: Path, lanes: Sequence[Lane], *, timeout_s: float) -> Mapping[str, Ended]:
    """Run all lanes at once and wait for them; a command that fails does not stop its lane.

    A lane whose machine is lost goes on in another, with what had not come to an end. A command that has
    ended, however, is never run again. Commands are missing in the answer that were not reached: where
    that happens something is printed.
    """
    end = time.monotonic() + timeout_s
    with ThreadPoolExecutor(len(lanes)) as threads:
        for each in [threads.submit(_run_lane, place, job, lane, end) for lane in lanes]:
            each.result()
    return {name: _ended(job, name) for lane in lanes for name in lane if _has_ended(job, name)}


def _run_lane(place: Place, job: Path, lane: Lane, end: float) -> None:
    for machine in range(1, _MACHINES + 1):
        left = {name: argv for name, argv in lane.items() if not _has_ended(job, name)}
        try:
            place.run(job, _script(left), timeout_s=max(0, end - time.monotonic()))
            return
        except MachineLostError as error:
            print(
                f"{', '.join(left)}: machine {machine} of at most {_MACHINES} was lost: {error}", flush=True
            )
        except HostError as error:
            print(f"{', '.join(left)}: {error}", flush=True)
            return


def _script(lane: Lane) -> str:
    lines = (f"run {shlex.quote(name)} {' '.join(map(_quoted, argv))}\n" for name, argv in lane.items())
    return "".join([_RUN, *lines])


def _quoted(argument: str) -> str:
    before, *after = argument.split("$JOB")
    return '"$JOB"'.join(shlex.quote(each) if each else "" for each in (before, *after)) or "''"


def _has_ended(job: Path, name: str) -> bool:
    return (job / f"{name}.status").exists()


def _ended(job: Path, name: str) -> Ended:
    status = int((job / f"{name}.status").read_text())
    err = (job / f"{name}.err").read_text(errors="replace")
    return Ended(status, (job / f"{name}.out").read_bytes(), err)
