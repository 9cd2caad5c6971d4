"""The bus, the 16550 and the few ports of a PC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.errors import UsageError
from swsnp.vmm.devices.bus import Bus
from swsnp.vmm.devices.legacy import attach_legacy
from swsnp.vmm.devices.serial import Serial16550
from swsnp.vmm.stop import PoweredOff, PowerSwitch


class Echo:
    """Reads as its offset; keeps what is written."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0xFFFF_FF00 | offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


def test_accesses_find_their_device() -> None:
    """Offsets count from where a device is attached; a value is cut to the access."""
    bus, ports, memory = Bus(), Echo(), Echo()
    bus.attach_ports(range(0x100, 0x108), ports)
    bus.attach_memory(range(0x1000, 0x2000), memory)
    assert (bus.port_in(0x103, 1), bus.port_in(0x104, 4)) == (0x03, 0xFFFF_FF04)
    bus.port_out(0x107, 1, 5)
    assert bus.memory_read(0x1FFE, 2) == 0xFFFE | 0xFF00
    bus.memory_write(0x1008, 8, 1 << 63)
    assert (ports.written, memory.written) == ([(7, 1, 5)], [(8, 8, 1 << 63)])
    assert bus.unclaimed == 0


@pytest.mark.parametrize(("address", "size"), [(0xFF, 1), (0xFF, 2), (0x108, 1), (0x107, 2)])
def test_nobody_answers(address: int, size: int) -> None:
    """Reads are all ones, writes go nowhere, also where an access begins or ends beside a device."""
    bus, device = Bus(), Echo()
    bus.attach_ports(range(0x100, 0x108), device)
    assert bus.port_in(address, size) == (1 << 8 * size) - 1
    bus.port_out(address, size, 0)
    assert bus.memory_read(0x100, 8) == (1 << 64) - 1
    bus.memory_write(0x100, 8, 0)
    assert (device.written, bus.unclaimed) == ([], 4)


@pytest.mark.parametrize(
    "where", [range(0x107, 0x109), range(0xFF, 0x101), range(0x102, 0x103), range(0), range(0x200, 0x208, 2)]
)
def test_overlaps(where: range) -> None:
    """Two devices at one address, none at all, or gaps, is a mistake of whoever builds the machine."""
    bus = Bus()
    bus.attach_ports(range(0x100, 0x108), Echo())
    with pytest.raises(UsageError, match="wanted a range that is free"):
        bus.attach_ports(where, Echo())
    bus.attach_ports(range(0x108, 0x110), Echo())
    bus.attach_ports(range(0xF8, 0x100), Echo())


# The 16550

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)


class Rig:
    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.sent: list[bytes] = []
        self.port = Serial16550(self.levels.append, self.sent.append)

    def write(self, offset: int, value: int) -> None:
        self.port.write(offset, 1, value)

    def read(self, offset: int) -> int:
        return self.port.read(offset, 1)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_output_comes_in_lines(rig: Rig) -> None:
    """The sink gets whole lines, and the rest when it is asked for."""
    for byte in b"one\ntwo":
        rig.write(DATA, byte)
    assert rig.sent == [b"one\n"]
    rig.port.flush()
    rig.port.flush()
    assert rig.sent == [b"one\n", b"two"]


def test_no_endless_line(rig: Rig) -> None:
    """Output without line feeds is not kept for ever."""
    for _ in range(5000):
        rig.write(DATA, 0x41)
    assert rig.sent == [b"A" * 4096]


def test_line_status(rig: Rig) -> None:
    """PC16550D: the transmitter is empty; DR while something waits."""
    assert rig.read(LSR) == 0x60
    rig.port.receive(b"ab")
    assert rig.read(LSR) == 0x61
    assert (rig.read(DATA), rig.read(DATA), rig.read(DATA)) == (0x61, 0x62, 0)
    assert rig.read(LSR) == 0x60


def test_divisor(rig: Rig) -> None:
    """PC16550D: with DLAB the first two registers are the divisor's, and nothing is sent."""
    rig.write(LCR, 0x83)
    rig.write(DATA, 0x0A)
    rig.write(IER, 2)
    assert (rig.read(DATA), rig.read(IER)) == (0x0A, 2)
    rig.write(IIR, 1)
    assert rig.read(IIR) == 0xC1
    rig.write(LCR, 0x03)
    assert (rig.read(DATA), rig.read(IER), rig.read(LCR)) == (0, 0, 3)
    assert rig.sent == []


def test_transmitter_interrupt(rig: Rig) -> None:
    """PC16550D: THRE interrupt when enabled and after each byte; reading IIR takes it back."""
    rig.write(IER, 2)
    assert rig.levels == [True]
    assert rig.read(IIR) == 2
    assert rig.levels == [True, False]
    assert rig.read(IIR) == 1
    rig.write(DATA, 0x41)
    assert rig.levels == [True, False, True]
    rig.write(IER, 0)
    assert rig.levels == [True, False, True, False]
    rig.write(DATA, 0x41)
    assert rig.read(IIR) == 1


def test_receiver_interrupt(rig: Rig) -> None:
    """PC16550D: received data has priority, and the line stays up until it was read."""
    rig.write(IER, 3)
    rig.port.receive(b"x")
    assert rig.read(IIR) == 4
    assert rig.levels == [True]
    rig.read(DATA)
    assert rig.read(IIR) == 2
    assert rig.levels == [True, False]


def test_fifo_control(rig: Rig) -> None:
    """PC16550D: IIR bits 7:6 tell of FIFOs; FCR bit 1 clears what was received."""
    rig.port.receive(b"old")
    rig.write(IIR, 3)
    assert rig.read(IIR) == 0xC1
    assert rig.read(LSR) == 0x60
    rig.write(IIR, 0)
    assert rig.read(IIR) == 1


def test_loopback(rig: Rig) -> None:
    """Linux, 8250 autoconfig: in loopback MCR's outputs are MSR's inputs, and data comes back."""
    assert rig.read(MSR) == 0xB0
    rig.write(MCR, 0x1A)
    assert rig.read(MSR) == 0x90
    rig.write(MCR, 0x15)
    assert rig.read(MSR) == 0x60
    for _ in range(20):
        rig.write(DATA, 7)
    assert [rig.read(DATA) for _ in range(17)] == [7] * 16 + [0]
    assert rig.sent == []


def test_registers_that_keep(rig: Rig) -> None:
    """Scratch keeps its byte, IER its four bits, LSR and MSR cannot be written."""
    for offset in (IER, SCRATCH, LSR, MSR):
        rig.write(offset, 0xF5)
    assert (rig.read(IER), rig.read(SCRATCH), rig.read(LSR), rig.read(MSR)) == (5, 0xF5, 0x60, 0xB0)


ACCESSES = st.lists(
    st.tuples(st.sampled_from(["read", "write", "receive"]), st.integers(0, 7), st.integers(0, 255)),
    max_size=60,
)


@given(ACCESSES)
def test_any_guest(accesses: list[tuple[str, int, int]]) -> None:
    """Whatever a guest does: registers are bytes, and the line is up exactly while there is a reason."""
    rig = Rig()
    for what, offset, value in accesses:
        if what == "read":
            assert 0 <= rig.read(offset) < 256
        elif what == "write":
            rig.write(offset, value)
        else:
            rig.port.receive(bytes([value]))
    assert all(one is not two for one, two in zip(rig.levels, rig.levels[1:], strict=False))
    rig.write(LCR, 0)
    rig.write(IER, 0)
    assert not rig.levels or rig.levels[-1] is False


# A PC's ports


def ports(when: datetime | None = None) -> tuple[Bus, PowerSwitch]:
    bus, power = Bus(), PowerSwitch()
    attach_legacy(bus, power, lambda: when or datetime(2026, 1, 1, tzinfo=UTC))
    return bus, power


def test_reset() -> None:
    """Linux, reboot=k: FEh at port 64h, once bit 1 there is clear; no controller is found."""
    bus, power = ports()
    bus.port_out(0x64, 1, 0xAA)
    bus.port_out(0x60, 1, 0xFE)
    assert power.pressed is None
    assert (bus.port_in(0x64, 1), bus.port_in(0x60, 1)) == (0xFD, 0xFF)
    bus.port_out(0x64, 1, 0xFE)
    assert power.pressed == PoweredOff("reset")


def test_debug_exit() -> None:
    """The first to switch off says how."""
    bus, power = ports()
    assert bus.port_in(0xF4, 1) == 0
    bus.port_out(0xF4, 4, 0x107)
    bus.port_out(0x64, 1, 0xFE)
    assert power.pressed == PoweredOff("exit port", 7)


def test_clock() -> None:
    """MC146818: time and date in BCD, 24 hours, never while updating; the rest is zero."""
    bus, _ = ports(datetime(2031, 12, 28, 23, 59, 7, tzinfo=UTC))
    found: dict[int, Any] = {}
    for register in (0, 2, 4, 6, 7, 8, 9, 0x32, 0x0A, 0x0B, 0x0D, 0x10):
        bus.port_out(0x70, 1, 0x80 | register)
        assert bus.port_in(0x70, 1) == register
        found[register] = bus.port_in(0x71, 1)
    bus.port_out(0x71, 1, 0x55)
    assert [found[each] for each in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [7, 0x59, 0x23, 1, 0x28, 0x12, 0x31, 0x20]
    assert [found[each] for each in (0x0A, 0x0B, 0x0D, 0x10)] == [0, 2, 0x80, 0]
