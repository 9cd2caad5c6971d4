"""Certificate sources: real files, real locks, and what a request gets from them."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.certs.ofd_lock import try_lock
from swsnp.vmm import certs
from swsnp.vmm.certs import (
    Blob,
    BlobFile,
    BytesSource,
    CallableSource,
    Failed,
    Retry,
    TooLarge,
    exclusive_lock,
    pages_for,
)

if TYPE_CHECKING:
    from tests.unit.vmm.conftest import Clock

ROOM = 4 * 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "certs.blob"
    path.write_bytes(b"first" * 1000)
    return path


@pytest.fixture
def source(path: Path, clock: Clock) -> BlobFile:
    return BlobFile(path, timeout_s=0.1, sleep=clock.sleep, monotonic=clock.monotonic)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def writer_gets_in(path: Path) -> bool:
    """Whether an updater could take its lock right now."""
    fd = os.open(path, os.O_RDWR)
    try:
        return try_lock(fd, fcntl.F_WRLCK)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("size", "pages"), [(0, 0), (1, 1), (4095, 1), (4096, 1), (4097, 2), (16384, 4), (16385, 5)]
)
def test_pages(size: int, pages: int) -> None:
    """The size in pages, rounded up: exact multiples need no page more, and nothing needs none."""
    assert pages_for(size) == pages


def test_blob_is_locked_until_released(source: BlobFile, path: Path) -> None:
    """amd-memory-encryption.rst: the read lock is kept until the firmware request has been made."""
    found = source.acquire(ROOM)
    assert isinstance(found, Blob)
    assert found.data == b"first" * 1000
    assert not writer_gets_in(path)
    found.release()
    assert writer_gets_in(path)


def test_two_requests_hold_their_own_locks(source: BlobFile, path: Path) -> None:
    """Two vCPUs read at the same time; the one that ends first does not drop the other's lock."""
    first, second = source.acquire(ROOM), source.acquire(ROOM)
    assert isinstance(first, Blob)
    assert isinstance(second, Blob)
    first.release()
    assert not writer_gets_in(path)
    second.release()
    assert writer_gets_in(path)


def test_file_is_read_afresh(source: BlobFile, path: Path) -> None:
    """A blob that was updated between two requests is the new one in the second."""
    for content in (b"one", b"two and more", b""):
        path.write_bytes(content)
        found = source.acquire(ROOM)
        assert isinstance(found, Blob)
        assert found.data == content
        found.release()


@settings(max_examples=25, derandomize=True)
@given(data=st.binary(max_size=3 * 4096))
def test_content_is_opaque(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """The series' cover letter: random data does as well; the bytes pass unchanged."""
    path = tmp_path_factory.mktemp("opaque") / "blob"
    path.write_bytes(data)
    found = BlobFile(path).acquire(ROOM)
    assert isinstance(found, Blob)
    assert found.data == data
    found.release()


@pytest.mark.parametrize("room", [0, 4096, 4999])
def test_too_large_holds_nothing(source: BlobFile, path: Path, room: int) -> None:
    """Too small a buffer: the size is told and the lock is dropped at once."""
    assert source.acquire(room) == TooLarge(5000)
    assert writer_gets_in(path)


def test_exact_fit(source: BlobFile) -> None:
    """A buffer of exactly the blob's size is enough."""
    found = source.acquire(5000)
    assert isinstance(found, Blob)
    found.release()


def test_empty_file_fits_no_room(source: BlobFile, path: Path) -> None:
    """A file of size 0 fits into 0 pages."""
    path.write_bytes(b"")
    found = source.acquire(0)
    assert isinstance(found, Blob)
    assert found.data == b""
    found.release()


def test_writer_makes_the_reader_wait_and_then_retry(source: BlobFile, path: Path, clock: Clock) -> None:
    """A lock that is held to the deadline is "retry later"; the wait is exactly the timeout."""
    with exclusive_lock(path):
        found = source.acquire(ROOM)
    assert isinstance(found, Retry)
    assert "locked by an updater" in found.reason
    assert clock.now == pytest.approx(1000.1)


def test_no_patience_is_one_attempt(path: Path, clock: Clock) -> None:
    """A timeout of 0 tries once and never sleeps."""
    source = BlobFile(path, timeout_s=0, sleep=clock.sleep, monotonic=clock.monotonic)
    with exclusive_lock(path):
        assert isinstance(source.acquire(ROOM), Retry)
    found = source.acquire(ROOM)
    assert isinstance(found, Blob)
    found.release()
    assert clock.slept == []


def test_least_wait_overrides_less_patience(source: BlobFile, path: Path, clock: Clock) -> None:
    """Where "retry later" cannot be said, the VMM waits longer before it fails."""
    with exclusive_lock(path):
        assert isinstance(source.acquire(ROOM, least_wait_s=2.0), Retry)
    assert clock.now == pytest.approx(1002.0)


def test_writer_that_ends_in_time(source: BlobFile, path: Path, clock: Clock) -> None:
    """An update that ends before the deadline is waited for; the request gets the new content."""
    update = exclusive_lock(path)
    fd = update.__enter__()

    def finish() -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"second", 0)
        update.__exit__(None, None, None)

    clock.at_sleep = [lambda: None, finish]
    found = source.acquire(ROOM)
    assert isinstance(found, Blob)
    assert found.data == b"second"
    found.release()
    assert len(clock.slept) == 2


def test_rename_during_the_wait(source: BlobFile, path: Path, tmp_path: Path, clock: Clock) -> None:
    """A file replaced by rename while its old inode was locked: the new file is opened, not waited for."""
    update = exclusive_lock(path)
    update.__enter__()
    (tmp_path / "new").write_bytes(b"renamed")
    clock.at_sleep = [lambda: (tmp_path / "new").rename(path)]
    found = source.acquire(ROOM)
    assert isinstance(found, Blob)
    assert found.data == b"renamed"
    found.release()
    assert len(clock.slept) == 1
    update.__exit__(None, None, None)


def between_lock_and_look(monkeypatch: pytest.MonkeyPatch, actions: list[Any]) -> None:
    """Run the next action after each lock is taken, before the inode is compared."""

    def lock_then_act(fd: int, kind: int) -> bool:
        taken = try_lock(fd, kind)
        if actions:
            actions.pop(0)()
        return taken

    monkeypatch.setattr(certs, "try_lock", lock_then_act)


def test_rename_between_open_and_lock(
    source: BlobFile, path: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on an inode that the path no longer names protects nothing: start over with the new file."""
    (tmp_path / "new").write_bytes(b"renamed")
    between_lock_and_look(monkeypatch, [lambda: (tmp_path / "new").rename(path)])
    found = source.acquire(ROOM)
    assert isinstance(found, Blob)
    assert found.data == b"renamed"
    found.release()
    assert len(clock.slept) == 1


def test_endless_renames_end_at_the_deadline(
    source: BlobFile, path: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is replaced at every attempt ends in "retry later", and no descriptor is lost."""

    def replace() -> None:
        (tmp_path / "new").write_bytes(b"again")
        (tmp_path / "new").rename(path)

    between_lock_and_look(monkeypatch, [replace] * 1000)
    before = open_descriptors()
    found = source.acquire(ROOM)
    assert isinstance(found, Retry)
    assert "replaced" in found.reason
    assert clock.now == pytest.approx(1000.1)
    assert open_descriptors() == before


def test_unlinked_between_open_and_lock(
    source: BlobFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is gone by the time it is locked is not served; the next attempt finds it missing."""
    between_lock_and_look(monkeypatch, [path.unlink])
    found = source.acquire(ROOM)
    assert isinstance(found, Failed)
    assert "No such file" in found.reason


def test_shrinking_under_the_lock(
    source: BlobFile, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An updater that ignores the lock and truncates: half a blob is never served."""
    whole = os.pread

    def short(fd: int, size: int, offset: int) -> bytes:
        if not clock.slept:
            os.truncate(path, 10)
        return whole(fd, size, offset)

    monkeypatch.setattr(os, "pread", short)
    found = source.acquire(ROOM)
    assert isinstance(found, Blob)
    assert found.data == b"firstfirst"
    assert len(clock.slept) == 1
    found.release()


def test_short_reads_are_put_together(source: BlobFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """read(2) may return less than was asked for; the read goes on where it stopped."""
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: whole(fd, min(size, 7), offset))
    found = source.acquire(ROOM)
    assert isinstance(found, Blob)
    assert found.data == b"first" * 1000
    found.release()


def test_in_place_rewrite_that_ignores_the_lock(source: BlobFile, path: Path) -> None:
    """What a request was given does not change under it when somebody rewrites the file."""
    found = source.acquire(ROOM)
    assert isinstance(found, Blob)
    path.write_bytes(b"rewritten")
    assert found.data == b"first" * 1000
    found.release()


def test_what_is_not_a_regular_file(tmp_path: Path, clock: Clock) -> None:
    """Directory, FIFO, device and socket are refused, and none of them is waited for."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, text in (
            (".", "not a regular file"),
            ("fifo", "not a regular file"),
            ("/dev/null", "not a regular file"),
            ("socket", "No such device"),
            ("missing", "No such file"),
        ):
            source = BlobFile(tmp_path / name, sleep=clock.sleep, monotonic=clock.monotonic)
            found = source.acquire(ROOM)
            assert isinstance(found, Failed)
            assert text in found.reason
    assert clock.slept == []


def test_unreadable_file(source: BlobFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be read, or whose file system fails, is a failure with the system's words."""

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert source.acquire(ROOM) == Failed(f"{source.path}: cannot be opened: Permission denied")
    before = open_descriptors()
    monkeypatch.setattr(certs, "try_lock", refuse)
    assert source.acquire(ROOM) == Failed(f"{source.path}: cannot be locked and read: Permission denied")
    assert open_descriptors() == before


def test_symbolic_link_is_followed(source: BlobFile, path: Path, tmp_path: Path) -> None:
    """A link that is switched to another file is seen, as a rename is."""
    link = tmp_path / "link"
    link.symlink_to(path)
    found = BlobFile(link).acquire(ROOM)
    assert isinstance(found, Blob)
    assert not writer_gets_in(path)
    found.release()


def test_names() -> None:
    """The trace says where certificates came from."""
    assert BlobFile("/srv/certs.blob").name == "/srv/certs.blob"
    assert BytesSource(b"").name == "bytes"
    assert CallableSource(bytes, name="vault").name == "vault"


def test_bytes() -> None:
    """Fixed certificates: they fit, or their size is told."""
    source = BytesSource(b"abc")
    found = source.acquire(3)
    assert isinstance(found, Blob)
    assert found.data == b"abc"
    found.release()
    assert source.acquire(2) == TooLarge(3)


def test_callable() -> None:
    """A callable is asked for every request; its exceptions and odd results are failures, not crashes."""
    answers: list[Any] = [b"one", bytearray(b"two"), "three", None]
    source = CallableSource(lambda: answers.pop(0), name="vault")
    first, second = source.acquire(8), source.acquire(8)
    assert isinstance(first, Blob)
    assert first.data == b"one"
    assert isinstance(second, Blob)
    assert second.data == b"two"
    assert source.acquire(8) == Failed("vault: got str, wanted bytes")
    assert source.acquire(8) == Failed("vault: got NoneType, wanted bytes")
    assert source.acquire(8) == Failed("vault: IndexError: pop from empty list")
    assert CallableSource(lambda: b"four").acquire(3) == TooLarge(4)


def test_certificates_are_not_printed() -> None:
    """A blob may be anything an operator chose; its bytes are in no repr."""
    assert "secret" not in repr(Blob(b"secret"))
