"""Where the rows of a batch come from: a directory, or a Parquet file.

A row is one report with what belongs to it alone. In a Parquet file these are columns, in a directory files
beside the report that differ in their suffix: `a.bin`, `a.certs`, `a.vcek`, `a.report_data`, `a.measurement`.
Bytes may be given as they are or, where the column or the file is text, in hexadecimal.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from itertools import compress, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

from swsnp.cli.inputs import LARGEST
from swsnp.errors import HostError, InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

__all__ = [
    "COLUMNS",
    "Chunk",
    "Columns",
    "DirectorySource",
    "ParquetSource",
    "Place",
    "Places",
    "Row",
    "RowId",
    "Source",
    "open_source",
    "read_row",
]

RowId: TypeAlias = int | str
"""Number of the row in a Parquet file, from 0; path below the directory."""
COLUMNS: Final = ("certs", "vcek", "report_data", "measurement")
"""What may stand beside `report`."""
_ROW_COLUMNS: Final = ("report", *COLUMNS)
"""As in `Row`."""
_PARQUET_MAGIC: Final = b"PAR1"
_FOOTER: Final = 1 << 16
_PIECE: Final = 1 << 14
_ROWS_AT_ONCE: Final = 1024
"""Of a Parquet file, at least."""


class Row(NamedTuple):
    """A report and what belongs to it alone, as it was given; `error` says why it could not be read."""

    report: bytes | str | None
    certs: bytes | str | None = None
    vcek: bytes | str | None = None
    report_data: bytes | str | None = None
    measurement: bytes | str | None = None
    error: str = ""


class Place(NamedTuple):
    """A report's file, from which a worker reads it, and which of `COLUMNS` stand beside it."""

    report: str
    beside: tuple[str, ...]


class Chunk(Protocol):
    """Some rows, in the form in which they are handed to a worker."""

    def rows(self) -> Iterator[tuple[RowId, Row]]:
        """Every row with its id."""
        ...


@dataclass(frozen=True, slots=True)
class Places:
    """Names and places of files, which the worker reads."""

    items: Sequence[tuple[str, Place]]

    def rows(self) -> Iterator[tuple[RowId, Row]]:
        """See `Chunk`."""
        return ((name, read_row(place)) for name, place in self.items)


@dataclass(frozen=True, slots=True)
class Columns:
    """Values as they lie in a Parquet file, column by column: so they cross to a process in half the time.

    `values` are in the order of a `Row`, one of each for every id; None is a column that is not there.
    """

    ids: Sequence[int]
    values: tuple[Sequence[bytes | str | None] | None, ...]

    def rows(self) -> Iterator[tuple[RowId, Row]]:
        """See `Chunk`."""
        columns = [repeat(None) if each is None else each for each in self.values]
        return zip(self.ids, map(Row, *columns), strict=True)


class Source(Protocol):
    """A finite, ordered collection of rows that is the same when it is opened again."""

    def identity(self) -> dict[str, Any]:
        """What tells this source from another, JSON-ready."""
        ...

    def __len__(self) -> int: ...

    def chunks(self, size: int, done: Collection[RowId]) -> Iterator[Chunk]:
        """The rows that are not `done`, in order, at most `size` at a time."""
        ...


def open_source(name: str, *, but: str | None = None) -> Source:
    """The directory or Parquet file of that name, told by what it is.

    Args:
        name: as the user wrote it.
        but: a file that is no row although it may lie in the directory: the results.

    Raises:
        InputError: neither, or without a report.
        HostError: a Parquet file, and pyarrow is not installed.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return DirectorySource(path, but=but)
        with path.open("rb") as file:
            magic = file.read(len(_PARQUET_MAGIC))
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if magic != _PARQUET_MAGIC:
        raise InputError(f"{name}: begins with {magic!r}, wanted a directory or a Parquet file")
    return ParquetSource(path)


class DirectorySource:
    """Every file below a directory, but hidden ones and those that stand beside a report.

    What stands beside which is seen once, when the directory is listed: each look for a file that is not
    there costs as much as reading one.
    """

    def __init__(self, folder: Path, *, but: str | None = None) -> None:
        self._folder = str(folder)
        left_out = None if but is None else os.path.relpath(os.path.realpath(but), os.path.realpath(folder))
        self._files = sorted(each for each in _below(self._folder, "") if each[0] != left_out)
        if not self._files:
            raise InputError(f"{folder}: holds no file, wanted reports")

    def identity(self) -> dict[str, Any]:
        """The directory's own name says nothing: the row ids are the files'."""
        return {"kind": "directory"}

    def __len__(self) -> int:
        return len(self._files)

    def chunks(self, size: int, done: Collection[RowId]) -> Iterator[Chunk]:
        """See `Source`; workers read the files."""
        folder = self._folder
        left = ((name, Place(f"{folder}/{name}", beside)) for name, beside in self._files if name not in done)
        while items := list(islice(left, size)):
            yield Places(items)


def _below(folder: str, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The name of every report, and which of `COLUMNS` stand beside it."""
    try:
        with os.scandir(folder) as found:
            entries = [each for each in found if not each.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    own = {each.name for each in entries if _split(each.name)[1] in COLUMNS}
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path, f"{prefix}{entry.name}/")
        elif entry.name not in own:
            stem = _split(entry.name)[0]
            beside = tuple(name for name in COLUMNS if f"{stem}.{name}" in own) if own else ()
            yield prefix + entry.name, beside


def _split(name: str) -> tuple[str, str]:
    """Stem and suffix without its dot, as `pathlib` has them."""
    stem, dot, suffix = name.rpartition(".")
    return (stem, suffix) if stem and dot and suffix else (name, "")


def read_row(place: Place) -> Row:
    """The row of one file of a directory, with the files beside it."""
    folder, _, name = place.report.rpartition("/")
    stem = f"{folder}/{_split(name)[0]}"
    try:
        beside: dict[str, Any] = {column: _read(f"{stem}.{column}") for column in place.beside}
        return Row(_read(place.report), **beside)
    except InputError as error:
        return Row(report=None, error=str(error))


def _read(path: str) -> bytes:
    """A whole file; asked for in pieces, since to make room for the largest costs more than to read most."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(file, _PIECE)
            while len(data) <= LARGEST and (more := os.read(file, _PIECE)):
                data += more
        finally:
            os.close(file)
    except FileNotFoundError:
        raise InputError(f"{path}: is gone") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(data) > LARGEST:
        raise InputError(f"{path}: got more than {LARGEST} bytes")
    return data


@dataclass(frozen=True, slots=True)
class _Parquet:
    """The two names of pyarrow that are used."""

    file: Any
    error: type[Exception]


def _pyarrow() -> _Parquet:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise HostError(
            "a Parquet file needs pyarrow, which is not installed; remedy: pip install 'swsnp[batch]'"
        ) from None
    return _Parquet(ParquetFile, ArrowException)


class ParquetSource:
    """The rows of a Parquet file with the column `report` and any of `COLUMNS`; others are passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pyarrow = _pyarrow()
        with self._opened() as file:
            self._rows = int(file.metadata.num_rows)
            schema = {each.name: str(each.type) for each in file.schema_arrow}
        if "report" not in schema:
            columns = ", ".join(schema) or "none"
            raise InputError(f"{path}: has no column `report`; its columns are: {columns}")
        self._columns = [name for name in _ROW_COLUMNS if name in schema]
        for name in self._columns:
            if not any(kind in schema[name] for kind in ("binary", "string")):
                raise InputError(
                    f"{path}: column `{name}` is {schema[name]}, wanted binary, or string for hex"
                )
        if not self._rows:
            raise InputError(f"{path}: has no rows, wanted reports")

    def _opened(self) -> Any:
        try:
            return self._pyarrow.file(self._path)
        except (self._pyarrow.error, OSError) as error:
            raise InputError(f"{self._path}: cannot be read as Parquet: {error}") from None

    def identity(self) -> dict[str, Any]:
        """Size and hash of the end of the file, where Parquet keeps what describes all of it."""
        size = self._path.stat().st_size
        with self._path.open("rb") as file:
            file.seek(max(0, size - _FOOTER))
            end = hashlib.sha256(file.read()).hexdigest()
        return {"kind": "parquet", "rows": self._rows, "size": size, "end_sha256": end}

    def __len__(self) -> int:
        return self._rows

    def chunks(self, size: int, done: Collection[RowId]) -> Iterator[Chunk]:
        """See `Source`."""
        kept: list[list[Any]] = [[] for _ in (None, *self._columns)]
        for columns in self._batches(max(size, _ROWS_AT_ONCE)):
            if done:
                left = [row not in done for row in columns[0]]
                columns = [list(compress(each, left)) for each in columns]
            kept = [[*before, *more] for before, more in zip(kept, columns, strict=True)]
            for _ in range(len(kept[0]) // size):
                yield self._chunk([each[:size] for each in kept])
                kept = [each[size:] for each in kept]
        if kept[0]:
            yield self._chunk(kept)

    def _chunk(self, columns: list[list[Any]]) -> Columns:
        """Of row numbers and those columns that the file has."""
        numbers, *values = columns
        found = dict(zip(self._columns, values, strict=True))
        return Columns(numbers, tuple(map(found.get, _ROW_COLUMNS)))

    def _batches(self, size: int) -> Iterator[list[list[Any]]]:
        """Row numbers and the file's columns, piece by piece."""
        number = 0
        with self._opened() as file:
            try:
                for batch in file.iter_batches(batch_size=size, columns=self._columns):
                    after = number + batch.num_rows
                    yield [
                        list(range(number, after)),
                        *(_listed(batch.column(name)) for name in self._columns),
                    ]
                    number = after
            except (self._pyarrow.error, OSError) as error:
                raise InputError(f"{self._path}: row {number} or after: cannot be read: {error}") from None


def _listed(column: Any) -> Any:
    """A column's values; pyarrow lists bytes of one size six times slower than bytes of any."""
    kind = str(column.type)
    return (column.cast("binary") if kind.startswith("fixed_size_binary") else column).to_pylist()
