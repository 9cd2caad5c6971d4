"""docs/how-to/measure.md: its commands run, and print what the page shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.docs.page import Step, blocks_of, prints, run

from swsnp.testing.firmware_image import firmware_image

if TYPE_CHECKING:
    from pathlib import Path

BLOCKS = blocks_of("how-to/measure.md")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[0].command[:60])
def test_commands(block: list[Step], tmp_path: Path) -> None:
    """A command of the page ends well, and prints what stands below it, if something does."""
    (tmp_path / "OVMF.fd").write_bytes(firmware_image())
    (tmp_path / "vmlinuz").write_bytes(b"kernel")
    for step in block:
        done = run(step.command, tmp_path)
        assert done.returncode == (1 if " diff " in step.command else 0), done.stderr
        if step.shown:
            assert prints(step.shown, done.stdout), done.stdout


def test_there_are_commands() -> None:
    """A page without commands would prove nothing."""
    assert len(BLOCKS) >= 5
