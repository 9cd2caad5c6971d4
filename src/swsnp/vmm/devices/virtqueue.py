"""Split virtqueues: what a driver offers is judged before a byte of it is touched.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapter 2.7.

The rings and all buffers lie in memory that the guest shares. A driver that breaks a rule gets `DriverFault`
raised against it, which the transport turns into DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from swsnp.abi.virtio import AVAIL_NO_INTERRUPT, DescriptorFlag, VirtqDescriptor
from swsnp.hardware.memory import BusError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Buffer", "Chain", "DriverFault", "LARGEST_CHAIN", "QUEUE_SIZE", "SharedMemory", "Virtqueue"]

QUEUE_SIZE: Final = 128
"""Descriptors that a queue can have, unless its device says less."""
LARGEST_CHAIN: Final = 16 << 20
"""Bytes that one chain may name, all its buffers together: what the host holds for it at a time."""
_INDICES: Final = 1 << 16
_RING_HEAD: Final = 4
_EVENT_INDEX: Final = 2
"""Behind each ring, with VIRTIO_F_EVENT_IDX."""
_U16: Final = struct.Struct("<H")
_HEAD: Final = struct.Struct("<HH")  # flags, idx
_USED: Final = struct.Struct("<II")  # id, len
_ALIGNMENTS: Final = {"descriptor table": 16, "available ring": 2, "used ring": 4}
_KNOWN_FLAGS: Final = DescriptorFlag.NEXT | DescriptorFlag.WRITE


class DriverFault(Exception):
    """The driver broke a rule: rule, got, wanted."""


class SharedMemory(Protocol):
    """Guest memory as a device may touch it; BusError for what is private or not there."""

    def read_shared(self, gpa: int, size: int) -> bytes:
        """Copy out of it."""
        ...

    def write_shared(self, gpa: int, data: bytes) -> None:
        """Copy into it."""
        ...


class Buffer(NamedTuple):
    """Memory that one descriptor names."""

    gpa: int
    size: int


class Chain:
    """One request: buffers for the device to read, then buffers for it to write.

    Attributes:
        on_offer: how many chains the driver's queue held for the device, this one and those behind it.
    """

    def __init__(
        self, memory: SharedMemory, head: int, readable: list[Buffer], writable: list[Buffer], on_offer: int
    ) -> None:
        self.head, self.on_offer = head, on_offer
        self._memory = memory
        self._readable, self._writable = readable, writable

    @property
    def room(self) -> int:
        """Bytes that the device may write."""
        return sum(each.size for each in self._writable)

    def read(self) -> bytes:
        """All that the driver says; DriverFault for a buffer that is not shared memory."""
        return b"".join(_read(self._memory, each.gpa, each.size) for each in self._readable)

    def write(self, data: bytes | memoryview, at: int = 0) -> None:
        """Answer, from byte `at` of the room on, which must be large enough; DriverFault as `read`."""
        view = memoryview(data)
        for each in self._writable:
            if at < each.size and view:
                piece = view[: each.size - at]
                _write(self._memory, each.gpa + at, bytes(piece))
                view = view[len(piece) :]
                at += len(piece)
            at -= each.size


class Virtqueue:
    """One queue. The transport sets `size` and addresses, then calls `enable`.

    Args:
        memory: where it lies.
        largest: descriptors that it can have, a power of two.

    Attributes:
        size: descriptors; a power of two.
        descriptors: GPA of the descriptor table.
        available: GPA of the available ring, which the driver writes.
        used: GPA of the used ring, which the device writes.
        ready: whether the driver has enabled it.
    """

    def __init__(self, memory: SharedMemory, largest: int = QUEUE_SIZE) -> None:
        self._memory = memory
        self.largest: Final = largest
        self.reset()

    def reset(self) -> None:
        """As after the reset of the device."""
        self.size = self.descriptors = self.available = self.used = 0
        self.ready = False
        self._taken = self._done = 0

    def enable(self) -> None:
        """Begin with empty rings.

        Raises:
            DriverFault: a size that no queue has, or an address that is not aligned.
        """
        if not 0 < self.size <= self.largest or self.size & self.size - 1:
            raise DriverFault(f"queue size: got {self.size}, wanted a power of two up to {self.largest}")
        areas = zip(_ALIGNMENTS.items(), (self.descriptors, self.available, self.used), strict=True)
        for (name, alignment), gpa in areas:
            if gpa % alignment:
                raise DriverFault(f"{name}: got {gpa:#x}, wanted a multiple of {alignment}")
        self._taken = self._done = 0
        self.ready = True

    def must_be_shared(self) -> None:
        """For a queue that another process serves.

        Raises:
            DriverFault: one of its rings is not wholly in memory that the guest shares.
        """
        for gpa, size in (
            (self.descriptors, VirtqDescriptor.SIZE * self.size),
            (self.available, _RING_HEAD + _U16.size * self.size + _EVENT_INDEX),
            (self.used, _RING_HEAD + _USED.size * self.size + _EVENT_INDEX),
        ):
            _read(self._memory, gpa, size)

    def disable(self) -> None:
        """The driver took it back."""
        self.ready = False

    def offered(self) -> Iterator[Chain]:
        """What is offered now; what is added meanwhile comes with a notification of its own.

        Raises:
            DriverFault: more chains than the queue has descriptors; see `_chain`.
        """
        _, index = _HEAD.unpack(_read(self._memory, self.available, _HEAD.size))
        count = (index - self._taken) % _INDICES
        if count > self.size:
            raise DriverFault(f"available ring: got {count} new entries, wanted at most {self.size}")
        for on_offer in range(count, 0, -1):
            slot = self.available + _RING_HEAD + _U16.size * (self._taken % self.size)
            (head,) = _U16.unpack(_read(self._memory, slot, _U16.size))
            self._taken = (self._taken + 1) % _INDICES
            yield self._chain(head, on_offer)

    def put_back(self) -> None:
        """The chain that was yielded last is offered again next time."""
        self._taken = (self._taken - 1) % _INDICES

    def complete(self, chain: Chain, written: int) -> None:
        """Give a chain back, `written` bytes into its room."""
        slot = self.used + _RING_HEAD + _USED.size * (self._done % self.size)
        _write(self._memory, slot, _USED.pack(chain.head, written))
        self._done = (self._done + 1) % _INDICES
        _write(self._memory, self.used + 2, _U16.pack(self._done))

    def wants_interrupt(self) -> bool:
        """Whether the driver asks for one after used buffers."""
        flags, _ = _HEAD.unpack(_read(self._memory, self.available, _HEAD.size))
        return not flags & AVAIL_NO_INTERRUPT

    def _chain(self, head: int, on_offer: int) -> Chain:
        """Follow a chain to its end.

        Raises:
            DriverFault: a descriptor outside the table, a loop, an unknown flag, an empty buffer, one to read
                behind one to write, or more bytes than `LARGEST_CHAIN`.
        """
        readable: list[Buffer] = []
        writable: list[Buffer] = []
        index, total = head, 0
        for _ in range(self.size):
            found = self._descriptor(index)
            total += found.len
            if not found.len or total > LARGEST_CHAIN:
                raise DriverFault(f"chain {head}: got {total} bytes at {index}, wanted 1..{LARGEST_CHAIN}")
            if found.flags & DescriptorFlag.WRITE:
                writable.append(Buffer(found.addr, found.len))
            elif writable:
                raise DriverFault(f"chain {head}: descriptor {index} is to be read, behind one to be written")
            else:
                readable.append(Buffer(found.addr, found.len))
            if not found.flags & DescriptorFlag.NEXT:
                return Chain(self._memory, head, readable, writable, on_offer)
            index = found.next
        raise DriverFault(f"chain {head}: wanted an end within {self.size} descriptors: it is a loop")

    def _descriptor(self, index: int) -> VirtqDescriptor:
        if index >= self.size:
            raise DriverFault(f"descriptor: got {index}, wanted one of {self.size}")
        where = self.descriptors + VirtqDescriptor.SIZE * index
        found = VirtqDescriptor.parse(_read(self._memory, where, VirtqDescriptor.SIZE))
        if unknown := found.flags & ~_KNOWN_FLAGS:
            raise DriverFault(f"descriptor {index}: flags {unknown:#x}, which were not negotiated")
        return found


def _read(memory: SharedMemory, gpa: int, size: int) -> bytes:
    try:
        return memory.read_shared(gpa, size)
    except BusError as error:
        raise DriverFault(str(error)) from None


def _write(memory: SharedMemory, gpa: int, data: bytes) -> None:
    try:
        memory.write_shared(gpa, data)
    except BusError as error:
        raise DriverFault(str(error)) from None
