"""A guest with ports, a network and a folder: what it runs, and what of it this side knows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.real_guest.builds import build_static

if TYPE_CHECKING:
    from tests.conftest import Skip
    from tests.real_guest.lanes import Lane

__all__ = ["STREAMS", "streams"]

STREAMS: Final = "streams"
"""Name of the command."""
_SOURCE: Final = Path(__file__).with_name("streams.c")
_KERNEL: Final = "debian-13"


def streams(job: Path, cannot_run: Skip) -> Lane:
    """One guest, with its peer; the program is in the job's folder."""
    build_static(_SOURCE, job / "streams", cannot_run)
    return {STREAMS: [sys.executable, "-m", "tests.real_guest.streams_host", "$JOB", _KERNEL]}
