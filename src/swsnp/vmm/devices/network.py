"""The virtio network device: Ethernet frames between the guest and one peer.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapter 5.1; the manual page qemu(1), `-netdev stream`: each
frame comes behind its length, four bytes, the highest first.

Nothing is offloaded: a frame is what would be on a wire. What the peer does not take in time is dropped, as
there; what the guest does not take holds the peer back.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.virtio import DeviceId, NetConfig, NetFeature, NetHeader
from swsnp.vmm.devices.virtqueue import QUEUE_SIZE, DriverFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.vmm.devices.virtqueue import Chain

__all__ = ["ByteStream", "FrameReader", "LARGEST_FRAME", "Network", "framed"]

_logger = logging.getLogger(__name__)
_TO_GUEST: Final = 0
_LINK_UP: Final = 1
_SMALLEST_FRAME: Final = 14
"""Two addresses and a type: short frames are not filled up."""
LARGEST_FRAME: Final = 1518
"""Bytes of a guest's frame: 1,500 behind addresses, type and a VLAN tag."""
_WAITING: Final = 64
"""Frames that wait for the guest before the peer has to wait."""
_LENGTH: Final = struct.Struct(">I")
_LARGEST_LENGTH: Final = 65536 + 4096
"""What is longer is no frame for QEMU either."""
_HEADER: Final = bytes(NetHeader(num_buffers=1))


class ByteStream(Protocol):
    """Bytes towards the peer; see `host_end.HostStream`."""

    @property
    def connected(self) -> bool:
        """Whether there is a peer."""
        ...

    def send(self, data: bytes, *, must: bool = False) -> bool:
        """Take all of it or nothing."""
        ...


def framed(frame: bytes) -> bytes:
    """A frame as it goes through a stream."""
    return _LENGTH.pack(len(frame)) + frame


class FrameReader:
    """Takes frames out of a stream that comes in pieces.

    Attributes:
        lost: a length came that no frame has; from then on nothing is understood.
    """

    def __init__(self) -> None:
        self.lost = False
        self._said = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that end in this piece."""
        self._said += data
        while not self.lost and len(self._said) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._said)
            if not 0 < size <= _LARGEST_LENGTH:
                _logger.warning("network: got a frame of %d bytes, wanted 1..%d", size, _LARGEST_LENGTH)
                self.lost = True
            elif len(self._said) < _LENGTH.size + size:
                return
            else:
                frame = bytes(self._said[_LENGTH.size : _LENGTH.size + size])
                del self._said[: _LENGTH.size + size]
                yield frame
        if self.lost:
            self._said.clear()


class Network:
    """As `virtio_mmio.VirtioDevice`, and as a port for the stream (`host_end.PortFace`).

    Args:
        mac: the guest's address, six bytes.
        stream: where its frames go.

    Attributes:
        dropped: frames that were none, that no buffer of the guest's could hold, or that nobody took.
    """

    device_id: Final = DeviceId.NETWORK
    queues: Final = 2
    queue_size: Final = QUEUE_SIZE
    features: Final = NetFeature.MAC | NetFeature.STATUS

    def __init__(self, mac: bytes, stream: ByteStream) -> None:
        self.config: Final = bytes(NetConfig(mac=mac, status=_LINK_UP))
        self.dropped = 0
        self._stream = stream
        self._reader = FrameReader()
        self._kick: Callable[[int], None] = lambda _: None
        self._waiting: deque[bytes] = deque()
        self._taken = threading.Condition()
        self._stopped = False

    # The peer's side

    def receive(self, data: bytes, *, wait: bool = True) -> None:
        """Bytes of the stream; comes back when there was room for the frames in them."""
        for frame in self._reader.feed(data):
            with self._taken:
                self._taken.wait_for(lambda: self._stopped or len(self._waiting) < _WAITING)
                if self._stopped:
                    return
                self._waiting.append(frame)
            self._kick(_TO_GUEST)

    def room(self) -> None:
        """What was dropped is gone."""

    def changed(self) -> None:
        """Another peer begins with a frame; without one the guest goes on and nobody hears it."""
        self._reader = FrameReader()
        if not self._stream.connected:
            _logger.warning("network: the peer is gone")

    def stop(self) -> None:
        """Nothing is received any more: nobody waits in `receive`."""
        with self._taken:
            self._stopped = True
            self._taken.notify_all()

    # The device's side

    def connect(self, kick: Callable[[int], None]) -> None:
        """What makes the transport offer a queue's chains again: `VirtioMmio.kick`."""
        self._kick = kick

    def begin(self, features: int) -> None:
        """What came before was for another driver."""
        with self._taken:
            self._waiting.clear()
            self._taken.notify_all()

    def serve(self, queue: int, chain: Chain) -> int | None:
        """One frame, behind its header."""
        if queue == _TO_GUEST:
            return self._give(chain)
        said = chain.read()
        if len(said) < NetHeader.SIZE:
            raise DriverFault(f"frame: got {len(said)} bytes, wanted {NetHeader.SIZE} of header at least")
        frame = said[NetHeader.SIZE :]
        if not (_SMALLEST_FRAME <= len(frame) <= LARGEST_FRAME and self._sent(frame)):
            self.dropped += 1
        return 0

    def _sent(self, frame: bytes) -> bool:
        return self._stream.connected and self._stream.send(framed(frame))

    def _give(self, chain: Chain) -> int | None:
        room = chain.room - NetHeader.SIZE
        if room < 0:
            raise DriverFault(f"buffer for a frame: got {chain.room} bytes, wanted {NetHeader.SIZE} at least")
        with self._taken:
            while self._waiting:
                frame = self._waiting.popleft()
                self._taken.notify_all()
                if len(frame) <= room:
                    break
                self.dropped += 1
            else:
                return None
        chain.write(_HEADER + frame)
        return NetHeader.SIZE + len(frame)
