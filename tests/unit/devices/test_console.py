"""The console device: its ports by control messages, bytes both ways, and drivers that mean no good."""

from __future__ import annotations

import struct
import threading
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.virtio import (
    CONSOLE_CONTROL_IN,
    CONSOLE_CONTROL_OUT,
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
    ConsoleConfig,
    ConsoleEvent,
    ConsoleFeature,
    DeviceStatus,
    VirtqDescriptor,
    console_queue,
)
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.console import Console, Port
from swsnp.vmm.devices.host_end import InputEnd
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

REQUIRED: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
MULTIPORT: Final = ConsoleFeature.MULTIPORT
BUFFER: Final = 64
PRIVATE: Final = range(0x70000, 0x80000)


class End:
    """The host's end, which takes what it is given unless it is full."""

    def __init__(self, *, connected: bool = True) -> None:
        self.connected = connected
        self.full = False
        self.got = b""

    def send(self, data: bytes, *, must: bool = False) -> bool:
        if self.full and not must:
            return False
        self.got += data
        return True


class Rig:
    """A console on port 0, a named port 1 that nobody has at the host, a nameless port 3; with its driver."""

    def __init__(self) -> None:
        self.ends = {0: End(), 1: End(connected=False), 3: End()}
        self.ports = {
            0: Port(0, self.ends[0], is_console=True),
            1: Port(1, self.ends[1], name="org.test.\u00e4"),
            3: Port(3, self.ends[3]),
        }
        self.console = Console(list(self.ports.values()))
        self.memory = DriverMemory(private=PRIVATE)
        self.levels: list[bool] = []
        self.device = VirtioMmio(self.console, self.memory, self.levels.append)
        self.console.connect(self.device.kick)
        self.queues = [
            VirtioDriver(self.device, self.memory, queue=queue) for queue in range(self.console.queues)
        ]
        self.control_in, self.control_out = self.queues[CONSOLE_CONTROL_IN], self.queues[CONSOLE_CONTROL_OUT]
        self.listeners = [Listener(each) for each in self.queues]

    def start(self, features: int = REQUIRED | MULTIPORT) -> None:
        self.queues[0].start(features, others=self.queues[1:])
        for each in self.listeners:
            each.start()

    def say(self, port: int, event: int, value: int = 1) -> None:
        self.control_out.request([struct.pack("<IHH", port, event, value)], [])

    def hear(self) -> list[tuple[int, int, int, bytes]]:
        """All that the device has to say: port, event, value, name."""
        heard = []
        while (said := self.listeners[CONSOLE_CONTROL_IN].next()) is not None:
            heard.append((*struct.unpack_from("<IHH", said), said[8:]))
        return heard

    def write(self, port: int, data: bytes) -> None:
        self.queues[console_queue(port) + 1].request([data], [])

    def read(self, port: int) -> bytes | None:
        return self.listeners[console_queue(port)].next()

    def open(self, port: int) -> None:
        self.say(port, ConsoleEvent.PORT_OPEN)

    @property
    def broken(self) -> bool:
        return bool(self.queues[0].status & DeviceStatus.NEEDS_RESET)


class Listener:
    """Reads one queue, a buffer at a time."""

    def __init__(self, queue: VirtioDriver) -> None:
        self._queue = queue
        self.start()

    def start(self) -> None:
        """The queue is empty again."""
        self._seen = self._offered = 0

    def next(self) -> bytes | None:
        """What is in the buffer that was offered, or is offered now; None: nothing yet."""
        if self._offered == self._seen:
            self._queue.chain([], [BUFFER])
            self._queue.offer(0)
            self._offered += 1
        index, entries = self._queue.used()
        if index == self._seen:
            return None
        at = self._queue._base + 0x4000
        said = bytes(self._queue.memory.raw[at : at + entries[self._seen % self._queue.size][1]])
        self._seen += 1
        return said


@pytest.fixture
def rig() -> Rig:
    """A device with its driver, which has opened nothing."""
    found = Rig()
    found.start()
    return found


@pytest.fixture
def ready(rig: Rig) -> Rig:
    """The driver knows all ports, and has them open."""
    rig.say(0, ConsoleEvent.DEVICE_READY)
    for port in rig.ports:
        rig.say(port, ConsoleEvent.PORT_READY)
        rig.open(port)
    rig.hear()
    return rig


# What the driver is told


def test_what_it_is() -> None:
    """5.3: device 3; queues of each port up to the last, and two for control; how many ports there can be."""
    rig = Rig()
    assert rig.queues[0].get(0x8) == 3
    assert rig.queues[0].features() == REQUIRED | 0b10
    raw = b"".join(rig.device.read(0x100 + at, 4).to_bytes(4, "little") for at in range(0, 12, 4))
    assert ConsoleConfig.parse(raw) == ConsoleConfig(max_nr_ports=4)
    assert rig.console.queues == 10
    assert rig.queues[0].get(0x34) == 32


@pytest.mark.parametrize(("most", "queues"), [(None, 4), (1, 4), (2, 6), (31, 64)])
def test_most_ports(most: int | None, queues: int) -> None:
    """5.3.2: two queues a port, and two for control."""
    console = Console([], most=most)
    assert (console.queues, ConsoleConfig.parse(console.config).max_nr_ports) == (queues, most or 1)


def test_ports_are_added(rig: Rig) -> None:
    """5.3.6: nothing until the driver is ready; then each port; of a port more when the driver has it."""
    assert rig.hear() == []
    rig.say(0, ConsoleEvent.DEVICE_READY)
    assert rig.hear() == [(port, ConsoleEvent.DEVICE_ADD, 1, b"") for port in (0, 1, 3)]
    rig.say(0, ConsoleEvent.PORT_READY)
    assert rig.hear() == [(0, ConsoleEvent.CONSOLE_PORT, 1, b""), (0, ConsoleEvent.PORT_OPEN, 1, b"")]
    rig.say(1, ConsoleEvent.PORT_READY)
    assert rig.hear() == [(1, ConsoleEvent.PORT_NAME, 1, "org.test.\u00e4".encode())]
    rig.say(3, ConsoleEvent.PORT_READY)
    assert rig.hear() == [(3, ConsoleEvent.PORT_OPEN, 1, b"")]
    assert not rig.broken


def test_host_comes_and_goes(ready: Rig) -> None:
    """VIRTIO_CONSOLE_PORT_OPEN tells of the host's end, in a buffer that waits for it; and not twice."""
    for connected in (True, False):
        assert ready.hear() == []
        ready.ends[1].connected = connected
        before, _ = ready.control_in.used()
        ready.ports[1].changed()
        ready.ports[1].changed()
        assert ready.control_in.used()[0] == before + 1
        assert ready.hear() == [(1, ConsoleEvent.PORT_OPEN, int(connected), b"")]


def test_host_that_comes_before_the_port_is_ready(rig: Rig) -> None:
    """The driver is told of the state that there is then."""
    rig.say(0, ConsoleEvent.DEVICE_READY)
    rig.ends[1].connected = True
    rig.ports[1].changed()
    assert {event for _, event, _, _ in rig.hear()} == {ConsoleEvent.DEVICE_ADD}
    rig.say(1, ConsoleEvent.PORT_READY)
    assert rig.hear()[1:] == [(1, ConsoleEvent.PORT_OPEN, 1, b"")]


def test_driver_that_asks_without_end(rig: Rig) -> None:
    """What is owed does not grow with the questions."""
    for _ in range(200):
        rig.say(0, ConsoleEvent.DEVICE_READY)
        for port in rig.ports:
            rig.say(port, ConsoleEvent.PORT_READY)
    assert len(rig.hear()) == 4
    rig.say(0, ConsoleEvent.DEVICE_READY)
    assert len(rig.hear()) == 3, "asked again, it is said again"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        bytes(7),
        struct.pack("<IHH", 0, ConsoleEvent.DEVICE_READY, 0),
        struct.pack("<IHH", 0, ConsoleEvent.PORT_READY, 0),
        struct.pack("<IHH", 2, ConsoleEvent.PORT_READY, 1),
        struct.pack("<IHH", 0xFFFF_FFFF, ConsoleEvent.PORT_OPEN, 1),
        struct.pack("<IHH", 0, 5, 1),
        struct.pack("<IHH", 0, 0xFFFF, 1),
    ],
)
def test_control_messages_that_are_left_alone(rig: Rig, said: bytes) -> None:
    """Too short, a driver or a port that failed, ports that are not there, unknown events."""
    rig.control_out.request([said] if said else [], [] if said else [8])
    assert rig.hear() == []
    assert not rig.broken
    assert not any(each.opened for each in rig.ports.values())


def test_longer_control_message(rig: Rig) -> None:
    """What follows the eight bytes says nothing."""
    rig.control_out.request([struct.pack("<IHH", 0, ConsoleEvent.DEVICE_READY, 1), b"more"], [])
    assert len(rig.hear()) == 3


def test_control_message_that_just_fits(rig: Rig) -> None:
    """Eight bytes of room are enough."""
    rig.control_in.chain([], [3, 5])
    rig.control_in.offer(0)
    rig.control_out.request([struct.pack("<IHH", 0, ConsoleEvent.DEVICE_READY, 1)], [])
    assert (rig.control_in.used()[0], rig.broken) == (1, False)


def test_control_message_without_room(rig: Rig) -> None:
    """A buffer that the driver must not offer for control messages."""
    rig.control_in.chain([], [7])
    rig.control_in.offer(0)
    assert not rig.broken
    rig.control_out.chain([struct.pack("<IHH", 0, ConsoleEvent.DEVICE_READY, 1)], [])
    rig.control_out.offer(0)
    assert rig.broken


# Bytes


def test_output(ready: Rig) -> None:
    """5.3.6: what the driver writes goes to the host's end, in order; where nobody is, it is lost."""
    for piece in (b"one ", b"two"):
        ready.write(3, piece)
        ready.write(1, piece)
    assert (ready.ends[3].got, ready.ends[1].got, ready.ends[0].got) == (b"one two", b"", b"")


def test_output_of_ports_that_are_not_there(ready: Rig) -> None:
    """Queues come in rows: between two ports there may be some without one."""
    ready.write(2, b"lost")
    assert ready.read(2) is None
    assert not ready.broken


def test_output_waits(ready: Rig) -> None:
    """A full end leaves buffers in the queue until it has room; then they come at once, in order."""
    queue = ready.queues[console_queue(3) + 1]
    ready.ends[3].full = True
    for index, text in enumerate((b"one", b"two")):
        at = queue._base + 0x4000 + 16 * index
        ready.memory.raw[at : at + 3] = text
        queue.describe(index, VirtqDescriptor(addr=at, len=3))
        queue.offer(index)
    assert (queue.used()[0], ready.ends[3].got) == (0, b"")
    ready.ports[3].room()
    assert queue.used()[0] == 0
    ready.ends[3].full = False
    ready.ports[3].room()
    assert (queue.used()[0], ready.ends[3].got) == (2, b"onetwo")


def test_output_at_the_end(ready: Rig) -> None:
    """What the guest had written when it ended is taken, full or not; the next guest waits again."""
    queue = ready.queues[console_queue(3) + 1]
    ready.ends[3].full = True
    queue.chain([b"last"], [])
    queue.offer(0)
    ready.console.finish()
    assert ready.ends[3].got == b"last"
    ready.device.stop()
    ready.start()
    queue.chain([b"waits"], [])
    queue.offer(0)
    assert (queue.used()[0], ready.ends[3].got) == (0, b"last")


def test_input(ready: Rig) -> None:
    """5.3.6: bytes for the guest come in the buffers that it has offered, as much as has room."""
    assert ready.read(3) is None
    ready.ports[3].receive(b"abc")
    assert ready.queues[console_queue(3)].used()[0] == 1
    assert ready.read(3) == b"abc"
    ready.ports[3].receive(b"d" * (BUFFER + 1))
    ready.ports[3].receive(b"e")
    assert [ready.read(3) for _ in range(3)] == [b"d" * BUFFER, b"de", None]
    assert ready.read(0) is None


def test_input_waits_until_the_port_is_open(rig: Rig) -> None:
    """5.3.6: a port that the guest has not opened, or has closed, is given nothing."""
    rig.say(0, ConsoleEvent.DEVICE_READY)
    rig.say(3, ConsoleEvent.PORT_READY)
    rig.ports[3].receive(b"early")
    assert rig.read(3) is None
    rig.open(3)
    assert rig.read(3) == b"early"
    rig.say(3, ConsoleEvent.PORT_OPEN, 0)
    rig.ports[3].receive(b"late")
    assert rig.read(3) is None


def test_input_without_room(ready: Rig) -> None:
    """A queue for input has buffers to write to."""
    queue = ready.queues[console_queue(3)]
    queue.chain([b"what?"], [])
    queue.offer(0)
    assert ready.broken


def test_input_is_bounded(ready: Rig) -> None:
    """Who types into a guest that does not read is not kept waiting: what is too much is dropped."""
    port = ready.ports[3]
    for number in range(6):
        port.receive(bytes([number]) * 1024, wait=False)
    got = b"".join(iter(lambda: ready.read(3) or b"", b""))
    assert got == b"".join(bytes([number]) * 1024 for number in range(4))


def test_input_holds_the_host_back(ready: Rig) -> None:
    """A reader thread waits until the guest has taken what came before, or the port is stopped."""
    port = ready.ports[3]
    done = []

    def feed() -> None:
        for number in range(3):
            port.receive(bytes([number]) * 4096)
            done.append(number)

    thread = threading.Thread(target=feed)
    thread.start()
    got = b""
    while len(got) < 2 * 4096 + 1:
        got += ready.read(3) or b""
    port.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert done == [0, 1, 2]
    assert got[: 2 * 4096] == bytes(4096) + bytes([1]) * 4096
    port.receive(b"stopped")
    port.go()
    while ready.read(3):
        pass
    port.receive(b"goes")
    assert ready.read(3) == b"goes"


def test_input_of_a_stopped_port(ready: Rig) -> None:
    """What comes while nobody shall wait is dropped, room or not."""
    ready.ports[3].stop()
    ready.ports[3].receive(b"dropped")
    ready.ports[3].receive(b"dropped", wait=False)
    assert ready.read(3) is None


def test_end_of_input_comes_last(ready: Rig) -> None:
    """5.3.6: a reader sees all bytes of a host that has gone, and then that it has gone."""
    ready.ports[3].receive(b"a" * BUFFER + b"b")
    ready.ends[3].connected = False
    ready.ports[3].changed()
    assert ready.hear() == []
    assert ready.read(3) == b"a" * BUFFER
    assert ready.hear() == []
    assert ready.read(3) == b"b"
    assert ready.hear() == [], "the driver has offered no buffer since"
    assert ready.read(3) is None
    assert ready.hear() == [(3, ConsoleEvent.PORT_OPEN, 0, b"")]


def with_buffers(queue: VirtioDriver) -> VirtioDriver:
    """Three buffers for input on offer."""
    for index in range(3):
        at = queue._base + 0x4000 + BUFFER * index
        queue.describe(index, VirtqDescriptor(addr=at, len=BUFFER, flags=2))
        queue.offer(index)
    return queue


def test_end_of_input_waits_for_the_reader(ready: Rig) -> None:
    """5.3.6: Linux offers a buffer again when it has been read; before, it might overlook the bytes in it."""
    queue = with_buffers(ready.queues[console_queue(3)])
    ready.ends[3].connected = False
    ready.ports[3].receive(b"a" * BUFFER + b"b")
    assert queue.used()[0] == 2
    for index in (0, 1):
        ready.ports[3].changed()
        assert ready.hear() == []
        queue.offer(index)
    assert ready.hear() == [(3, ConsoleEvent.PORT_OPEN, 0, b"")]
    assert queue.used()[0] == 2


@given(st.lists(st.sampled_from(["bytes", "host goes", "host comes", "driver reads"]), max_size=30))
def test_no_end_before_the_last_bytes(happens: list[str]) -> None:
    """Whatever happens when: an end is told when all is read that came before it, and then it is told."""
    rig = Rig()
    rig.start()
    rig.say(3, ConsoleEvent.PORT_READY)
    queue, end, sent = with_buffers(rig.queues[console_queue(3)]), rig.ends[3], 0
    rig.open(3)
    is_open = rig.hear() == [(3, ConsoleEvent.PORT_OPEN, 1, b"")]
    seen, got = 0, 0
    for each in [*happens, "host goes", *["driver reads"] * 40]:
        used, entries = queue.used()
        if each == "bytes" and end.connected:
            rig.ports[3].receive(bytes(BUFFER // 2 + 9))
            sent += BUFFER // 2 + 9
        elif each.startswith("host"):
            end.connected = each == "host comes"
            rig.ports[3].changed()
        elif each == "driver reads" and seen < used:
            index, size = entries[seen % queue.size]
            seen, got = seen + 1, got + size
            queue.offer(index)
        for _, _, value, _ in rig.hear():
            assert value != is_open
            assert value or (got == sent and not end.connected)
            is_open = bool(value)
    assert (got, is_open) == (sent, False)


def test_host_that_went_before_its_bytes_were_read(rig: Rig) -> None:
    """A port whose bytes wait is open at the host, or a reader would take it for its end."""
    rig.ports[3].receive(b"early")
    rig.ends[3].connected = False
    rig.say(0, ConsoleEvent.DEVICE_READY)
    rig.hear()
    rig.say(3, ConsoleEvent.PORT_READY)
    assert rig.hear() == [(3, ConsoleEvent.PORT_OPEN, 1, b"")]
    rig.open(3)
    assert rig.read(3) == b"early"
    assert rig.read(3) is None
    assert rig.hear() == [(3, ConsoleEvent.PORT_OPEN, 0, b"")]


def test_input_that_ends(rig: Rig) -> None:
    """However short it is, the guest hears of its end when it has written, and has read everything."""
    end = InputEnd()
    rig.ports[3] = Port(3, end)
    rig.console = Console(list(rig.ports.values()))
    end.attach(rig.ports[3])
    rig.device._device = rig.console
    rig.console.connect(rig.device.kick)
    rig.start()
    end.give(b"all")
    end.finish()
    rig.say(0, ConsoleEvent.DEVICE_READY)
    rig.hear()
    rig.say(3, ConsoleEvent.PORT_READY)
    assert rig.hear() == [(3, ConsoleEvent.PORT_OPEN, 1, b"")]
    rig.open(3)
    assert rig.read(3) == b"all"
    assert rig.read(3) is None
    assert rig.hear() == []
    rig.write(3, b"\0")
    assert rig.hear() == [(3, ConsoleEvent.PORT_OPEN, 0, b"")]


# Drivers without ports, resets


def test_without_multiport() -> None:
    """5.3.4: the driver has port 0 alone, which is open at once; nobody speaks of control."""
    rig = Rig()
    rig.start(REQUIRED)
    for port in (0, 3):
        rig.ports[port].receive(b"in")
        rig.write(port, b"out")
    assert (rig.read(0), rig.read(3), rig.ends[0].got) == (b"in", None, b"out")
    assert rig.hear() == []


def test_reset(ready: Rig) -> None:
    """2.4: a new driver has opened nothing, and is told everything again; bytes that wait are its own."""
    ready.ports[3].receive(b"waits")
    ready.start()
    assert ready.hear() == []
    assert ready.read(3) is None
    ready.say(0, ConsoleEvent.DEVICE_READY)
    assert len(ready.hear()) == 3
    ready.open(3)
    assert ready.read(3) == b"waits"


def test_reset_with_bytes_unread(ready: Rig) -> None:
    """What an old driver had not read is gone with it: to a new one the port is as the host's end is."""
    ready.ports[3].receive(b"unread")
    assert ready.read(3) == b"unread"
    ready.ends[3].connected = False
    ready.start()
    ready.say(3, ConsoleEvent.PORT_READY)
    assert ready.hear() == []


def test_stopped_device(ready: Rig) -> None:
    """Whatever the host's ends do, the memory of a guest that is gone is not touched."""
    assert ready.read(3) is None
    ready.device.stop()
    before = bytes(ready.memory.raw)
    ready.ports[3].receive(b"late")
    ready.ports[3].room()
    ready.ends[1].connected = True
    ready.ports[1].changed()
    assert bytes(ready.memory.raw) == before


@given(data=st.data())
def test_no_driver_gets_more_than_a_reset(data: Any) -> None:
    """Any messages, any bytes, any order: an answer or a reset is due, and private memory stays as it was."""
    rig = Rig()
    rig.start()
    control = st.builds(
        struct.pack,
        st.just("<IHH"),
        st.one_of(st.integers(0, 4), st.integers(0, (1 << 32) - 1)),
        st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)),
        st.integers(0, 2),
    )
    places = st.sampled_from([0x4000, 0x4000, PRIVATE.start - 4, PRIVATE.start, 1 << 40])
    chains = st.tuples(
        st.integers(0, rig.console.queues - 1),
        st.one_of(control, st.binary(max_size=20)),
        st.integers(0, 300),
        places,
    )
    for queue, said, room, at in data.draw(st.lists(chains, max_size=25)):
        driver = rig.queues[queue]
        rig.memory.raw[0x4000 : 0x4000 + len(said)] = said
        driver.describe(0, VirtqDescriptor(addr=at, len=len(said), flags=1 if room else 0, next=1))
        driver.describe(1, VirtqDescriptor(addr=at, len=room, flags=2))
        driver.offer(0 if said else 1)
        rig.ports[data.draw(st.sampled_from([0, 1, 3]))].receive(b"typed", wait=False)
    assert bytes(rig.memory.raw[PRIVATE.start : PRIVATE.stop]) == bytes(len(PRIVATE))
    assert rig.memory.refused == 0 or rig.broken
    for port in rig.ports.values():
        assert len(port._waiting) <= 4096 + 5
        assert len(port._owed) <= 2
