"""Answers of the key service that are kept, so that nothing is asked for twice.

On disk a folder per service holds what it answered under names that people can read, DER and PEM as they
came, and beside each a note with its URL, date and digest. Both are replaced by rename; whatever does not
agree with its note counts as not there. One lock per answer keeps threads and processes from asking for it
at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.certs.kds_answer import limit_of
from swsnp.certs.kds_url import ChainRequest, parse_url, target_of
from swsnp.certs.ofd_lock import same_file
from swsnp.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["Cache", "DiskCache", "Kept", "MemoryCache", "default_folder", "fetched_of"]

_logger = logging.getLogger(__name__)
_NOTE_MAX: Final = 1 << 14
_RETRY_S: Final = 0.05
"""Pause between two attempts at a lock: an answer takes some tenths of a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An answer as it came, and when that was."""

    body: bytes = field(repr=False)
    fetched: datetime


class Cache(Protocol):
    """Where a client keeps answers, by URL."""

    def read(self, url: str) -> Kept | None:
        """What is kept; None for nothing, or nothing whole."""

    def write(self, url: str, kept: Kept) -> None:
        """Keep it, in place of what was kept."""

    def hold(self, url: str, patience_s: float) -> AbstractContextManager[None]:
        """Be the only one who asks for it; HostError when others still do after `patience_s`."""


def default_folder() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/swsnp/kds, or ~/.cache/swsnp/kds."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "swsnp" / "kds"


def _busy(url: str, patience_s: float) -> HostError:
    return HostError(f"{url}: another thread or process has been asking for it for {patience_s:g} s")


class MemoryCache:
    """Answers of one process, gone with it. For hosts without a place to write, and for tests."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._locks: dict[str, threading.Lock] = {}

    def read(self, url: str) -> Kept | None:
        """What is kept."""
        return self._kept.get(url)

    def write(self, url: str, kept: Kept) -> None:
        """Keep it."""
        self._kept[url] = kept

    @contextmanager
    def hold(self, url: str, patience_s: float) -> Iterator[None]:
        """Be the only thread that asks for it."""
        lock = self._locks.setdefault(url, threading.Lock())
        if not lock.acquire(timeout=patience_s):
            raise _busy(url, patience_s)
        try:
            yield
        finally:
            lock.release()


class DiskCache:
    """Answers in a folder, for all processes that use it.

    Args:
        folder: made when something is kept first. A folder that was filled elsewhere may be read-only.
        monotonic: the clock that patience is measured with.
        sleep: how to wait for another's lock.
    """

    def __init__(
        self,
        folder: Path,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder = folder
        self._monotonic = monotonic
        self._sleep = sleep

    def __repr__(self) -> str:
        return f"DiskCache({str(self.folder)!r})"

    def path_of(self, url: str) -> Path:
        """Where the answer to a URL is kept: SERVICE/KIND/PRODUCT/..., ending in .der or .pem.

        Raises:
            LayoutError: no URL of a key service.
        """
        base, request = parse_url(url)
        service = base.replace("://", "_").replace(":", "_")
        path, _, query = target_of(request).partition("?")
        kind, _, product, *name = path.strip("/").split("/")
        suffix = ".pem" if isinstance(request, ChainRequest) else ".der"
        if query:
            name.append(query.replace("=", "").replace("&", "-"))
        return self.folder.joinpath(service, kind, product, *name[:-1], name[-1] + suffix)

    def read(self, url: str) -> Kept | None:
        """What is kept; None for nothing, or for files that do not agree with each other.

        Raises:
            HostError: the files are there and cannot be read.
        """
        path = self.path_of(url)
        try:
            note = _read(_note_of(path), _NOTE_MAX)
            body = _read(path, limit_of(parse_url(url)[1]))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostError(f"{path}: cannot be read: {error.strerror}; the cache is at fault") from None
        fetched = fetched_of(note, url, body)
        if fetched is None:
            _logger.warning("%s: does not agree with its note; it is asked for again", path)
            return None
        return Kept(body=body, fetched=fetched)

    def write(self, url: str, kept: Kept) -> None:
        """Keep it; the caller holds the lock.

        Raises:
            HostError: the folder cannot be written.
        """
        path = self.path_of(url)
        note = {
            "url": url,
            "fetched": kept.fetched.astimezone(UTC).isoformat(),
            "sha256": hashlib.sha256(kept.body).hexdigest(),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, kept.body)
            _replace(_note_of(path), json.dumps(note, indent=1).encode() + b"\n")
        except OSError as error:
            raise _unwritable(path, error) from None

    @contextmanager
    def hold(self, url: str, patience_s: float) -> Iterator[None]:
        """Be the only one of all threads and processes who asks for it.

        Raises:
            HostError: others still do after `patience_s`, or the folder cannot be written.
        """
        path = self.path_of(url)
        lock = path.with_name(path.name + ".lock")
        deadline = self._monotonic() + patience_s
        while (fd := _try_lock(lock)) is None:
            left = deadline - self._monotonic()
            if left <= 0:
                raise _busy(url, patience_s)
            self._sleep(min(_RETRY_S, left))
        try:
            yield
        finally:
            # gone before it is let go of, so that whoever waits sees that it is not the file's name any more
            lock.unlink(missing_ok=True)
            os.close(fd)


def _note_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit + 1)


def fetched_of(note: bytes, url: str, body: bytes) -> datetime | None:
    """When the body came, if the note is about this URL and this body."""
    try:
        found = json.loads(note)
        if found["url"] != url or found["sha256"] != hashlib.sha256(body).hexdigest():
            return None
        fetched = datetime.fromisoformat(found["fetched"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return fetched if fetched.tzinfo is not None else None


def _replace(path: Path, data: bytes) -> None:
    """A whole file or none. One writer at a time: what an interrupted one left behind is overwritten."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _unwritable(path: Path, error: OSError) -> HostError:
    return HostError(
        f"{path}: the cache cannot be written: {error.strerror}; name another folder, or use it offline"
    )


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None when somebody else does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(path, error) from None
    locked = False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = same_file(fd, path)  # whoever held it before may have taken its name away
    except BlockingIOError:
        pass
    except OSError as error:
        raise HostError(f"{path}: this file system gives no locks: {error.strerror}") from None
    finally:
        if not locked:
            os.close(fd)
    return fd if locked else None
