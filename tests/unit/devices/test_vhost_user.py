"""vhost-user from the VMM's end: what is asked in which order, and what a daemon gets that answers badly."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.unit.devices.vhost_backend import ALL_FEATURES, Backend, PassableDriverMemory, answer, until

from swsnp.abi.vhost_user import MemoryRegion, Request, VringAddress, VringState
from swsnp.errors import HostError, InputError
from swsnp.vmm.devices.vhost_user import VhostUser, connect_to_daemon
from swsnp.vmm.devices.virtqueue import Virtqueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME: Final = "the daemon"
GREETING: Final = ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "SET_OWNER"]
QUEUE: Final = ["NUM", "BASE", "ADDR", "CALL", "KICK", "ENABLE"]
NEED_REPLY: Final = 1 | 8


@pytest.fixture
def events() -> Iterator[tuple[int, int]]:
    """Kick and call of a queue."""
    found = os.eventfd(0), os.eventfd(0)
    yield found
    for fd in found:
        os.close(fd)


def queue_of(memory: PassableDriverMemory) -> Virtqueue:
    found = Virtqueue(memory)
    found.size, found.descriptors, found.available, found.used = 8, 0x1000, 0x2000, 0x3000
    return found


def test_greeting() -> None:
    """vhost-user, "Communication": features, protocol features (here REPLY_ACK alone), then the owner.

    An acknowledgement is asked for from SET_FEATURES on: daemons over the crate vhost give none before.
    """
    backend = Backend()
    with VhostUser(backend.front, NAME) as daemon:
        until(lambda: len(backend.said) == 4)
        assert daemon.features == ALL_FEATURES & ~(1 << 30)
        assert backend.requests() == GREETING
        assert [each.flags for each in backend.said] == [1, 1, 1, 1]
        assert backend.said[2].payload == struct.pack("<Q", 1 << 3)
    backend.join()


@pytest.mark.parametrize(
    ("features", "protocol", "words"),
    [
        (
            ALL_FEATURES & ~(1 << 32),
            8,
            "GET_FEATURES: got 0x670000008, wanted VIRTIO_F_VERSION_1, 0x100000000;",
        ),
        (
            ALL_FEATURES & ~(1 << 30),
            8,
            "GET_FEATURES: got .*wanted VHOST_USER_F_PROTOCOL_FEATURES, 0x40000000;",
        ),
        (ALL_FEATURES, 7, "GET_PROTOCOL_FEATURES: got 0x7, wanted VHOST_USER_PROTOCOL_F_REPLY_ACK, 0x8;"),
    ],
)
def test_feature_that_is_missing(features: int, protocol: int, words: str) -> None:
    """Without them an error would be told nowhere, or the queues would be another kind's."""
    backend = Backend(features=features, protocol=protocol)
    with pytest.raises(HostError, match=f"^{NAME}: {words} remedy: see what the daemon says"):
        VhostUser(backend.front, NAME)
    backend.join()
    assert backend.front.fileno() == -1


def test_begin_and_queues(events: tuple[int, int]) -> None:
    """vhost-user: the table of memory with its descriptors, and a ring that is known before it is kicked."""
    backend, memory = Backend(), PassableDriverMemory(0x10000)
    with VhostUser(backend.front, NAME) as daemon:
        daemon.begin(1 << 32, [(0, 0x8000, memory.fd), (1 << 32, 0x4000, memory.fd)])
        daemon.start_queue(3, queue_of(memory), kick=events[0], call=events[1])
        daemon.stop_queue(3)
        assert backend.requests()[4:] == [
            "SET_FEATURES",
            "SET_MEM_TABLE",
            *(f"SET_VRING_{each}" for each in QUEUE),
            "GET_VRING_BASE",
        ]
        said = backend.said[4:]
        assert said[0].payload == struct.pack("<Q", 1 << 32 | 1 << 30)
        assert said[1].payload == struct.pack("<II", 2, 0) + bytes(
            MemoryRegion(guest_phys_addr=0, memory_size=0x8000)
        ) + bytes(MemoryRegion(guest_phys_addr=1 << 32, memory_size=0x4000, userspace_addr=1 << 32))
        assert [each.descriptors for each in said] == [0, 2, 0, 0, 0, 1, 1, 0, 0]
        assert [each.flags for each in said] == [NEED_REPLY] * 8 + [1]
        num, base, where, call, kick, enable, stop = (each.payload for each in said[2:])
        assert VringState.parse(num) == VringState(index=3, num=8)
        assert VringState.parse(base) == VringState.parse(stop) == VringState(index=3, num=0)
        assert VringState.parse(enable) == VringState(index=3, num=1)
        assert VringAddress.parse(where) == VringAddress(
            index=3, descriptor=0x1000, available=0x2000, used=0x3000
        )
        assert call == kick == struct.pack("<Q", 3)


def test_most_memory() -> None:
    """vhost-user: a table has eight regions at most; nothing was said then, and the daemon is fine."""
    backend, memory = Backend(), PassableDriverMemory(0x1000)
    one = (0, 0x1000, memory.fd)
    with VhostUser(backend.front, NAME) as daemon:
        with pytest.raises(HostError, match="got 9 ranges of memory, wanted at most 8"):
            daemon.begin(0, [one] * 9)
        daemon.begin(0, [one] * 8)
        assert len(backend.memory.regions) == 8


def status(value: int) -> Callable[[int, bytes], bytes]:
    return lambda request, _: answer(request, struct.pack("<Q", value))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda *_: None, "the daemon closed the connection"),
        (lambda _, data: data[:7], "no answer within 0.2 s"),
        (lambda _, data: data[:13], "no answer within 0.2 s"),
        (lambda *_: b"", "no answer within 0.2 s"),
        (lambda _, data: b"\5" + data[1:], "answer's request: got 0x5, wanted 0x2"),
        (lambda _, data: data[:4] + b"\1" + data[5:], "answer's flags: got 0x1, wanted 0x5"),
        (lambda _, data: data[:4] + b"\6" + data[5:], "answer's flags: got 0x6, wanted 0x5"),
        (lambda _, data: data[:8] + b"\4" + data[9:], "answer's size: got 0x4, wanted 0x8"),
        (lambda _, data: data[:8] + b"\xff" * 4 + data[12:], "answer's size: got 0xffffffff, wanted 0x8"),
        (status(1), "the daemon could not do it: got status 0x1, wanted 0"),
    ],
)
def test_answers_that_are_none(spoil: Callable[[int, bytes], bytes | None], words: str) -> None:
    """Field, got and wanted; after it the same error at once, and the daemon is hung up on."""
    backend = Backend()
    with VhostUser(backend.front, NAME, answer_s=0.2) as daemon:
        backend.spoil = spoil
        with pytest.raises(HostError, match=f"^{NAME}: SET_FEATURES: {words}; remedy: ") as first:
            daemon.begin(0, ())
        backend.join(10)
        assert not backend.is_alive()
        daemon._answer_s = 100
        with pytest.raises(HostError) as again:
            daemon.stop_queue(0)
        assert str(again.value) == str(first.value)
        assert backend.requests()[4:] == ["SET_FEATURES"]


def test_queue_that_was_not_asked_for(events: tuple[int, int]) -> None:
    """GET_VRING_BASE answers for the ring that was named."""
    backend = Backend(spoil=lambda request, data: data if request != 11 else data[:12] + b"\1" + data[13:])
    memory = PassableDriverMemory(0x10000)
    with VhostUser(backend.front, NAME) as daemon:
        daemon.start_queue(0, queue_of(memory), kick=events[0], call=events[1])
        with pytest.raises(HostError, match="GET_VRING_BASE: got queue 1, wanted 0"):
            daemon.stop_queue(0)


def test_answer_that_drips() -> None:
    """The time is for the whole answer: a byte now and then does not make it longer."""
    front, back = socket.socketpair()
    now = iter(range(100))
    back.sendall(answer(Request.GET_FEATURES, bytes(8))[:5])
    with back, pytest.raises(HostError, match="GET_FEATURES: no answer within 3 s"):
        VhostUser(front, NAME, answer_s=3, clock=lambda: next(now))
    assert next(now) == 4, "asked at 0, 1 and 2, and was over at 3"


def test_answer_of_a_daemon_that_died() -> None:
    """A connection that is reset is no answer."""
    front, back = socket.socketpair()
    back.sendall(b"x")
    timer = threading.Timer(0.1, back.close)  # with our request unread
    timer.start()
    with pytest.raises(HostError, match="GET_FEATURES: no answer: Connection reset by peer"):
        VhostUser(front, NAME)
    timer.join()


def test_daemon_that_takes_nothing() -> None:
    """Whether it is gone or does not read: an error, in time."""
    front, back = socket.socketpair()
    back.close()
    with pytest.raises(HostError, match="GET_FEATURES: not taken: Broken pipe"):
        VhostUser(front, NAME)
    front, back = socket.socketpair()
    front.setblocking(False)
    with suppress(BlockingIOError):
        while front.send(bytes(1 << 16)):
            pass
    with back, pytest.raises(HostError, match=r"GET_FEATURES: not taken within 0\.1 s"):
        VhostUser(front, NAME, answer_s=0.1)


def test_daemon_that_takes_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message is taken at once or not: the descriptors go with its first byte."""
    monkeypatch.setattr(socket, "send_fds", lambda *_: 11)
    front, back = socket.socketpair()
    with back, pytest.raises(HostError, match="GET_FEATURES: the daemon took 11 bytes, wanted 12"):
        VhostUser(front, NAME)


def descriptors() -> int:
    """How many are open, which this looks with among them."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_of_the_daemon() -> None:
    """What a daemon sends along is not taken: it could fill this process's table."""
    front, back = socket.socketpair()
    with back:
        socket.send_fds(back, [answer(Request.GET_FEATURES, bytes(8))], [back.fileno()])
        before = descriptors()
        with pytest.raises(HostError, match="wanted VIRTIO_F_VERSION_1"):
            VhostUser(front, NAME)
        assert descriptors() == before - 1, "the connection's own is closed"


def test_after_the_end() -> None:
    """A connection that was closed is used no more, and can be closed again."""
    daemon = VhostUser(Backend().front, NAME)
    daemon.close()
    daemon.close()
    assert daemon.fileno() == -1
    with pytest.raises(HostError, match=f"^{NAME}: the connection was closed$"):
        daemon.stop_queue(0)


def test_connecting(tmp_path: Path) -> None:
    """A path at which nobody listens is told with what might; else the daemon is called by its path."""
    path = tmp_path / "s"
    remedy = rf"remedy: start the daemon that shall listen there, such as virtiofsd --socket-path={path}$"
    with pytest.raises(
        InputError, match=rf"^{path}: cannot be connected to: No such file or directory; {remedy}"
    ):
        connect_to_daemon(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        started = time.monotonic()
        with pytest.raises(HostError, match=rf"^{path}: GET_FEATURES: no answer within 0\.1 s"):
            connect_to_daemon(path, answer_s=0.1)
        assert time.monotonic() - started < 5
