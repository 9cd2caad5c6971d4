"""Numbers and layouts of virtio devices, as far as they are modelled.

Source: OASIS, Virtual I/O Device (VIRTIO) 1.2: chapters 2.1 (device status), 2.7 (split virtqueues),
4.2 (virtio over MMIO), 5.1 (network device), 5.2 (block device), 5.3 (console device), 5.4 (entropy device),
5.11 (file system device), 6 (reserved feature bits).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, blob, record, u8, u16, u32, u64

__all__ = [
    "AVAIL_NO_INTERRUPT",
    "BLK_ID_SIZE",
    "BlkConfig",
    "BlkFeature",
    "BlkRequest",
    "BlkStatus",
    "BlkType",
    "CONFIG_AT",
    "CONSOLE_CONTROL_IN",
    "CONSOLE_CONTROL_OUT",
    "ConsoleConfig",
    "ConsoleControl",
    "ConsoleEvent",
    "ConsoleFeature",
    "DescriptorFlag",
    "DeviceId",
    "DeviceStatus",
    "FS_TAG_SIZE",
    "FsConfig",
    "Interrupt",
    "MMIO_MAGIC",
    "MMIO_VERSION",
    "MmioRegister",
    "NetConfig",
    "NetFeature",
    "NetHeader",
    "SECTOR",
    "VIRTIO_F_ACCESS_PLATFORM",
    "VIRTIO_F_EVENT_IDX",
    "VIRTIO_F_INDIRECT_DESC",
    "VIRTIO_F_VERSION_1",
    "VirtqDescriptor",
    "console_queue",
]

MMIO_MAGIC: Final = 0x74726976
"""The letters virt."""
MMIO_VERSION: Final = 2
"""1 is the legacy interface."""
CONFIG_AT: Final = 0x100
"""The device's own configuration begins there."""
VIRTIO_F_INDIRECT_DESC: Final = 1 << 28
VIRTIO_F_EVENT_IDX: Final = 1 << 29
VIRTIO_F_VERSION_1: Final = 1 << 32
VIRTIO_F_ACCESS_PLATFORM: Final = 1 << 33
"""The device reaches memory only as the platform lets it: of an SNP guest, what is shared."""


class MmioRegister(IntEnum):
    """Offsets of 32-bit registers."""

    MAGIC = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_SIZE_MAX = 0x034
    QUEUE_SIZE = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    CONFIG_GENERATION = 0x0FC


class DeviceStatus(IntEnum):
    """Status bits; writing 0 resets the device."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Interrupt(IntEnum):
    """Why there is an interrupt."""

    USED_BUFFER = 1
    CONFIGURATION = 2


class DeviceId(IntEnum):
    """What a device is."""

    NETWORK = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    FILE_SYSTEM = 26


class DescriptorFlag(IntEnum):
    """Of one descriptor."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


AVAIL_NO_INTERRUPT: Final = 1


@record(size=16, source="VIRTIO 1.2, struct virtq_desc")
class VirtqDescriptor(Record):
    """One buffer of a chain."""

    addr: int = u64(0)
    len: int = u32(8)
    flags: int = u16(12)
    next: int = u16(14)


# The block device

SECTOR: Final = 512
BLK_ID_SIZE: Final = 20


class BlkFeature(IntEnum):
    """Feature bits of block devices."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9


class BlkType(IntEnum):
    """Request types."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8


class BlkStatus(IntEnum):
    """The last byte of a request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


@record(size=16, source="VIRTIO 1.2, struct virtio_blk_req")
class BlkRequest(Record):
    """How each request begins."""

    type: int = u32(0)
    reserved: int = u32(4)
    sector: int = u64(8)


@record(size=24, source="VIRTIO 1.2, struct virtio_blk_config, up to blk_size")
class BlkConfig(Record):
    """Capacity in sectors, largest segment in bytes, most segments of a request, block size in bytes."""

    capacity: int = u64(0)
    size_max: int = u32(8)
    seg_max: int = u32(12)
    cylinders: int = u16(16)
    heads: int = u8(18)
    sectors: int = u8(19)
    blk_size: int = u32(20)


# The console device

CONSOLE_CONTROL_IN: Final = 2
"""Queue of control messages for the driver; the next one has the driver's."""
CONSOLE_CONTROL_OUT: Final = 3


class ConsoleFeature(IntEnum):
    """Feature bits of console devices."""

    MULTIPORT = 1 << 1


class ConsoleEvent(IntEnum):
    """What a control message says."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    PORT_READY = 3
    CONSOLE_PORT = 4
    PORT_OPEN = 6
    PORT_NAME = 7


@record(size=12, source="VIRTIO 1.2, struct virtio_console_config")
class ConsoleConfig(Record):
    """Columns, rows and emergency writes count with features that are not modelled."""

    cols: int = u16(0)
    rows: int = u16(2)
    max_nr_ports: int = u32(4)
    emerg_wr: int = u32(8)


@record(size=8, source="VIRTIO 1.2, struct virtio_console_control")
class ConsoleControl(Record):
    """A control message about port `id`; a name follows where the event says so."""

    id: int = u32(0)
    event: int = u16(4)
    value: int = u16(6)


def console_queue(port: int) -> int:
    """A port's queue for the driver to read from; the next one is for it to write to."""
    return 2 * port + 2 if port else 0


# The network device


class NetFeature(IntEnum):
    """Feature bits of network devices."""

    MAC = 1 << 5
    STATUS = 1 << 16


@record(size=8, source="VIRTIO 1.2, struct virtio_net_config, up to status")
class NetConfig(Record):
    """The address, and status: bit 0 says that the link is up."""

    mac: bytes = blob(0, 6)
    status: int = u16(6)


@record(size=12, source="VIRTIO 1.2, struct virtio_net_hdr")
class NetHeader(Record):
    """Before each frame; all zeros without offloads but `num_buffers`, 1 towards the driver."""

    flags: int = u8(0)
    gso_type: int = u8(1)
    hdr_len: int = u16(2)
    gso_size: int = u16(4)
    csum_start: int = u16(6)
    csum_offset: int = u16(8)
    num_buffers: int = u16(10)


# The file system device

FS_TAG_SIZE: Final = 36


@record(size=40, source="VIRTIO 1.2, struct virtio_fs_config, up to num_request_queues")
class FsConfig(Record):
    """The name that the driver mounts it by, in UTF-8 behind which zeros are; queues beside the first."""

    tag: bytes = blob(0, FS_TAG_SIZE)
    num_request_queues: int = u32(FS_TAG_SIZE)
