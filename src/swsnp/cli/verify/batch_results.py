"""The result file of a batch: a line each, appended, and never a row twice.

The first line says what was judged and by what; a run goes on in a file only if its own first line would be
the same. Lines are written in the order of the rows, a chunk at a time, and synced before the next
chunk. What a killed run leaves behind is whole lines and at most one torn end, which the next run cuts off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Self

from swsnp.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from swsnp.cli.verify.batch_rows import RowId

__all__ = ["ResultFile", "SCHEMA", "Tally"]

SCHEMA: Final = "swsnp.batch/1"
"""Name and version of the form that the result file has."""
_HEADER_START: Final = json.dumps({"schema": SCHEMA}).encode()[:-1]


class Tally(Counter[str]):
    """How many rows had which verdict."""


class ResultFile:
    """An open result file, locked against other runs; a context manager.

    Raises:
        UsageError: it cannot be written, another run is writing it, or it is some other file.
        InputError: a line in its middle is broken, or a row stands twice.

    Attributes:
        header: its first line; None while it has none.
        done: rows whose results the file already has.
        tally: their verdicts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[RowId] = set()
        self.tally = Tally()
        self.header: dict[str, Any] | None = None
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._end = self._load()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.path}: another run is writing it") from None

    def _load(self) -> int:
        """Read what an earlier run has written; returns where its last whole line ends."""
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                entry = _entry(line)
                if entry is None:
                    self._require_torn(number, line, file)
                    break
                self._take(number, entry)
                end += len(line)
        return end

    def _require_torn(self, number: int, line: bytes, rest: Iterable[bytes]) -> None:
        """Only an end may be broken: after a broken line no whole one follows."""
        if number == 1 and not _HEADER_START.startswith(line[: len(_HEADER_START)]):
            raise self._not_ours()
        if any(_entry(later) is not None for later in rest):
            raise InputError(f"{self.path}: line {number} is broken, and whole lines follow it")

    def _take(self, number: int, entry: dict[str, Any]) -> None:
        if number == 1:
            if entry.get("schema") != SCHEMA:
                raise self._not_ours()
            self.header = entry
            return
        row, verdict = entry.get("row"), entry.get("verdict")
        if not isinstance(row, int | str) or not isinstance(verdict, str):
            raise InputError(f"{self.path}: line {number} is no result: no row or no verdict")
        if row in self.done:
            raise InputError(f"{self.path}: line {number}: row {row!r} stands twice")
        self.done.add(row)
        self.tally[verdict] += 1

    def _not_ours(self) -> UsageError:
        return UsageError(f"{self.path}: is no result file of `swsnp verify --batch`; it was left as it is")

    def begin(self, header: dict[str, Any]) -> None:
        """Go on after the last whole line, or write the first line of a new file.

        Raises:
            UsageError: the file holds results of other inputs or settings.
        """
        if self.header is not None and self.header != header:
            names = sorted(key for key in {*header, *self.header} if header.get(key) != self.header.get(key))
            raise UsageError(f"{self.path}: holds results of another batch: {', '.join(names)} differ")
        self._file.truncate(self._end)
        if self.header is None:
            self.append([json.dumps(header)], ())
            _sync_folder(self.path.parent)
            self.header = header

    def append(self, lines: Sequence[str], verdicts: Sequence[str]) -> None:
        """Write a chunk of results and wait until it is on the disk.

        Raises:
            UsageError: the disk is full or fails.
        """
        left = memoryview("".join(f"{line}\n" for line in lines).encode())
        try:
            while left:
                left = left[os.write(self._file.fileno(), left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.tally.update(verdicts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _entry(line: bytes) -> dict[str, Any] | None:
    """The object of one whole line; None for a torn or broken one."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _sync_folder(folder: Path) -> None:
    """So that the new file's name is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
