"""The virtio console device: ports, each a stream of bytes both ways between guest and host.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapter 5.3.

A port has a number, and a name or the duty of a console; with VIRTIO_CONSOLE_F_MULTIPORT the driver learns
that by control messages. What is owed to the driver follows from each port's state, so that a driver which
asks again and again, and takes nothing, fills no queue of ours. A driver without the feature has port 0, open
at once.

A reader in a Linux guest takes it for the end of the bytes that the port is closed at the host, and looks for
bytes before that, not again after. So the driver is told only when it has offered all buffers again that had
bytes: Linux does once they are read.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.virtio import (
    CONSOLE_CONTROL_IN,
    CONSOLE_CONTROL_OUT,
    ConsoleConfig,
    ConsoleControl,
    ConsoleEvent,
    ConsoleFeature,
    DeviceId,
    console_queue,
)
from swsnp.vmm.devices.virtqueue import DriverFault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swsnp.vmm.devices.virtqueue import Chain

__all__ = ["Console", "HostEnd", "Port"]

_logger = logging.getLogger(__name__)
_WAITING: Final = 4096
"""Bytes that wait for the guest before more are taken from the host."""


class HostEnd(Protocol):
    """The host's end of a port."""

    @property
    def connected(self) -> bool:
        """Whether somebody is there to talk to."""
        ...

    def send(self, data: bytes, *, must: bool = False) -> bool:
        """Take bytes, at once; False: not now, and the port is told by `Port.room` when. `must` says: now."""
        ...


class Port:
    """One port. `receive`, `room` and `changed` are for the host's end, from any thread of its own.

    Args:
        number: its number; 0 is a console's.
        end: the host's end.
        name: what the guest finds it by; "" for none.
        is_console: the guest makes a terminal of it.
    """

    def __init__(self, number: int, end: HostEnd, *, name: str = "", is_console: bool = False) -> None:
        self.number: Final = number
        self.end: Final = end
        self.opened = False
        self._name, self._is_console = name.encode(errors="surrogateescape"), is_console
        self._kick: Callable[[int], None] = lambda _: None
        self._owed: list[bytes] = []
        self._ready = self._said_open = False
        self._buffers = 0
        """How many buffers for input the driver has, as far as it has shown them."""
        self._unread = False
        """Some of them are not back since there were bytes in them."""
        self._waiting = bytearray()
        self._taken = threading.Condition()
        self._stopped = False

    # The host's side

    def receive(self, data: bytes, *, wait: bool = True) -> None:
        """Bytes for the guest: what waits already is given first.

        Args:
            data: a few thousand bytes at most, since they are kept.
            wait: until there is room for them; else they are dropped when there is none.
        """
        with self._taken:
            if wait:
                self._taken.wait_for(lambda: self._stopped or len(self._waiting) < _WAITING)
            if self._stopped or len(self._waiting) >= _WAITING:
                return
            self._waiting += data
        self._kick(console_queue(self.number))

    def room(self) -> None:
        """The end takes bytes again."""
        self._kick(console_queue(self.number) + 1)

    def changed(self) -> None:
        """`connected` of the end is another than before; that nobody is there is told behind what waits."""
        self._kick(CONSOLE_CONTROL_IN)

    def stop(self) -> None:
        """Nothing is received any more: nobody waits in `receive`, until `go`."""
        with self._taken:
            self._stopped = True
            self._taken.notify_all()

    def go(self) -> None:
        """Receive again."""
        self._stopped = False

    # The device's side

    def connect(self, kick: Callable[[int], None]) -> None:
        """What makes the device look at a queue."""
        self._kick = kick

    def begin(self, *, opened: bool) -> None:
        """A driver knows nothing of it yet; whether the guest reads and writes without saying so."""
        self._owed, self._ready, self._said_open, self.opened = [], False, False, opened
        self._buffers, self._unread = 0, False

    def give(self, chain: Chain) -> int | None:
        """Bytes for the guest, as many as wait and have room."""
        if not chain.room:
            raise DriverFault(f"console port {self.number}: no room in a buffer for input")
        with self._taken:
            piece = bytes(self._waiting[: chain.room]) if self.opened else b""
            del self._waiting[: len(piece)]
            self._taken.notify_all()
        self._buffers = max(self._buffers, chain.on_offer)
        if piece:
            self._unread = True
            chain.write(piece)
            return len(piece)
        if self._unread and chain.on_offer == self._buffers:
            self._unread = False
            self._kick(CONSOLE_CONTROL_IN)
        return None

    def add(self) -> None:
        """The driver wants to hear of its ports."""
        self.begin(opened=False)
        self._owed = [self._message(ConsoleEvent.DEVICE_ADD, 1)]

    def ready(self) -> None:
        """The driver has this port, and wants to hear more of it."""
        self._ready, self._said_open = True, False
        self._owed = [self._message(ConsoleEvent.CONSOLE_PORT, 1)] if self._is_console else []
        if self._name:
            self._owed.append(self._message(ConsoleEvent.PORT_NAME, 1) + self._name)

    def owed(self) -> bytes | None:
        """The next control message; None when the driver knows everything."""
        if self._owed:
            return self._owed.pop(0)
        is_open = self.end.connected or bool(self._waiting) or self._unread
        if not self._ready or is_open == self._said_open:
            return None
        self._said_open = is_open
        return self._message(ConsoleEvent.PORT_OPEN, int(is_open))

    def _message(self, event: ConsoleEvent, value: int) -> bytes:
        return bytes(ConsoleControl(id=self.number, event=event, value=value))


class Console:
    """Ports, as `virtio_mmio.VirtioDevice`.

    Args:
        ports: by rising numbers.
        most: how many ports the driver shall make queues for; None: as many as there are.
    """

    device_id: Final = DeviceId.CONSOLE
    queue_size: Final = 32
    """Linux fills each queue for input with buffers of a page, which bounce."""
    features: Final = int(ConsoleFeature.MULTIPORT)

    def __init__(self, ports: Sequence[Port], *, most: int | None = None) -> None:
        self.ports: Final = tuple(ports)
        self._by_number = {each.number: each for each in ports}
        most = max(self._by_number, default=0) + 1 if most is None else most
        self.queues: Final = console_queue(most)
        self.config: Final = bytes(ConsoleConfig(max_nr_ports=most))
        self._kick: Callable[[int], None] = lambda _: None
        self._ending = False

    def connect(self, kick: Callable[[int], None]) -> None:
        """What makes the transport offer a queue's chains again: `VirtioMmio.kick`."""
        self._kick = kick
        for each in self.ports:
            each.connect(kick)

    def finish(self) -> None:
        """The guest has ended: take what it has said before, however slow the host's ends are."""
        self._ending = True
        for each in self.ports:
            each.room()

    def begin(self, features: int) -> None:
        """A new driver."""
        self._ending = False
        several = bool(features & ConsoleFeature.MULTIPORT)
        for each in self.ports:
            each.begin(opened=not several and each.number == 0)

    def serve(self, queue: int, chain: Chain) -> int | None:
        """Bytes of a port, or a control message."""
        if queue == CONSOLE_CONTROL_IN:
            return self._tell(chain)
        if queue == CONSOLE_CONTROL_OUT:
            self._listen(chain.read())
            return 0
        port = self._by_number.get(max(queue // 2 - 1, 0))
        if queue % 2:
            return self._take(port, chain)
        return None if port is None else port.give(chain)

    def _take(self, port: Port | None, chain: Chain) -> int | None:
        """What the guest writes; where nobody is, it is lost."""
        data = chain.read()
        if port is not None and port.end.connected and not port.end.send(data, must=self._ending):
            return None
        return 0

    def _tell(self, chain: Chain) -> int | None:
        for port in self.ports:
            if (message := port.owed()) is not None:
                if len(message) > chain.room:
                    raise DriverFault(f"console control: got room for {chain.room} of {len(message)} bytes")
                chain.write(message)
                return len(message)
        return None

    def _listen(self, said: bytes) -> None:
        """A driver's control message; what makes no sense is left alone."""
        if len(said) < ConsoleControl.SIZE:
            _logger.info("console control: got %d bytes, wanted %d", len(said), ConsoleControl.SIZE)
            return
        message = ConsoleControl.parse(said[: ConsoleControl.SIZE])
        port = self._by_number.get(message.id)
        match message.event:
            case ConsoleEvent.DEVICE_READY if message.value:
                for each in self.ports:
                    each.add()
                self._kick(CONSOLE_CONTROL_IN)
            case ConsoleEvent.PORT_READY if message.value and port is not None:
                port.ready()
                self._kick(CONSOLE_CONTROL_IN)
            case ConsoleEvent.PORT_OPEN if port is not None:
                port.opened = bool(message.value)
                self._kick(console_queue(port.number))
            case _:
                _logger.info("console control: left alone: %s", message)
