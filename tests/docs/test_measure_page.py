"""docs/how-to/measure.md: its commands run, and print what the page shows."""

from __future__ import annotations

import os
import re
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
    lines = block.splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", "\n".join(commands)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if " diff " in commands[-1] else 0), done.stderr
    if shown := lines[len(commands) :]:
        assert done.stdout.splitlines() == shown


def test_there_are_commands() -> None:
    """A page without commands would prove nothing."""
    assert len(BLOCKS) >= 5
