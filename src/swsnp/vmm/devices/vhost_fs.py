"""The virtio file system device: a folder of the host's, by a daemon such as virtiofsd.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2, chapter 5.11.

What is in the queues is FUSE, between the guest's kernel and the daemon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.virtio import FS_TAG_SIZE, VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, DeviceId, FsConfig

if TYPE_CHECKING:
    from swsnp.vmm.devices.vhost_user import VhostUser

__all__ = ["VhostFs"]

_REQUEST_QUEUES: Final = 1
_PASSED_ON: Final = VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX
"""Of the daemon's features what is between it and the driver alone."""


class VhostFs:
    """One folder, as `vhost_mmio.VhostDevice`.

    Args:
        tag: the name that the guest mounts it by, 1 to 36 bytes.
        daemon: who serves it.
        queue_size: descriptors of each queue, a power of two.
    """

    device_id: Final = DeviceId.FILE_SYSTEM
    queues: Final = 1 + _REQUEST_QUEUES
    """The first is for what must not wait (FORGET)."""

    def __init__(self, tag: bytes, daemon: VhostUser, *, queue_size: int) -> None:
        self.daemon: Final = daemon
        self.queue_size: Final = queue_size
        self.features: Final = daemon.features & _PASSED_ON
        config = FsConfig(tag=tag.ljust(FS_TAG_SIZE, b"\0"), num_request_queues=_REQUEST_QUEUES)
        self.config: Final = bytes(config)
