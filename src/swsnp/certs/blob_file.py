"""Replace the certificate file that running VMMs read, so that none of them ever sees half of it.

Readers (VMMs) hold a shared lock from before they read until the firmware has answered, and look, once they
have it, whether the path still names the file that they locked. An updater's side of the same bargain:

1. Take the exclusive lock of the file that the path names, and look likewise: an updater who waited for a
   file that was replaced meanwhile starts over with the new one.
2. Write the new bytes beside it, with the old file's owner and mode; sync them to the disk.
3. Lock the new file too, before it has a name that anybody reads. A reader that opens it after the rename
   then waits until the whole update is over, firmware included.
4. Rename it over the old one, which is one step for whoever opens the path; sync the folder.
5. Let go of both.

A reader that opened the old file before step 4 and gets its lock after step 5 finds that the path names
another file, and starts over. So locks and renames do not race, and who stops at any point leaves the old
file or the new one, and at most a hidden file beside it.

Source: Linux, Documentation/virt/kvm/x86/amd-memory-encryption.rst; fcntl(2), rename(2), fsync(2).
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swsnp.certs.ofd_lock import exclusive_lock, same_file, try_lock, unlock_and_close
from swsnp.errors import HostError, InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Update", "replace", "updating"]

_MODE: Final = 0o644
"""Of a file that was not there before: certificates are public, and the VMM may run as another user."""


class Update:
    """An update that is going on: nobody else reads or changes the file until it ends. Made by `updating`."""

    def __init__(self, path: Path, fd: int, held: ExitStack) -> None:
        self._path, self._fd, self._held = path, fd, held

    @property
    def data(self) -> bytes:
        """What is in the file."""
        size = os.fstat(self._fd).st_size
        return os.pread(self._fd, size, 0)

    def replace(self, data: bytes) -> None:
        """Put other bytes in the file's place; may be called again.

        Raises:
            InputError: somebody who does not take the lock has replaced the file meanwhile.
            UsageError: it cannot be written there; the old file is as it was.
        """
        target = Path(os.path.realpath(self._path))
        old = os.fstat(self._fd)
        try:
            fd, beside = _written_beside(target, data, old)
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be replaced: {error.strerror}") from None
        self._held.callback(unlock_and_close, fd)
        try:
            if not same_file(self._fd, self._path):
                raise InputError(f"{self._path}: replaced under the lock by somebody who does not take it")
            beside.replace(target)
            self._fd = fd
            _sync_folder(target.parent)
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be replaced: {error.strerror}") from None
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def updating(
    path: Path | str,
    *,
    timeout_s: float = 60.0,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Iterator[Update]:
    """Hold the updater's lock while certificates, and the key that they belong to, change.

    Whatever is done inside, guests see all of it or nothing: SNP_COMMIT, SNP_SET_CONFIG or SNP_VLEK_LOAD in
    any order with `Update.replace`. A symbolic link is followed and stays.

    Args:
        path: an existing regular file.
        timeout_s: how long to wait for readers and other updaters.
        sleep: how to wait.
        monotonic: the clock that `timeout_s` is measured with.

    Raises:
        InputError: the file cannot be opened, or is not a regular file.
        HostError: no lock within `timeout_s`.
    """
    path = Path(path)
    with (
        exclusive_lock(path, timeout_s=timeout_s, sleep=sleep, monotonic=monotonic) as fd,
        ExitStack() as held,
    ):
        yield Update(path, fd, held)


def replace(
    path: Path | str,
    data: bytes,
    *,
    timeout_s: float = 60.0,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Put a whole blob at the path: in the place of the one that is there, or as the first.

    Args:
        path: where VMMs look.
        data: the blob.
        timeout_s: how long to wait for readers and other updaters.
        sleep: how to wait.
        monotonic: the clock that `timeout_s` is measured with.

    Raises:
        InputError: there is something else than a regular file, or it cannot be opened.
        HostError: no lock within `timeout_s`.
        UsageError: it cannot be written there; what was there is as it was.
    """
    path = Path(path)
    if _created(path, data):
        return
    with updating(path, timeout_s=timeout_s, sleep=sleep, monotonic=monotonic) as update:
        update.replace(data)


def _created(path: Path, data: bytes) -> bool:
    """Whether the file was made, because the path named none. Nobody ever sees it empty."""
    target = Path(os.path.realpath(path))
    if target.exists():
        return False
    try:
        fd, beside = _written_beside(target, data, None)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        os.link(beside, target)  # unlike rename, it never takes the place of another
        _sync_folder(target.parent)
    except FileExistsError:
        return False  # somebody was faster: then it is an update
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
        unlock_and_close(fd)
    return True


def _written_beside(target: Path, data: bytes, old: os.stat_result | None) -> tuple[int, Path]:
    """A synced and locked file in the target's folder: its descriptor and name."""
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    beside = Path(name)
    try:
        _write_all(fd, data)
        _give_to_owner(fd, old, target)
        os.fchmod(fd, _MODE if old is None else stat.S_IMODE(old.st_mode))
        os.fsync(fd)
        if not try_lock(fd, fcntl.F_WRLCK):
            raise HostError(f"{beside}: locked by somebody else, although nobody else knows it")
    except BaseException:
        os.close(fd)
        beside.unlink(missing_ok=True)
        raise
    return fd, beside


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _give_to_owner(fd: int, old: os.stat_result | None, target: Path) -> None:
    """A VMM that could read the old file must be able to read the new one."""
    if old is None:
        return
    new = os.fstat(fd)
    if (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid):
        return
    try:
        os.fchown(fd, old.st_uid, old.st_gid)
    except PermissionError:
        raise UsageError(
            f"{target}: belongs to user {old.st_uid}, group {old.st_gid}; replace it as that user or as root"
        ) from None


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
