"""The host's end of a port: a thread writes what the guest says, another reads what is said to the guest.

What waits is bounded in both directions: a peer that reads slowly stops the guest's writing, a guest that
does not read stops the peer's. A peer that goes takes with it what it has not read.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Connection", "HostStream", "InputEnd", "Nobody", "PortFace", "Source"]

_logger = logging.getLogger(__name__)
_CHUNK: Final = 4096
"""Bytes at a time: so many a pipe or terminal takes without a wait once it is said to be ready."""
_MOST: Final = 64 << 10
"""Bytes that wait for the peer before the guest has to wait."""
_PATIENCE_S: Final = 1.0
"""For a peer that takes nothing, after the guest has ended."""


class PortFace(Protocol):
    """What a stream tells its port; see `console.Port`."""

    def receive(self, data: bytes, *, wait: bool = True) -> None:
        """Bytes for the guest."""
        ...

    def room(self) -> None:
        """`send` takes bytes again."""
        ...

    def changed(self) -> None:
        """`connected` has changed."""
        ...

    def stop(self) -> None:
        """Nobody shall wait in `receive`."""
        ...


class Connection(NamedTuple):
    """Descriptors of one peer; `reads` None: it says nothing."""

    reads: int | None
    writes: int


class Source(Protocol):
    """Where peers come from."""

    patient: bool
    """What is written goes somewhere in the end: there is no giving up on it."""

    def first(self) -> Connection | None:
        """The peer that is there from the start."""
        ...

    def next(self, stop: int) -> Connection | None:
        """Wait for another peer; None when there will be none, or the descriptor `stop` can be read."""
        ...

    def hang_up(self) -> None:
        """The peer is gone, or is to be: nobody shall wait for it any more."""
        ...

    def ended(self) -> None:
        """Give the peer's descriptors back."""
        ...

    def close(self) -> None:
        """Give back everything."""
        ...


class Nobody:
    """An end where everything is lost and nothing comes from."""

    connected: Final = True

    def attach(self, port: PortFace) -> None:
        """Nothing to tell it."""

    def send(self, data: bytes, *, must: bool = False) -> bool:
        """Gone."""
        return True

    def close(self) -> None:
        """Nothing to give back."""


class InputEnd:
    """An end that gives bytes and is at its end some time. `attach` comes first.

    A reader in a Linux guest finds the end of a port that is closed at the host, be it closed already or not
    open yet. So the end is told only when the guest has written something, which it can as soon as it knows
    that the port is open.
    """

    def __init__(self) -> None:
        self._port: PortFace
        self._is_heard = self._is_over = False

    def attach(self, port: PortFace) -> None:
        """Where its bytes go."""
        self._port = port

    @property
    def connected(self) -> bool:
        """Until it is at its end, and the guest has noticed that it began."""
        return not (self._is_heard and self._is_over)

    def send(self, data: bytes, *, must: bool = False) -> bool:
        """What the guest writes says only that it is there."""
        self._is_heard = True
        self._port.changed()
        return True

    def give(self, data: bytes) -> None:
        """Bytes for the guest; waits until there is room for them. See `PortFace.receive`."""
        self._port.receive(data)

    def finish(self) -> None:
        """There are no more."""
        self._is_over = True
        self._port.changed()

    def close(self) -> None:
        """Nobody shall wait in `give`."""
        self._port.stop()


class HostStream:
    """As `console.HostEnd`, over descriptors. `attach` starts it, `close` writes what waits and ends it.

    Args:
        source: where its peers come from; becomes this object's.
        on_send: called with every `send` that is taken.
    """

    def __init__(self, source: Source, *, on_send: Callable[[], None] = lambda: None) -> None:
        self._source, self._on_send = source, on_send
        self._peer: Connection | None = None
        self._changed = threading.Condition()
        self._writing = threading.Lock()
        """Held while the peer's descriptors are used, which nobody gives back then."""
        self._waiting = bytearray()
        self._refused = self._closing = False
        self._stopped, self._stop = os.pipe()
        self._threads: list[threading.Thread] = []
        self._port: PortFace | None = None

    def attach(self, port: PortFace) -> None:
        """Begin to move bytes."""
        self._port = port
        self._peer = self._source.first()
        for work, name in ((self._read_all, "reader"), (self._write_all, "writer")):
            thread = threading.Thread(target=work, args=(port,), name=f"port {name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def connected(self) -> bool:
        """Whether there is a peer."""
        return self._peer is not None

    def send(self, data: bytes, *, must: bool = False) -> bool:
        """Take bytes for the peer. See `console.HostEnd`."""
        with self._changed:
            if len(self._waiting) >= _MOST and not must:
                self._refused = True
                return False
            self._waiting += data
            self._changed.notify_all()
        self._on_send()
        return True

    def close(self) -> None:
        """Write what waits, to a peer that is slow for a second at most, and give everything back."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        os.close(self._stop)  # before the reader is woken: it must not read on
        if self._port is not None:
            self._port.stop()
        for each in self._threads:
            each.join()
        os.close(self._stopped)
        if self._peer is not None:
            self._source.ended()
        self._source.close()

    # Towards the guest

    def _read_all(self, port: PortFace) -> None:
        if self._peer is not None:
            self._read(self._peer, port)
        while not self._closing and (peer := self._source.next(self._stopped)) is not None:
            self._peer = peer
            port.changed()
            self._read(peer, port)

    def _read(self, peer: Connection, port: PortFace) -> None:
        """Until it says no more; one that never says anything stays."""
        if peer.reads is None:
            return
        while True:
            if self._stopped in _wait([peer.reads, self._stopped], []):
                return
            try:
                data = os.read(peer.reads, _CHUNK)
            except BlockingIOError:
                continue
            except OSError as error:
                _logger.info("port: its peer is gone: %s", error)
                data = b""
            if not data:
                break
            port.receive(data)
        self._gone()
        port.changed()

    def _gone(self) -> None:
        with self._changed:
            self._peer = None
            self._waiting.clear()
        self._source.hang_up()
        with self._writing:
            self._source.ended()

    # Towards the peer

    def _write_all(self, port: PortFace) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                piece, peer = bytes(self._waiting[:_CHUNK]), self._peer
                del self._waiting[:_CHUNK]
                asks = self._refused and len(self._waiting) < _MOST
                self._refused = self._refused and not asks
            if asks:
                port.room()
            while piece and peer is not None:
                with self._writing:
                    piece = piece[self._write(peer, piece) :] if self._peer is peer else b""

    def _write(self, peer: Connection, piece: bytes) -> int:
        """How many bytes are done with."""
        ending, patience = self._closing, None
        if ending and not self._source.patient:
            patience = _PATIENCE_S
        try:
            if peer.writes in _wait([] if ending else [self._stopped], [peer.writes], patience):
                return os.write(peer.writes, piece)
        except BlockingIOError:
            return 0
        except OSError as error:
            _logger.info("port: %d bytes are lost: %s", len(piece), error)
            return len(piece)
        if not ending:
            return 0
        with self._changed:
            lost = len(piece) + len(self._waiting)
            self._waiting.clear()
        _logger.info("port: %d bytes are lost, which its peer does not take", lost)
        return len(piece)


def _wait(reads: list[int], writes: list[int], timeout_s: float | None = None) -> set[int]:
    """Those that are ready, or will never be."""
    poll = select.poll()
    for fd in reads:
        poll.register(fd, select.POLLIN)
    for fd in writes:
        poll.register(fd, select.POLLOUT)
    return {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)}
