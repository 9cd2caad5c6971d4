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
        assert any(map(has_tests, named(ROOT / name))), f"{name}: pytest finds no test there"


def named(path: Path) -> list[Path]:
    """The files that pytest would look into."""
    return sorted(path.rglob("test_*.py")) if path.is_dir() else [path]


def has_tests(file: Path) -> bool:
    """Whether pytest collects something: a function, or a state machine's test case."""
    if not re.fullmatch(r"test_\w+\.py", file.name) or not file.is_file():
        return False
    return (
        re.search(r"^(    )?def test_|^Test\w+ = machine_test\(", file.read_text(), re.MULTILINE) is not None
    )


@pytest.mark.parametrize("name", ["tests/none.py", "tests/conftest.py", "tests/docs/none", "src"])
def test_names_without_tests(name: str) -> None:
    """What is not there, or holds no test, holds no rule."""
    assert not any(map(has_tests, named(ROOT / name)))
