"""Where the rows of a batch come from: a directory, or a Parquet file.

A row is one report with what belongs to it alone. In a Parquet file these are columns, in a directory files
beside the report that differ in their suffix: `a.bin`, `a.certs`, `a.vcek`, `a.report_data`, `a.measurement`.
Bytes may be given as they are or, where the column or the file is text, in hexadecimal.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

from swsnp.cli.inputs import LARGEST
from swsnp.errors import HostError, InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = [
    "COLUMNS",
    "DirectorySource",
    "Item",
    "ParquetSource",
    "Row",
    "RowId",
    "Source",
    "Values",
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


class Row(NamedTuple):
    """A report and what belongs to it alone, as it was given; `error` says why it could not be read."""

    report: bytes | str | None
    certs: bytes | str | None = None
    vcek: bytes | str | None = None
    report_data: bytes | str | None = None
    measurement: bytes | str | None = None
    error: str = ""


Values: TypeAlias = tuple[bytes | str | None, ...]
"""What a `Row` is made of: plain tuples cross to another process in a third of the time."""
Item: TypeAlias = tuple[RowId, Values | str]
"""A row, or the path from which a worker reads it."""


class Source(Protocol):
    """A finite, ordered collection of rows that is the same when it is opened again."""

    def identity(self) -> dict[str, Any]:
        """What tells this source from another, JSON-ready."""
        ...

    def __len__(self) -> int: ...

    def chunks(self, size: int, done: Collection[RowId]) -> Iterator[list[Item]]:
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


def _in_chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk


class DirectorySource:
    """Every file below a directory, but hidden ones and those that stand beside a report."""

    def __init__(self, folder: Path, *, but: str | None = None) -> None:
        self._folder = folder
        left_out = None if but is None else os.path.relpath(os.path.realpath(but), os.path.realpath(folder))
        self._names = sorted(name for name in _below(str(folder), "") if name != left_out)
        if not self._names:
            raise InputError(f"{folder}: holds no file, wanted reports")

    def identity(self) -> dict[str, Any]:
        """The directory's own name says nothing: the row ids are the files'."""
        return {"kind": "directory"}

    def __len__(self) -> int:
        return len(self._names)

    def chunks(self, size: int, done: Collection[RowId]) -> Iterator[list[Item]]:
        """See `Source`; workers read the files."""
        yield from _in_chunks(
            ((name, str(self._folder / name)) for name in self._names if name not in done), size
        )


def _below(folder: str, prefix: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path, f"{prefix}{entry.name}/")
        elif Path(entry.name).suffix.removeprefix(".") not in COLUMNS:
            yield prefix + entry.name


def read_row(path: str) -> Row:
    """The row of one file of a directory, with the files beside it."""
    try:
        certs, vcek, data, measurement = (
            _read(str(Path(path).with_suffix(f".{name}")), wanted=False) for name in COLUMNS
        )
        return Row(_read(path, wanted=True), certs, vcek, data, measurement)
    except InputError as error:
        return Row(report=None, error=str(error))


def _read(path: str, *, wanted: bool) -> bytes | None:
    try:
        with Path(path).open("rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError:
        if wanted:
            raise InputError(f"{path}: is gone") from None
        return None
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

    def chunks(self, size: int, done: Collection[RowId]) -> Iterator[list[Item]]:
        """See `Source`."""
        items = self._items(size)
        yield from _in_chunks((each for each in items if each[0] not in done) if done else items, size)

    def _items(self, size: int) -> Iterator[Item]:
        number = 0
        with self._opened() as file:
            try:
                for batch in file.iter_batches(batch_size=max(size, 1024), columns=self._columns):
                    columns = [
                        batch.column(name).to_pylist() if name in self._columns else repeat(None)
                        for name in _ROW_COLUMNS
                    ]
                    yield from enumerate(zip(*columns, strict=False), number)  # ends with `report`
                    number += batch.num_rows
            except (self._pyarrow.error, OSError) as error:
                raise InputError(f"{self._path}: row {number} or after: cannot be read: {error}") from None
