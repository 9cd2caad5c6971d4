"""Ports of a PC that a kernel touches although nothing much is behind them.

Source: Linux, arch/x86/kernel/reboot.c, drivers/input/serio/i8042.c, drivers/rtc/rtc-cmos.c; QEMU,
hw/misc/debugexit.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.vmm.stop import RESET

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from swsnp.vmm.devices.bus import Bus
    from swsnp.vmm.stop import PowerSwitch

__all__ = ["Cmos", "DebugExit", "I8042", "attach_legacy"]

_I8042: Final = range(0x60, 0x65)
_CMOS: Final = range(0x70, 0x72)
_DEBUG_EXIT: Final = range(0xF4, 0xF8)
_STATUS: Final = 4
_RESET: Final = 0xFE
_INPUT_FULL: Final = 2
_24_HOURS_BCD: Final = 0x02
_VALID: Final = 0x80
_CENTURY: Final = 0x32


class I8042:
    """The keyboard controller: nobody is there, but for the reset line."""

    def __init__(self, power: PowerSwitch) -> None:
        self._power = power

    def read(self, offset: int, size: int) -> int:
        """All ones: no controller. But its input buffer is empty, or Linux waits for that before it resets.

        Port 61h is the timer's, KVM's own.
        """
        ones = (1 << 8 * size) - 1
        return ones & ~_INPUT_FULL if offset == _STATUS else ones

    def write(self, offset: int, size: int, value: int) -> None:
        """Command FEh at port 64h pulses the reset line."""
        if offset == _STATUS and value & 0xFF == _RESET:
            self._power.press(RESET)


class DebugExit:
    """A port that ends the VM with the guest's exit status."""

    def __init__(self, power: PowerSwitch) -> None:
        self._power = power

    def read(self, offset: int, size: int) -> int:
        """Zero: it is there."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The low byte is the status."""
        self._power.press("exit port", value & 0xFF)


class Cmos:
    """The clock, read only; the rest of the memory reads as zeros.

    Args:
        now: the time, aware.
    """

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._index = 0

    def read(self, offset: int, size: int) -> int:
        """Port 71h: the register chosen at port 70h."""
        if not offset:
            return self._index
        at = self._now()
        clock = {
            0x00: at.second,
            0x02: at.minute,
            0x04: at.hour,
            0x06: at.isoweekday() % 7 + 1,
            0x07: at.day,
            0x08: at.month,
            0x09: at.year % 100,
            _CENTURY: at.year // 100,
        }
        if self._index in clock:
            value = clock[self._index]
            return value // 10 << 4 | value % 10
        return {0x0B: _24_HOURS_BCD, 0x0D: _VALID}.get(self._index, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Port 70h chooses; bit 7 would mask NMIs."""
        if not offset:
            self._index = value & 0x7F


def attach_legacy(bus: Bus, power: PowerSwitch, now: Callable[[], datetime]) -> None:
    """Put all of them on the bus."""
    bus.attach_ports(_I8042, I8042(power))
    bus.attach_ports(_CMOS, Cmos(now))
    bus.attach_ports(_DEBUG_EXIT, DebugExit(power))
