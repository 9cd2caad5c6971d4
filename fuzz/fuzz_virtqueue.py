"""Virtqueues and block requests: served, or the device needs a reset; private memory and disk's size stay."""

from __future__ import annotations

import struct
from typing import Final

from swsnp.abi.virtio import DescriptorFlag, DeviceStatus, MmioRegister, VirtqDescriptor
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.block import Block
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

__all__ = ["one", "seeds"]

_SIZE: Final = 0x5000
_PRIVATE: Final = range(0x3000, 0x4000)
_DISK: Final = 4096


class _Disk:
    """Zeros, and what is written."""

    read_only = False
    size = _DISK

    def __init__(self) -> None:
        self.raw = bytearray(_DISK)

    def read(self, at: int, size: int) -> bytes:
        return bytes(self.raw[at : at + size])

    def write(self, at: int, data: bytes | memoryview) -> None:
        self.raw[at : at + len(data)] = data

    def flush(self) -> None:
        pass


def _memory(*descriptors: VirtqDescriptor, heads: tuple[int, ...] = (0,), request: bytes = b"") -> bytes:
    """Descriptor table, available ring, request: as `one` puts them into memory."""
    table = b"".join(map(bytes, descriptors)).ljust(128, b"\0")
    ring = struct.pack("<HH8H", 0, len(heads), *heads, *[0] * (8 - len(heads)))
    return table + ring + request


def seeds() -> list[bytes]:
    """A read, a write, two at once, a loop, one into private memory."""
    head = VirtqDescriptor(addr=0x4000, len=16, flags=DescriptorFlag.NEXT, next=1)
    more = VirtqDescriptor(addr=0x4200, len=512, flags=DescriptorFlag.NEXT, next=2)
    room = more.but(flags=DescriptorFlag.NEXT | DescriptorFlag.WRITE)
    status = VirtqDescriptor(addr=0x4800, len=1, flags=DescriptorFlag.WRITE)
    read, write = struct.pack("<IIQ", 0, 0, 1), struct.pack("<IIQ", 1, 0, 7)
    return [
        _memory(head, room, status, request=read),
        _memory(head, more, status, request=write),
        _memory(head, room, status, heads=(0, 0), request=read),
        _memory(head.but(next=0), request=read),
        _memory(head, room.but(addr=_PRIVATE.start), status, request=read),
    ]


def one(data: bytes) -> object:
    """Let the device take what the bytes say."""
    memory, disk = DriverMemory(_SIZE, private=_PRIVATE), _Disk()
    driver = VirtioDriver(VirtioMmio(Block(disk), memory, lambda _: None), memory)
    driver.start()
    memory.raw[0:128] = data[:128].ljust(128, b"\0")
    memory.raw[0x1000:0x1014] = data[128:148].ljust(20, b"\0")
    request = data[148:][:0x1000]
    memory.raw[0x4000 : 0x4000 + len(request)] = request
    driver.put(MmioRegister.QUEUE_NOTIFY, 0)
    broken = bool(driver.status & DeviceStatus.NEEDS_RESET)
    assert len(memory.raw) == _SIZE
    assert len(disk.raw) == _DISK
    assert not any(memory.raw[_PRIVATE.start : _PRIVATE.stop])
    assert broken or not memory.refused
    count, entries = driver.used()
    return broken, count, entries[0][1] > 0
