"""docs/how-to/operator.md: its commands run one after the other, and print what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "operator.md"
BLOCKS = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
STEP = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole page: later blocks use what earlier ones made."""
    return tmp_path_factory.mktemp("operator")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: " ".join(block.split()[:4]))
def test_commands(block: str, folder: Path) -> None:
    """Exit code 1 where the page shows findings, else 0; and every line that stands below a command."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    before = ""
    for command, shown in STEP.findall(block):
        done = subprocess.run(
            ["bash", "-c", f"{before}{command}"],
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.stdout == shown, done.stderr
        assert done.returncode == (1 if "not clean" in shown and "|" not in command else 0), done.stderr
        if "=$(" in command:
            before = f"{command}; "


def test_there_are_commands() -> None:
    """A page without commands would prove nothing."""
    assert len(BLOCKS) >= 7
    assert all(STEP.search(block) for block in BLOCKS)
