"""ACPI's power management registers."""

from __future__ import annotations

import pytest

from swsnp.vmm.devices.bus import Bus
from swsnp.vmm.devices.power import attach_power
from swsnp.vmm.stop import PoweredOff, PowerSwitch

EVENT, ENABLE, CONTROL = 0x600, 0x602, 0x604
POWER_OFF = 5 << 10 | 1 << 13


@pytest.fixture
def power() -> PowerSwitch:
    return PowerSwitch()


@pytest.fixture
def bus(power: PowerSwitch) -> Bus:
    found = Bus()
    attach_power(found, power)
    return found


def test_registers(bus: Bus, power: PowerSwitch) -> None:
    """4.8.3: no event, SCI_EN set from the start; enable and control keep what is written."""
    assert [bus.port_in(port, 2) for port in (EVENT, ENABLE, CONTROL)] == [0, 0, 1]
    bus.port_out(ENABLE, 2, 0x1_0320)
    bus.port_out(CONTROL, 2, 5 << 10)
    bus.port_out(EVENT, 2, 0xFFFF)
    assert [bus.port_in(port, 2) for port in (EVENT, ENABLE, CONTROL)] == [0, 0x320, 5 << 10 | 1]
    assert (bus.port_in(EVENT, 4), bus.port_in(ENABLE + 1, 1)) == (0x320_0000, 3)
    assert power.pressed is None


@pytest.mark.parametrize("value", [5 << 10, 1 << 13, 4 << 10 | 1 << 13, 7 << 10 | 1 << 13])
def test_other_states(bus: Bus, power: PowerSwitch, value: int) -> None:
    """Only SLP_EN with the type of S5 is a power-off; SLP_EN reads as zero."""
    bus.port_out(CONTROL, 2, value)
    assert power.pressed is None
    assert not bus.port_in(CONTROL, 2) & 1 << 13


def test_power_off(bus: Bus, power: PowerSwitch) -> None:
    """4.8.3.2.1: the VM ends; it is no reset, and there is no status."""
    bus.port_out(CONTROL, 2, POWER_OFF)
    assert power.pressed == PoweredOff("power off")
    assert not PoweredOff("power off").is_reset
    assert PoweredOff("reset").is_reset
