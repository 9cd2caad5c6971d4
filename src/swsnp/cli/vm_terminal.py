"""The terminal as a guest's console: keys go to the guest at once, ^A begins a command as with QEMU.

Where standard input is a pipe or a file its bytes go through as they are. A terminal's settings come back on
every way out, also by SIGTERM and SIGHUP. A terminal that another job has is neither set nor read.

Source: qemu(1), "Keys in the character backend multiplexer"; termios(3).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["EscapeKeys", "Terminal", "raw_mode"]

_ESCAPE: Final = 1
_CHUNK: Final = 4096
_HELP: Final = b"\r\n^A h  this help\r\n^A x  end the guest\r\n^A ^A sends ^A\r\n"
_INPUT_OFF: Final = (
    termios.IGNBRK
    | termios.BRKINT
    | termios.PARMRK
    | termios.ISTRIP
    | termios.INLCR
    | termios.IGNCR
    | termios.ICRNL
    | termios.IXON
)
_LOCAL_OFF: Final = termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG


class EscapeKeys:
    """Takes commands out of what is typed. Other keys after ^A are dropped, as QEMU does.

    Attributes:
        quit: ^A x was typed; nothing behind it counts.
        help: how often ^A h was typed.
    """

    def __init__(self) -> None:
        self.quit = False
        self.help = 0
        self._escaped = False

    def feed(self, typed: bytes) -> bytes:
        """What of it is the guest's."""
        kept = bytearray()
        for key in typed:
            if self.quit:
                break
            if not self._escaped:
                self._escaped = key == _ESCAPE
                if not self._escaped:
                    kept.append(key)
                continue
            self._escaped = False
            if key == _ESCAPE:
                kept.append(key)
            elif key in b"xX":
                self.quit = True
            elif key in b"hH?":
                self.help += 1
        return bytes(kept)


@contextmanager
def raw_mode(fd: int) -> Iterator[bool]:
    """No echo, no lines, no signals by keys while the block runs; True when `fd` is a terminal.

    SIGTERM and SIGHUP end the block by SystemExit with 128 and their number.
    """
    if not os.isatty(fd):
        yield False
        return
    before = termios.tcgetattr(fd)
    settings: list[Any] = list(termios.tcgetattr(fd))
    settings[0] &= ~_INPUT_OFF
    settings[3] &= ~_LOCAL_OFF
    settings[6][termios.VMIN], settings[6][termios.VTIME] = 1, 0
    with ExitStack() as undo:
        undo.callback(termios.tcsetattr, fd, termios.TCSADRAIN, before)
        for number in (signal.SIGTERM, signal.SIGHUP):
            undo.callback(signal.signal, number, signal.signal(number, _leave))
        termios.tcsetattr(fd, termios.TCSADRAIN, settings)
        yield True


def _is_others(fd: int) -> bool:
    """Whether the terminal has another job in front: reading or setting it would stop this one."""
    try:
        return os.isatty(fd) and os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:  # a terminal without job control
        return False


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


class Terminal:
    """Standard input for a guest, while the block runs; a context manager.

    Args:
        receive: takes the guest's bytes.
        quit_guest: called from another thread after ^A x.
        fd: what is read.
        at_end: called from another thread when there is no more to be read.
        release: makes `receive` return, if it waits; called when the block ends. Nothing is read after that.
    """

    def __init__(
        self,
        receive: Callable[[bytes], None],
        quit_guest: Callable[[], None],
        fd: int | None = None,
        *,
        at_end: Callable[[], None] = lambda: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._receive, self._quit_guest = receive, quit_guest
        self._at_end, self._release = at_end, release
        self._fd = sys.stdin.fileno() if fd is None else fd
        self._undo = ExitStack()

    def __enter__(self) -> Terminal:
        if _is_others(self._fd):
            return self
        with ExitStack() as undo:
            keys = EscapeKeys() if undo.enter_context(raw_mode(self._fd)) else None
            stopped, stop = os.pipe()
            undo.callback(os.close, stopped)
            reader = threading.Thread(target=self._read, args=(stopped, keys), daemon=True)
            undo.callback(reader.join)
            undo.callback(self._release)
            undo.callback(os.close, stop)
            reader.start()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _read(self, stopped: int, keys: EscapeKeys | None) -> None:
        while True:
            ready, _, _ = select.select([self._fd, stopped], [], [])
            if stopped in ready:
                return
            if (data := self._bytes()) is None:
                continue
            if not data:
                self._at_end()
                return
            if keys is not None:
                shown = keys.help
                data = keys.feed(data)
                if keys.help > shown:
                    os.write(sys.stderr.fileno(), _HELP)
            if data:
                self._receive(data)
            if keys is not None and keys.quit:
                self._quit_guest()
                return

    def _bytes(self) -> bytes | None:
        """What is there; b"" at the end, and where it cannot be read, which is said; None: nothing yet."""
        try:
            return os.read(self._fd, _CHUNK)
        except BlockingIOError:  # somebody else has read it
            return None
        except OSError as error:
            print(f"swsnp vm: standard input: cannot be read: {error.strerror or error}", file=sys.stderr)
            return b""
