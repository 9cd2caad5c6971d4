"""The registers through which a driver finds, configures and notifies a virtio device over MMIO.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapters 2.1, 2.4, 3.1 and 4.2.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from swsnp.abi.virtio import (
    CONFIG_AT,
    MMIO_MAGIC,
    MMIO_VERSION,
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
    DeviceStatus,
    Interrupt,
    MmioRegister,
)
from swsnp.vmm.devices.virtqueue import DriverFault, Virtqueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.vmm.devices.virtqueue import SharedMemory

__all__ = ["DeviceKind", "VirtioRegisters"]

_logger = logging.getLogger(__name__)
_VENDOR: Final = int.from_bytes(b"SNPS", "little")
_REQUIRED: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
_ONES: Final = (1 << 32) - 1
_RUNNING: Final = DeviceStatus.DRIVER_OK | DeviceStatus.FEATURES_OK
_BY_DRIVER: Final = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | _RUNNING | DeviceStatus.FAILED
_ADDRESSES: Final = {
    MmioRegister.QUEUE_DESC_LOW: ("descriptors", 0),
    MmioRegister.QUEUE_DESC_HIGH: ("descriptors", 32),
    MmioRegister.QUEUE_DRIVER_LOW: ("available", 0),
    MmioRegister.QUEUE_DRIVER_HIGH: ("available", 32),
    MmioRegister.QUEUE_DEVICE_LOW: ("used", 0),
    MmioRegister.QUEUE_DEVICE_HIGH: ("used", 32),
}


class DeviceKind(Protocol):
    """What a driver finds of a device."""

    @property
    def device_id(self) -> int:
        """`DeviceId`."""
        ...

    @property
    def features(self) -> int:
        """Feature bits of its kind, and of its queues."""
        ...

    @property
    def queues(self) -> int:
        """How many."""
        ...

    @property
    def queue_size(self) -> int:
        """Descriptors that each of them can have, a power of two."""
        ...

    @property
    def config(self) -> bytes:
        """Its configuration, read-only."""
        ...


_D = TypeVar("_D", bound=DeviceKind)


class VirtioRegisters(Generic[_D]):
    """One device, as `bus.Device`; accesses of several vCPUs come one after the other.

    What a device does is a subclass's: `_begin`, `_notified`, `_ready_changed` and `_end`, which are called
    with `_lock` held.

    Args:
        device: what it is.
        memory: guest memory, as far as the guest shares it.
        line: its interrupt line.
    """

    def __init__(self, device: _D, memory: SharedMemory, line: Callable[[bool], None]) -> None:
        self._device, self._line = device, line
        self._features = device.features | _REQUIRED
        self._queues = tuple(Virtqueue(memory, device.queue_size) for _ in range(device.queues))
        self._lock = threading.RLock()
        self._writers: Final[dict[int, Callable[[int], None]]] = {
            MmioRegister.STATUS: self._set_status,
            MmioRegister.INTERRUPT_ACK: self._acknowledge,
            MmioRegister.DEVICE_FEATURES_SEL: self._select_device_features,
            MmioRegister.DRIVER_FEATURES_SEL: self._select_driver_features,
            MmioRegister.DRIVER_FEATURES: self._set_driver_features,
            MmioRegister.QUEUE_SEL: self._select_queue,
            MmioRegister.QUEUE_SIZE: self._set_queue_size,
            MmioRegister.QUEUE_READY: self._set_queue_ready,
            MmioRegister.QUEUE_NOTIFY: self._notified,
        }
        self._level = False
        self._clear()

    # What a subclass does

    def _begin(self, features: int) -> None:
        """The driver is ready, with these features of those that were offered."""
        raise NotImplementedError

    def _notified(self, queue: int) -> None:
        """The driver says that there is something in a queue, which may be none."""
        raise NotImplementedError

    def _ready_changed(self, queue: int) -> None:
        """The driver has enabled a queue, or taken it back; before `_begin`, too."""

    def _end(self) -> None:
        """The driver resets the device, which may not have begun."""
        raise NotImplementedError

    def _reset(self) -> None:
        self._end()
        self._clear()

    def _clear(self) -> None:
        self._status = 0
        self._interrupts = 0
        self._accepted = 0
        self._device_select = self._driver_select = self._queue_select = 0
        for each in self._queues:
            each.reset()
        self._settle()

    # Accesses

    def read(self, offset: int, size: int) -> int:
        """Registers by 32 bits; the configuration in any way."""
        with self._lock:
            if offset >= CONFIG_AT:
                at = offset - CONFIG_AT
                return int.from_bytes(self._device.config[at : at + size], "little")
            return self._register(offset) if size == 4 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Registers by 32 bits; the configuration cannot be written."""
        with self._lock:
            if size != 4:
                return
            if offset in _ADDRESSES:
                self._set_address(*_ADDRESSES[MmioRegister(offset)], value)
            elif (writer := self._writers.get(offset)) is not None:
                writer(value)

    def _register(self, offset: int) -> int:
        queue = self._queue()
        match offset:
            case MmioRegister.MAGIC:
                return MMIO_MAGIC
            case MmioRegister.VERSION:
                return MMIO_VERSION
            case MmioRegister.DEVICE_ID:
                return self._device.device_id
            case MmioRegister.VENDOR_ID:
                return _VENDOR
            case MmioRegister.DEVICE_FEATURES:
                return self._features >> 32 * self._device_select & _ONES
            case MmioRegister.QUEUE_SIZE_MAX:
                return 0 if queue is None else queue.largest
            case MmioRegister.QUEUE_READY:
                return 0 if queue is None else int(queue.ready)
            case MmioRegister.INTERRUPT_STATUS:
                return self._interrupts
            case MmioRegister.STATUS:
                return self._status
            case MmioRegister.SHM_LEN_LOW | MmioRegister.SHM_LEN_HIGH:
                return _ONES  # no shared memory of any number
            case _:
                return 0

    # Status and features

    def _set_status(self, value: int) -> None:
        """Bits only come, until 0 is written; features are judged when the driver says that it has chosen."""
        if not value:
            self._reset()
            return
        new = value & _BY_DRIVER
        chosen = self._accepted & ~self._features == 0 and self._accepted & _REQUIRED == _REQUIRED
        if not chosen:
            new &= ~DeviceStatus.FEATURES_OK
        before = self._status & _RUNNING
        self._status |= new
        if before != _RUNNING == self._status & _RUNNING:
            self._begin(self._accepted)

    def _select_device_features(self, value: int) -> None:
        self._device_select = value

    def _select_driver_features(self, value: int) -> None:
        self._driver_select = value

    def _set_driver_features(self, value: int) -> None:
        if self._driver_select < 2 and not self._status & DeviceStatus.FEATURES_OK:
            shift = 32 * self._driver_select
            self._accepted = self._accepted & ~(_ONES << shift) | value << shift

    # Queues

    def _queue(self) -> Virtqueue | None:
        return self._queues[self._queue_select] if self._queue_select < len(self._queues) else None

    def _select_queue(self, value: int) -> None:
        self._queue_select = value

    def _set_queue_size(self, value: int) -> None:
        if (queue := self._queue()) is not None and not queue.ready:
            queue.size = value

    def _set_address(self, name: str, shift: int, value: int) -> None:
        if (queue := self._queue()) is not None and not queue.ready:
            setattr(queue, name, getattr(queue, name) & ~(_ONES << shift) | value << shift)

    def _set_queue_ready(self, value: int) -> None:
        if (queue := self._queue()) is None:
            return
        try:
            if not value & 1:
                queue.disable()
            elif not queue.ready:
                queue.enable()
            self._ready_changed(self._queue_select)
        except DriverFault as fault:
            self._broken(fault)

    def _running(self, number: int) -> Virtqueue | None:
        """A queue that may be used now; None for one that may not, or is not there."""
        status = self._status & (_RUNNING | DeviceStatus.NEEDS_RESET)
        if status != _RUNNING or number >= len(self._queues) or not self._queues[number].ready:
            return None
        return self._queues[number]

    def _broken(self, fault: Exception) -> None:
        """Nothing is done any more until the driver resets the device."""
        _logger.info("virtio device %d needs a reset: %s", self._device.device_id, fault)
        self._status |= DeviceStatus.NEEDS_RESET
        if self._status & DeviceStatus.DRIVER_OK:
            self._interrupt(Interrupt.CONFIGURATION)

    # Interrupts

    def _interrupt(self, reason: Interrupt) -> None:
        self._interrupts |= reason
        self._settle()

    def _acknowledge(self, value: int) -> None:
        self._interrupts &= ~value
        self._settle()

    def _settle(self) -> None:
        """The line is up as long as there is a reason."""
        if (wanted := bool(self._interrupts)) != self._level:
            self._level = wanted
            self._line(wanted)
