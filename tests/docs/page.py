"""The console blocks of a page: their commands, what stands below each, and how to run one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Step", "blocks_of", "prints", "run"]

_PAGES: Final = Path(__file__).resolve().parents[2] / "docs"
_BLOCK: Final = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_STEP: Final = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """A command, and the lines that the page shows below it."""

    command: str
    shown: str


def blocks_of(page: str) -> list[list[Step]]:
    """The steps of each console block of a page below docs/."""
    text = (_PAGES / page).read_text(encoding="utf-8")
    return [[Step(*found) for found in _STEP.findall(block)] for block in _BLOCK.findall(text)]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a reader would, with the program of this environment first on the path."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def prints(shown: str, output: str) -> bool:
    """Whether that is what the page shows: a line `…` stands for any lines, and … in a line for anything."""
    rules = [r"(?:.*\n)*" if line == "…" else _any_of(line) for line in shown.splitlines()]
    return re.fullmatch("".join(rules), output) is not None


def _any_of(line: str) -> str:
    return re.escape(line).replace("…", ".*") + r"\n"
