"""docs/how-to/measure.md: its commands run, and print what the page shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from swsnp.testing.firmware_image import firmware_image

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "measure.md"
BLOCKS = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:60])
def test_commands(block: str, tmp_path: Path) -> None:
    """A command of the page ends well, and prints what stands below it, if something does."""
    (tmp_path / "OVMF.fd").write_bytes(firmware_image())
    (tmp_path / "vmlinuz").write_bytes(b"kernel")
    command, *shown = block.splitlines()
    words = shlex.split(command.removeprefix("$ "))
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == (1 if "diff" in words else 0)
    if shown:
        assert done.stdout.splitlines() == shown


def test_there_are_commands() -> None:
    """A page without commands would prove nothing."""
    assert len(BLOCKS) >= 5
