"""A small driver of virtio-mmio devices, in place of a guest's: what tests speak to our devices with.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapters 2.7, 3.1 and 4.2.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.virtio import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
    DescriptorFlag,
    DeviceStatus,
    MmioRegister,
    VirtqDescriptor,
)
from swsnp.hardware.memory import BusError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swsnp.vmm.devices.virtio_registers import VirtioRegisters

__all__ = ["DriverMemory", "VirtioDriver"]

_AVAILABLE: Final = 0x1000
_USED: Final = 0x2000
_BUFFERS: Final = 0x4000
_QUEUE: Final = 0x8000
"""From one queue's memory to the next one's."""
_MASK: Final = (1 << 32) - 1


class DriverMemory:
    """Guest memory from address 0: everything is shared but `private`, as a range of addresses.

    Attributes:
        raw: the bytes.
        refused: how many accesses of the device were refused.
    """

    def __init__(self, size: int = 1 << 20, private: range = range(0)) -> None:
        self.raw = bytearray(size)
        self.private = private
        self.refused = 0

    def read_shared(self, gpa: int, size: int) -> bytes:
        """As `GuestRam.read_shared`."""
        self._judge(gpa, size)
        return bytes(self.raw[gpa : gpa + size])

    def write_shared(self, gpa: int, data: bytes) -> None:
        """As `GuestRam.write_shared`."""
        self._judge(gpa, len(data))
        self.raw[gpa : gpa + len(data)] = data

    def _judge(self, gpa: int, size: int) -> None:
        outside = gpa < 0 or gpa + size > len(self.raw)
        if outside or (gpa < self.private.stop and self.private.start < gpa + size):
            self.refused += 1
            raise BusError(f"gpa {gpa:#x}: {size} bytes from there are not all shared with the host")


class VirtioDriver:
    """Brings a device up and sends it requests on one queue, each as a chain from descriptor 0.

    A device with several queues has an object for each; one of them starts it together with the others.
    """

    def __init__(
        self, device: VirtioRegisters[Any], memory: DriverMemory, *, size: int = 8, queue: int = 0
    ) -> None:
        self.device, self.memory, self.size, self.queue = device, memory, size, queue
        self._base = _QUEUE * queue
        self._offered = 0

    def get(self, register: int) -> int:
        """A 32-bit register."""
        return self.device.read(register, 4)

    def put(self, register: int, value: int) -> None:
        """A 32-bit register."""
        self.device.write(register, 4, value)

    @property
    def status(self) -> int:
        """The device's, bits of `DeviceStatus`."""
        return self.get(MmioRegister.STATUS)

    def features(self) -> int:
        """What the device offers, 64 bits."""
        words = []
        for number in (0, 1):
            self.put(MmioRegister.DEVICE_FEATURES_SEL, number)
            words.append(self.get(MmioRegister.DEVICE_FEATURES))
        return words[0] | words[1] << 32

    def accept(self, features: int) -> int:
        """Reset the device, choose features, and see what it says."""
        self.put(MmioRegister.STATUS, 0)
        self.put(MmioRegister.STATUS, DeviceStatus.ACKNOWLEDGE)
        self.put(MmioRegister.STATUS, DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
        for number in (0, 1):
            self.put(MmioRegister.DRIVER_FEATURES_SEL, number)
            self.put(MmioRegister.DRIVER_FEATURES, features >> 32 * number & _MASK)
        self.put(MmioRegister.STATUS, self.status | DeviceStatus.FEATURES_OK)
        return self.status

    def start(
        self,
        features: int = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM,
        *,
        others: Sequence[VirtioDriver] = (),
    ) -> None:
        """Everything up to DRIVER_OK, with this queue and the others."""
        self.accept(features)
        for each in (self, *others):
            each.set_up()
        self.put(MmioRegister.STATUS, self.status | DeviceStatus.DRIVER_OK)

    def set_up(self) -> None:
        """Empty rings, and the queue enabled."""
        self._offered = 0
        for ring in (_AVAILABLE, _USED):
            self.memory.raw[self._base + ring : self._base + ring + 4] = bytes(4)
        self.set_queue(self._base, self._base + _AVAILABLE, self._base + _USED)

    def set_queue(self, descriptors: int, available: int, used: int) -> None:
        """Addresses of the queue, and enable it."""
        self.put(MmioRegister.QUEUE_SEL, self.queue)
        self.put(MmioRegister.QUEUE_SIZE, self.size)
        for register, gpa in (
            (MmioRegister.QUEUE_DESC_LOW, descriptors),
            (MmioRegister.QUEUE_DRIVER_LOW, available),
            (MmioRegister.QUEUE_DEVICE_LOW, used),
        ):
            self.put(register, gpa & _MASK)
            self.put(register + 4, gpa >> 32)
        self.put(MmioRegister.QUEUE_READY, 1)

    def describe(self, index: int, descriptor: VirtqDescriptor) -> None:
        """Write a descriptor."""
        at = self._base + VirtqDescriptor.SIZE * index
        self.memory.raw[at : at + VirtqDescriptor.SIZE] = bytes(descriptor)

    def offer(self, *heads: int, flags: int = 0) -> None:
        """Put chains into the available ring, and notify."""
        for head in heads:
            at = self._base + _AVAILABLE + 4 + 2 * (self._offered % self.size)
            struct.pack_into("<H", self.memory.raw, at, head)
            self._offered = self._offered + 1 & 0xFFFF
        struct.pack_into("<HH", self.memory.raw, self._base + _AVAILABLE, flags, self._offered)
        self.put(MmioRegister.QUEUE_NOTIFY, self.queue)

    def used(self) -> tuple[int, list[tuple[int, int]]]:
        """Index of the used ring, and its entries by slot: head and length."""
        (index,) = struct.unpack_from("<H", self.memory.raw, self._base + _USED + 2)
        slots = range(self._base + _USED + 4, self._base + _USED + 4 + 8 * self.size, 8)
        return index, [struct.unpack_from("<II", self.memory.raw, at) for at in slots]

    def chain(self, readable: Sequence[bytes], writable: Sequence[int]) -> list[tuple[int, int]]:
        """Lay out a chain of buffers from descriptor 0 on; address and size of the writable ones."""
        at, room = self._base + _BUFFERS, []
        sizes = [*map(len, readable), *writable]
        for index, size in enumerate(sizes):
            flags = 0 if index < len(readable) else int(DescriptorFlag.WRITE)
            if index < len(readable):
                self.memory.raw[at : at + size] = readable[index]
            else:
                room.append((at, size))
            if index + 1 < len(sizes):
                flags |= DescriptorFlag.NEXT
            self.describe(index, VirtqDescriptor(addr=at, len=size, flags=flags, next=index + 1))
            at += size
        return room

    def request(self, readable: Sequence[bytes], writable: Sequence[int]) -> tuple[int, bytes]:
        """One request: the used length, and what is in the writable buffers then."""
        room = self.chain(readable, writable)
        before = self.used()[0]
        self.offer(0)
        index, entries = self.used()
        if index != before + 1 & 0xFFFF:
            raise AssertionError(f"used index {index} after {before}")
        length = entries[before % self.size][1]
        return length, b"".join(bytes(self.memory.raw[at : at + size]) for at, size in room)
