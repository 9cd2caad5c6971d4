"""What an operator leaves at the certificates' path, and what happens there meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from unittest.mock import patch

from swsnp.certs.ofd_lock import try_lock, unlock_and_close
from swsnp.testing.clock import FakeClock
from swsnp.vmm.certs import BlobFile, CallableSource, CertificateSource, exclusive_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = [
    "Act",
    "Make",
    "BLOB",
    "OTHER",
    "append",
    "at",
    "below_a_file",
    "from_callable",
    "happening",
    "link",
    "link_to_blob",
    "locked",
    "loop",
    "nothing",
    "raises",
    "read_locked",
    "replace",
    "returns",
    "rewrite",
    "shrink",
    "sparse",
    "standing",
    "unreadable",
    "without_locks",
]

BLOB: Final = b"certificates, which nobody reads "
OTHER: Final = b"other certificates"


# Files

Make: TypeAlias = "Callable[[Path], None]"


def _blob_file(path: Path) -> BlobFile:
    clock = FakeClock()
    return BlobFile(path, sleep=clock.sleep, monotonic=clock.monotonic)


@contextmanager
def standing(make: Make, folder: Path) -> Iterator[CertificateSource]:
    """Something that stands at the path all the time."""
    path = folder / "certs.blob"
    make(path)
    yield _blob_file(path)


@contextmanager
def at(where: Callable[[Path], Path], folder: Path) -> Iterator[CertificateSource]:
    """A path that leads nowhere good."""
    yield _blob_file(where(folder))


def nothing(path: Path) -> None:
    """Leave the path empty."""
    del path


def sparse(size: int, path: Path) -> None:
    """A file of `size` bytes that takes no room."""
    path.touch()
    os.truncate(path, size)


def link(target: str, path: Path) -> None:
    """A symbolic link."""
    path.symlink_to(target)


def link_to_blob(path: Path) -> None:
    """A symbolic link to a good blob."""
    target = path.with_suffix(".target")
    target.write_bytes(BLOB)
    path.symlink_to(target)


def loop(path: Path) -> None:
    """Two symbolic links to each other."""
    other = path.with_suffix(".other")
    path.symlink_to(other)
    other.symlink_to(path)


def below_a_file(folder: Path) -> Path:
    """A path through something that is no folder."""
    (folder / "file").touch()
    return folder / "file" / "certs.blob"


@contextmanager
def unreadable(folder: Path) -> Iterator[CertificateSource]:
    """Mode 000; root may read that all the same, and is refused in another way."""
    path = folder / "certs.blob"
    path.write_bytes(BLOB)
    path.chmod(0)
    with ExitStack() as undo:
        if os.access(path, os.R_OK):
            undo.enter_context(_failing("open", path, errno.EACCES))
        yield _blob_file(path)


# Things that happen

Act: TypeAlias = "Callable[[Path], None]"


def _is_blob(path: Path, call: str, file: Any) -> bool:
    if call == "open":
        return str(file) == str(path)
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return os.fstat(file).st_nlink == 0


@contextmanager
def _around(call: str, path: Path, act: Act, *, after: bool = False) -> Iterator[None]:
    """Act just before, or after, each `os.open` or `os.pread` of the blob in this process."""
    real = getattr(os, call)

    def meddled(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_blob(path, call, file):
            return real(file, *args, **kwargs)
        if not after:
            act(path)
        result = real(file, *args, **kwargs)
        if after:
            act(path)
        return result

    with patch.object(os, call, meddled):
        yield


@contextmanager
def _failing(call: str, path: Path, number: int) -> Iterator[None]:
    def fail(_: Path) -> None:
        raise OSError(number, os.strerror(number))

    with _around(call, path, fail):
        yield


class _Once:
    """An act that happens the first time only."""

    def __init__(self, act: Act) -> None:
        self._act, self._done = act, False

    def __call__(self, path: Path) -> None:
        if not self._done:
            self._done = True
            self._act(path)


@contextmanager
def happening(
    folder: Path,
    *,
    call: str,
    act: Act,
    after: bool = False,
    content: bytes = BLOB,
    once: bool = True,
) -> Iterator[CertificateSource]:
    """A good blob, and something that happens while it is opened or read."""
    path = folder / "certs.blob"
    path.write_bytes(content)
    clock = FakeClock()
    with _around(call, path, _Once(act) if once else act, after=after):
        # coarse, so that a case of every attempt is one of a few hundred files and not of some thousands
        yield BlobFile(path, sleep=lambda _: clock.sleep(0.05), monotonic=clock.monotonic)


def rewrite(data: bytes, path: Path) -> None:
    """Put other bytes at the start, in place and without the lock."""
    with path.open("r+b") as file:
        file.write(data)


def append(data: bytes, path: Path) -> None:
    """Put more bytes at the end, without the lock."""
    with path.open("ab") as file:
        file.write(data)


def replace(path: Path) -> None:
    """Rename another blob over this one, without the lock."""
    other = path.with_suffix(".new")
    other.write_bytes(OTHER)
    other.replace(path)


def shrink(path: Path) -> None:
    """Cut the last byte off, without the lock."""
    os.truncate(path, max(0, path.stat().st_size - 1))


@contextmanager
def locked(folder: Path, *, during: Act | None = None, release: bool = False) -> Iterator[CertificateSource]:
    """An updater holds the lock; while the VMM waits, something happens."""
    path = folder / "certs.blob"
    path.write_bytes(BLOB)
    clock = FakeClock()
    with ExitStack() as updater:
        updater.enter_context(exclusive_lock(path))

        def sleep(seconds: float) -> None:
            clock.sleep(seconds)
            if during is not None and len(clock.slept) == 1:
                during(path)
            if release:
                updater.close()

        yield BlobFile(path, sleep=sleep, monotonic=clock.monotonic)


@contextmanager
def read_locked(folder: Path) -> Iterator[CertificateSource]:
    """Another VMM is reading too."""
    path = folder / "certs.blob"
    path.write_bytes(BLOB)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try_lock(fd, fcntl.F_RDLCK)
    try:
        yield _blob_file(path)
    finally:
        unlock_and_close(fd)


@contextmanager
def without_locks(folder: Path) -> Iterator[CertificateSource]:
    """A file system that has no such locks."""
    path = folder / "certs.blob"
    path.write_bytes(BLOB)
    with patch.object(fcntl, "fcntl", side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))):
        yield _blob_file(path)


# Callables


@contextmanager
def from_callable(function: Callable[[], Any], folder: Path) -> Iterator[CertificateSource]:
    """A Python callable; the folder stays empty."""
    del folder
    yield CallableSource(function)


def raises() -> bytes:
    """A callable that fails."""
    raise RuntimeError("the key service is down")


def returns(value: object) -> Any:
    """A callable that returns `value`, of whatever type."""
    return lambda: value
