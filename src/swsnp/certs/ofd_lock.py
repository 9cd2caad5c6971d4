"""Open-file-description locks on the certificate file.

Whoever reads the file for a guest holds a shared lock until the firmware has answered; whoever changes the
file, or the key that it belongs to, holds an exclusive one. The lock belongs to the open file description:
two vCPUs of one process each hold their own, and closing one does not drop the other, as the older
per-process locks would.

Source: Linux, fcntl(2), F_OFD_SETLK; Documentation/virt/kvm/x86/amd-memory-encryption.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swsnp.errors import HostError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["RETRY_S", "exclusive_lock", "lock_record", "same_file", "try_lock", "unlock_and_close"]

RETRY_S: Final = 0.001
"""Pause between two attempts at a lock that somebody else holds."""

# struct flock of a 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid, padded to 32 bytes
_FLOCK: Final = struct.Struct("@hhqqi0q")
_BUSY: Final = (errno.EAGAIN, errno.EACCES)


def lock_record(kind: int) -> bytes:
    """`struct flock` for the whole file: from 0, length 0 (to the end, wherever that will be), no owner.

    Args:
        kind: `fcntl.F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    """
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)


def try_lock(fd: int, kind: int) -> bool:
    """Take the lock without waiting; False when somebody's lock is in the way.

    Raises:
        OSError: this file system or kernel has no such locks, or other trouble.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock_record(kind))
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise
    return True


def unlock_and_close(fd: int) -> None:
    """Drop the lock, then the descriptor.

    Closing alone would leave the lock with a child process that was forked meanwhile.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock_record(fcntl.F_UNLCK))
    finally:
        os.close(fd)


def same_file(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file: it was not replaced by rename, nor unlinked."""
    ours = os.fstat(fd)
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


@contextmanager
def exclusive_lock(
    path: Path | str,
    *,
    timeout_s: float = 60.0,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Iterator[int]:
    """Hold the updater's lock on a certificate file while its content, or the key it belongs to, changes.

    Keep it over the whole update: new blob and SNP_COMMIT, SNP_SET_CONFIG or SNP_VLEK_LOAD. Rewrite the file
    in place through the descriptor; if it is replaced by rename instead, rename last, because the new file is
    unlocked.

    Args:
        path: an existing regular file.
        timeout_s: how long to wait for readers and other updaters.
        sleep: how to wait.
        monotonic: the clock that `timeout_s` is measured with.

    Yields:
        The descriptor, open for reading and writing.

    Raises:
        InputError: the file cannot be opened, or is not a regular file.
        HostError: no lock within `timeout_s`.
    """
    path = Path(path)
    deadline = monotonic() + timeout_s
    while (fd := _open_and_lock(path)) is None:
        left = deadline - monotonic()
        if left <= 0:
            raise HostError(
                f"{path}: locked by others for {timeout_s} s; a VMM holds the lock only while a request "
                "runs, so look for a stuck process (lslocks)"
            )
        sleep(min(RETRY_S, left))
    try:
        yield fd
    finally:
        unlock_and_close(fd)


def _open_and_lock(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened for update: {error.strerror}") from error
    locked = False
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InputError(f"{path}: not a regular file")
        locked = try_lock(fd, fcntl.F_WRLCK) and same_file(fd, path)
    except OSError as error:
        raise HostError(f"{path}: this file system gives no OFD locks: {error.strerror}") from error
    finally:
        if not locked:
            os.close(fd)
    return fd if locked else None
