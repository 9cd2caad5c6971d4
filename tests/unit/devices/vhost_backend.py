"""A small vhost-user back-end of the tests' own: a device in a thread, which turns what it is told round.

Source: QEMU's documentation, docs/interop/vhost-user.

It has the guest's memory only by the descriptors that came over the socket.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.vhost_user import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    FLAG_VERSION,
    MemoryRegion,
    MemoryTableHead,
    ProtocolFeature,
    Request,
    VhostHeader,
    VringAddress,
    VringState,
)
from swsnp.hardware.memory import passable_memory
from swsnp.testing.virtio_driver import DriverMemory
from swsnp.vmm.devices.virtqueue import Virtqueue

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ALL_FEATURES", "Backend", "PassableDriverMemory", "Said", "answer", "until"]

ALL_FEATURES: Final = 1 << 34 | 1 << 33 | 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 3
"""VERSION_1, EVENT_IDX, INDIRECT_DESC, vhost-user's own, and three that are not for the guest."""


class Said(NamedTuple):
    """A message that came, without its descriptors."""

    request: int
    flags: int
    payload: bytes
    descriptors: int


def answer(request: int, payload: bytes, flags: int = FLAG_VERSION | FLAG_REPLY) -> bytes:
    """A message of the back-end's."""
    return bytes(VhostHeader(request=request, flags=flags, size=len(payload))) + payload


def until(what: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


class PassableDriverMemory(DriverMemory):
    """As `DriverMemory`, of a memfd; `passable` says that it is one range from address 0 on."""

    def __init__(self, size: int = 1 << 20, private: range = range(0)) -> None:
        super().__init__(0, private)
        self.raw, self.fd = passable_memory(size)  # type: ignore[assignment]  # as good as a bytearray

    def passable(self) -> tuple[tuple[int, int, int], ...]:
        return ((0, len(self.raw), self.fd),)


class _Mapped:
    """Memory of the front-end's regions, as `SharedMemory`."""

    def __init__(self) -> None:
        self.regions: list[tuple[MemoryRegion, mmap.mmap]] = []

    def read_shared(self, gpa: int, size: int) -> bytes:
        area, at = self._place(gpa)
        return area[at : at + size]

    def write_shared(self, gpa: int, data: bytes) -> None:
        area, at = self._place(gpa)
        area[at : at + len(data)] = data

    def _place(self, gpa: int) -> tuple[mmap.mmap, int]:
        for region, area in self.regions:
            if region.guest_phys_addr <= gpa < region.guest_phys_addr + region.memory_size:
                return area, gpa - region.guest_phys_addr
        raise AssertionError(f"{gpa:#x}: no such memory was passed")


class Backend(threading.Thread):
    """Answers at one end of a pair of sockets, until the other is closed. Its `front` is for the front-end.

    Args:
        features: of the device.
        protocol: protocol features.
        spoil: what becomes of each answer before it is sent: other bytes, or None, which ends the connection.

    Attributes:
        said: every message that came.
        memory: what was passed.
    """

    def __init__(
        self,
        *,
        features: int = ALL_FEATURES,
        protocol: int = ProtocolFeature.REPLY_ACK | 1,
        spoil: Callable[[int, bytes], bytes | None] = lambda _, data: data,
        peer: socket.socket | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.front, self._peer = (peer, peer) if peer is not None else socket.socketpair()
        self.said: list[Said] = []
        self.memory = _Mapped()
        self.spoil = spoil
        self._own: dict[int, int] = {Request.GET_FEATURES: features, Request.GET_PROTOCOL_FEATURES: protocol}
        self._queues: dict[int, Virtqueue] = {}
        self._events: dict[tuple[int, int], int] = {}
        self._gone = threading.Event()
        self.start()

    def run(self) -> None:
        with self._peer:
            try:
                while self._step():
                    pass
            except OSError:  # the front-end is gone
                pass
            finally:
                for fd in self._events.values():
                    os.close(fd)

    def requests(self) -> list[str]:
        """Names of what came."""
        return [Request(each.request).name for each in self.said]

    def call(self, queue: int) -> None:
        """Say that something was done, although nothing was."""
        os.eventfd_write(self._events[queue, Request.SET_VRING_CALL], 1)

    def hang_up(self) -> None:
        """End the connection."""
        self._peer.shutdown(socket.SHUT_RDWR)
        self.join()

    def _step(self) -> bool:
        poll = select.poll()
        poll.register(self._peer, select.POLLIN)
        kicks = {fd: at[0] for at, fd in self._events.items() if at[1] == Request.SET_VRING_KICK}
        for fd in kicks:
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        # before a request that may close the queue's descriptors
        for fd in ready & kicks.keys():
            self._serve(kicks[fd], fd)
        return self._peer.fileno() not in ready or self._take()

    def _serve(self, number: int, kick: int) -> None:
        os.eventfd_read(kick)
        queue = self._queues[number]
        done = 0
        for chain in queue.offered():
            turned = chain.read()[::-1][: chain.room]
            chain.write(turned)
            queue.complete(chain, len(turned))
            done += 1
        if done:
            self.call(number)

    def _take(self) -> bool:
        head, fds, _, _ = socket.recv_fds(self._peer, VhostHeader.SIZE, 16)
        if len(head) < VhostHeader.SIZE:
            return False
        header = VhostHeader.parse(head)
        payload = self._peer.recv(header.size, socket.MSG_WAITALL) if header.size else b""
        self.said.append(Said(header.request, header.flags, payload, len(fds)))
        own = self._done(header.request, payload, fds)
        if own is None and header.flags & FLAG_NEED_REPLY:
            own = bytes(8)
        if own is None:
            return True
        reply = self.spoil(header.request, answer(header.request, own))
        if reply is None:
            return False
        self._peer.sendall(reply)
        return True

    def _done(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        """Do it; the answer, where there is one other than an acknowledgement."""
        match request:
            case Request.GET_FEATURES | Request.GET_PROTOCOL_FEATURES:
                return struct.pack("<Q", self._own[request])
            case Request.SET_MEM_TABLE:
                self._map(payload, fds)
            case Request.SET_VRING_NUM:
                self._queue(payload).size = VringState.parse(payload).num
            case Request.SET_VRING_ADDR:
                where = VringAddress.parse(payload)
                queue = self._queue(payload)
                queue.descriptors, queue.available, queue.used = where.descriptor, where.available, where.used
                queue.enable()
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL:
                (number,) = struct.unpack("<Q", payload)
                self._keep(number, request, fds[0])
            case Request.GET_VRING_BASE:
                number = VringState.parse(payload).index
                for each in (Request.SET_VRING_KICK, Request.SET_VRING_CALL):
                    self._keep(number, each, None)
                return bytes(VringState(index=number, num=self._queues[number]._taken))
        return None

    def _queue(self, payload: bytes) -> Virtqueue:
        (number,) = struct.unpack_from("<I", payload)
        return self._queues.setdefault(number, Virtqueue(self.memory, 1024))

    def _keep(self, number: int, request: int, fd: int | None) -> None:
        if (old := self._events.pop((number, request), None)) is not None:
            os.close(old)
        if fd is not None:
            self._events[number, request] = fd

    def _map(self, payload: bytes, fds: list[int]) -> None:
        head = MemoryTableHead.parse(payload[: MemoryTableHead.SIZE])
        self.memory.regions = []
        for number, fd in zip(range(head.num_regions), fds, strict=True):
            at = MemoryTableHead.SIZE + MemoryRegion.SIZE * number
            region = MemoryRegion.parse(payload[at : at + MemoryRegion.SIZE])
            self.memory.regions.append((region, mmap.mmap(fd, region.memory_size, offset=region.mmap_offset)))
            os.close(fd)
