"""Virtio over MMIO and its queues: what a driver may do, and what a hostile one gets for the rest."""

from __future__ import annotations

import struct
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.virtio import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
    DescriptorFlag,
    DeviceStatus,
    MmioRegister,
    VirtqDescriptor,
)
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.virtio_mmio import VirtioMmio
from swsnp.vmm.devices.virtqueue import LARGEST_CHAIN, QUEUE_SIZE, Chain, DriverFault

REQUIRED: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
NEXT, WRITE = DescriptorFlag.NEXT, DescriptorFlag.WRITE
MAGIC_AND_CO: Final = {0x000: 0x74726976, 0x004: 2, 0x008: 77, 0x00C: 0x53504E53, 0x0FC: 0}
WRITABLE_REGISTERS: Final = (0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, *range(0x80, 0xA8, 4))


class Echo:
    """Answers with what it was told, turned round."""

    device_id = 77
    features = 0b1010
    queues = 1
    queue_size = QUEUE_SIZE
    config = bytes(range(10))

    def __init__(self) -> None:
        self.served: list[bytes] = []
        self.begun: list[int] = []
        self.busy = False

    def begin(self, features: int) -> None:
        self.begun.append(features)

    def serve(self, queue: int, chain: Chain) -> int | None:
        if self.busy:
            return None
        said = chain.read()
        self.served.append(said)
        if said == b"unanswerable":
            raise DriverFault("no answer")
        answer = said[::-1][: chain.room]
        chain.write(answer)
        return len(answer)


class Rig:
    """A device with its driver."""

    def __init__(self, memory: DriverMemory | None = None, size: int = 8) -> None:
        self.memory = memory or DriverMemory()
        self.levels: list[bool] = []
        self.echo = Echo()
        self.device = VirtioMmio(self.echo, self.memory, self.levels.append)
        self.driver = VirtioDriver(self.device, self.memory, size=size)

    @property
    def broken(self) -> bool:
        return bool(self.driver.status & DeviceStatus.NEEDS_RESET)


@pytest.fixture
def rig() -> Rig:
    """A device that runs."""
    found = Rig()
    found.driver.start(REQUIRED | 0b10)
    return found


# Registers


def test_identity() -> None:
    """VIRTIO 1.2, 4.2.2: magic, version 2, device and vendor; no shared memory."""
    rig = Rig()
    assert {offset: rig.driver.get(offset) for offset in MAGIC_AND_CO} == MAGIC_AND_CO
    assert (rig.driver.get(0xB0), rig.driver.get(0xB4)) == (0xFFFF_FFFF, 0xFFFF_FFFF)
    assert (rig.driver.get(0x10C), rig.device.read(0x101, 1), rig.device.read(0x108, 2)) == (0, 1, 0x0908)


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (2, 4), (0x70, 1)])
def test_registers_are_32_bits_wide(offset: int, size: int) -> None:
    """4.2.2.2: the driver uses aligned 32-bit accesses only; others read zeros and change nothing."""
    rig = Rig()
    rig.device.write(offset, size, 1)
    assert (rig.device.read(offset, size), rig.driver.status) == (0, 0)


def test_features_are_offered_by_halves() -> None:
    """4.2.2: DeviceFeaturesSel chooses 32 bits; there are no more than 64."""
    rig = Rig()
    assert rig.driver.features() == REQUIRED | 0b1010
    rig.driver.put(MmioRegister.DEVICE_FEATURES_SEL, 2)
    assert rig.driver.get(MmioRegister.DEVICE_FEATURES) == 0


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (REQUIRED, True),
        (REQUIRED | 0b1010, True),
        (REQUIRED | 0b0100, False),
        (REQUIRED | 1 << 40, False),
        (VIRTIO_F_VERSION_1, False),
        (VIRTIO_F_ACCESS_PLATFORM, False),
        (0, False),
    ],
)
def test_features_that_are_chosen(features: int, accepted: bool) -> None:
    """3.1.1, 6.1: FEATURES_OK stays only for a subset, with VERSION_1, by a driver that shares its memory."""
    assert bool(Rig().driver.accept(features) & DeviceStatus.FEATURES_OK) is accepted


def test_features_are_chosen_once(rig: Rig) -> None:
    """2.2.1: not after FEATURES_OK."""
    rig.driver.put(MmioRegister.DRIVER_FEATURES_SEL, 0)
    rig.driver.put(MmioRegister.DRIVER_FEATURES, 0b0100)
    rig.driver.put(MmioRegister.STATUS, DeviceStatus.FEATURES_OK)
    assert rig.driver.request([b"ab"], [4]) == (2, b"ba\0\0")


def test_features_beyond_64_bits() -> None:
    """A selector of no features takes nothing."""
    rig = Rig()
    rig.driver.put(MmioRegister.DRIVER_FEATURES_SEL, 2)
    rig.driver.put(MmioRegister.DRIVER_FEATURES, 1)
    assert rig.driver.accept(REQUIRED) & DeviceStatus.FEATURES_OK


def test_status_bits_only_come(rig: Rig) -> None:
    """2.1.1: the driver does not clear bits, but all by a reset; DEVICE_NEEDS_RESET is the device's."""
    before = rig.driver.status
    rig.driver.put(MmioRegister.STATUS, DeviceStatus.FAILED | DeviceStatus.NEEDS_RESET)
    assert rig.driver.status == before | DeviceStatus.FAILED
    rig.driver.put(MmioRegister.STATUS, 0)
    assert rig.driver.status == 0
    assert rig.driver.get(MmioRegister.QUEUE_READY) == 0


def test_queues_that_are_not_there(rig: Rig) -> None:
    """4.2.3.2: their largest size is 0, and nothing can be set."""
    assert rig.driver.get(MmioRegister.QUEUE_SIZE_MAX) == QUEUE_SIZE
    rig.driver.put(MmioRegister.QUEUE_SEL, 1)
    for register in (MmioRegister.QUEUE_SIZE, MmioRegister.QUEUE_DESC_LOW, MmioRegister.QUEUE_READY):
        rig.driver.put(register, 1)
    assert (rig.driver.get(MmioRegister.QUEUE_SIZE_MAX), rig.driver.get(MmioRegister.QUEUE_READY)) == (0, 0)
    rig.driver.put(MmioRegister.QUEUE_NOTIFY, 1)
    assert not rig.broken


def test_queue_is_fixed_while_it_is_ready(rig: Rig) -> None:
    """4.2.2: size and addresses count before QueueReady; a queue that was taken back can be set again."""
    rig.driver.put(MmioRegister.QUEUE_SIZE, 2)
    rig.driver.put(MmioRegister.QUEUE_DESC_LOW, 0x8000)
    rig.driver.put(MmioRegister.QUEUE_READY, 1)
    assert rig.driver.request([b"ab"], [2]) == (2, b"ba")
    rig.driver.put(MmioRegister.QUEUE_READY, 0)
    assert rig.driver.get(MmioRegister.QUEUE_READY) == 0
    rig.driver.offer(0)
    assert len(rig.echo.served) == 1


@pytest.mark.parametrize("size", [0, 3, QUEUE_SIZE + 1, 2 * QUEUE_SIZE, 1 << 31])
def test_queue_sizes(size: int) -> None:
    """2.7: a power of two, not above the largest."""
    rig = Rig(size=size)
    rig.driver.start()
    assert rig.broken


def test_largest_queue() -> None:
    """As many descriptors as QueueSizeMax says."""
    rig = Rig(size=QUEUE_SIZE)
    rig.driver.start()
    assert rig.driver.request([b"x"] * (QUEUE_SIZE - 1), [QUEUE_SIZE]) == (127, b"x" * 127 + b"\0")


@pytest.mark.parametrize(
    ("descriptors", "available", "used"),
    [(8, 0x1000, 0x2000), (0, 0x1001, 0x2000), (0, 0x1000, 0x2002)],
)
def test_queue_alignments(descriptors: int, available: int, used: int) -> None:
    """2.7: 16, 2 and 4 bytes."""
    rig = Rig()
    rig.driver.accept(REQUIRED)
    rig.driver.set_queue(descriptors, available, used)
    assert rig.broken
    assert rig.driver.get(MmioRegister.QUEUE_READY) == 0
    assert rig.levels == [], "no interrupt before DRIVER_OK"


def test_nothing_before_the_driver_is_ready() -> None:
    """3.1.1: no buffer is used before DRIVER_OK."""
    rig = Rig()
    rig.driver.accept(REQUIRED)
    rig.driver.set_queue(0, 0x1000, 0x2000)
    rig.driver.chain([b"ab"], [2])
    rig.driver.offer(0)
    assert rig.echo.served == []
    rig.driver.put(MmioRegister.STATUS, rig.driver.status | DeviceStatus.DRIVER_OK)
    rig.driver.offer()
    assert rig.echo.served == [b"ab"]


# Requests


@pytest.mark.parametrize(
    ("readable", "writable", "answer"),
    [
        ([b"abc"], [3], (3, b"cba")),
        ([b"a", b"bcd", b"e"], [1, 2, 5], (5, b"edcba\0\0\0")),
        ([b"abcdef"], [2], (2, b"fe")),
        ([b"x"], [], (0, b"")),
        ([], [4], (0, bytes(4))),
    ],
)
def test_requests(rig: Rig, readable: list[bytes], writable: list[int], answer: tuple[int, bytes]) -> None:
    """2.7.4: buffers of any cut; the used length is what was written."""
    for _ in range(20):  # more than the queue has descriptors
        rig.memory.raw[0x4000:0x5000] = bytes(0x1000)
        assert rig.driver.request(readable, writable) == answer
    assert not rig.broken


def test_several_at_once(rig: Rig) -> None:
    """2.7.13: all that is in the ring at the notification, in its order, with one interrupt."""
    for index, text in enumerate((b"one", b"two", b"three")):
        at = 0x4000 + 16 * index
        rig.memory.raw[at : at + len(text)] = text
        rig.driver.describe(index, VirtqDescriptor(addr=at, len=len(text)))
    rig.driver.offer(2, 0, 1)
    assert rig.echo.served == [b"three", b"one", b"two"]
    index, entries = rig.driver.used()
    assert (index, entries[:3]) == (3, [(2, 0), (0, 0), (1, 0)])
    assert rig.levels == [True]


def test_indices_wrap(rig: Rig) -> None:
    """2.7: indices are 16 bits wide and rings go round."""
    rig.driver.chain([b"x"], [])
    for _ in range((1 << 16) // 8 + 3):
        rig.driver.offer(*[0] * 8)
    assert not rig.broken
    assert rig.driver.used()[0] == 24


def test_interrupt(rig: Rig) -> None:
    """4.2.2: the line is up until every reason was acknowledged."""
    rig.driver.request([b"x"], [])
    assert (rig.driver.get(MmioRegister.INTERRUPT_STATUS), rig.levels) == (1, [True])
    rig.driver.put(MmioRegister.INTERRUPT_ACK, 2)
    rig.driver.request([b"x"], [])
    assert rig.levels == [True]
    rig.driver.put(MmioRegister.INTERRUPT_ACK, 1)
    assert (rig.driver.get(MmioRegister.INTERRUPT_STATUS), rig.levels) == (0, [True, False])


def test_no_interrupt_wanted(rig: Rig) -> None:
    """2.7.7: VIRTQ_AVAIL_F_NO_INTERRUPT; nor is there one when nothing was used."""
    rig.driver.chain([b"x"], [])
    rig.driver.offer(0, flags=1)
    rig.driver.offer()
    assert (rig.driver.used()[0], rig.levels) == (1, [])


def test_reset_lowers_the_line(rig: Rig) -> None:
    """4.2.2: a reset takes interrupts back."""
    rig.driver.request([b"x"], [])
    rig.driver.put(MmioRegister.STATUS, 0)
    assert (rig.levels, rig.driver.get(MmioRegister.INTERRUPT_STATUS)) == ([True, False], 0)


# Devices that take their time


def test_device_begins_with_its_driver() -> None:
    """3.1.1: the device is told the features once, when the driver is ready, and again after a reset."""
    rig = Rig()
    rig.driver.accept(REQUIRED | 0b10)
    assert rig.echo.begun == []
    for _ in range(2):
        rig.driver.put(MmioRegister.STATUS, rig.driver.status | DeviceStatus.DRIVER_OK)
    assert rig.echo.begun == [REQUIRED | 0b10]
    rig.driver.start(REQUIRED | 0b1000)
    assert rig.echo.begun == [REQUIRED | 0b10, REQUIRED | 0b1000]


def test_device_does_not_begin_without_features() -> None:
    """3.1.1: DRIVER_OK alone, or with features that were refused, starts nothing."""
    rig = Rig()
    rig.driver.accept(0)
    rig.driver.put(MmioRegister.STATUS, rig.driver.status | DeviceStatus.DRIVER_OK)
    assert rig.echo.begun == []


def test_chain_that_has_to_wait(rig: Rig) -> None:
    """2.7: buffers that the device does not use stay in the ring, in their order, without an interrupt."""
    rig.echo.busy = True
    for index, text in enumerate((b"one", b"two")):
        at = 0x4000 + 16 * index
        rig.memory.raw[at : at + 3] = text
        rig.driver.describe(index, VirtqDescriptor(addr=at, len=3))
        rig.driver.offer(index)
    rig.device.kick(0)
    assert (rig.driver.used()[0], rig.levels) == (0, [])
    rig.echo.busy = False
    rig.device.kick(0)
    assert (rig.driver.used()[0], rig.echo.served, rig.levels) == (2, [b"one", b"two"], [True])
    rig.device.kick(0)
    assert rig.driver.used()[0] == 2


def test_queue_size_of_a_device() -> None:
    """4.2.2: QueueSizeMax is the device's own, and a larger queue is refused."""
    rig = Rig(size=16)
    rig.echo.queue_size = 8
    rig.device = VirtioMmio(rig.echo, rig.memory, rig.levels.append)
    rig.driver = VirtioDriver(rig.device, rig.memory, size=16)
    assert rig.driver.get(MmioRegister.QUEUE_SIZE_MAX) == 8
    rig.driver.start()
    assert rig.broken


def test_stopped_device_does_nothing(rig: Rig) -> None:
    """A guest that has ended has no memory any more."""
    rig.driver.request([b"x"], [])
    rig.echo.busy = True
    rig.driver.offer(0)
    rig.device.stop()
    rig.echo.busy = False
    rig.device.kick(0)
    assert (len(rig.echo.served), rig.driver.used()[0], rig.levels) == (1, 1, [True, False])


@pytest.mark.parametrize("queue", [1, 99])
def test_kick_of_no_queue(rig: Rig, queue: int) -> None:
    """Nothing happens."""
    rig.device.kick(queue)
    assert not rig.broken


# Hostile drivers


def descriptor(addr: int = 0x4000, length: int = 16, flags: int = 0, following: int = 0) -> VirtqDescriptor:
    return VirtqDescriptor(addr=addr, len=length, flags=flags, next=following)


@pytest.mark.parametrize(
    ("descriptors", "head"),
    [
        ([descriptor()], 8),
        ([descriptor()], 0xFFFF),
        ([descriptor(flags=NEXT, following=8)], 0),
        ([descriptor(flags=NEXT)], 0),
        ([descriptor(flags=NEXT, following=1), descriptor(flags=NEXT)], 0),
        ([descriptor(flags=DescriptorFlag.INDIRECT)], 0),
        ([descriptor(flags=0x8000)], 0),
        ([descriptor(length=0)], 0),
        ([descriptor(flags=WRITE | NEXT, following=1), descriptor()], 0),
        ([descriptor(addr=1 << 20)], 0),
        ([descriptor(addr=(1 << 20) - 8)], 0),
        ([descriptor(addr=(1 << 64) - 8)], 0),
        ([descriptor(flags=NEXT, following=1), descriptor(addr=1 << 40, flags=WRITE)], 0),
        ([descriptor(length=LARGEST_CHAIN + 1)], 0),
        ([descriptor(length=LARGEST_CHAIN, flags=NEXT, following=1), descriptor(length=1)], 0),
        ([descriptor(length=(1 << 32) - 1, flags=WRITE)], 0),
        ([descriptor(addr=0xF000, length=4096)], 0),
        (
            [
                descriptor(addr=0xFFFF, flags=NEXT, following=1, length=1),
                descriptor(addr=0xFFFF, flags=WRITE),
            ],
            0,
        ),
    ],
    ids=str,
)
def test_chains_that_break_a_rule(descriptors: list[VirtqDescriptor], head: int) -> None:
    """2.7.5: outside the table, loops, unknown flags, empty, out of order, no or private memory, too large.

    2.1.2: the device says DEVICE_NEEDS_RESET with a configuration interrupt, and does nothing any more; after
    a reset it works again.
    """
    rig = Rig(DriverMemory(private=range(0xF800, 0x10000)))
    rig.driver.start()
    before = bytes(rig.memory.raw[0xF800:0x10000])
    for index, each in enumerate(descriptors):
        rig.driver.describe(index, each)
    rig.driver.offer(head)
    assert rig.broken
    assert (rig.driver.get(MmioRegister.INTERRUPT_STATUS), rig.levels) == (2, [True])
    assert (rig.driver.used()[0], bytes(rig.memory.raw[0xF800:0x10000])) == (0, before)
    served = len(rig.echo.served)
    rig.driver.chain([b"x"], [])
    rig.driver.offer(0)
    assert len(rig.echo.served) == served
    rig.driver.start()
    assert not rig.broken
    assert rig.driver.request([b"x"], [1]) == (1, b"x")


def test_largest_chain() -> None:
    """A chain of just so many bytes is served."""
    rig = Rig(DriverMemory(LARGEST_CHAIN + 0x4000))
    rig.driver.start()
    rig.driver.chain([bytes(LARGEST_CHAIN)], [])
    rig.driver.offer(0)
    assert not rig.broken
    assert len(rig.echo.served[0]) == LARGEST_CHAIN


def test_longest_chain(rig: Rig) -> None:
    """As many descriptors as the queue has."""
    assert rig.driver.request([b"abcdefg"[n : n + 1] for n in range(7)], [9]) == (7, b"gfedcba\0\0")


@pytest.mark.parametrize("index", [8, 9])
def test_descriptors_behind_the_table(rig: Rig, index: int) -> None:
    """2.7.5: what lies behind the table may look like a descriptor, and is none."""
    rig.driver.describe(index, descriptor())
    rig.driver.offer(index)
    assert rig.broken
    rig.driver.start()
    rig.driver.describe(0, descriptor(flags=NEXT, following=index))
    rig.driver.offer(0)
    assert rig.broken
    assert rig.echo.served == []


@pytest.mark.parametrize("count", [9, 0x8000, 0xFFFF])
def test_more_chains_than_descriptors(rig: Rig, count: int) -> None:
    """2.7.6: the index runs ahead by the queue's size at most."""
    rig.driver.chain([b"x"], [])
    struct.pack_into("<HH", rig.memory.raw, 0x1000, 0, count)
    rig.driver.put(MmioRegister.QUEUE_NOTIFY, 0)
    assert rig.broken
    assert rig.echo.served == []


@pytest.mark.parametrize(
    "areas", [(1 << 20, 0x1000, 0x2000), (0, 1 << 20, 0x2000), (0, 0x1000, 1 << 63), (0, 0xF000, 0x2000)]
)
def test_rings_that_are_not_shared(areas: tuple[int, int, int]) -> None:
    """Rings outside memory or in private memory are found at their first use."""
    rig = Rig(DriverMemory(private=range(0xF000, 0x10000)))
    rig.driver.start()
    rig.driver.put(MmioRegister.QUEUE_READY, 0)
    rig.driver.set_queue(*areas)
    rig.driver.chain([b"x"], [])
    rig.driver.offer(0)
    assert rig.broken


def test_request_without_an_answer(rig: Rig) -> None:
    """What a device cannot answer breaks the queue, and nothing is given back."""
    rig.driver.chain([b"unanswerable"], [])
    rig.driver.offer(0)
    assert rig.broken
    assert rig.driver.used()[0] == 0


@given(data=st.data())
def test_no_driver_gets_more_than_a_reset(data: Any) -> None:
    """Whatever registers and rings hold: an answer or a reset is due, and private memory stays as it was."""
    rig = Rig(DriverMemory(0x8000, private=range(0x3000, 0x4000)))
    rig.driver.start()
    rings = st.integers(0, 40).flatmap(lambda n: st.tuples(st.integers(0, 0x2100), st.binary(max_size=n)))
    registers = st.tuples(
        st.sampled_from(WRITABLE_REGISTERS),
        st.one_of(
            st.integers(0, 16), st.integers(0, (1 << 32) - 1), st.sampled_from([0x1000, 0x2000, 0x4000])
        ),
    )
    for at, raw in data.draw(st.lists(rings, max_size=6)):
        rig.memory.raw[at : at + len(raw)] = raw
    for register, value in data.draw(st.lists(registers, max_size=20)):
        rig.driver.put(register, value)
    rig.driver.put(MmioRegister.QUEUE_NOTIFY, 0)
    assert len(rig.memory.raw) == 0x8000
    assert rig.memory.raw[0x3000:0x4000] == bytes(0x1000)
    assert rig.memory.refused == 0 or rig.broken or not rig.driver.status
