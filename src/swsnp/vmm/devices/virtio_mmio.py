"""Virtio over MMIO: devices of this process, whose requests are done where the notification arrives.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapters 2.7 and 4.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from swsnp.abi.virtio import Interrupt
from swsnp.vmm.devices.virtio_registers import DeviceKind, VirtioRegisters
from swsnp.vmm.devices.virtqueue import DriverFault

if TYPE_CHECKING:
    from swsnp.vmm.devices.virtqueue import Chain

__all__ = ["VirtioDevice", "VirtioMmio"]


class VirtioDevice(DeviceKind, Protocol):
    """What is behind the registers."""

    def begin(self, features: int) -> None:
        """The driver is ready, with these features; what was said to the driver before is forgotten."""
        ...

    def serve(self, queue: int, chain: Chain) -> int | None:
        """Do one request; how many bytes of its room were written.

        None: not now. The chain stays in the queue, until `VirtioMmio.kick` or the driver's next
        notification.

        Raises:
            DriverFault: it cannot be answered.
        """
        ...


class VirtioMmio(VirtioRegisters[VirtioDevice]):
    """One device with its registers."""

    def kick(self, queue: int) -> None:
        """Offer the chains of a queue to the device again, which left some there; any thread may.

        Also from within `VirtioDevice.serve`, for another queue.
        """
        with self._lock:
            self._notified(queue)

    def stop(self) -> None:
        """Touch guest memory no more, whoever kicks: the guest is about to be gone."""
        with self._lock:
            self._reset()

    # What the registers ask for

    def _begin(self, features: int) -> None:
        self._device.begin(features)

    def _end(self) -> None:
        """Nothing goes on between notifications."""

    def _notified(self, number: int) -> None:
        if (queue := self._running(number)) is None:
            return
        try:
            served = False
            for chain in queue.offered():
                if (written := self._device.serve(number, chain)) is None:
                    queue.put_back()
                    break
                queue.complete(chain, written)
                served = True
            if served and queue.wants_interrupt():
                self._interrupt(Interrupt.USED_BUFFER)
        except DriverFault as fault:
            self._broken(fault)
