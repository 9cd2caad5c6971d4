"""The network device: frames between a driver and a stream, and what neither of them may do."""

from __future__ import annotations

import logging
import struct
import threading
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.virtio import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
    DeviceStatus,
    NetConfig,
    VirtqDescriptor,
)
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.network import LARGEST_FRAME, FrameReader, Network, framed
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

REQUIRED: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
MAC: Final = bytes.fromhex("525400123456")
ROOM: Final = 1526
HEADER: Final = bytes(10) + b"\1\0"
FRAME: Final = bytes(range(60))


class Stream:
    """Bytes towards the peer; `full` takes none."""

    def __init__(self) -> None:
        self.connected = True
        self.full = False
        self.got = b""

    def send(self, data: bytes, *, must: bool = False) -> bool:
        self.got += b"" if self.full else data
        return not self.full


class Rig:
    """A device with its driver."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.network = Network(MAC, self.stream)
        self.memory = DriverMemory(private=range(0x70000, 0x80000))
        self.device = VirtioMmio(self.network, self.memory, lambda _: None)
        self.network.connect(self.device.kick)
        self.input, self.output = (VirtioDriver(self.device, self.memory, queue=queue) for queue in range(2))

    def start(self) -> None:
        self.input.start(REQUIRED | 1 << 5, others=[self.output])

    def offer(self, count: int = 1, room: int = ROOM) -> None:
        self.input.chain([], [room])
        self.input.offer(*[0] * count)

    def heard(self) -> bytes | None:
        """What is in the buffer that was used last, if any."""
        index, entries = self.input.used()
        size = entries[(index - 1) % self.input.size][1]
        return bytes(self.memory.raw[0x4000 : 0x4000 + size]) if index else None

    @property
    def broken(self) -> bool:
        return bool(self.input.status & DeviceStatus.NEEDS_RESET)


@pytest.fixture
def rig() -> Rig:
    """A device that runs."""
    found = Rig()
    found.start()
    return found


# Frames in a stream


def test_frames_in_pieces() -> None:
    """qemu(1), -netdev stream: length and frame, wherever the stream was cut."""
    frames = [b"a", b"bc" * 700, b"d" * 69632]
    whole = b"".join(map(framed, frames))
    assert whole[:5] == b"\0\0\0\1a"
    for size in (1, 3, 4096, len(whole)):
        reader = FrameReader()
        pieces = (whole[at : at + size] for at in range(0, len(whole), size))
        assert [frame for piece in pieces for frame in reader.feed(piece)] == frames
        assert not reader.lost


@pytest.mark.parametrize("length", [0, 69633, 0xFFFF_FFFF])
def test_lengths_that_no_frame_has(length: int, caplog: pytest.LogCaptureFixture) -> None:
    """The peer is not understood any more, and nothing of it is kept; what came before counts."""
    reader = FrameReader()
    assert list(reader.feed(framed(b"good") + struct.pack(">I", length) + b"more")) == [b"good"]
    assert reader.lost
    assert f"got a frame of {length} bytes, wanted 1..69632" in caplog.text
    caplog.clear()
    assert list(reader.feed(framed(b"good"))) == []
    assert (bytes(reader._said), caplog.text) == (b"", "")


@given(st.lists(st.binary(min_size=1, max_size=50)), st.lists(st.integers(1, 40)))
def test_any_cut(frames: list[bytes], cuts: list[int]) -> None:
    """The pieces of a stream say nothing."""
    reader, whole = FrameReader(), b"".join(map(framed, frames))
    found: list[bytes] = []
    for cut in cuts:
        found += reader.feed(whole[:cut])
        whole = whole[cut:]
    assert [*found, *reader.feed(whole)] == frames


# The device


def test_what_it_is() -> None:
    """5.1: device 1, two queues, an address, a link that is up; nothing is offloaded."""
    rig = Rig()
    assert rig.input.get(0x8) == 1
    assert rig.input.features() == REQUIRED | 1 << 5 | 1 << 16
    raw = b"".join(rig.device.read(0x100 + at, 1).to_bytes(1, "little") for at in range(8))
    assert NetConfig.parse(raw) == NetConfig(mac=MAC, status=1)
    assert rig.network.queues == 2
    assert rig.input.get(0x34) == 128


@pytest.mark.parametrize("size", [14, 60, 1514, LARGEST_FRAME])
def test_sent(rig: Rig, size: int) -> None:
    """5.1.6.2: the header is not the peer's."""
    frame = bytes(number % 251 for number in range(size))
    assert rig.output.request([HEADER + frame[:5], frame[5:]], [])[0] == 0
    assert rig.stream.got == framed(frame)
    assert rig.network.dropped == 0


@pytest.mark.parametrize("size", [0, 13, LARGEST_FRAME + 1])
def test_frames_that_are_none(rig: Rig, size: int) -> None:
    """Too short for addresses and type, or too long for a wire: dropped and counted."""
    rig.output.request([HEADER + bytes(size)], [])
    assert (rig.stream.got, rig.network.dropped, rig.broken) == (b"", 1, False)


def test_half_a_header(rig: Rig) -> None:
    """5.1.6: each buffer begins with the header."""
    rig.output.chain([HEADER[:-1]], [])
    rig.output.offer(0)
    assert rig.broken


@pytest.mark.parametrize("way", ["full", "gone"])
def test_peer_that_takes_nothing(rig: Rig, way: str) -> None:
    """A wire does not wait: the buffer is used, and the frame is lost."""
    rig.stream.full, rig.stream.connected = way == "full", way != "gone"
    assert rig.output.request([HEADER + FRAME], [])[0] == 0
    assert (rig.stream.got, rig.network.dropped) == (b"", 1)
    rig.stream.full, rig.stream.connected = False, True
    rig.network.room()
    rig.output.request([HEADER + FRAME], [])
    assert rig.stream.got == framed(FRAME)


def test_received(rig: Rig) -> None:
    """5.1.6.4: a header of zeros that counts one buffer, and the frame, in the buffer that waited."""
    rig.offer(2)
    assert rig.heard() is None
    for frame in (FRAME, FRAME * 2):
        rig.network.receive(framed(frame)[:9])
        rig.network.receive(framed(frame)[9:])
        assert rig.heard() == HEADER + frame


def test_received_before_a_buffer(rig: Rig) -> None:
    """Frames wait, in their order."""
    rig.network.receive(framed(FRAME) + framed(FRAME[:20]))
    for frame in (FRAME, FRAME[:20]):
        rig.offer()
        assert rig.heard() == HEADER + frame
    rig.offer()
    assert rig.input.used()[0] == 2


def test_frame_larger_than_its_buffer(rig: Rig) -> None:
    """It is dropped, and the buffer has the next one that it can hold; one that just fits is no larger."""
    rig.offer(2, room=12 + 60)
    rig.network.receive(framed(bytes(61)) + framed(bytes(69632)) + framed(FRAME))
    assert (rig.heard(), rig.network.dropped, rig.input.used()[0]) == (HEADER + FRAME, 2, 1)
    rig.network.receive(framed(bytes(61)))
    assert (rig.input.used()[0], rig.network.dropped) == (1, 3)


@pytest.mark.parametrize(("room", "broken"), [(11, True), (12, False)])
def test_buffer_without_room_for_a_header(rig: Rig, room: int, broken: bool) -> None:
    """5.1.6.3: such a buffer is of no use to anybody."""
    rig.offer(room=room)
    assert rig.broken is broken


def test_guest_that_does_not_read_holds_its_peer_back(rig: Rig) -> None:
    """64 frames wait; then the peer does, until the guest reads or the device is stopped."""
    done = threading.Event()

    def feed() -> None:
        rig.network.receive(b"".join(framed(bytes([number]) * 14) for number in range(70)))
        done.set()

    thread = threading.Thread(target=feed)
    thread.start()
    while len(rig.network._waiting) < 64:
        pass
    assert not done.wait(0.05)
    assert len(rig.network._waiting) == 64
    for number in range(3):
        rig.offer()
        assert rig.heard() == HEADER + bytes([number]) * 14
    rig.network.stop()
    thread.join(20)
    assert done.is_set()
    assert len(rig.network._waiting) <= 64
    rig.network.receive(framed(FRAME))
    assert len(rig.network._waiting) <= 64


def test_new_driver(rig: Rig) -> None:
    """2.4: what came for the driver before is gone, and the one who waited with more goes on."""
    rig.network.receive(framed(FRAME))
    rig.start()
    rig.offer()
    assert rig.heard() is None
    rig.network.receive(framed(FRAME[:30]))
    assert rig.heard() == HEADER + FRAME[:30]


def test_new_peer(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """The rest of a frame that a peer did not finish is not the next one's; the log tells that it is gone."""
    caplog.set_level(logging.WARNING)
    rig.offer(2)
    rig.network.receive(framed(FRAME)[:20])
    rig.stream.connected = False
    rig.network.changed()
    assert "network: the peer is gone" in caplog.text
    caplog.clear()
    rig.stream.connected = True
    rig.network.changed()
    assert caplog.text == ""
    rig.network.receive(framed(FRAME[:40]))
    assert rig.heard() == HEADER + FRAME[:40]


@given(data=st.data())
def test_neither_side_gets_further(data: Any) -> None:
    """Whatever driver and peer say: an answer or a reset is due, little is kept, private memory stays."""
    rig = Rig()
    rig.start()
    place = st.sampled_from([0x4000, 0x4000, 0x6FFF0, 0x70000, 1 << 40])
    steps = st.tuples(st.integers(0, 2), st.binary(max_size=40), place, st.integers(0, 100))
    for kind, said, at, room in data.draw(st.lists(steps, max_size=20)):
        if kind == 2:
            if len(rig.network._waiting) < 50:
                rig.network.receive(said)
            continue
        driver = (rig.input, rig.output)[kind]
        rig.memory.raw[0x4000 : 0x4000 + len(said)] = said
        driver.describe(0, VirtqDescriptor(addr=at, len=len(said), flags=1 if room else 0, next=1))
        driver.describe(1, VirtqDescriptor(addr=at, len=room, flags=2))
        driver.offer(0 if said else 1)
    assert bytes(rig.memory.raw[0x70000:0x80000]) == bytes(0x10000)
    assert rig.memory.refused == 0 or rig.broken
    assert len(rig.network._reader._said) <= 4 + 69632 + 40
