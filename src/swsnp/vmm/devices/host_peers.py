"""Who can be at the host's end of a port: files, the standard output, pipes, sockets, pseudoterminals.

Each is a `host_end.Source`. Functions that open something raise InputError with its name.

Source: the manual page qemu(1), "Character device options".
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import tty
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from swsnp.errors import InputError
from swsnp.vmm.devices.host_end import Connection

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Address",
    "Fixed",
    "Listener",
    "Pseudoterminal",
    "connect_to",
    "connected",
    "file_end",
    "pipe_end",
    "socket_end",
    "standard_output",
]

_logger = logging.getLogger(__name__)
Address: TypeAlias = "Path | tuple[str, int]"
"""A socket's: a path, or a host and a TCP port."""
_STDOUT: Final = 1
_LOOKS_EVERY_S: Final = 0.2
"""How often a pseudoterminal is asked whether somebody has opened it: no call tells."""


class Fixed:
    """One peer for good.

    Args:
        connection: its descriptors.
        patient: see `host_end.Source`.
        hang_up: makes reading and writing end.
        close: gives the descriptors back.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        patient: bool,
        close: Callable[[], None],
        hang_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.patient: bool = patient
        self._connection, self._close, self._hang_up = connection, close, hang_up

    def first(self) -> Connection | None:
        """It is there from the start."""
        return self._connection

    def next(self, stop: int) -> Connection | None:
        """There is no other."""
        return None

    def hang_up(self) -> None:
        """See `host_end.Source`."""
        self._hang_up()

    def ended(self) -> None:
        """Its descriptors stay until `close`."""

    def close(self) -> None:
        """Give them back."""
        self._close()


def file_end(path: Path, *, append: bool) -> Fixed:
    """A file that takes what the guest says; emptied before, unless `append`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    return Fixed(Connection(None, fd), patient=True, close=lambda: os.close(fd))


def standard_output() -> Fixed:
    """This process's; what is for the guest comes by `Port.receive` from whoever reads standard input."""
    return Fixed(Connection(None, _STDOUT), patient=True, close=lambda: None)


def pipe_end(path: Path) -> Fixed:
    """Named pipes `path`.in for the guest and `path`.out from it; else `path` alone for both.

    Both are opened for reading and writing, so that others may come and go.
    """
    both = [Path(f"{path}.in"), Path(f"{path}.out")]
    names = both if all(each.exists() for each in both) else [path, path]
    with ExitStack() as opened:
        found = []
        for each in names:
            try:
                fd = os.open(each, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise InputError(f"{each}: cannot be opened: {error.strerror or error}") from None
            opened.callback(os.close, fd)
            if not stat.S_ISFIFO(os.fstat(fd).st_mode):
                raise InputError(f"{each}: wanted a named pipe (mkfifo)")
            found.append(fd)
        close = opened.pop_all().close
    return Fixed(Connection(*found), patient=False, close=close)


def connect_to(address: Address) -> Fixed:
    """Somebody who listens already."""
    try:
        peer = connected(address)
    except OSError as error:
        raise InputError(f"{_text(address)}: cannot be connected to: {error.strerror or error}") from None
    return socket_end(peer)


def socket_end(peer: socket.socket) -> Fixed:
    """A socket that is connected; it becomes the end's."""
    peer.setblocking(False)
    connection = Connection(peer.fileno(), peer.fileno())
    return Fixed(connection, patient=False, close=peer.close, hang_up=lambda: _hang_up(peer))


class Listener:
    """Peers that connect, one at a time; whoever comes meanwhile waits.

    Args:
        address: where; a socket that nobody listens at any more is replaced.
        wait: `first` waits for the first of them.

    Raises:
        InputError: it cannot be listened at, or somebody does.

    Attributes:
        where: the address, as text.
    """

    patient: bool = False

    def __init__(self, address: Address, *, wait: bool) -> None:
        self._address, self._waits = address, wait
        self._peer: socket.socket | None = None
        try:
            self._listener = _listening(address)
        except OSError as error:
            raise InputError(f"{_text(address)}: cannot be listened at: {error.strerror or error}") from None
        self.where = _text(address if isinstance(address, Path) else self._listener.getsockname()[:2])

    def first(self) -> Connection | None:
        """Wait, or begin without one."""
        return self._accepted() if self._waits else None

    def next(self, stop: int) -> Connection | None:
        """Wait for one."""
        poll = select.poll()
        for fd in (self._listener.fileno(), stop):
            poll.register(fd, select.POLLIN)
        if any(fd == stop for fd, _ in poll.poll()):
            return None
        try:
            return self._accepted()
        except OSError as error:
            _logger.warning("%s: nobody can connect any more: %s", self.where, error.strerror or error)
            return None

    def _accepted(self) -> Connection:
        self._peer, _ = self._listener.accept()
        self._peer.setblocking(False)
        return Connection(self._peer.fileno(), self._peer.fileno())

    def hang_up(self) -> None:
        """See `host_end.Source`."""
        if self._peer is not None:
            _hang_up(self._peer)

    def ended(self) -> None:
        """See `host_end.Source`."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def close(self) -> None:
        """Listen no more; a path is taken away."""
        self._listener.close()
        if isinstance(self._address, Path):
            self._address.unlink(missing_ok=True)


class Pseudoterminal:
    """A terminal that somebody may open, set to raw.

    Attributes:
        name: of the device that is to be opened.
    """

    patient: bool = False

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(self._master, False)
        self.name = os.ttyname(slave)
        os.close(slave)

    def first(self) -> Connection | None:
        """Nobody knows its name yet."""
        return None

    def next(self, stop: int) -> Connection | None:
        """Look from time to time."""
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        while self._is_closed():
            if poll.poll(_LOOKS_EVERY_S * 1000):
                return None
        return Connection(self._master, self._master)

    def _is_closed(self) -> bool:
        poll = select.poll()
        poll.register(self._master, 0)
        return bool(poll.poll(0))  # POLLHUP is told unasked

    def hang_up(self) -> None:
        """Reading from it has failed already."""

    def ended(self) -> None:
        """The next one opens it again."""

    def close(self) -> None:
        """There is no such terminal any more."""
        os.close(self._master)


# Sockets


def connected(address: Address) -> socket.socket:
    """A socket to somebody who listens; an OSError otherwise."""
    if not isinstance(address, Path):
        return socket.create_connection(address)
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(str(address))
    except BaseException:
        peer.close()
        raise
    return peer


def _listening(address: Address) -> socket.socket:
    if not isinstance(address, Path):
        return socket.create_server(address, family=_family(address), backlog=1)
    if address.is_socket() and _is_left_over(address):
        address.unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(address))
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def _family(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]


def _is_left_over(path: Path) -> bool:
    """Whether nobody listens there."""
    try:
        connected(path).close()
    except OSError as error:
        return error.errno == errno.ECONNREFUSED
    return False


def _hang_up(peer: socket.socket) -> None:
    with suppress(OSError):  # it has gone already
        peer.shutdown(socket.SHUT_RDWR)


def _text(address: Address) -> str:
    return str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"
