"""The virtio entropy device: chance from the host.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapter 5.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.virtio import DeviceId
from swsnp.vmm.devices.virtqueue import QUEUE_SIZE, DriverFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.vmm.devices.virtqueue import Chain

__all__ = ["Entropy"]

_MOST: Final = 64 << 10
"""Bytes of one request; a driver that has room for more asks again."""


class Entropy:
    """As `virtio_mmio.VirtioDevice`.

    Args:
        source: gives so many bytes of chance.
    """

    device_id: Final = DeviceId.ENTROPY
    queues: Final = 1
    queue_size: Final = QUEUE_SIZE
    features: Final = 0
    config: Final = b""

    def __init__(self, source: Callable[[int], bytes]) -> None:
        self._source = source

    def begin(self, features: int) -> None:
        """Requests stand for themselves."""

    def serve(self, queue: int, chain: Chain) -> int:
        """Fill the room."""
        if not chain.room:
            raise DriverFault("entropy request: no room")
        data = self._source(min(chain.room, _MOST))
        chain.write(data)
        return len(data)
