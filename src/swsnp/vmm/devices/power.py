"""ACPI's fixed hardware: the registers through which a kernel powers its machine off.

Source: ACPI 6.5, chapter 4.8.3, "PM1 Event Registers" and "PM1 Control Registers".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.acpi import PM1_CONTROL, PM1_EVENT, POWER_OFF_TYPE

if TYPE_CHECKING:
    from swsnp.vmm.devices.bus import Bus
    from swsnp.vmm.stop import PowerSwitch

__all__ = ["Pm1Registers", "attach_power"]

_ENABLE: Final = 2
_SCI_ENABLED: Final = 1
_SLEEP_TYPE: Final = 7 << 10
_SLEEP_ENABLE: Final = 1 << 13


class Pm1Registers:
    """Status, enable and control, 16 bits each: no event ever happens, and there is one sleeping state."""

    def __init__(self, power: PowerSwitch) -> None:
        self._power = power
        self._enable = 0
        self._control = _SCI_ENABLED

    def read(self, offset: int, size: int) -> int:
        """Of wider accesses too, since the registers are neighbours."""
        everything = self._enable << 16 | self._control << 32
        return everything >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """SLP_EN with S5's type ends the VM; whole registers only."""
        control_at = PM1_CONTROL.start - PM1_EVENT.start
        if offset == _ENABLE:
            self._enable = value & 0xFFFF
        elif offset == control_at:
            self._control = value & 0xFFFF & ~_SLEEP_ENABLE | _SCI_ENABLED
            if value & _SLEEP_ENABLE and (value & _SLEEP_TYPE) >> 10 == POWER_OFF_TYPE:
                self._power.press("power off")


def attach_power(bus: Bus, power: PowerSwitch) -> None:
    """Put the registers on the bus."""
    bus.attach_ports(range(PM1_EVENT.start, PM1_CONTROL.stop), Pm1Registers(power))
