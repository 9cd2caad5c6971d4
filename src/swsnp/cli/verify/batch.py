"""`swsnp verify --batch`: many reports, a result line each, on all cores, and a killed run goes on."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from swsnp.cli import BAD_VERDICT, GOOD
from swsnp.cli.progress import progress
from swsnp.cli.verify.batch_results import SCHEMA, ResultFile, Tally
from swsnp.cli.verify.batch_rows import open_source
from swsnp.cli.verify.batch_work import Judge, chunk_size, judged, workers
from swsnp.cli.verify.evidence import gather_common, service_of
from swsnp.errors import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection, Sequence

    from swsnp.cli.verify.batch_rows import RowId, Source
    from swsnp.cli.verify.evidence import Evidence, Service

__all__ = ["run_batch"]


class Sink(Protocol):
    """Where result lines go."""

    def append(self, lines: Sequence[str], verdicts: Sequence[str]) -> None:
        """Take a chunk of them."""
        ...


class _Output:
    """Result lines on standard output: nothing to go on from."""

    def __init__(self) -> None:
        self.tally = Tally()

    def append(self, lines: Sequence[str], verdicts: Sequence[str]) -> None:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        self.tally.update(verdicts)


def run_batch(options: argparse.Namespace, *, now: Callable[[], datetime]) -> int:
    """Judge every row that has no result yet; the exit code is good only if every row is."""
    evidence, service = gather_common(options), service_of(options)
    source = open_source(options.batch, but=options.out)
    with ResultFile(Path(options.out)) if options.out else nullcontext() as file:
        at = _time(options, file, now)
        done: Collection[RowId] = ()
        sink: ResultFile | _Output = _Output()
        if file is not None:
            file.begin(_header(options, evidence, service, source, at))
            sink, done = file, file.done
        earlier = len(done)
        _judge_all(options, evidence, service, source, at, done, sink)
        return _conclude(options, sink.tally, earlier)


def _time(options: argparse.Namespace, file: ResultFile | None, now: Callable[[], datetime]) -> datetime:
    """One time for all rows: that of the run which is gone on with, unless the command line names one."""
    if options.at is not None:
        at: datetime = options.at
        return at
    if file is None or file.header is None:
        return now()
    try:
        return datetime.fromisoformat(str(file.header.get("at")))
    except ValueError:
        raise InputError(f"{file.path}: line 1: at: got {file.header.get('at')!r}, wanted a time") from None


def _header(
    options: argparse.Namespace, evidence: Evidence, service: Service | None, source: Source, at: datetime
) -> dict[str, Any]:
    """The first line of a result file: everything that a verdict depends on, by its content."""
    return {
        "schema": SCHEMA,
        "source": source.identity(),
        "at": at.isoformat(),
        "product": options.product.value if options.product else None,
        "like": options.like,
        "report_data": options.report_data.hex() if options.report_data else None,
        "measurement": options.measurement.hex() if options.measurement else None,
        "inputs": [[each["option"], each["sha256"]] for each in evidence.inputs],
        **({} if service is None else {"kds": service.base}),
    }


def _judge_all(
    options: argparse.Namespace,
    evidence: Evidence,
    service: Service | None,
    source: Source,
    at: datetime,
    done: Collection[RowId],
    sink: Sink,
) -> None:
    judge = Judge(
        evidence=evidence,
        engine=options.engine,
        product=options.product,
        like=options.like,
        at=at,
        report_data=options.report_data,
        measurement=options.measurement,
        service=service,
    )
    count = options.jobs or len(os.sched_getaffinity(0))
    size = chunk_size(len(source) - len(done), count)
    with workers(judge, count) as submit, progress("verify", len(source), len(done)) as advance:
        for lines, verdicts in judged(submit, source.chunks(size, done), count):
            sink.append(lines, verdicts)
            advance(len(lines))


def _conclude(options: argparse.Namespace, tally: Tally, earlier: int) -> int:
    rows = sum(tally.values())
    wanted = tally["accepted"] + (tally["authentic"] if options.authentic_only else 0)
    summary = {
        "rows": rows,
        **{name: tally[name] for name in ("accepted", "authentic", "refused", "unreadable")},
    }
    if options.json and options.out:
        print(json.dumps({**summary, "earlier": earlier, "out": options.out}))
    else:
        text = ", ".join(f"{count} {name}" for name, count in summary.items() if name != "rows")
        before = f" ({earlier} of them in an earlier run)" if earlier else ""
        plural = "s" if rows != 1 else ""
        target = sys.stdout if options.out else sys.stderr
        print(f"{rows} report{plural}{before}: {text}", file=target)
    return GOOD if wanted == rows else BAD_VERDICT
