"""The private directory tree."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from swsnp.errors import HostError
from swsnp.front.wrap.tsm_mirror import Mirror, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    made = Mirror((str(tmp_path),))
    yield made
    made.close()


def test_nobody_else_may_enter(mirror: Mirror) -> None:
    """Mode 0700, whatever the umask."""
    assert stat.S_IMODE(Path(mirror.root).stat().st_mode) == 0o700


def test_no_place(tmp_path: Path) -> None:
    """The text names the places and the remedy; a name that is taken is not used."""
    with pytest.raises(HostError, match="no directory for private files in .*/none; remedy: mount a tmpfs"):
        Mirror((str(tmp_path / "none"),))
    first = Mirror((str(tmp_path / "none"), str(tmp_path)))
    second = Mirror((str(tmp_path),))
    assert first.root != second.root


def test_all_names_taken(tmp_path: Path) -> None:
    """A hundred names, then the next place."""
    for attempt in range(100):
        (tmp_path / f"swsnp-{os.getpid()}-{attempt}").mkdir()
    with pytest.raises(HostError):
        Mirror((str(tmp_path),))


def test_directories_and_files(mirror: Mirror) -> None:
    """Made when first asked for, with the mode that was asked for under any umask, and only once."""
    before = os.umask(0o077)
    try:
        made = [mirror.file("a", "b", "c", mode=0o444, size=4096) for _ in range(2)]
    finally:
        os.umask(before)
    assert made == [f"{mirror.root}/a/b/c"] * 2
    found = Path(made[0]).stat()
    assert (stat.S_IMODE(found.st_mode), found.st_size) == (0o444, 4096)
    assert stat.S_IMODE(Path(mirror.directory("a", "b")).stat().st_mode) == 0o755


def test_remove(mirror: Mirror) -> None:
    """With its files; what is not there is no error; what comes again is new."""
    mirror.remove("a")
    mirror.file("a", "b", mode=0o200, size=0)
    mirror.remove("a")
    assert list(Path(mirror.root).iterdir()) == []
    assert Path(mirror.file("a", "b", mode=0o444, size=1)).stat().st_size == 1


def test_close(mirror: Mirror) -> None:
    """Nothing is left; again is allowed."""
    mirror.file("a", "b", mode=0o200, size=0)
    mirror.close()
    assert not Path(mirror.root).exists()
    mirror.close()


def test_status(mirror: Mirror) -> None:
    """Every field as the kernel has it."""
    found = Path(mirror.file("f", mode=0o444, size=4096)).stat()
    status = status_of(found)
    assert (status.mode, status.dev, status.ino, status.nlink) == (0o100444, found.st_dev, found.st_ino, 1)
    assert (status.uid, status.gid, status.size, status.blocks) == (found.st_uid, found.st_gid, 4096, 0)
    assert (status.atime_ns, status.mtime_ns, status.ctime_ns, status.blksize) == (
        found.st_atime_ns,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_blksize,
    )
