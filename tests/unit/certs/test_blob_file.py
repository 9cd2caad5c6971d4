"""Replacing a certificate file. Source: Linux, amd-memory-encryption.rst; rename(2), fsync(2)."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from swsnp.certs import blob_file
from swsnp.certs.blob_file import replace, updating
from swsnp.certs.ofd_lock import exclusive_lock, same_file, try_lock, unlock_and_close
from swsnp.errors import HostError, InputError, UsageError
from swsnp.vmm.certs import Blob, BlobFile, Retry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.certs.conftest import Clock

OLD, NEW = b"old" * 1000, b"newer" * 2000


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    path = tmp_path / "certs.blob"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def reader(blob: Path) -> Iterator[int]:
    fd = os.open(blob, os.O_RDONLY)
    yield fd
    os.close(fd)


def only(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_replaced_by_rename(blob: Path, reader: int, tmp_path: Path) -> None:
    """Who has the old file open keeps the old bytes; who opens the path gets new ones; nothing is left."""
    replace(blob, NEW)
    assert os.pread(reader, 1 << 20, 0) == OLD
    assert not same_file(reader, blob)
    assert blob.read_bytes() == NEW
    assert only(tmp_path) == ["certs.blob"]


def test_mode_is_kept(blob: Path) -> None:
    """The VMM's user reads what it could read before."""
    blob.chmod(0o640)
    replace(blob, NEW)
    assert stat.S_IMODE(blob.stat().st_mode) == 0o640


def test_the_first_blob(tmp_path: Path) -> None:
    """A path that names nothing gets a file that others can read, whole from its first moment."""
    path = tmp_path / "first.blob"
    replace(path, NEW)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (NEW, 0o644)
    assert only(tmp_path) == ["first.blob"]
    assert path.stat().st_nlink == 1
    with exclusive_lock(path, timeout_s=0):
        pass


def test_two_first_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """link(2) takes nobody's place: whoever comes second updates."""
    path = tmp_path / "first.blob"
    link = os.link

    def late(source: Path, target: Path) -> None:
        path.write_bytes(OLD)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    replace(path, NEW)
    assert path.read_bytes() == NEW
    assert only(tmp_path) == ["first.blob"]


def test_a_symbolic_link_stays(blob: Path, tmp_path: Path) -> None:
    """`certs-path=` may be a link: what it points at is replaced; likewise where that is not there yet."""
    for target in (blob, tmp_path / "none.blob"):
        link = tmp_path / f"link-{target.name}"
        link.symlink_to(target.name)
        replace(link, NEW)
        assert link.is_symlink()
        assert target.read_bytes() == NEW


def test_waits_for_a_reader(blob: Path, reader: int, clock: Clock) -> None:
    """amd-memory-encryption.rst: a reader holds the shared lock until the firmware has answered."""
    assert try_lock(reader, fcntl.F_RDLCK)
    seen: list[bytes] = []
    clock.at_sleep = [lambda: seen.append(blob.read_bytes()), lambda: unlock_and_close(os.dup(reader))]
    replace(blob, NEW, timeout_s=1, sleep=clock.sleep, monotonic=clock.monotonic)
    assert seen == [OLD]
    assert blob.read_bytes() == NEW


def test_gives_up(blob: Path, reader: int, clock: Clock, tmp_path: Path) -> None:
    """A reader that never lets go: an error that says what to look for, and the old file."""
    assert try_lock(reader, fcntl.F_RDLCK)
    with pytest.raises(HostError, match=r"locked by others for 0\.01 s; .*lslocks"):
        replace(blob, NEW, timeout_s=0.01, sleep=clock.sleep, monotonic=clock.monotonic)
    assert blob.read_bytes() == OLD
    assert only(tmp_path) == ["certs.blob"]


def test_readers_of_the_new_file_wait_for_the_end(blob: Path) -> None:
    """kvm.md 1.8: the lock covers the whole update; the new file is not open to readers before its end."""
    source = BlobFile(blob, timeout_s=0)
    with updating(blob) as update:
        assert update.data == OLD
        update.replace(NEW)
        assert update.data == NEW
        assert isinstance(source.acquire(1 << 20), Retry)
        update.replace(NEW + b"!")
        assert isinstance(source.acquire(1 << 20), Retry)
    acquired = source.acquire(1 << 20)
    assert isinstance(acquired, Blob)
    assert acquired.data == NEW + b"!"
    acquired.release()


def test_a_reader_that_opened_before_and_locks_after(blob: Path) -> None:
    """The race of lock and rename: the VMM's reader finds that its file is no longer the one at the path."""
    source = BlobFile(blob, timeout_s=5)
    opened, replaced = threading.Event(), threading.Event()
    real = fcntl.fcntl

    def slow(fd: int, command: int, argument: bytes) -> object:
        if threading.current_thread().name == "vcpu" and not opened.is_set():
            opened.set()
            assert replaced.wait(10)
        return real(fd, command, argument)

    found: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "fcntl", slow)
        vcpu = threading.Thread(name="vcpu", target=lambda: found.append(source.acquire(1 << 20)))
        vcpu.start()
        assert opened.wait(10)
        replace(blob, NEW)
        replaced.set()
        vcpu.join(10)
    (acquired,) = found
    assert isinstance(acquired, Blob)
    assert acquired.data == NEW
    acquired.release()


def test_an_updater_that_waited_for_a_replaced_file(blob: Path, clock: Clock) -> None:
    """Two updaters: the second gets the lock of a file that has no name any more, and starts over."""
    others = ExitStack()
    first = others.enter_context(updating(blob))
    seen: list[bytes] = []

    def finish() -> None:
        first.replace(b"first")
        others.close()
        seen.append(blob.read_bytes())

    clock.at_sleep = [finish]
    replace(blob, NEW, timeout_s=1, sleep=clock.sleep, monotonic=clock.monotonic)
    assert (seen, blob.read_bytes()) == ([b"first"], NEW)


def test_somebody_who_takes_no_lock(blob: Path, tmp_path: Path) -> None:
    """A file that was exchanged under the lock is not overwritten: its writer believes it is in place."""
    other = tmp_path / "other"
    other.write_bytes(b"theirs")
    with updating(blob) as update:
        other.replace(blob)
        with pytest.raises(InputError, match="by somebody who does not take it"):
            update.replace(NEW)
    assert blob.read_bytes() == b"theirs"
    assert only(tmp_path) == ["certs.blob"]


@pytest.mark.parametrize("call", ["write", "fsync", "fchmod"])
def test_trouble_while_writing(
    call: str, blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, for one: the old file is as it was, nothing is left beside it, and the lock is free."""

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UsageError, match=r"certs\.blob: cannot be replaced: No space left"):
        replace(blob, NEW)
    with pytest.raises(UsageError, match=r"first\.blob: cannot be written: No space left"):
        replace(tmp_path / "first.blob", NEW)
    monkeypatch.undo()
    assert blob.read_bytes() == OLD
    assert only(tmp_path) == ["certs.blob"]
    with exclusive_lock(blob, timeout_s=0):
        pass


def test_trouble_with_the_rename(blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the last step, and for the first file's link."""

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    monkeypatch.setattr(os, "link", fail)
    for name, text in (("certs.blob", "cannot be replaced"), ("first.blob", "cannot be written")):
        with pytest.raises(UsageError, match=f"{text}: Input/output error"):
            replace(tmp_path / name, NEW)
    assert only(tmp_path) == ["certs.blob"]


def test_the_folder_is_synced(blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync(2): the file's bytes before it gets its name, the folder after."""
    synced: list[str] = []
    real = os.fsync

    def note(fd: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"{os.fstat(fd).st_size}")
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    replace(blob, NEW)
    replace(tmp_path / "first", OLD)
    assert synced == [str(len(NEW)), "folder", str(len(OLD)), "folder"]


def test_another_owner(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner is kept; who may not do that is told so instead of taking the file from the VMM."""
    given: list[tuple[int, int]] = []
    real = os.fstat

    def foreign(fd: int) -> os.stat_result:
        found = real(fd)
        if found.st_size != len(OLD):
            return found
        fields = list(found)
        fields[stat.ST_UID], fields[stat.ST_GID] = 4242, 4343
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", foreign)
    monkeypatch.setattr(blob_file, "same_file", lambda *_: True)
    monkeypatch.setattr(os, "fchown", lambda _fd, uid, gid: given.append((uid, gid)))
    replace(blob, NEW)
    assert given == [(4242, 4343)]
    blob.write_bytes(OLD)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(UsageError, match="belongs to user 4242, group 4343; replace it as that user"):
        replace(blob, NEW)


def test_the_same_owner(blob: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked to give a file to whom it belongs: that takes rights which an updater may not have."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    replace(blob, NEW)
    assert blob.read_bytes() == NEW


def test_what_is_no_file(tmp_path: Path) -> None:
    """A folder, a FIFO, a path without a folder."""
    os.mkfifo(tmp_path / "fifo")
    for name, text in ((".", "Is a directory"), ("fifo", "not a regular file")):
        with pytest.raises(InputError, match=text):
            replace(tmp_path / name, NEW)
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        replace(tmp_path / "none" / "certs.blob", NEW)
    with pytest.raises(InputError, match="No such file"), updating(tmp_path / "none"):
        pass


def test_a_lock_on_an_unnamed_file(blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can lock the file beside before us; if somebody does, nothing is replaced."""
    monkeypatch.setattr(blob_file, "try_lock", lambda *_: False)
    with pytest.raises(HostError, match="nobody else knows it"):
        replace(blob, NEW)
    assert only(tmp_path) == ["certs.blob"]
