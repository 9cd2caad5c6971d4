"""QEMU's devices for consoles and other streams: virtio-serial-device, and the ports on its bus.

Source: the manual page qemu(1); QEMU, hw/char/virtio-serial-bus.c and virtio-console.c, for properties.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from swsnp.cli.qemu_chardevs import STDIN, STDIO, Chardev
from swsnp.cli.qemu_values import name_value, number, text_value
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from swsnp.cli.qemu_values import Converter, Parts

__all__ = ["PORTS", "SERIAL_DEVICES", "Bus", "SerialDevice", "SerialPort", "bus_of", "with_input"]

_MOST_PORTS: Final = 31
_NAME_SIZE: Final = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class SerialPort:
    """A virtserialport with its name, or a virtconsole."""

    number: int
    chardev: Chardev
    name: str = ""
    is_console: bool = False


@dataclass(frozen=True, slots=True)
class SerialDevice:
    """A virtio-serial-device; `most` ports can be in it, None: those that are."""

    ports: tuple[SerialPort, ...] = ()
    most: int | None = None


def with_input(device: SerialDevice) -> SerialDevice:
    """Where a port has the standard output, the device with another, the first that is free: for the input.

    A port that is closed at the host, as it is at the end of input, cannot be written to any more: one port
    is not enough for both.

    Raises:
        UsageError: it has no room for one.
    """
    if all(each.chardev.kind != STDIO for each in device.ports):
        return device
    most = _MOST_PORTS if device.most is None else device.most
    taken = {each.number for each in device.ports}
    number = next((each for each in range(1, most) if each not in taken), None)
    if number is None:
        raise UsageError(
            f"-device virtio-serial-device: got {len(taken)} ports of at most {most}, "
            "wanted room for one more, which the input of --exec takes"
        )
    port = SerialPort(number=number, chardev=Chardev(id=STDIN, kind=STDIN))
    return replace(device, ports=tuple(sorted((*device.ports, port), key=lambda each: each.number)))


SERIAL_DEVICES: Final[Mapping[str, Mapping[str, Converter]]] = {
    "virtio-serial-device": {"id": text_value, "max_ports": number(1, _MOST_PORTS)},
    "virtserialport": {
        "id": text_value,
        "bus": text_value,
        "nr": number(1, _MOST_PORTS - 1),
        "chardev": text_value,
        "name": name_value(_NAME_SIZE),
    },
    "virtconsole": {
        "id": text_value,
        "bus": text_value,
        "nr": number(0, _MOST_PORTS - 1),
        "chardev": text_value,
    },
}
"""Properties by driver."""
PORTS: Final = ("virtserialport", "virtconsole")


@dataclass(slots=True)
class Bus:
    """A virtio-serial-device while the command line is read."""

    id: str
    most: int | None
    ports: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def device(self, chardevs: Parts[Chardev]) -> SerialDevice:
        """The device with its ports by rising numbers: those that are given, else the next that is free.

        Number 0 is for a console.

        Raises:
            UsageError: numbers or names that do not fit together, or a chardev that is not there.
        """
        most = _MOST_PORTS if self.most is None else self.most
        taken = {values["nr"] for _, values in self.ports if "nr" in values}
        if len(taken) < sum("nr" in values for _, values in self.ports):
            raise UsageError("-device: property 'nr': wanted another number for each port of a bus")
        ports: dict[int, SerialPort] = {}
        names: set[str] = set()
        for driver, values in self.ports:
            where, is_console = f"-device {driver}", driver == "virtconsole"
            free = (each for each in range(1 - is_console, most) if each not in taken)
            port = values["nr"] if "nr" in values else next(free, most)
            if port >= most:
                raise UsageError(
                    f"{where}: got number {port}, wanted one below max_ports={most} that is free"
                )
            if (name := values.get("name", "")) and name in names:
                raise UsageError(f"{where}: property 'name': {name!r} is taken")
            taken.add(port)
            names.add(name)
            ports[port] = SerialPort(
                number=port, chardev=chardevs.take(where, values), name=name, is_console=is_console
            )
        return SerialDevice(tuple(ports[each] for each in sorted(ports)), self.most)


def bus_of(where: str, values: Mapping[str, Any], found: Iterable[object]) -> Bus:
    """The bus that a port names, or the first.

    Raises:
        UsageError: there is none.
    """
    buses = [each for each in found if isinstance(each, Bus)]
    wanted = values.get("bus")
    chosen = [each for each in buses if wanted is None or wanted == f"{each.id}.0"]
    if not chosen:
        raise UsageError(
            f"{where}: wanted a -device virtio-serial-device before it"
            + (f", with the id in bus={wanted}" if wanted is not None else "")
        )
    return chosen[0]
