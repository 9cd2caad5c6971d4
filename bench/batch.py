"""`swsnp verify --batch` against the bare rate: as many processes that only verify P-384 signatures.

The batch reads its rows from a Parquet file, applies a policy, and writes and syncs its results, all in the
time that is measured. Both sides have started and seen the chip before; they take turns, the best count.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import pyarrow as pa
import pyarrow.parquet as pq

from bench.jobs import ENGINES
from swsnp import Machine
from swsnp.abi.snp_report import SIGNED_SIZE, AttestationReport
from swsnp.cli.verify.batch_results import SCHEMA, ResultFile
from swsnp.cli.verify.batch_rows import ParquetSource
from swsnp.cli.verify.batch_work import Judge, chunk_size, judged, workers
from swsnp.cli.verify.evidence import Evidence
from swsnp.crypto.ecdsa import VerifyingKey
from swsnp.verify import Policy, Roots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swsnp.crypto.ecdsa import Engine

__all__ = ["batch_rows"]

_ROWS: Final = 8192
_TURNS: Final = 5
_DIFFERENT: Final = 64
"""Reports that are signed; the file repeats them."""

_bare: list[tuple[VerifyingKey, Sequence[bytes]]] = []
"""In a process that only verifies: the key and the reports."""


def _begin(x: bytes, y: bytes, engine: Engine, reports: Sequence[bytes]) -> None:
    _bare.append((VerifyingKey(x, y, engine=engine), reports))


def _verify(count: int) -> bool:
    key, reports = _bare[0]
    return all(
        key.verify(each[:SIGNED_SIZE], each[SIGNED_SIZE:])
        for each in (reports[number % len(reports)] for number in range(count))
    )


def _best(call: Callable[[], object], times: list[float]) -> None:
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)


def batch_rows() -> list[dict[str, object]]:
    """One row per engine, in microseconds per report.

    Raises:
        RuntimeError: a report was not accepted.
    """
    machine = Machine()
    with machine.create_vm() as vm, TemporaryDirectory() as folder:
        vm.boot()
        answers = [vm.extended_report(bytes([number]) * 64) for number in range(_DIFFERENT)]
        reports = [each.report for each in answers]
        path = Path(folder) / "reports.parquet"
        _write(path, reports)
        return [_row(engine, machine, reports, answers[0].certs, path) for engine in ENGINES]


def _write(path: Path, reports: Sequence[bytes]) -> None:
    rows = [reports[number % len(reports)] for number in range(_ROWS)]
    data = [AttestationReport.parse(each).report_data for each in rows]
    table = pa.table(
        {"report": pa.array(rows, pa.binary(1184)), "report_data": pa.array(data, pa.binary(64))}
    )
    pq.write_table(table, path)


def _row(
    engine: Engine, machine: Machine, reports: Sequence[bytes], table: bytes, path: Path
) -> dict[str, object]:
    count = os.cpu_count() or 1
    measurement = AttestationReport.parse(reports[0]).measurement
    judge = Judge(
        evidence=Evidence(
            roots=Roots.of(machine.root_certificate),
            policy=Policy(measurements=[measurement]),
            table=table,
        ),
        engine=engine,
        product=None,
        like=None,
        at=machine.now(),
        report_data=None,
        measurement=None,
    )
    point = machine.chip.vcek_public_point(machine.chip.reported_tcb)
    batch: list[float] = []
    bare: list[float] = []
    with ExitStack() as stack:
        submit = stack.enter_context(workers(judge, count))
        floor = stack.enter_context(
            ProcessPoolExecutor(
                count, mp_context=get_context("spawn"), initializer=_begin, initargs=(*point, engine, reports)
            )
        )
        source = ParquetSource(path)

        def run() -> None:
            out = path.with_name(f"{engine}-{len(batch)}.jsonl")
            size = chunk_size(_ROWS, count)
            with ResultFile(out) as results:
                results.begin({"schema": SCHEMA})
                for lines, verdicts in judged(submit, source.chunks(size, results.done), count):
                    results.append(lines, verdicts)
                if results.tally != {"accepted": _ROWS}:
                    raise RuntimeError(f"not all were accepted: {results.tally}")

        def verify_only() -> None:
            if not all(floor.map(_verify, [_ROWS // count] * count)):
                raise RuntimeError("a signature was refused")

        for _ in range(_TURNS + 1):
            _best(run, batch)
            _best(verify_only, bare)
    value, least = (min(times[1:]) / _ROWS * 1e6 for times in (batch, bare))
    return {
        "job": "verify/batch",
        "value": round(value, 2),
        "floor": round(least, 2),
        "ratio": round(value / least, 3),
        "own": round(value - least, 2),
        "spread": "",
        "unit": "us",
        "library": engine,
        "goal": "ratio <= 1.11",
    }


if __name__ == "__main__":
    for each in batch_rows():
        print(each)
