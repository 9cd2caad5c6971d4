"""docs/how-to/operator.md: its commands run one after the other, and print what the page shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.docs.page import Step, blocks_of, prints, run

if TYPE_CHECKING:
    from pathlib import Path

BLOCKS = blocks_of("how-to/operator.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole page: later blocks use what earlier ones made."""
    return tmp_path_factory.mktemp("operator")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: " ".join(block[0].command.split()[:4]))
def test_commands(block: list[Step], folder: Path) -> None:
    """Exit code 1 where the page shows findings, else 0; and every line that stands below a command."""
    before = ""
    for step in block:
        done = run(f"{before}{step.command}", folder)
        assert prints(step.shown, done.stdout), done.stdout + done.stderr
        refused = "not clean" in step.shown and "|" not in step.command
        assert done.returncode == (1 if refused else 0), done.stderr
        if "=$(" in step.command:
            before = f"{step.command}; "


def test_there_are_commands() -> None:
    """A page without commands would prove nothing."""
    assert len(BLOCKS) >= 7
    assert all(BLOCKS)
