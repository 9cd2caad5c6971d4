"""The conformance tables: every row is whole, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "docs" / "conformance.md"


def _rows() -> list[list[str]]:
    rows = []
    wanted = False
    for line in TABLES.read_text().splitlines():
        if line.startswith("| rule | module | test | state | evidence |"):
            wanted = True
        elif not line.startswith("|"):
            wanted = False
        elif wanted and not line.startswith("|---"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


ROWS = _rows()


def test_there_are_tables() -> None:
    """An empty document proves nothing."""
    assert len(ROWS) > 200


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_row(row: list[str]) -> None:
    """Five cells; done with module, test and evidence, or absent with a reason; named files exist."""
    assert len(row) == 5, row
    rule, module, test, state, evidence = row
    assert rule
    assert state.startswith(("done", "absent: "))
    if state.startswith("done"):
        assert evidence, "what does it rest on?"
        assert re.search(r"tests/", test), "which test holds it?"
    for name in re.findall(r"`([\w./]+)`", module):
        assert (ROOT / "src" / "swsnp" / name).exists(), name
    for name in re.findall(r"`(tests/[\w./]*)`", test):
        assert (ROOT / name).exists(), name
