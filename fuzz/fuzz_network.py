"""Network devices: any stream of a peer and any driver are served or reset the device; little is kept."""

from __future__ import annotations

import struct
from typing import Final

from fuzz.virtio import offer
from swsnp.abi.virtio import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, DeviceStatus
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.network import Network, framed
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

__all__ = ["one", "seeds"]

_PLACES: Final = (0x14000, 0x1FFF0, 0x20000, 0x30000)
"""Shared memory, its end, private memory, none."""
_HEAD: Final = struct.Struct("<BBHH")  # kind, place, bytes, room
_PEER: Final = 2
_MOST_FRAMES: Final = 60


class _Stream:
    """Somebody who takes everything."""

    connected = True

    def send(self, data: bytes, *, must: bool = False) -> bool:
        assert data[:4] == struct.pack(">I", len(data) - 4)
        assert 14 <= len(data) - 4 <= 1518
        return True


def _step(kind: int, said: bytes, room: int = 0, place: int = 0) -> bytes:
    return _HEAD.pack(kind, place, len(said), room) + said


def seeds() -> list[bytes]:
    """Frames both ways, cut, too large and too small, into private memory, and a length that is none."""
    frame = bytes(range(60))
    return [
        _step(0, b"", 1526) + _step(_PEER, framed(frame)) + _step(1, bytes(12) + frame),
        _step(_PEER, framed(frame)[:20]) + _step(_PEER, framed(frame)[20:] * 2) + _step(0, b"", 1526) * 3,
        _step(_PEER, framed(bytes(2000)) + framed(frame)) + _step(0, b"", 1526),
        _step(1, bytes(12)) + _step(1, bytes(11)),
        _step(0, b"", 1526, 2) + _step(_PEER, framed(frame)),
        _step(0, b"", 11),
        _step(_PEER, bytes(4)) + _step(_PEER, framed(frame)) + _step(0, b"", 1526),
    ]


def one(data: bytes) -> object:
    """Steps: a chain on one of the queues, or bytes of the peer."""
    network = Network(b"\2\0\0\0\0\1", _Stream())
    memory = DriverMemory(0x30000, private=range(0x20000, 0x30000))
    device = VirtioMmio(network, memory, lambda _: None)
    network.connect(device.kick)
    drivers = [VirtioDriver(device, memory, queue=queue) for queue in range(network.queues)]
    drivers[0].start(VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM, others=drivers[1:])
    while len(data) >= _HEAD.size:
        kind, place, size, room = _HEAD.unpack_from(data)
        said, data = data[_HEAD.size :][:size], data[_HEAD.size + size :]
        if kind % 3 < _PEER:
            offer(drivers[kind % 3], _PLACES[place % len(_PLACES)], said, room)
        elif len(network._waiting) + len(said) // 5 < _MOST_FRAMES:  # or this thread would wait for itself
            network.receive(said)
    broken = bool(drivers[0].status & DeviceStatus.NEEDS_RESET)
    assert broken or not memory.refused
    assert not any(memory.raw[0x20000:])
    assert len(network._waiting) <= _MOST_FRAMES
    used = (min(each.used()[0], 3) for each in drivers)
    return broken, network._reader.lost, *used, min(network.dropped, 3)
