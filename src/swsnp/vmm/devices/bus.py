"""Where devices answer: ranges of ports and of guest physical addresses."""

from __future__ import annotations

from bisect import bisect_right
from typing import Protocol

from swsnp.errors import UsageError

__all__ = ["Bus", "Device"]


class Device(Protocol):
    """Answers accesses at offsets from where it is attached; several vCPUs' threads may call at once."""

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes, little-endian."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a value of `size` bytes."""
        ...


class _Space:
    """One kind of address; ranges rise and do not overlap."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._starts: list[int] = []
        self._found: list[tuple[range, Device]] = []

    def attach(self, where: range, device: Device) -> None:
        at = bisect_right(self._starts, where.start)
        near = self._found[max(0, at - 1) : at + 1]
        taken = next((each for each, _ in near if each.start < where.stop and where.start < each.stop), None)
        if taken is not None or not where or where.step != 1:
            raise UsageError(
                f"{self._name} {where.start:#x}..{where.stop:#x}: wanted a range that is free"
                + (f", {taken.start:#x}..{taken.stop:#x} is taken" if taken else "")
            )
        self._starts.insert(at, where.start)
        self._found.insert(at, (where, device))

    def look_up(self, address: int, size: int) -> tuple[Device, int] | None:
        """The device that answers a whole access, and the offset in it."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            where, device = self._found[at]
            if address + size <= where.stop:
                return device, address - where.start
        return None


class Bus:
    """Hands accesses to devices. Where none answers, reads are all ones and writes go nowhere.

    Attributes:
        unclaimed: how many accesses no device answered.
    """

    def __init__(self) -> None:
        self.unclaimed = 0
        self._ports = _Space("ports")
        self._memory = _Space("device memory")

    def attach_ports(self, where: range, device: Device) -> None:
        """Let a device answer ports; UsageError when one of them is taken."""
        self._ports.attach(where, device)

    def attach_memory(self, where: range, device: Device) -> None:
        """Let a device answer guest physical addresses; UsageError when one of them is taken."""
        self._memory.attach(where, device)

    def port_in(self, port: int, size: int) -> int:
        """Read a port."""
        return self._read(self._ports, port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        """Write a port."""
        self._write(self._ports, port, size, value)

    def memory_read(self, gpa: int, size: int) -> int:
        """Read a device's memory."""
        return self._read(self._memory, gpa, size)

    def memory_write(self, gpa: int, size: int, value: int) -> None:
        """Write a device's memory."""
        self._write(self._memory, gpa, size, value)

    def _read(self, space: _Space, address: int, size: int) -> int:
        ones = (1 << 8 * size) - 1
        if (found := space.look_up(address, size)) is None:
            self.unclaimed += 1
            return ones
        device, offset = found
        return device.read(offset, size) & ones

    def _write(self, space: _Space, address: int, size: int, value: int) -> None:
        if (found := space.look_up(address, size)) is None:
            self.unclaimed += 1
            return
        device, offset = found
        device.write(offset, size, value)
