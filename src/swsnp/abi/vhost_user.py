"""Messages of the vhost-user protocol, as far as a front-end needs them that has the device's configuration.

Source: QEMU's documentation, docs/interop/vhost-user: "Vhost-user Protocol". The front-end is the VMM, the
back-end the program that is the device.

Every message is a header and a payload, little-endian; descriptors go along as ancillary data (SCM_RIGHTS).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, record, u32, u64

__all__ = [
    "F_PROTOCOL_FEATURES",
    "FLAG_NEED_REPLY",
    "FLAG_REPLY",
    "FLAG_VERSION",
    "MOST_REGIONS",
    "MemoryRegion",
    "MemoryTableHead",
    "ProtocolFeature",
    "Request",
    "VhostHeader",
    "VringAddress",
    "VringState",
]

FLAG_VERSION: Final = 1
FLAG_REPLY: Final = 1 << 2
FLAG_NEED_REPLY: Final = 1 << 3
"""The back-end shall acknowledge a request that has no answer otherwise: eight bytes, zero for success."""
F_PROTOCOL_FEATURES: Final = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES, among the feature bits of the device."""
MOST_REGIONS: Final = 8


class Request(IntEnum):
    """What a front-end asks for."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18


class ProtocolFeature(IntEnum):
    """Bits of SET_PROTOCOL_FEATURES."""

    REPLY_ACK = 1 << 3


@record(size=12, source="vhost-user, Header")
class VhostHeader(Record):
    """`size`: bytes of payload behind it."""

    request: int = u32(0)
    flags: int = u32(4)
    size: int = u32(8)


@record(size=8, source="vhost-user, Multiple Memory regions description")
class MemoryTableHead(Record):
    """Before the regions of SET_MEM_TABLE."""

    num_regions: int = u32(0)
    padding: int = u32(4)


@record(size=32, source="vhost-user, A region")
class MemoryRegion(Record):
    """Memory of the guest; its descriptor goes along, in the same order.

    `userspace_addr` is what addresses of rings are counted in (SET_VRING_ADDR), `mmap_offset` where the
    region begins in its file.
    """

    guest_phys_addr: int = u64(0)
    memory_size: int = u64(8)
    userspace_addr: int = u64(16)
    mmap_offset: int = u64(24)


@record(size=8, source="vhost-user, A vring state description")
class VringState(Record):
    """`num` is a size, a base or whether it is enabled, by the request."""

    index: int = u32(0)
    num: int = u32(4)


@record(size=40, source="vhost-user, A vring address description")
class VringAddress(Record):
    """Where a ring lies."""

    index: int = u32(0)
    flags: int = u32(4)
    descriptor: int = u64(8)
    used: int = u64(16)
    available: int = u64(24)
    log: int = u64(32)
