"""A result file of a batch: it is gone on with after its last whole line, or refused and left as it is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzz.outcome import attempt
from swsnp.cli.verify.batch_results import SCHEMA, ResultFile
from swsnp.errors import InputError, UsageError

__all__ = ["one", "seeds"]

_HEADER = {"schema": SCHEMA, "at": "2026-01-01T00:00:00+00:00"}


def seeds() -> list[bytes]:
    """A new file, one with results, one that was torn, and one with zeros at its end."""
    lines = [_HEADER, {"row": 0, "verdict": "accepted"}, {"row": "a/b.bin", "verdict": "refused"}]
    whole = b"".join(json.dumps(each).encode() + b"\n" for each in lines)
    return [b"", whole, whole[:-9], whole + bytes(64), whole + whole]


def one(data: bytes) -> object:
    """Open, begin, append one result, and read it again."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results"
        path.write_bytes(data)
        before, refusal = attempt(partial(_append, path), InputError, UsageError)
        if refusal:
            assert path.read_bytes() == data
            return refusal
        with ResultFile(path) as file:
            assert file.done == before | {"the new one"}
            assert sum(file.tally.values()) == len(file.done)
        return len(before)


def _append(path: Path) -> set[int | str]:
    with ResultFile(path) as file:
        before = set(file.done)
        file.begin(_HEADER)
        if "the new one" in before:
            raise UsageError("it was there before")
        file.append([json.dumps({"row": "the new one", "verdict": "accepted"})], ["accepted"])
    return before
