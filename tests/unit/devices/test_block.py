"""The block and the entropy device, by a driver's requests."""

from __future__ import annotations

import errno
import struct
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.virtio import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, BlkConfig, BlkStatus, DeviceStatus
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.block import Block
from swsnp.vmm.devices.entropy import Entropy
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

REQUIRED: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
OK, IOERR, UNSUPP = (bytes([each]) for each in (BlkStatus.OK, BlkStatus.IOERR, BlkStatus.UNSUPP))
SECTORS: Final = 16
CONTENT: Final = bytes(number % 251 for number in range(512 * SECTORS))


class Disk:
    """In memory; `error` is raised by every access."""

    def __init__(self, *, read_only: bool = False) -> None:
        self.raw = bytearray(CONTENT)
        self.size = len(self.raw)
        self.read_only = read_only
        self.error: int | None = None
        self.flushed = 0

    def _judge(self) -> None:
        if self.error is not None:
            raise OSError(self.error, "trouble")

    def read(self, at: int, size: int) -> bytes:
        self._judge()
        return bytes(self.raw[at : at + size])

    def write(self, at: int, data: bytes | memoryview) -> None:
        self._judge()
        self.raw[at : at + len(data)] = data

    def flush(self) -> None:
        self._judge()
        self.flushed += 1


def driver_of(disk: Disk, serial: bytes = b"") -> VirtioDriver:
    memory = DriverMemory()
    driver = VirtioDriver(VirtioMmio(Block(disk, serial=serial), memory, lambda _: None), memory)
    driver.start()
    return driver


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def driver(disk: Disk) -> VirtioDriver:
    return driver_of(disk)


@pytest.mark.parametrize(("read_only", "bits"), [(False, 0b10_0100_0110), (True, 0b10_0110_0110)])
def test_what_it_is(read_only: bool, bits: int) -> None:
    """5.2: device 2, one queue, capacity in sectors, limits, block size; RO where the disk is."""
    driver = driver_of(Disk(read_only=read_only))
    assert driver.features() == REQUIRED | bits
    raw = b"".join(driver.device.read(0x100 + at, 4).to_bytes(4, "little") for at in range(0, 24, 4))
    assert BlkConfig.parse(raw) == BlkConfig(capacity=SECTORS, size_max=128 << 10, seg_max=126, blk_size=512)
    assert driver.get(0x8) == 2
    assert driver.device.read(0x118, 8) == 0


def test_read(driver: VirtioDriver) -> None:
    """5.2.6: data, then status, and all of it is counted as used."""
    assert driver.request([header(0, 3)], [1024, 1]) == (1025, CONTENT[1536:2560] + OK)


def test_buffers_of_any_cut(driver: VirtioDriver, disk: Disk) -> None:
    """2.7.4.2: neither header nor data nor status have buffers of their own by right."""
    head = header(0, 15)
    assert driver.request([head[:5], head[5:]], [100, 413]) == (513, CONTENT[-512:] + OK)
    assert driver.request([header(1, 2) + bytes(100), bytes(412)], [1]) == (1, OK)
    assert disk.raw == CONTENT[:1024] + bytes(512) + CONTENT[1536:]


def test_write(driver: VirtioDriver, disk: Disk) -> None:
    """5.2.6: the status is all that is written."""
    assert driver.request([header(1, 14), b"w" * 1024], [1]) == (1, OK)
    assert disk.raw == CONTENT[: 14 * 512] + b"w" * 1024


@pytest.mark.parametrize(
    ("readable", "writable", "answer"),
    [
        ([header(0, 16)], [512, 1], (0, bytes(512) + IOERR)),
        ([header(0, 15)], [1024, 1], (0, bytes(1024) + IOERR)),
        ([header(0, (1 << 64) - 1)], [512, 1], (0, bytes(512) + IOERR)),
        ([header(0)], [511, 1], (0, bytes(511) + IOERR)),
        ([header(1, 16), bytes(512)], [1], (1, IOERR)),
        ([header(1, 15), bytes(1024)], [1], (1, IOERR)),
        ([header(1), bytes(513)], [1], (1, IOERR)),
        ([header(2)], [1], (1, UNSUPP)),
        ([header(11), bytes(16)], [1], (1, UNSUPP)),
        ([header(0xFFFF_FFFF)], [9, 1], (0, bytes(9) + UNSUPP)),
    ],
)
def test_refused_requests(
    driver: VirtioDriver, disk: Disk, readable: list[bytes], writable: list[int], answer: tuple[int, bytes]
) -> None:
    """5.2.6: beyond the capacity, half sectors, unknown types; nothing else is touched."""
    assert driver.request(readable, writable) == answer
    assert disk.raw == CONTENT
    assert driver.request([header(0)], [512, 1]) == (513, CONTENT[:512] + OK)


def test_read_only() -> None:
    """5.2.6.2: writes to a read-only device are VIRTIO_BLK_S_IOERR; there is nothing to flush."""
    disk = Disk(read_only=True)
    driver = driver_of(disk)
    assert driver.request([header(1), bytes(512)], [1]) == (1, IOERR)
    assert driver.request([header(4)], [1]) == (1, OK)
    assert (bytes(disk.raw), disk.flushed) == (CONTENT, 0)


def test_flush(driver: VirtioDriver, disk: Disk) -> None:
    """5.2.6: VIRTIO_BLK_T_FLUSH."""
    assert driver.request([header(4)], [1]) == (1, OK)
    assert disk.flushed == 1


@pytest.mark.parametrize(
    ("serial", "room", "answer"),
    [
        (b"disk-1", 20, (21, b"disk-1".ljust(20, b"\0") + OK)),
        (b"x" * 30, 20, (21, b"x" * 20 + OK)),
        (b"disk-1", 4, (5, b"disk" + OK)),
        (b"disk-1", 22, (20, b"disk-1".ljust(22, b"\0") + OK)),
    ],
)
def test_identification(serial: bytes, room: int, answer: tuple[int, bytes]) -> None:
    """5.2.6: VIRTIO_BLK_T_GET_ID, 20 bytes."""
    assert driver_of(Disk(), serial).request([header(8)], [room, 1]) == answer


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_disk_in_trouble(driver: VirtioDriver, disk: Disk, error: int) -> None:
    """5.2.6: VIRTIO_BLK_S_IOERR; the device goes on."""
    disk.error = error
    assert driver.request([header(0)], [512, 1]) == (0, bytes(512) + IOERR)
    assert driver.request([header(1), bytes(512)], [1]) == (1, IOERR)
    assert driver.request([header(4)], [1]) == (1, IOERR)
    disk.error = None
    assert driver.request([header(0)], [512, 1]) == (513, CONTENT[:512] + OK)


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([b"x" * 15], [1]), ([], [16]), ([header(4)], []), ([header(1), bytes(512)], [])],
)
def test_requests_without_header_or_status(
    driver: VirtioDriver, disk: Disk, readable: list[bytes], writable: list[int]
) -> None:
    """5.2.6: they cannot be answered, so the device needs a reset, and nothing is done."""
    driver.chain(readable, writable)
    driver.offer(0)
    assert driver.status & DeviceStatus.NEEDS_RESET
    assert (bytes(disk.raw), disk.flushed) == (CONTENT, 0)


@given(
    kind=st.sampled_from([0, 1, 4, 8, 9]),
    sector=st.one_of(st.integers(0, 20), st.integers(0, (1 << 64) - 1)),
    data=st.binary(max_size=1100),
    room=st.integers(1, 1100),
)
def test_no_request_leaves_the_disk(kind: int, sector: int, data: bytes, room: int) -> None:
    """A disk keeps its size; what a write says is done is there, and nothing else changes."""
    disk = Disk()
    _, answer = driver_of(disk).request([header(kind, sector) + data], [room])
    at = sector * 512
    if kind == 1 and answer.endswith(OK):
        assert disk.raw == CONTENT[:at] + data + CONTENT[at + len(data) :]
    else:
        assert disk.raw == CONTENT


# Entropy


def test_entropy() -> None:
    """5.4: the room is filled from the source; what is larger than a request may be, in part."""
    memory = DriverMemory()
    driver = VirtioDriver(VirtioMmio(Entropy(lambda size: b"r" * size), memory, lambda _: None), memory)
    assert driver.features() == REQUIRED
    assert driver.get(0x8) == 4
    driver.start()
    assert driver.request([], [10, 6]) == (16, b"r" * 16)
    assert driver.request([b"ignored"], [3]) == (3, b"rrr")
    length, answer = driver.request([], [100_000])
    assert (length, answer) == (65536, b"r" * 65536 + bytes(100_000 - 65536))
    driver.chain([b"no room"], [])
    driver.offer(0)
    assert driver.status & DeviceStatus.NEEDS_RESET
