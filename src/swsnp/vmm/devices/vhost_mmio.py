"""Virtio over MMIO before a device that is another process: its queues are the daemon's to serve.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapters 2.7 and 4.2; QEMU's documentation,
docs/interop/vhost-user.

The driver's notification becomes the kick of an eventfd, the daemon's call an interrupt. The daemon has the
guest's shared memory and no other: docs/adr/0020.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.virtio import VIRTIO_F_ACCESS_PLATFORM, Interrupt
from swsnp.errors import HostError
from swsnp.vmm.devices.virtio_registers import DeviceKind, VirtioRegisters
from swsnp.vmm.devices.virtqueue import DriverFault, SharedMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.vmm.devices.vhost_user import VhostUser

__all__ = ["PassableMemory", "VhostDevice", "VhostMmio"]

_logger = logging.getLogger(__name__)
_EVENT: Final = os.EFD_CLOEXEC | os.EFD_NONBLOCK


class PassableMemory(SharedMemory, Protocol):
    """Guest memory whose shared side another process can have."""

    def passable(self) -> tuple[tuple[int, int, int], ...]:
        """GPA, bytes and descriptor of each range."""
        ...


class VhostDevice(DeviceKind, Protocol):
    """A device whose queues a daemon serves."""

    @property
    def daemon(self) -> VhostUser:
        """Who serves them."""
        ...


class VhostMmio(VirtioRegisters[VhostDevice]):
    """One device with its registers, for one guest; the daemon may outlast it.

    Args:
        device: what it is.
        memory: guest memory; the daemon gets the shared side of all of it.
        line: its interrupt line.
    """

    def __init__(self, device: VhostDevice, memory: PassableMemory, line: Callable[[bool], None]) -> None:
        self._daemon = device.daemon
        self._ranges = memory.passable()
        self._served: set[int] = set()
        """Queues that the daemon has."""
        self._began = False
        self._kicks = [os.eventfd(0, _EVENT) for _ in range(device.queues)]
        self._calls = [os.eventfd(0, _EVENT) for _ in range(device.queues)]
        self._stopped = os.eventfd(0, _EVENT)
        self._listener: threading.Thread | None = threading.Thread(target=self._listen, daemon=True)
        super().__init__(device, memory, line)
        self._listener.start()

    def stop(self) -> None:
        """Take all queues back: the guest is about to be gone. Again is allowed."""
        with self._lock:
            self._reset()
            listener, self._listener = self._listener, None
        if listener is None:
            return
        os.eventfd_write(self._stopped, 1)
        listener.join()
        for fd in (*self._kicks, *self._calls, self._stopped):
            os.close(fd)

    # What the registers ask for

    def _begin(self, features: int) -> None:
        try:
            self._began = True
            self._daemon.begin(features & ~VIRTIO_F_ACCESS_PLATFORM, self._ranges)
            for number in range(len(self._queues)):
                self._ready_changed(number)
        except DriverFault as fault:
            self._broken(fault)
        except HostError as error:
            self._lost(error)

    def _ready_changed(self, number: int) -> None:
        if not self._began:
            return
        try:
            if self._queues[number].ready:
                self._start(number)
            else:
                self._take_back(number)
        except HostError as error:
            self._lost(error)

    def _notified(self, number: int) -> None:
        if number in self._served and self._running(number) is not None:
            _signal(self._kicks[number])

    def _end(self) -> None:
        try:
            for number in sorted(self._served):
                self._take_back(number)
        except HostError as error:
            _logger.warning("%s", error)
        self._served.clear()
        self._began = False

    def _start(self, number: int) -> None:
        """Hand a queue over, unless it was.

        Raises:
            DriverFault: its rings are not in memory that the guest shares, which the daemon would not see.
            HostError: the daemon does not take it.
        """
        if number in self._served:
            return
        queue = self._queues[number]
        queue.must_be_shared()
        self._daemon.start_queue(number, queue, kick=self._kicks[number], call=self._calls[number])
        self._served.add(number)
        # what the driver has offered before it was ready
        _signal(self._kicks[number])

    def _take_back(self, number: int) -> None:
        if number in self._served:
            self._served.discard(number)
            self._daemon.stop_queue(number)

    # The daemon's side

    def _listen(self) -> None:
        """Interrupts for the daemon's calls, until the device is stopped or the daemon is gone."""
        poll = select.poll()
        for fd in (*self._calls, self._stopped):
            poll.register(fd, select.POLLIN)
        daemon = self._daemon.fileno()
        poll.register(daemon, select.POLLRDHUP)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._stopped in ready:
                return
            called = [number for number, fd in enumerate(self._calls) if fd in ready and _drain(fd)]
            with self._lock:
                if any(self._running(number) is not None for number in called):
                    self._interrupt(Interrupt.USED_BUFFER)
                if daemon in ready:
                    poll.unregister(daemon)
                    self._lost(self._daemon.gone())

    def _lost(self, why: HostError) -> None:
        """The daemon is: a reset is what the guest can try, and it comes to the same then."""
        if self._began:
            _logger.warning("virtio device %d: %s", self._device.device_id, why)
        self._served.clear()
        self._began = False
        self._broken(why)


def _signal(fd: int) -> None:
    with suppress(BlockingIOError):  # it was signalled quite often, and nobody has looked
        os.eventfd_write(fd, 1)


def _drain(fd: int) -> bool:
    """Whether it was signalled."""
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return False
    return True
