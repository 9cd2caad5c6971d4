"""Keys and settings of the terminal that is a guest's console; a pseudoterminal stands for it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.cli.vm_terminal import EscapeKeys, Terminal, raw_mode

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudoterminal."""
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(
    ("typed", "kept", "quits", "helps"),
    [
        (b"ls\r", b"ls\r", False, 0),
        (b"\x03", b"\x03", False, 0),
        (b"a\x01\x01b", b"a\x01b", False, 0),
        (b"a\x01xb", b"a", True, 0),
        (b"a\x01hb", b"ab", False, 1),
        (b"a\x01zb", b"ab", False, 0),
    ],
)
def test_keys(typed: bytes, kept: bytes, quits: bool, helps: int) -> None:
    """qemu(1), "Keys in the character backend multiplexer"."""
    keys = EscapeKeys()
    assert (keys.feed(typed), keys.quit, keys.help) == (kept, quits, helps)


@given(st.lists(st.binary(max_size=4)))
def test_pieces(pieces: list[bytes]) -> None:
    """How the terminal cuts what is typed changes nothing."""
    one, many = EscapeKeys(), EscapeKeys()
    assert one.feed(b"".join(pieces)) == b"".join(map(many.feed, pieces))
    assert one.quit == many.quit


def test_pipe_is_bytes() -> None:
    """What is no terminal goes through as it is, ^A too, and its end ends nothing."""
    reading, writing = os.pipe()
    got = bytearray()
    arrived = threading.Event()

    def receive(data: bytes) -> None:
        got.extend(data)
        arrived.set()

    def quit_guest() -> None:
        raise AssertionError("no key of a pipe ends a guest")

    with Terminal(receive, quit_guest, reading):
        os.write(writing, b"\x01x")
        assert arrived.wait(10)
        os.close(writing)
    os.close(reading)
    assert got == b"\x01x"


def readers() -> int:
    """How many threads read for a `Terminal`."""
    return sum(each.name.endswith("(_read)") for each in threading.enumerate())


def test_a_pipes_end_ends_its_reader() -> None:
    """read(2): an end stays ready for ever, so who went on reading would take a whole processor."""
    reading, writing = os.pipe()
    with Terminal(lambda data: None, lambda: None, reading):
        assert readers() == 1
        os.close(writing)
        end = time.monotonic() + 10
        while readers() and time.monotonic() < end:
            time.sleep(0.001)
        assert readers() == 0
    os.close(reading)


def test_the_blocks_end_ends_its_reader() -> None:
    """A guest may end while nobody types: the block does not wait for a key."""
    reading, writing = os.pipe()
    ended = threading.Event()

    def block() -> None:
        with Terminal(lambda data: None, lambda: None, reading):
            pass
        ended.set()

    threading.Thread(target=block, daemon=True).start()
    good = ended.wait(10)
    os.close(writing)
    assert ended.wait(10)
    os.close(reading)
    assert good


def test_terminal_in_front(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """tcgetpgrp(3): a job that has the terminal reads it."""
    master, slave = terminal
    monkeypatch.setattr(os, "tcgetpgrp", lambda fd: os.getpgrp())
    arrived = threading.Event()
    with Terminal(lambda data: arrived.set(), lambda: None, slave):
        os.write(master, b"a")
        assert arrived.wait(10)


def test_terminal_of_another_job(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """tty_ioctl(4): a job in the background would be stopped, so it neither sets nor reads."""
    master, slave = terminal
    before = termios.tcgetattr(slave)
    monkeypatch.setattr(os, "tcgetpgrp", lambda fd: os.getpgrp() + 1)
    with Terminal(lambda data: None, lambda: None, slave):
        assert termios.tcgetattr(slave) == before
        os.write(master, b"a\n")
    assert os.read(slave, 9) == b"a\n"


def test_terminal_without_job_control(terminal: tuple[int, int]) -> None:
    """A terminal that controls no session is read as any other."""
    master, slave = terminal
    quitted = threading.Event()
    got = bytearray()
    with Terminal(got.extend, quitted.set, slave):
        os.write(master, b"a\x01x")
        assert quitted.wait(10)
    assert got == b"a"


_CHILD = """
import os, signal, sys, time
from swsnp.cli.vm_terminal import Terminal
def quit_guest(): os.kill(os.getpid(), signal.SIGINT)
with Terminal(lambda data: os.write(1, data), quit_guest, 0):
    os.write(1, b"ready\\n")
    {body}
"""
_FOREVER = "while True: time.sleep(0.05)"  # a signal just before a system call does not interrupt it


@pytest.mark.parametrize(
    ("body", "typed", "ending", "status"),
    [
        (_FOREVER, b"k\x01x", None, -signal.SIGINT),
        (_FOREVER, b"k", signal.SIGTERM, 128 + signal.SIGTERM),
        (_FOREVER, b"k", signal.SIGHUP, 128 + signal.SIGHUP),
        ("raise ValueError", b"", None, 1),
    ],
)
def test_settings_come_back(
    terminal: tuple[int, int], body: str, typed: bytes, ending: int | None, status: int
) -> None:
    """termios(3): keys come at once while the guest runs; afterwards all is as it was, on every way."""
    master, slave = terminal
    before = termios.tcgetattr(slave)
    code = _CHILD.format(body=body)
    take = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", take + code],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        if typed:
            during = termios.tcgetattr(slave)
            assert not during[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
            os.write(master, typed)
            assert child.stdout.read(1) == b"k"
        if ending is not None:
            child.send_signal(ending)
        assert child.wait(30) == status
    assert termios.tcgetattr(slave) == before


def test_raw_mode_of_a_pipe() -> None:
    """A pipe has no settings."""
    reading, writing = os.pipe()
    with raw_mode(reading) as is_terminal:
        assert not is_terminal
    os.close(reading)
    os.close(writing)
