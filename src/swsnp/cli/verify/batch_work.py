"""Judging the rows of a batch: one row to one line, and the workers that do it on all cores.

Threads for `cryptography`, whose verification runs without the interpreter's lock; processes for `awscrt`,
which keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from swsnp.certs.classify import classify
from swsnp.certs.kds_errors import KdsError
from swsnp.cli.inputs import report_in
from swsnp.cli.verify.verdict import word
from swsnp.errors import HostError, InputError, SwsnpError
from swsnp.verify import Outcome, Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Executor, Future
    from datetime import datetime

    from swsnp.abi.snp_report import Product
    from swsnp.cli.verify.batch_fetch import Fetcher
    from swsnp.cli.verify.batch_rows import Chunk, Row, RowId
    from swsnp.cli.verify.evidence import Evidence, Service
    from swsnp.crypto.ecdsa import Engine
    from swsnp.verify import Verification

__all__ = ["Judge", "Judged", "UNREADABLE", "chunk_size", "judged", "workers"]

Judged: TypeAlias = tuple[list[str], list[str]]
"""The result lines of a chunk, and their verdicts."""
UNREADABLE: Final = "unreadable"
"""The verdict on a row that holds no report, or something else that cannot be read."""
_LARGEST_CHUNK: Final = 512
"""Handing a chunk over costs about as much as one verification."""
_CHUNKS_PER_WORKER: Final = 8
_AHEAD: Final = 3
"""Chunks per worker that are read before the oldest has been written: bounds memory."""
_KEPT: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What holds for every row, and turns rows into lines; can be sent to another process."""

    evidence: Evidence
    engine: Engine
    product: Product | None
    like: Literal["go-sev-guest"] | None
    at: datetime
    report_data: bytes | None
    measurement: bytes | None
    service: Service | None = None

    def start(self) -> Callable[[Chunk], Judged]:
        """A verifier of its own, warm from chunk to chunk; what it returns judges a chunk.

        Raises:
            HostError: the library of the engine is not installed.
        """
        verifier = Verifier(
            roots=self.evidence.roots,
            policy=self.evidence.policy,
            engine=self.engine,
            product=self.product,
            like=self.like,
        )
        return partial(self._chunk, verifier, self._fetcher())

    def _fetcher(self) -> Fetcher | None:
        if self.service is None:
            return None
        from swsnp.cli.verify.batch_fetch import Fetcher

        return Fetcher(self.service, self.product)

    def _chunk(self, verifier: Verifier, fetcher: Fetcher | None, chunk: Chunk) -> Judged:
        lines, verdicts = [], []
        for row_id, row in chunk.rows():
            line, verdict = self._line(verifier, fetcher, row_id, row)
            lines.append(line)
            verdicts.append(verdict)
        return lines, verdicts

    def _line(self, verifier: Verifier, fetcher: Fetcher | None, row_id: RowId, row: Row) -> tuple[str, str]:
        try:
            report, absent, verification = self._verify(verifier, fetcher, row)
        except (KdsError, HostError):  # says nothing of this row: the run has to wait for another time
            raise
        except SwsnpError as error:
            return json.dumps({"row": row_id, "verdict": UNREADABLE, "error": str(error)}), UNREADABLE
        verdict = word(verification)
        return _result_line(row_id, verdict, report, verification, absent), verdict

    def _verify(
        self, verifier: Verifier, fetcher: Fetcher | None, row: Row
    ) -> tuple[bytes, str, Verification]:
        if row.error:
            raise InputError(row.error)
        if row.report is None:
            raise InputError("report: got nothing")
        common = self.evidence
        certificates, table, crls = common.certificates, common.table, common.crls
        own = row.certs is not None or row.vcek is not None
        for name, given in (("certs", row.certs), ("vcek", row.vcek)) if own else ():
            if given is not None:
                more, own_table, more_crls = _certificates(_bytes(name, given), name)
                certificates, crls = more + certificates, more_crls + crls
                table = own_table if own_table is not None else table
        report, absent = report_in(_bytes("report", row.report), "report"), ""
        if fetcher is not None:
            lacking = replace(common, report=report, certificates=certificates, table=table, crls=crls)
            evidence, absent = fetcher.complete(lacking)
            certificates, crls = evidence.certificates, evidence.crls
        verification = verifier.verify(
            report,
            certificates=certificates,
            table=table,
            crls=crls,
            at=self.at,
            report_data=_expected("report_data", row.report_data, 64) or self.report_data,
            measurement=_expected("measurement", row.measurement, 48) or self.measurement,
        )
        return report, absent, verification


def _result_line(
    row_id: RowId, verdict: str, report: bytes, verification: Verification, absent: str = ""
) -> str:
    """As `json.dumps` would write it, which costs more than it says for so little."""
    row = str(row_id) if isinstance(row_id, int) else json.dumps(row_id)
    digest = hashlib.sha256(report).hexdigest()
    product = f'"{verification.product.value}"' if verification.product else "null"
    line = f'{{"row": {row}, "verdict": "{verdict}", "sha256": "{digest}", "product": {product}'
    more = _more(verification, absent) if verification.missing or verification.noted or absent else None
    return f"{line}, {json.dumps(more)[1:]}" if more else line + "}"


def _more(verification: Verification, absent: str) -> dict[str, Any]:
    """What not every result has."""
    result: dict[str, Any] = {}
    if absent:
        result["kds"] = absent
    if verification.missing:
        result["missing"] = list(verification.missing)
    if verification.noted:
        for key, outcome in (("failures", Outcome.FAIL), ("warnings", Outcome.WARN)):
            told = [each.as_dict() for each in verification.noted if each.outcome is outcome]
            if told:
                result[key] = told
    return result


def _bytes(name: str, given: bytes | str) -> bytes:
    """Bytes as they are; text is hexadecimal."""
    if isinstance(given, bytes):
        return given
    try:
        return bytes.fromhex(given)
    except ValueError:
        raise InputError(f"{name}: got text that is not hexadecimal") from None


def _expected(name: str, given: bytes | str | None, size: int) -> bytes | None:
    """An expected value: `size` bytes, or their hexadecimal digits."""
    if given is None or (isinstance(given, bytes) and len(given) == size):
        return given
    if isinstance(given, bytes):
        given = given.decode("ascii", "replace").strip()
    value = _bytes(name, given)
    if len(value) != size:
        raise InputError(f"{name}: got {len(value)} bytes, wanted {size}")
    return value


@lru_cache(maxsize=_KEPT)
def _certificates(data: bytes, name: str) -> tuple[tuple[bytes, ...], bytes | None, tuple[bytes, ...]]:
    """Certificates, table and lists in one value; rows of one chip mostly have the same."""
    found = classify(data, name)
    if not found.certificates and found.table is None and not found.crls:
        raise InputError(f"{name}: got {found.form}, wanted certificates")
    return found.certificates, found.table, found.crls


_chunk_here: Callable[[Chunk], Judged] | None = None
"""What judges chunks in this worker process."""


def _begin(judge: Judge) -> None:
    global _chunk_here
    _end_with_parent()
    _chunk_here = judge.start()


def _end_with_parent() -> None:
    """A worker waits on a pipe that other workers hold open too: only this tells it that the run died."""
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _chunk_in_process(chunk: Chunk) -> Judged:
    if _chunk_here is None:
        raise RuntimeError("the worker has not begun")
    return _chunk_here(chunk)


@contextmanager
def workers(judge: Judge, count: int) -> Iterator[Callable[[Chunk], Future[Judged]]]:
    """So many workers; yields what hands a chunk to the next free one.

    Raises:
        HostError: the library of the engine is not installed.
    """
    work = judge.start()  # here too, so that what is missing is said before any worker starts
    pool: Executor
    if judge.engine == "awscrt":
        context = get_context("spawn")
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(judge,))
        work = _chunk_in_process
    else:
        pool = ThreadPoolExecutor(count)
    try:
        yield lambda chunk: pool.submit(work, chunk)
    finally:
        pool.shutdown(cancel_futures=True)


def chunk_size(rows: int, count: int) -> int:
    """Rows that one of so many workers gets at a time."""
    return min(_LARGEST_CHUNK, max(1, rows // (count * _CHUNKS_PER_WORKER)))


def judged(
    submit: Callable[[Chunk], Future[Judged]], chunks: Iterable[Chunk], count: int
) -> Iterator[Judged]:
    """The results of the chunks in their order, while later ones are being worked on.

    Raises:
        HostError: a worker process died.
    """
    waiting: deque[Future[Judged]] = deque()
    try:
        for chunk in chunks:
            waiting.append(submit(chunk))
            if len(waiting) >= _AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise HostError("a worker process died; run again to go on after the last result") from None
