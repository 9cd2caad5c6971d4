"""The host's ends of ports: every kind carries bytes both ways, holds back who is too fast, and ends."""

from __future__ import annotations

import os
import socket
import termios
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.errors import InputError
from swsnp.vmm.devices import host_end
from swsnp.vmm.devices.host_end import Connection, HostStream, InputEnd, Nobody
from swsnp.vmm.devices.host_peers import (
    Fixed,
    Listener,
    Pseudoterminal,
    connect_to,
    file_end,
    pipe_end,
    standard_output,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.vmm.devices.host_end import Source

LONG_S = 20.0


class Port:
    """What a stream speaks to; `take` stands for a guest that reads."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.rooms = self.changes = 0
        self.taking = threading.Event()
        self.taking.set()

    def receive(self, data: bytes, *, wait: bool = True) -> None:
        self.taking.wait()
        self.got += data

    def room(self) -> None:
        self.rooms += 1

    def changed(self) -> None:
        self.changes += 1

    def stop(self) -> None:
        self.taking.set()


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def holds(port: Port, data: bytes) -> bool:
    return bytes(port.got) == data


def started(source: Source) -> tuple[HostStream, Port]:
    stream, port = HostStream(source), Port()
    stream.attach(port)
    return stream, port


def read_exactly(peer: socket.socket, size: int) -> bytes:
    peer.settimeout(LONG_S)
    data = b""
    while len(data) < size:
        piece = peer.recv(size - len(data))
        assert piece, f"ended after {len(data)} bytes"
        data += piece
    return data


def test_nobody() -> None:
    """-chardev null: everything is taken."""
    end = Nobody()
    end.attach(Port())
    assert end.connected
    assert end.send(b"x")
    end.close()


@pytest.mark.parametrize("heard_first", [True, False])
def test_input_end(heard_first: bool) -> None:
    """It ends when there is no more input and the guest has said something, whichever comes first."""
    end, port = InputEnd(), Port()
    end.attach(port)
    end.give(b"some")
    both: list[Callable[[], object]] = [partial(end.send, b"\0"), end.finish]
    for number, happens in enumerate(both if heard_first else reversed(both)):
        assert (end.connected, port.changes) == (True, number)
        happens()
    assert (end.connected, port.changes, bytes(port.got)) == (False, 2, b"some")
    assert end.send(b"more")


def test_input_end_that_closes() -> None:
    """Who waits for a guest that does not read waits no more."""
    end, port = InputEnd(), Port()
    end.attach(port)
    port.taking.clear()
    giver = threading.Thread(target=end.give, args=(b"some",))
    giver.start()
    end.close()
    giver.join(LONG_S)
    assert not giver.is_alive()


@pytest.mark.parametrize(("append", "content"), [(False, b"new" * 9000), (True, b"old" + b"new" * 9000)])
def test_file(tmp_path: Path, append: bool, content: bytes) -> None:
    """-chardev file: emptied or added to; all is there when the stream was closed."""
    path = tmp_path / "out"
    path.write_bytes(b"old")
    stream, port = started(file_end(path, append=append))
    assert stream.connected
    for _ in range(9000):
        assert stream.send(b"new", must=True)
    stream.close()
    assert path.read_bytes() == content
    assert (bytes(port.got), port.changes) == (b"", 0)


def test_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    """-chardev stdio: it stays open for others."""
    stream, _ = started(standard_output())
    stream.send(b"said\n")
    stream.close()
    os.write(1, b"more\n")
    assert capfd.readouterr().out == "said\nmore\n"


def pair() -> tuple[HostStream, Port, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(ours.fileno(), ours.fileno())
    source = Fixed(
        connection, patient=False, close=ours.close, hang_up=lambda: ours.shutdown(socket.SHUT_RDWR)
    )
    return *started(source), theirs


def test_both_ways() -> None:
    """Bytes come in order, whatever their number."""
    stream, port, theirs = pair()
    data = os.urandom(3 * 4096 + 1)
    with closing(theirs):
        theirs.sendall(data)
        until(lambda: len(port.got) == len(data))
        assert port.got == data
        assert stream.send(data)
        assert read_exactly(theirs, len(data)) == data
        stream.close()


def test_slow_peer() -> None:
    """A peer that does not read fills 64 KiB; then the guest waits, and is told when there is room."""
    stream, port, theirs = pair()
    with closing(theirs):
        sent = 0
        while stream.send(b"x" * 4096):
            sent += 4096
            time.sleep(0.001)
            assert sent < 1 << 24
        assert len(stream._waiting) >= 64 << 10
        assert port.rooms == 0
        assert stream.send(b"y", must=True)
        assert read_exactly(theirs, sent + 1) == b"x" * sent + b"y"
        until(lambda: port.rooms)
        assert port.rooms == 1
        assert stream.send(b"z")
        stream.close()


def test_most_that_waits() -> None:
    """64 KiB; a byte less is not enough to make the guest wait."""
    stream = HostStream(standard_output())
    assert stream.send(b"x" * (65536 - 1))
    assert stream.send(b"x")
    assert not stream.send(b"x")


def test_slow_guest() -> None:
    """What the guest does not read stays with the peer; closing does not wait for the guest."""
    stream, port, theirs = pair()
    port.taking.clear()
    with closing(theirs):
        theirs.setblocking(False)
        sent = 0
        with suppress(BlockingIOError):
            while sent < 1 << 24:
                sent += theirs.send(b"x" * 4096)
        assert port.got == b""
        stream.close()
    assert len(port.got) <= 4096 < sent


def test_peer_that_never_reads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing gives up on it after a while, also when a thread waits for it already."""
    monkeypatch.setattr(host_end, "_PATIENCE_S", 0.05)
    stream, _, theirs = pair()
    with closing(theirs):
        while stream.send(b"x" * 4096):
            time.sleep(0.001)
        before = time.monotonic()
        stream.close()
        assert time.monotonic() - before < LONG_S / 2


def test_peer_that_goes() -> None:
    """It is gone for the guest too; what it had not read is lost, and writing goes on."""
    stream, port, theirs = pair()
    while stream.send(b"x" * 4096):
        time.sleep(0.001)
    theirs.close()
    until(lambda: not stream.connected and port.changes)
    assert (port.changes, bytes(stream._waiting)) == (1, b"")
    assert stream.send(b"into the void")
    until(lambda: not stream._waiting)
    stream.close()


def test_patient_end_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A standard output that somebody reads slowly gets all of it."""
    monkeypatch.setattr(host_end, "_PATIENCE_S", 0.0)
    reads, writes = os.pipe()
    stream, _ = started(Fixed(Connection(None, writes), patient=True, close=lambda: os.close(writes)))
    while stream.send(b"x" * 4096):
        time.sleep(0.001)
    size = len(stream._waiting)
    closer = threading.Thread(target=stream.close)
    closer.start()
    got = b""
    while piece := os.read(reads, 1 << 16):
        got += piece
        time.sleep(0.01)
    closer.join(LONG_S)
    os.close(reads)
    assert len(got) >= size
    assert not closer.is_alive()


# Who may be there


@pytest.mark.parametrize("kind", ["path", "tcp"])
def test_listener(tmp_path: Path, kind: str) -> None:
    """-chardev socket,server=on,wait=off: one peer after the other; the path goes at the end."""
    path = tmp_path / "socket"
    address: Any = path if kind == "path" else ("127.0.0.1", 0)
    listener = Listener(address, wait=False)
    stream, port = started(listener)
    assert not stream.connected
    where: Any = str(path) if kind == "path" else tuple(listener.where.split(":"))
    for number in range(2):
        with socket.socket(socket.AF_UNIX) if kind == "path" else socket.socket() as peer:
            peer.connect(where if kind == "path" else (where[0], int(where[1])))
            until(lambda: stream.connected)
            peer.sendall(b"in")
            stream.send(b"out")
            assert read_exactly(peer, 3) == b"out"
            until(partial(holds, port, b"in" * (number + 1)))
        until(lambda: not stream.connected)
    until(lambda: port.changes == 4)
    stream.close()
    assert not path.exists()


def test_listener_that_cannot_accept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Too many open files, or whatever it is: the log tells, and the guest goes on without a peer."""
    listener = Listener(tmp_path / "s", wait=False)
    monkeypatch.setattr(listener, "_accepted", partial(fails, OSError(24, "Too many open files")))
    stream, port = started(listener)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "s"))
        until(lambda: "s: nobody can connect any more: Too many open files" in caplog.text)
        assert not stream.connected
        assert port.changes == 0
    stream.close()


def fails(error: Exception) -> Connection:
    raise error


def test_listener_that_waits(tmp_path: Path) -> None:
    """wait=on: the first peer is there before the guest begins."""
    path = tmp_path / "socket"
    listener = Listener(path, wait=True)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        stream, port = started(listener)
        assert stream.connected
        assert port.changes == 0
        stream.send(b"out")
        assert read_exactly(peer, 3) == b"out"
        stream.close()
        assert peer.recv(1) == b"", "the peer sees the end"


def test_listener_in_the_way(tmp_path: Path) -> None:
    """A socket that somebody listens at is refused, one that was left over is replaced, a file is neither."""
    path, file = tmp_path / "socket", tmp_path / "file"
    file.touch()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(InputError, match="socket: cannot be listened at: Address already in use"):
            Listener(path, wait=False)
    Listener(path, wait=False).close()
    assert not path.exists()
    with pytest.raises(InputError, match="file: cannot be listened at"):
        Listener(file, wait=False)
    assert file.exists()
    with pytest.raises(InputError, match=r"192\.0\.2\.1:1: cannot be listened at"):
        Listener(("192.0.2.1", 1), wait=False)


def test_client(tmp_path: Path) -> None:
    """-chardev socket: somebody listens already; when it goes nobody is there any more."""
    path = tmp_path / "socket"
    with pytest.raises(InputError, match="socket: cannot be connected to: No such file"):
        connect_to(path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        stream, port = started(connect_to(server.getsockname()[:2]))
        peer, _ = server.accept()
        with peer:
            stream.send(b"out")
            assert read_exactly(peer, 3) == b"out"
        until(lambda: not stream.connected and port.changes)
        stream.close()
    with pytest.raises(InputError, match=r"127\.0\.0\.1:\d+: cannot be connected to: Connection refused"):
        connect_to(("127.0.0.1", server_port_that_is_free()))


def server_port_that_is_free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.parametrize("names", [("p.in", "p.out"), ("p",), ("p", "p.in")])
def test_pipes(tmp_path: Path, names: tuple[str, ...]) -> None:
    """-chardev pipe: PATH.in to the guest and PATH.out from it, or PATH where these are not both there."""
    for name in names:
        os.mkfifo(tmp_path / name)
    stream, port = started(pipe_end(tmp_path / "p"))
    if "p.out" in names:
        (tmp_path / "p.in").write_bytes(b"in")
        with (tmp_path / "p.out").open("rb") as out:
            stream.send(b"out")
            assert out.read(3) == b"out"
    else:
        (tmp_path / "p").write_bytes(b"in")
    until(lambda: port.got == b"in")
    stream.close()


def test_pipes_that_are_none(tmp_path: Path) -> None:
    """A name that is not there, or another kind of file."""
    with pytest.raises(InputError, match="p: cannot be opened: No such file"):
        pipe_end(tmp_path / "p")
    os.mkfifo(tmp_path / "p.in")
    (tmp_path / "p.out").touch()
    with pytest.raises(InputError, match=r"p\.out: wanted a named pipe"):
        pipe_end(tmp_path / "p")


def test_pseudoterminal() -> None:
    """-chardev pty: connected while somebody has it open; bytes are not changed."""
    terminal = Pseudoterminal()
    stream, port = started(terminal)
    assert not stream.connected
    for number in range(2):
        fd = os.open(terminal.name, os.O_RDWR | os.O_NOCTTY)
        until(lambda: stream.connected)
        assert termios.tcgetattr(fd)[3] & termios.ECHO == 0
        os.write(fd, b"a\r\n\x03\x04")
        stream.send(b"b\n")
        assert os.read(fd, 10) == b"b\n"
        until(partial(holds, port, b"a\r\n\x03\x04" * (number + 1)))
        os.close(fd)
        until(lambda: not stream.connected)
    stream.close()
    assert not Path(terminal.name).exists()


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The name and the reason."""
    with pytest.raises(InputError, match="none/f: cannot be written: No such file"):
        file_end(tmp_path / "none" / "f", append=False)
