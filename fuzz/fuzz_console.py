"""Console devices: any bytes on any queue are served or reset the device; what it keeps stays small."""

from __future__ import annotations

import struct
from typing import Final

from fuzz.virtio import offer
from swsnp.abi.virtio import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
    ConsoleEvent,
    ConsoleFeature,
    DeviceStatus,
)
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.console import Console, Port
from swsnp.vmm.devices.host_end import Nobody
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

__all__ = ["one", "seeds"]

_FEATURES: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
_PLACES: Final = (0x40000, 0x4FFF0, 0x50000, 0x60000)
"""Shared memory, its end, private memory, none."""
_HEAD: Final = struct.Struct("<BBBB")  # queue, place, bytes to read, bytes to write


def _step(queue: int, said: bytes, room: int = 0, place: int = 0) -> bytes:
    return _HEAD.pack(queue, place, len(said), room) + said


def _control(port: int, event: ConsoleEvent, value: int = 1) -> bytes:
    return _step(3, struct.pack("<IHH", port, event, value))


def seeds() -> list[bytes]:
    """A driver that takes both ports into use and writes; one that closes; private and small buffers."""
    empty = [_step(queue, b"", 32) for queue in (0, 4, 2, 2, 2, 2, 2, 2)]
    greets = _control(0, ConsoleEvent.DEVICE_READY)
    ports = b"".join(
        _control(port, event)
        for port in (0, 1)
        for event in (ConsoleEvent.PORT_READY, ConsoleEvent.PORT_OPEN)
    )
    return [
        b"\1" + b"".join(empty) + greets + ports + _step(1, b"out") + _step(5, b"out"),
        b"\1" + greets + ports + _control(1, ConsoleEvent.PORT_OPEN, 0) + _step(4, b"", 8),
        b"\0" + _step(0, b"", 8) + _step(1, b"out"),
        b"\1" + _step(2, b"", 8, 2) + greets,
        b"\1" + _step(2, b"", 2) + greets,
        b"\1" + _step(3, b"short") + _step(4, b"", 9) * 9,
    ]


def one(data: bytes) -> object:
    """The first byte's lowest bit accepts the ports; then steps of one chain each."""
    ports = [Port(0, Nobody(), is_console=True), Port(1, Nobody(), name="name")]
    console = Console(ports)
    assert console.queues == 6
    memory = DriverMemory(0x60000, private=range(0x50000, 0x60000))
    device = VirtioMmio(console, memory, lambda _: None)
    console.connect(device.kick)
    drivers = [VirtioDriver(device, memory, queue=queue) for queue in range(console.queues)]
    features = _FEATURES | (ConsoleFeature.MULTIPORT if data[:1] and data[0] & 1 else 0)
    drivers[0].start(features, others=drivers[1:])
    data = data[1:]
    while len(data) >= _HEAD.size:
        queue, place, size, room = _HEAD.unpack_from(data)
        said, data = data[_HEAD.size :][:size], data[_HEAD.size + size :]
        offer(drivers[queue % len(drivers)], _PLACES[place % len(_PLACES)], said, room)
        ports[queue % 2].receive(b"typed", wait=False)
    broken = bool(drivers[0].status & DeviceStatus.NEEDS_RESET)
    assert broken or not memory.refused
    assert not any(memory.raw[0x50000:])
    assert all(len(each._waiting) < 4096 + 5 and len(each._owed) <= 2 for each in ports)
    return broken, *(min(each.used()[0], 2) for each in drivers), *(each.opened for each in ports)
