"""Where the standard input goes with `swsnp vm -kernel … --exec`: every byte, then its end; or nowhere."""

from __future__ import annotations

import os
import pty
import socket
import sys
import threading
import time
from contextlib import closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.cli.conftest import vm

from swsnp.cli.vm_input import console_input, program_input
from swsnp.testing.tiny_kernel import GOOD
from swsnp.vmm.devices.host_end import InputEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STDIO_PORT = "-device virtio-serial-device -device virtserialport,chardev=c -chardev stdio,id=c"
NOTE = "swsnp vm: the program gets nothing of the standard input: that takes a port, -chardev stdio"


class Port:
    """A port whose guest has said that it is there, and reads when `taking`."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.taking = threading.Event()
        self.taking.set()
        self.end = InputEnd()
        self.end.attach(self)
        self.end.send(b"\0")

    def receive(self, data: bytes, *, wait: bool = True) -> None:
        assert wait
        self.taking.wait()
        self.got += data

    def room(self) -> None:
        pytest.fail("nothing was refused")

    def changed(self) -> None:
        pass

    def stop(self) -> None:
        self.taking.set()

    @property
    def devices(self) -> Any:
        return SimpleNamespace(input=self.end, stdio=None)

    def wait_for_the_end(self) -> bytes:
        until = time.monotonic() + 20
        while self.end.connected:
            assert time.monotonic() < until
            time.sleep(0.005)
        return bytes(self.got)


def never() -> None:
    pytest.fail("no key ends this guest")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes a descriptor the standard input; it stays the test's."""
    return lambda fd: monkeypatch.setattr(sys, "stdin", os.fdopen(fd, closefd=False))


@pytest.fixture
def pipe(stdin: Callable[[int], None]) -> Iterator[int]:
    """A pipe's other end, which the test closes."""
    reads, writes = os.pipe()
    stdin(reads)
    yield writes
    os.close(reads)


def test_pipe(pipe: int) -> None:
    """All bytes as they are, ^A x and ^D among them, and the end when they were given."""
    port, data = Port(), bytes(range(256)) * 300 + b"\x01x\x04"
    with program_input(port.devices, never), os.fdopen(pipe, "wb") as writer:
        writer.write(data[:1000])
        writer.flush()
        assert port.end.connected
        writer.write(data[1000:])
        writer.close()
        assert port.wait_for_the_end() == data


def test_file(tmp_path: Path, stdin: Callable[[int], None]) -> None:
    """From where the shell is in it."""
    path, port = tmp_path / "input", Port()
    path.write_bytes(b"skipped" + b"data" * 5000)
    with path.open("rb") as file:
        file.seek(7)
        os.lseek(file.fileno(), 7, os.SEEK_SET)
        stdin(file.fileno())
        with program_input(port.devices, never):
            assert port.wait_for_the_end() == b"data" * 5000


def test_nothing(stdin: Callable[[int], None]) -> None:
    """/dev/null is at its end at once."""
    port = Port()
    with open(os.devnull, "rb") as file:  # noqa: PTH123
        stdin(file.fileno())
        with program_input(port.devices, never):
            assert port.wait_for_the_end() == b""


def test_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read is at its end, and stderr says why."""
    port, fd = Port(), os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: fd, closed=False))
    with program_input(port.devices, never):
        assert port.wait_for_the_end() == b""
    os.close(fd)
    assert capfd.readouterr().err == "swsnp vm: standard input: cannot be read: Is a directory\n"


def test_somebody_else_reads_too(
    pipe: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """read(2): who finds nothing any more, on a descriptor that does not wait, looks again."""
    answers, read = [BlockingIOError(11, "none")], os.read

    def first_nothing(fd: int, size: int) -> bytes:
        if answers:
            raise answers.pop()
        return read(fd, size)

    monkeypatch.setattr(os, "read", first_nothing)
    port = Port()
    with program_input(port.devices, never):
        os.write(pipe, b"data")
        os.close(pipe)
        assert port.wait_for_the_end() == b"data"
    assert capfd.readouterr().err == ""


def test_terminal(stdin: Callable[[int], None]) -> None:
    """It stays the user's: the program's input is at its end, and no key is read."""
    port = Port()
    master, slave = pty.openpty()
    stdin(slave)
    os.write(master, b"typed\n")
    with program_input(port.devices, never):
        assert port.wait_for_the_end() == b""
    assert os.read(slave, 9) == b"typed\n"
    for fd in (master, slave):
        os.close(fd)


@pytest.mark.parametrize("given", ["none", "closed", "no descriptor"])
def test_no_standard_input(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """sys(3): `sys.stdin` may be None, closed, or what some program put there."""

    class Other:
        closed = given == "closed"

        def fileno(self) -> int:
            assert not self.closed
            raise ValueError

    port = Port()
    monkeypatch.setattr(sys, "stdin", None if given == "none" else Other())
    with program_input(port.devices, never):
        assert port.wait_for_the_end() == b""
    with console_input(port.devices, lambda data: pytest.fail("read"), never):
        pass


def test_input_that_nobody_reads(pipe: int) -> None:
    """The guest may end before: nobody waits for it to read; and who writes is held back meanwhile."""
    port = Port()
    port.taking.clear()
    os.set_blocking(pipe, False)
    with program_input(port.devices, never):
        assert os.write(pipe, bytes(1 << 16)) == 1 << 16
    assert len(port.got) <= 1 << 12
    os.close(pipe)


# Where there is no port


def note_with(fd: int, stdin: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> str:
    stdin(fd)
    with program_input(SimpleNamespace(input=None), never):  # type: ignore[arg-type]  # all that is looked at
        return capsys.readouterr().err


def test_without_a_port(
    tmp_path: Path, stdin: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that would be left lying are told of; they stay where they are."""
    path = tmp_path / "input"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        assert note_with(file.fileno(), stdin, capsys).startswith(NOTE)
        assert file.read() == b"x"
        assert note_with(file.fileno(), stdin, capsys) == ""
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        assert note_with(ours.fileno(), stdin, capsys) == ""
        theirs.send(b"x")
        assert note_with(ours.fileno(), stdin, capsys).startswith(NOTE)
    with open(os.devnull, "rb") as file:  # noqa: PTH123
        assert note_with(file.fileno(), stdin, capsys) == ""


def test_terminal_without_a_port(stdin: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    """What is typed meanwhile is the shell's."""
    master, slave = pty.openpty()
    os.write(master, b"typed\n")
    assert note_with(slave, stdin, capsys) == ""
    for fd in (master, slave):
        os.close(fd)


def test_no_standard_input_without_a_port(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing to tell."""
    monkeypatch.setattr(sys, "stdin", None)
    with program_input(SimpleNamespace(input=None), never):  # type: ignore[arg-type]  # all that is looked at
        assert capsys.readouterr().err == ""


# The command


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize(("words", "told"), [(STDIO_PORT, False), ("", True)])
def test_guest_that_does_not_read(
    kernel: str,
    static_program: str,
    pipe: int,
    words: str,
    told: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It ends all the same, with its own status."""
    os.write(pipe, bytes(30_000))
    line = ("-kernel", kernel, "-append", "x", "-m", "32M", *words.split(), "--exec", static_program)
    assert vm(*line) == GOOD
    assert (NOTE in capfd.readouterr().err) is told
    os.close(pipe)


def test_no_room(kernel: str, static_program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, before the host is looked at."""
    words = STDIO_PORT.replace("serial-device", "serial-device,max_ports=2", 1).split()
    assert vm("-kernel", kernel, *words, "--exec", static_program) == 2
    assert "got 1 ports of at most 2, wanted room for one more" in capsys.readouterr().err
