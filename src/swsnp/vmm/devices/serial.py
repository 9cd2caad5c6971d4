"""The 16550A: what a PC's console is.

Source: National Semiconductor PC16550D, data sheet; Linux, drivers/tty/serial/8250.

Transmission takes no time: the transmitter is always empty, and its interrupt comes at once.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COM1", "COM1_LINE", "COM2", "COM2_LINE", "Serial16550"]

COM1: Final = range(0x3F8, 0x400)
COM1_LINE: Final = 4
COM2: Final = range(0x2F8, 0x300)
COM2_LINE: Final = 3
_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCRATCH = range(8)
_DLAB: Final = 0x80
_LOOPBACK: Final = 0x10
_IER_RECEIVED, _IER_EMPTY = 1, 2
_FIFO_ENABLED, _FIFO_CLEAR_RECEIVED = 1, 2
_IIR_NONE, _IIR_EMPTY, _IIR_RECEIVED = 1, 2, 4
_IIR_FIFOS: Final = 0xC0
_LSR_READY: Final = 1
_LSR_EMPTY: Final = 0x60
_MSR_CONNECTED: Final = 0xB0  # carrier, data set ready, clear to send
_FIFO_SIZE: Final = 16
_BATCH: Final = 4096


class Serial16550:
    """One port.

    Args:
        line: the interrupt line.
        sink: takes what the guest sent, in pieces: whole lines, or what there is at `flush`.
    """

    def __init__(self, line: Callable[[bool], None], sink: Callable[[bytes], None]) -> None:
        self._line, self._sink = line, sink
        self._lock = threading.Lock()
        self._sent = bytearray()
        self._received: deque[int] = deque()
        self._registers = [0] * 8
        self._divisor = [1, 0]
        self._fifos = False
        self._empty_interrupt = False
        self._level = False

    # The host's side

    def receive(self, data: bytes) -> None:
        """Bytes for the guest; they wait until it reads them."""
        with self._lock:
            self._received.extend(data)
            self._settle()

    def flush(self) -> None:
        """Give the sink what has not ended in a line feed yet."""
        with self._lock:
            data, self._sent = bytes(self._sent), bytearray()
        if data:
            self._sink(data)

    # The guest's side

    def read(self, offset: int, size: int) -> int:
        """As `bus.Device`; wider accesses read one register."""
        with self._lock:
            value = self._read(offset)
            self._settle()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """As `bus.Device`; of wider accesses the first byte counts."""
        data = b""
        with self._lock:
            if self._write(offset, value & 0xFF):
                data, self._sent = bytes(self._sent), bytearray()
            self._settle()
        if data:
            self._sink(data)

    def _read(self, offset: int) -> int:
        if self._registers[_LCR] & _DLAB and offset < 2:
            return self._divisor[offset]
        if offset == _DATA:
            return self._received.popleft() if self._received else 0
        if offset == _IIR:
            return self._identify()
        if offset == _LSR:
            return _LSR_EMPTY | (_LSR_READY if self._received else 0)
        if offset == _MSR:
            return self._modem_status()
        return self._registers[offset]

    def _identify(self) -> int:
        fifos = _IIR_FIFOS if self._fifos else 0
        enabled = self._registers[_IER]
        if enabled & _IER_RECEIVED and self._received:
            return fifos | _IIR_RECEIVED
        if enabled & _IER_EMPTY and self._empty_interrupt:
            self._empty_interrupt = False
            return fifos | _IIR_EMPTY
        return fifos | _IIR_NONE

    def _modem_status(self) -> int:
        """In loopback outputs come back as inputs: DTR as DSR, RTS as CTS, OUT1 as RI, OUT2 as DCD."""
        control = self._registers[_MCR]
        if not control & _LOOPBACK:
            return _MSR_CONNECTED
        return (control & 1) << 5 | (control & 2) << 3 | (control & 4) << 4 | (control & 8) << 4

    def _write(self, offset: int, value: int) -> bool:
        """Take a register's value; True when the sink is to have what was sent."""
        if self._registers[_LCR] & _DLAB and offset < 2:
            self._divisor[offset] = value
            return False
        if offset == _DATA:
            return self._send(value)
        if offset == _IIR:  # the FIFO control register, when written
            self._fifos = bool(value & _FIFO_ENABLED)
            if value & _FIFO_CLEAR_RECEIVED:
                self._received.clear()
        elif offset == _IER:
            self._registers[_IER] = value & 0xF
            self._empty_interrupt = bool(value & _IER_EMPTY)
        elif offset not in (_LSR, _MSR):
            self._registers[offset] = value & (0x1F if offset == _MCR else 0xFF)
        return False

    def _send(self, value: int) -> bool:
        self._empty_interrupt = True
        if self._registers[_MCR] & _LOOPBACK:
            if len(self._received) < _FIFO_SIZE:
                self._received.append(value)
            return False
        self._sent.append(value)
        return value == 0x0A or len(self._sent) >= _BATCH

    def _settle(self) -> None:
        """Drive the interrupt line; a new reason while it is up makes an edge."""
        enabled = self._registers[_IER]
        wanted = bool(
            (enabled & _IER_RECEIVED and self._received) or (enabled & _IER_EMPTY and self._empty_interrupt)
        )
        if wanted != self._level:
            self._level = wanted
            self._line(wanted)
