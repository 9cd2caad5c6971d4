"""Ratios of our own jobs against their cryptographic floor, measured in one run.

The floor of a job is what its cryptographic calls cost alone, with the same library, in the same rounds.
Job and floor take turns of about four milliseconds, so that a change of the machine's speed meets both sides;
the figure is the minimum over turns, the spread is median over minimum. See `scale.py` for `scale/*`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench.batch import batch_rows
from bench.jobs import ENGINES, Job, jobs
from bench.measure import command_row, measure_jobs
from bench.real_vcpu import real_vcpu_jobs
from bench.scale import FREE_THREADED, free_threaded_row, memory_rows, threads_row

if TYPE_CHECKING:
    from collections.abc import Callable

OUT = Path("build/bench.json")
TURN_S = 0.004
TURNS = 2
"""Turns of a job in one round."""


@dataclass(slots=True)
class Series:
    """Seconds per call, one figure a turn."""

    call: Callable[[], object]
    repeat: int
    figures: list[float]

    def run(self) -> None:
        call = self.call
        start = time.perf_counter()
        for _ in range(self.repeat):
            call()
        self.figures.append((time.perf_counter() - start) / self.repeat)


def _series(call: Callable[[], object]) -> Series:
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    return Series(call, max(1, round(TURN_S / once)), [])


def measure(chosen: list[Job], rounds: int) -> list[dict[str, object]]:
    """Run every job and its floor in turn, `rounds` times."""
    pairs = [(job, _series(job.call), _series(job.floor)) for job in chosen]
    for _ in range(rounds):
        for _, value, floor in pairs:
            for _ in range(TURNS):
                value.run()
                floor.run()
    rows: list[dict[str, object]] = []
    for job, value, floor in pairs:
        best, least = min(value.figures) * 1e6, min(floor.figures) * 1e6
        rows.append(
            {
                "job": job.name,
                "value": round(best, 2),
                "floor": round(least, 2),
                "ratio": round(best / least, 3),
                "own": round(best - least, 2),
                "spread": round(statistics.median(value.figures) / min(value.figures), 2),
                "unit": "us",
                "library": job.library,
                "goal": job.goal,
            }
        )
    return rows


def _machine() -> dict[str, object]:
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown"
    )
    versions = {name: metadata.version(name) for name in ("cryptography", "awscrt", "sev-snp-measure")}
    return {"cpu": model, "cpus": os.cpu_count(), "python": platform.python_version(), **versions}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Measure, print the table, write the JSON."""
    command = argparse.ArgumentParser(prog="bench", description=__doc__)
    command.add_argument("--rounds", type=int, default=60, help="rounds per job (default: 60)")
    command.add_argument(
        "--seconds", type=float, default=60.0, help="of 64 vCPUs (default: 60; 0: leave out)"
    )
    options = command.parse_args()
    with jobs() as chosen:
        rows = measure(chosen, options.rounds)
    with ExitStack() as stack:
        rows += measure(list(real_vcpu_jobs(stack)), options.rounds)
    with measure_jobs() as chosen:
        rows += measure(chosen, options.rounds)
    rows.append(command_row())
    rows += memory_rows()
    rows += batch_rows()
    if options.seconds:
        rows += [threads_row(options.seconds, engine) for engine in ENGINES]
        if FREE_THREADED.exists():
            rows.append(free_threaded_row(options.seconds, "awscrt"))
        else:
            print("scale/64-vcpus without the interpreter lock: left out; run `make free-threaded` first")
    machine = _machine()
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"machine": machine, "jobs": rows}, indent=2) + "\n")
    table = Table(title="; ".join(f"{name} {value}" for name, value in machine.items()))
    for column in ("job", "library", "unit", "value", "floor", "ratio", "own", "spread", "goal"):
        table.add_column(column, justify="left" if column in {"job", "library", "unit", "goal"} else "right")
    for row in rows:
        table.add_row(
            *(
                str(row[name])
                for name in ("job", "library", "unit", "value", "floor", "ratio", "own", "spread", "goal")
            )
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
