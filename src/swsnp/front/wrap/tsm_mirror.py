"""A private directory tree that stands for configfs wherever the kernel itself must find a directory.

Descriptors of directories are real: getdents, fchdir and fstat work on them without the supervisor. Files and
entries are made here when they are first looked at; nobody ever opens the files.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from swsnp.errors import HostError
from swsnp.front.wrap.status import FileStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Mirror", "status_of"]

_PLACES: Final = ("/dev/shm", "/tmp")  # noqa: S108  # a name is only used when its mkdir succeeded
_ATTEMPTS: Final = 100


def status_of(found: os.stat_result) -> FileStatus:
    """What the kernel told about a file, in the form that stat calls are answered from."""
    return FileStatus(
        mode=found.st_mode,
        dev=found.st_dev,
        ino=found.st_ino,
        nlink=found.st_nlink,
        uid=found.st_uid,
        gid=found.st_gid,
        size=found.st_size,
        blksize=found.st_blksize,
        blocks=found.st_blocks,
        atime_ns=found.st_atime_ns,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


class Mirror:
    """The tree; `root` is its path."""

    def __init__(self, places: Iterable[str] = _PLACES) -> None:
        """Make the root, which only we may enter.

        Args:
            places: directories to try, in order.

        Raises:
            HostError: none of them can be written to.
        """
        self.root = _private_directory(tuple(places))
        self._known: set[str] = set()

    def path(self, *names: str) -> str:
        """Where something lies."""
        return "/".join((self.root, *names))

    def directory(self, *names: str) -> str:
        """The path of a directory, mode 0755, made with what is above it if it is missing."""
        path = self.path(*names)
        if path not in self._known:
            if names:
                self.directory(*names[:-1])
                os.mkdir(path)  # noqa: PTH102
                os.chmod(path, 0o755)  # noqa: PTH101, S103  # mkdir's mode is subject to the umask
            self._known.add(path)
        return path

    def file(self, *names: str, mode: int, size: int) -> str:
        """The path of a file with these permissions and this size, made if it is missing."""
        path = self.path(*names)
        if path not in self._known:
            self.directory(*names[:-1])
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(made, mode)
                os.ftruncate(made, size)
            finally:
                os.close(made)
            self._known.add(path)
        return path

    def remove(self, *names: str) -> None:
        """Remove a directory of files, if it was made."""
        path = self.path(*names)
        if path not in self._known:
            return
        for name in os.listdir(path):  # noqa: PTH208
            os.unlink(f"{path}/{name}")  # noqa: PTH108
            self._known.discard(f"{path}/{name}")
        os.rmdir(path)  # noqa: PTH106
        self._known.discard(path)

    def close(self) -> None:
        """Remove everything."""
        from shutil import rmtree  # not before it is needed: importing it takes milliseconds

        rmtree(self.root, ignore_errors=True)


def _private_directory(places: tuple[str, ...]) -> str:
    for place in places:
        for attempt in range(_ATTEMPTS):
            path = f"{place}/swsnp-{os.getpid()}-{attempt}"
            try:
                os.mkdir(path, 0o700)  # noqa: PTH102
            except FileExistsError:
                continue
            except OSError:
                break
            return path
    raise HostError(
        f"no directory for private files in {', '.join(places)}; remedy: mount a tmpfs at /dev/shm"
    )
