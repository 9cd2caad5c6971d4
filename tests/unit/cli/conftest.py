"""What commands that boot a kernel are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.testing.tiny_kernel import tiny_kernel

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinuz"
    path.write_bytes(tiny_kernel())
    return str(path)
