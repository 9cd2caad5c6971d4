"""The kernel objects behind the descriptors that a program is given, and how they are told from others.

`/dev/sev-guest` is stood for by an own opening of `/dev/null`: an unprivileged process cannot make a
character device, and of those that every container has this one comes nearest. fstat says S_ISCHR even where
the supervisor is not asked, poll is always ready, epoll refuses it with EPERM (as it refuses the real device,
which has no poll operation) and mmap with ENODEV. What differs (device number, read, write, lseek) the
supervisor answers as long as the descriptor is in the reserved range. A private regular file would be easier
to recognise, but fails `test -c` on every duplicate outside the range.

Our openings are recognised by two status flags that mean nothing for the device, that no program combines on
`/dev/null` and that fcntl cannot change: O_DSYNC and O_NOFOLLOW. They belong to the open file description, so
duplicates, forked and passed descriptors have them too. F_GETFL shows them.
"""

from __future__ import annotations

import os
import stat
from typing import Final, NamedTuple

from swsnp.errors import HostError

__all__ = ["FdInfo", "NullDevice", "fd_info", "free_descriptor"]

_FDINFO_SIZE: Final = 512


class FdInfo(NamedTuple):
    """What /proc/TID/fdinfo says about a descriptor.

    Attributes:
        flags: access mode and status flags, as F_GETFL.
        identity: the lines after them: mount and, from Linux 5.15 on, inode number; then locks, if any.
    """

    flags: int
    identity: bytes


def fd_info(tid: int | str, descriptor: int) -> FdInfo:
    """Look at a descriptor of another thread, or of our own with "self".

    Raises:
        OSError: ENOENT when it is not open; EACCES when the thread is out of reach.
    """
    info = os.open(f"/proc/{tid}/fdinfo/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _, flags, identity = os.read(info, _FDINFO_SIZE).split(b"\n", 2)
    finally:
        os.close(info)
    return FdInfo(int(flags.removeprefix(b"flags:\t"), 8), identity)


def free_descriptor(tid: int, reserved: range) -> int | None:
    """The lowest number in `reserved` that a thread has not in use; None when it uses all of them."""
    for number in reserved:
        if not os.path.lexists(f"/proc/{tid}/fd/{number}"):
            return number
    return None


class NullDevice:
    """Opens `/dev/null` so that the opening can be recognised later; see the module's text."""

    PATH = "/dev/null"
    MARK: Final = os.O_DSYNC | os.O_NOFOLLOW
    _KEPT: Final = os.O_ACCMODE | os.O_NONBLOCK | os.O_APPEND | os.O_PATH

    def __init__(self) -> None:
        """Look at the device.

        Raises:
            HostError: it is missing or is not a character device.
        """
        try:
            descriptor = self.open(os.O_RDONLY)
        except OSError as error:
            raise HostError(f"{self.PATH}: {error.strerror}; remedy: provide it, mode 0666") from error
        try:
            if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
                raise HostError(
                    f"{self.PATH}: not a character device; remedy: mknod -m 666 {self.PATH} c 1 3"
                )
            self._identity = fd_info("self", descriptor).identity
        finally:
            os.close(descriptor)

    def open(self, flags: int) -> int:
        """A new opening with the access mode that the program's `flags` ask for.

        With O_PATH it carries no mark: the kernel itself then refuses what is done with it.
        """
        return os.open(self.PATH, flags & self._KEPT | self.MARK | os.O_CLOEXEC)

    def recognises(self, info: FdInfo) -> bool:
        """Whether a descriptor is one of our openings."""
        return info.flags & self.MARK == self.MARK and info.identity.startswith(self._identity)
