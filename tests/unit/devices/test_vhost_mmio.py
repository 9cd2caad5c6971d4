"""A device that is another process: its queues over memory that was passed, and its end."""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

import pytest
from tests.unit.devices.vhost_backend import ALL_FEATURES, Backend, PassableDriverMemory, answer, until

from swsnp.abi.vhost_user import Request
from swsnp.abi.virtio import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    DeviceStatus,
    FsConfig,
    MmioRegister,
)
from swsnp.testing.virtio_driver import VirtioDriver
from swsnp.vmm.devices import vhost_mmio
from swsnp.vmm.devices.vhost_fs import VhostFs
from swsnp.vmm.devices.vhost_mmio import VhostMmio
from swsnp.vmm.devices.vhost_user import VhostUser

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIRED: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
SERVED: Final = ["NUM", "BASE", "ADDR", "CALL", "KICK", "ENABLE"]
USED_BUFFER, CONFIGURATION = 1, 2


class Rig:
    """A folder's device with its driver and its daemon; the daemon's answers may take a second."""

    def __init__(self, *, private: range = range(0), features: int = ALL_FEATURES) -> None:
        self.memory = PassableDriverMemory(private=private)
        self.backend = Backend(features=features)
        self.levels: list[bool] = []
        self.daemon = VhostUser(self.backend.front, "f.sock", answer_s=1)
        self.folder = VhostFs(b"mine", self.daemon, queue_size=16)
        self.device = VhostMmio(self.folder, self.memory, self.levels.append)
        self.urgent, self.driver = (VirtioDriver(self.device, self.memory, queue=queue) for queue in (0, 1))

    def start(self, features: int = REQUIRED) -> None:
        self.driver.start(features, others=[self.urgent])

    def close(self) -> None:
        self.device.stop()
        self.daemon.close()
        os.close(self.memory.fd)

    def said(self) -> list[str]:
        """Requests since the last look, without the greeting."""
        found = self.backend.requests()
        self.backend.said.clear()
        return [each for each in found if each not in GREETING]

    def told(self, driver: VirtioDriver, data: bytes) -> bytes:
        """One request, and the daemon's answer to it."""
        ((at, size),) = driver.chain([data], [len(data)])
        before = driver.used()[0]
        driver.offer(0)
        until(lambda: driver.used()[0] != before)
        return bytes(self.memory.raw[at : at + size])

    @property
    def broken(self) -> bool:
        return bool(self.driver.status & DeviceStatus.NEEDS_RESET)


GREETING: Final = ("GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "SET_OWNER")


@pytest.fixture
def rig() -> Iterator[Rig]:
    found = Rig()
    yield found
    found.close()


def test_identity(rig: Rig) -> None:
    """VIRTIO 1.2, 5.11: device 26, two queues, the tag behind which zeros are, one queue for requests."""
    assert rig.driver.get(MmioRegister.DEVICE_ID) == 26
    raw = bytes(rig.device.read(0x100 + at, 1) for at in range(FsConfig.SIZE))
    assert FsConfig.parse(raw) == FsConfig(tag=b"mine" + bytes(32), num_request_queues=1)
    sizes = []
    for queue in (0, 1, 2):
        rig.driver.put(MmioRegister.QUEUE_SEL, queue)
        sizes.append(rig.driver.get(MmioRegister.QUEUE_SIZE_MAX))
    assert sizes == [16, 16, 0]


@pytest.mark.parametrize("own", [VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, 0])
def test_features(own: int) -> None:
    """Of the daemon's features what is between it and the driver; ACCESS_PLATFORM is ours and stays here."""
    theirs = ALL_FEATURES & ~(VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC) | own
    rig = Rig(features=theirs)
    assert rig.driver.features() == REQUIRED | own
    rig.start(REQUIRED | own)
    (features,) = (each.payload for each in rig.backend.said if each.request == Request.SET_FEATURES)
    assert features == struct.pack("<Q", VIRTIO_F_VERSION_1 | own | 1 << 30)
    rig.close()


def test_requests(rig: Rig) -> None:
    """Kick, call and interrupt: both queues are served, over the memory that was passed and no other."""
    rig.start()
    assert rig.said() == ["SET_FEATURES", "SET_MEM_TABLE", *(f"SET_VRING_{each}" for each in SERVED * 2)]
    ((region, _),) = rig.backend.memory.regions
    assert (region.guest_phys_addr, region.memory_size) == (0, len(rig.memory.raw))
    assert rig.told(rig.driver, b"hello") == b"olleh"
    until(lambda: rig.levels == [True])
    assert rig.driver.get(MmioRegister.INTERRUPT_STATUS) == USED_BUFFER
    rig.driver.put(MmioRegister.INTERRUPT_ACK, USED_BUFFER)
    assert rig.levels == [True, False]
    assert rig.told(rig.urgent, b"soon") == b"noos"
    until(lambda: rig.levels == [True, False, True])
    assert rig.said() == []


def test_requests_before_the_driver_is_ready(rig: Rig) -> None:
    """VIRTIO 1.2, 3.1.1: a device may not use a queue before DRIVER_OK, and has to look at it then."""
    rig.driver.accept(REQUIRED)
    rig.driver.set_up()
    ((at, _),) = rig.driver.chain([b"early"], [5])
    rig.driver.offer(0)
    assert rig.said() == []
    rig.driver.put(MmioRegister.STATUS, rig.driver.status | DeviceStatus.DRIVER_OK)
    until(lambda: rig.driver.used()[0] == 1)
    assert rig.memory.raw[at : at + 5] == b"ylrae"


def test_reset(rig: Rig) -> None:
    """The driver's reset takes both queues back, and another driver begins anew."""
    rig.start()
    rig.told(rig.driver, b"x")
    rig.said()
    rig.driver.put(MmioRegister.STATUS, 0)
    assert rig.said() == ["GET_VRING_BASE"] * 2
    rig.driver.put(MmioRegister.STATUS, 0)
    assert rig.said() == []
    rig.start()
    assert rig.told(rig.driver, b"again") == b"niaga"
    assert rig.said()[:2] == ["SET_FEATURES", "SET_MEM_TABLE"]


def test_queue_is_taken_back(rig: Rig) -> None:
    """4.2.2, QueueReady: a queue that the driver takes back is no longer the daemon's; the other one is."""
    rig.start()
    rig.told(rig.driver, b"x")
    rig.said()
    rig.driver.put(MmioRegister.QUEUE_SEL, 1)
    rig.driver.put(MmioRegister.QUEUE_READY, 0)
    rig.driver.put(MmioRegister.QUEUE_READY, 0)
    assert rig.said() == ["GET_VRING_BASE"]
    assert rig.told(rig.urgent, b"soon") == b"noos"
    rig.driver.put(MmioRegister.QUEUE_NOTIFY, 1)
    rig.driver.set_up()
    rig.driver.put(MmioRegister.QUEUE_SEL, 1)
    rig.driver.put(MmioRegister.QUEUE_READY, 1)
    assert rig.said() == [f"SET_VRING_{each}" for each in SERVED]
    assert rig.told(rig.driver, b"again") == b"niaga"


def test_one_queue(rig: Rig) -> None:
    """A queue that the driver did not enable is not the daemon's."""
    rig.driver.start(REQUIRED)
    assert rig.said() == ["SET_FEATURES", "SET_MEM_TABLE", *(f"SET_VRING_{each}" for each in SERVED)]
    for queue in (0, 2, 99):
        rig.driver.put(MmioRegister.QUEUE_NOTIFY, queue)
    assert rig.told(rig.driver, b"x") == b"x"
    assert not rig.broken


def test_stop() -> None:
    """Queues are taken back, and nothing of the guest's stays open; again is allowed."""
    rig = Rig()
    rig.start()
    rig.said()
    opened = [*rig.device._kicks, *rig.device._calls, rig.device._stopped]
    threads = threading.active_count()
    rig.device.stop()
    assert rig.said() == ["GET_VRING_BASE"] * 2
    assert threading.active_count() == threads - 1
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    rig.device.stop()
    rig.close()


def test_guest_after_guest() -> None:
    """A machine that resets has other memory: the daemon is told, over the same connection."""
    rig = Rig()
    rig.start()
    rig.told(rig.driver, b"x")
    rig.device.stop()
    memory = PassableDriverMemory()
    device = VhostMmio(rig.folder, memory, rig.levels.append)
    rig.device, old, rig.memory = device, rig.memory, memory
    os.close(old.fd)
    rig.urgent, rig.driver = (VirtioDriver(device, memory, queue=queue) for queue in (0, 1))
    rig.start()
    assert rig.told(rig.driver, b"other") == b"rehto"
    assert not any(old.raw[0x20000:])
    rig.close()


@pytest.mark.parametrize("place", [0x8000, 0x9000, 0xA000], ids=["descriptors", "available", "used"])
def test_ring_in_private_memory(place: int) -> None:
    """A ring that the daemon would see as zeros is not given to it: DEVICE_NEEDS_RESET."""
    rig = Rig(private=range(place + 8, place + 16))
    rig.start()
    assert rig.broken
    assert rig.said() == ["SET_FEATURES", "SET_MEM_TABLE", *(f"SET_VRING_{each}" for each in SERVED)]
    rig.driver.put(MmioRegister.QUEUE_NOTIFY, 1)
    rig.driver.put(MmioRegister.STATUS, 0)
    assert rig.said() == ["GET_VRING_BASE"]
    rig.memory.private = range(0)
    rig.start()
    assert rig.told(rig.driver, b"good") == b"doog"
    rig.close()


def test_ring_in_private_memory_of_a_running_driver(rig: Rig) -> None:
    """As before, for a queue that is enabled late."""
    rig.memory.private = range(0x8000, 0x9000)
    rig.urgent.start(REQUIRED)
    assert not rig.broken
    rig.driver.set_up()
    assert rig.broken


@pytest.mark.parametrize("end", [0x8080, 0x9016, 0xA046], ids=["descriptors", "available", "used"])
def test_ring_up_to_private_memory(end: int) -> None:
    """2.7: 8 descriptors take 128 bytes; rings end with the event index of VIRTIO_F_EVENT_IDX."""
    for private in (range(end, end + 16), range(end - 1, end + 16)):
        rig = Rig(private=private)
        rig.start()
        assert rig.broken is (private.start < end)
        rig.close()


def test_daemon_goes(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """DEVICE_NEEDS_RESET with an interrupt; another try comes to the same; the end waits for nobody."""
    rig.start()
    rig.told(rig.driver, b"x")
    until(lambda: rig.levels == [True])
    rig.driver.put(MmioRegister.INTERRUPT_ACK, USED_BUFFER)
    rig.backend.hang_up()
    until(lambda: rig.broken)
    assert rig.driver.get(MmioRegister.INTERRUPT_STATUS) == CONFIGURATION
    gone = "virtio device 26: f.sock: the daemon closed the connection; remedy: see what the daemon says"
    assert caplog.messages == [f"{gone}, start it again, and then the guest"]
    rig.driver.put(MmioRegister.QUEUE_NOTIFY, 1)
    rig.start()
    assert rig.broken
    started = time.monotonic()
    rig.device.stop()
    assert time.monotonic() - started < 0.5
    assert caplog.messages == [f"{gone}, start it again, and then the guest"] * 2


def test_daemon_goes_before_the_driver_comes(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """The guest is told when it tries; nobody else is."""
    rig.backend.hang_up()
    until(lambda: rig.broken)
    assert rig.levels == [], "no interrupt before DRIVER_OK"
    assert not caplog.messages
    rig.start()
    assert rig.broken
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "request_name", ["SET_FEATURES", "SET_MEM_TABLE", "SET_VRING_ADDR", "SET_VRING_ENABLE"]
)
def test_daemon_refuses(rig: Rig, request_name: str, caplog: pytest.LogCaptureFixture) -> None:
    """An error at any step of the start: the driver gets DEVICE_NEEDS_RESET, the user the reason."""
    wrong = Request[request_name]
    rig.backend.spoil = lambda request, data: answer(request, b"\1" + bytes(7)) if request == wrong else data
    rig.start()
    assert rig.broken
    assert f"{request_name}: the daemon could not do it: got status 0x1" in caplog.messages[0]
    assert rig.said()[-1] == request_name


def test_daemon_refuses_a_queue_that_comes_late(rig: Rig) -> None:
    """As before, for a queue that is enabled while the driver runs."""
    rig.urgent.start(REQUIRED)
    rig.backend.spoil = lambda request, _: answer(request, b"\1" + bytes(7))
    rig.driver.set_up()
    assert rig.broken


def test_daemon_hangs(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """A guest's end waits once for a daemon that does not answer, and says so."""
    rig.start()
    rig.said()
    rig.backend.spoil = lambda *_: b""
    started = time.monotonic()
    rig.device.stop()
    assert 0.9 < time.monotonic() - started < 5
    assert rig.said() == ["GET_VRING_BASE"]
    (message,) = caplog.messages
    assert message.startswith("f.sock: GET_VRING_BASE: no answer within 1 s; remedy: ")


def test_calls_of_a_device_that_was_reset(rig: Rig) -> None:
    """A daemon that calls a device that was reset interrupts nobody."""
    rig.urgent.start(REQUIRED)
    rig.backend.call(0)
    until(lambda: rig.levels == [True])
    rig.urgent.put(MmioRegister.STATUS, 0)
    assert rig.levels == [True, False]
    os.eventfd_write(rig.device._calls[0], 1)
    until(lambda: not _is_signalled(rig.device._calls[0]))
    rig.driver.get(MmioRegister.STATUS)
    assert rig.levels == [True, False]


def test_kicks_that_nobody_takes(rig: Rig) -> None:
    """An eventfd that is full is signalled enough: no vCPU waits for a daemon."""
    os.eventfd_write(rig.device._kicks[1], (1 << 64) - 2)
    rig.start()
    assert rig.told(rig.driver, b"on") == b"no"


def test_call_that_the_daemon_takes_back() -> None:
    """The daemon has the same eventfd: who comes second finds nothing, and does not wait."""
    fd = os.eventfd(1, os.EFD_NONBLOCK)
    assert (vhost_mmio._drain(fd), vhost_mmio._drain(fd)) == (True, False)
    os.close(fd)


def _is_signalled(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
