"""Commands in lanes that run side by side, as one shell script; with all that each of them prints."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swsnp.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.real_guest.place import Place

__all__ = ["Ended", "Lane", "run_lanes"]

Lane = dict[str, list[str]]
"""Commands by name, in order. `$JOB` in an argument stands for the job's folder."""

_RUN = """
run() {
    name=$1; shift
    from=$(cut -d. -f1 /proc/uptime)
    "$@" > "$JOB/$name.out" 2> "$JOB/$name.err" < /dev/null
    echo $? > "$JOB/$name.status"
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

    Commands are missing in the answer that were not reached: where that happens something is printed.
    """
    try:
        place.run(job, _script(lanes), timeout_s=timeout_s)
    except HostError as error:
        print(error)
    names = [name for lane in lanes for name in lane]
    return {name: _ended(job, name) for name in names if (job / f"{name}.status").exists()}


def _script(lanes: Sequence[Lane]) -> str:
    parts = [_RUN]
    for lane in lanes:
        lines = (f"run {shlex.quote(name)} {' '.join(map(_quoted, argv))}" for name, argv in lane.items())
        parts.append("{\n" + "\n".join(lines) + "\n} &\n")
    return "".join([*parts, "wait\n"])


def _quoted(argument: str) -> str:
    before, *after = argument.split("$JOB")
    return '"$JOB"'.join(shlex.quote(each) if each else "" for each in (before, *after)) or "''"


def _ended(job: Path, name: str) -> Ended:
    status = int((job / f"{name}.status").read_text())
    err = (job / f"{name}.err").read_text(errors="replace")
    return Ended(status, (job / f"{name}.out").read_bytes(), err)
