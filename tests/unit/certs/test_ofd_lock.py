"""Open-file-description locks: the bytes, who excludes whom, and the updater's side."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from swsnp.certs.ofd_lock import exclusive_lock, lock_record, same_file, try_lock, unlock_and_close
from swsnp.errors import HostError, InputError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.certs.conftest import Clock


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    path = tmp_path / "certs.blob"
    path.write_bytes(b"old")
    return path


def test_number_and_structure() -> None:
    """Linux, fcntl.h: F_OFD_SETLK is 37; struct flock has 32 bytes, start and length at 8 and 16, owner 0."""
    assert fcntl.F_OFD_SETLK == 37
    assert lock_record(fcntl.F_WRLCK) == bytes.fromhex("01000000" + "00" * 28)
    assert lock_record(fcntl.F_RDLCK) == bytes(32)


def test_readers_coexist_and_a_writer_excludes(blob: Path) -> None:
    """fcntl(2): shared locks of two descriptions of one process coexist; a write lock waits for both."""
    readers = [os.open(blob, os.O_RDONLY) for _ in range(2)]
    writer = os.open(blob, os.O_RDWR)
    assert all(try_lock(fd, fcntl.F_RDLCK) for fd in readers)
    assert not try_lock(writer, fcntl.F_WRLCK)
    unlock_and_close(readers[0])
    assert not try_lock(writer, fcntl.F_WRLCK), "closing one descriptor must not drop the other's lock"
    unlock_and_close(readers[1])
    assert try_lock(writer, fcntl.F_WRLCK)
    unlock_and_close(writer)


def test_unlocking_reaches_a_duplicate_too(blob: Path) -> None:
    """fcntl(2): the lock belongs to the description, so a copy of the descriptor must not keep it alive."""
    reader = os.open(blob, os.O_RDONLY)
    copy = os.dup(reader)  # what a forked child would have
    assert try_lock(reader, fcntl.F_RDLCK)
    unlock_and_close(reader)
    with exclusive_lock(blob, timeout_s=0):
        pass
    os.close(copy)


def test_trouble_is_not_taken_for_a_held_lock(blob: Path) -> None:
    """fcntl(2): a read lock wants a descriptor open for reading; EBADF is not "somebody holds it"."""
    fd = os.open(blob, os.O_WRONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        try_lock(fd, fcntl.F_RDLCK)
    os.close(fd)


def test_same_file_sees_rename_and_unlink(blob: Path, tmp_path: Path) -> None:
    """amd-memory-encryption.rst: replacing the blob by rename is legitimate, so lock users compare inodes."""
    fd = os.open(blob, os.O_RDONLY)
    assert same_file(fd, blob)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(blob)
    assert not same_file(fd, blob)
    blob.unlink()
    assert not same_file(fd, blob)
    os.close(fd)


def test_updater_holds_and_drops(blob: Path) -> None:
    """amd-memory-encryption.rst: the updater's lock covers the whole update."""
    with exclusive_lock(blob) as fd:
        os.pwrite(fd, b"new", 0)
        reader = os.open(blob, os.O_RDONLY)
        assert not try_lock(reader, fcntl.F_RDLCK)
    assert try_lock(reader, fcntl.F_RDLCK)
    os.close(reader)
    assert blob.read_bytes() == b"new"


def test_updater_waits_for_readers(blob: Path, clock: Clock) -> None:
    """An updater waits as long as it was told, then gets the lock of the file that the path names by then."""
    reader = os.open(blob, os.O_RDONLY)
    assert try_lock(reader, fcntl.F_RDLCK)
    clock.at_sleep = [lambda: None, lambda: unlock_and_close(reader)]
    with exclusive_lock(blob, timeout_s=1.0, sleep=clock.sleep, monotonic=clock.monotonic):
        pass
    assert clock.slept == [0.001, 0.001]


def test_updater_gives_up(blob: Path, clock: Clock) -> None:
    """A lock that is never free ends in an error that says so, at the deadline and not before."""
    reader = os.open(blob, os.O_RDONLY)
    assert try_lock(reader, fcntl.F_RDLCK)
    with (
        pytest.raises(HostError, match=r"locked by others for 0\.01 s"),
        exclusive_lock(blob, timeout_s=0.01, sleep=clock.sleep, monotonic=clock.monotonic),
    ):
        pass
    assert clock.now == pytest.approx(1000.01)
    os.close(reader)


def test_updater_wants_a_regular_file(tmp_path: Path) -> None:
    """A missing file, a directory and a FIFO are refused without waiting."""
    os.mkfifo(tmp_path / "fifo")
    for name, text in (("none", "No such file"), (".", "Is a directory"), ("fifo", "not a regular file")):
        with pytest.raises(InputError, match=text), exclusive_lock(tmp_path / name):
            pass


def test_updater_on_a_file_system_without_such_locks(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL from F_OFD_SETLK is told as what it is; there is no fall-back to per-process locks."""

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(HostError, match="gives no OFD locks: Invalid argument"), exclusive_lock(blob):
        pass
