"""The virtio block device: sectors of a disk.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapter 5.2.

Requests are done where the driver's notification arrives, one after the other. The host's page cache is the
device's volatile cache: what has to stay must be flushed, as the feature says.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.virtio import (
    BLK_ID_SIZE,
    SECTOR,
    BlkConfig,
    BlkFeature,
    BlkRequest,
    BlkStatus,
    BlkType,
    DeviceId,
)
from swsnp.vmm.devices.virtqueue import QUEUE_SIZE, DriverFault

if TYPE_CHECKING:
    from swsnp.vmm.devices.virtqueue import Chain

__all__ = ["Block", "Disk"]

_logger = logging.getLogger(__name__)
_LARGEST_SEGMENT: Final = 128 << 10
_MOST_SEGMENTS: Final = QUEUE_SIZE - 2
"""Beside header and status."""


class Disk(Protocol):
    """Bytes that stay; every call may raise OSError."""

    @property
    def size(self) -> int:
        """Bytes, whole sectors."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether writing is refused."""
        ...

    def read(self, at: int, size: int) -> bytes:
        """Exactly so many bytes."""
        ...

    def write(self, at: int, data: bytes | memoryview) -> None:
        """All of it."""
        ...

    def flush(self) -> None:
        """Make it stay."""
        ...


class Block:
    """One disk, as `virtio_mmio.VirtioDevice`.

    Args:
        disk: its bytes.
        serial: what the guest reads as its identification, at most 20 bytes.
    """

    device_id: Final = DeviceId.BLOCK
    queues: Final = 1
    queue_size: Final = QUEUE_SIZE

    def __init__(self, disk: Disk, *, serial: bytes = b"") -> None:
        self._disk, self._serial = disk, serial[:BLK_ID_SIZE].ljust(BLK_ID_SIZE, b"\0")
        self.features = BlkFeature.SIZE_MAX | BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.FLUSH
        if disk.read_only:
            self.features |= BlkFeature.RO
        config = BlkConfig(
            capacity=disk.size // SECTOR,
            size_max=_LARGEST_SEGMENT,
            seg_max=_MOST_SEGMENTS,
            blk_size=SECTOR,
        )
        self.config = bytes(config)

    def begin(self, features: int) -> None:
        """Requests stand for themselves."""

    def serve(self, queue: int, chain: Chain) -> int:
        """Header, data and status may be cut into buffers in any way."""
        said = chain.read()
        if len(said) < BlkRequest.SIZE:
            raise DriverFault(f"block request: got {len(said)} bytes, wanted {BlkRequest.SIZE} at least")
        if not chain.room:
            raise DriverFault("block request: no room for its status")
        request = BlkRequest.parse(said[: BlkRequest.SIZE])
        try:
            status, answer = self._done(request, memoryview(said)[BlkRequest.SIZE :], chain.room - 1)
        except OSError as error:
            _logger.warning("disk: request %d at sector %d: %s", request.type, request.sector, error)
            status, answer = BlkStatus.IOERR, b""
        chain.write(answer)
        chain.write(bytes([status]), at=chain.room - 1)
        return chain.room if len(answer) == chain.room - 1 else len(answer)

    def _done(self, request: BlkRequest, data: memoryview, room: int) -> tuple[BlkStatus, bytes]:
        at = request.sector * SECTOR
        match request.type:
            case BlkType.IN if self._has(at, room):
                return BlkStatus.OK, self._disk.read(at, room)
            case BlkType.OUT if self._has(at, len(data)) and not self._disk.read_only:
                self._disk.write(at, data)
                return BlkStatus.OK, b""
            case BlkType.IN | BlkType.OUT:
                return BlkStatus.IOERR, b""
            case BlkType.FLUSH:
                if not self._disk.read_only:
                    self._disk.flush()
                return BlkStatus.OK, b""
            case BlkType.GET_ID:
                return BlkStatus.OK, self._serial[:room]
            case _:
                return BlkStatus.UNSUPP, b""

    def _has(self, at: int, size: int) -> bool:
        """Whole sectors that the disk has."""
        return size % SECTOR == 0 and at + size <= self._disk.size
