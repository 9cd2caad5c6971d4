"""QEMU's options for consoles and streams: ports with their numbers, and who is at the host's end."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from swsnp.cli.qemu_chardevs import Chardev
from swsnp.cli.qemu_devices import AnyDevice, EntropyDevice, uses_stdio, with_program_input
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.cli.qemu_ports import SerialDevice, SerialPort
from swsnp.errors import UsageError

BUS: Final = "-device virtio-serial-device"
NULL: Final = Chardev(id="c", kind="null")


def devices(words: str) -> tuple[AnyDevice, ...]:
    return parse_qemu_options(["-kernel", "k", *words.split()]).devices


def port_of(words: str) -> SerialPort:
    (device,) = devices(words)
    assert isinstance(device, SerialDevice)
    (port,) = device.ports
    return port


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("null,id=c", NULL),
        ("backend=null,id=c", NULL),
        ("stdio,id=c", Chardev(id="c", kind="stdio")),
        ("pty,id=c", Chardev(id="c", kind="pty")),
        ("file,id=c,path=a,,b", Chardev(id="c", kind="file", path=Path("a,b"))),
        ("file,id=c,path=a,append=on", Chardev(id="c", kind="file", path=Path("a"), append=True)),
        ("pipe,id=c,path=a", Chardev(id="c", kind="pipe", path=Path("a"))),
        ("socket,id=c,path=a", Chardev(id="c", kind="socket", path=Path("a"))),
        (
            "socket,id=c,path=a,server=on,wait=off",
            Chardev(id="c", kind="socket", path=Path("a"), server=True, wait=False),
        ),
        (
            "socket,id=c,host=::1,port=0,server=on",
            Chardev(id="c", kind="socket", host="::1", server=True),
        ),
        (
            "socket,id=c,host=h,port=65535,server=off",
            Chardev(id="c", kind="socket", host="h", port=65535),
        ),
    ],
)
def test_chardevs(text: str, found: Chardev) -> None:
    """qemu(1), -chardev: a backend with its properties; it may come behind the device that names it."""
    words = f"{BUS} -device virtserialport,chardev=c,name=n -chardev {text}"
    assert port_of(words) == SerialPort(number=1, chardev=found, name="n")
    assert uses_stdio(devices(words)[0]) == (found.kind == "stdio")


def chardevs(count: int) -> str:
    return " ".join(f"-chardev null,id=c{number}" for number in range(count))


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("", []),
        ("-device virtserialport,chardev=c0", [1]),
        ("-device virtconsole,chardev=c0", [0]),
        ("-device virtserialport,chardev=c0 -device virtconsole,chardev=c1", [0, 1]),
        ("-device virtconsole,chardev=c0 -device virtconsole,chardev=c1", [0, 1]),
        ("-device virtserialport,chardev=c0,nr=2 -device virtserialport,chardev=c1", [1, 2]),
        ("-device virtserialport,chardev=c0 -device virtserialport,chardev=c1,nr=1", [1, 2]),
        ("-device virtserialport,chardev=c0,nr=30 -device virtconsole,chardev=c1,nr=7,id=x", [7, 30]),
    ],
)
def test_numbers(words: str, numbers: list[int]) -> None:
    """QEMU: number 0 is a console's; who names none has the first that nobody names."""
    (device,) = devices(f"{BUS} {words} {chardevs(words.count('chardev'))}")
    assert isinstance(device, SerialDevice)
    assert [each.number for each in device.ports] == numbers
    assert [each.is_console for each in device.ports].count(True) == words.count("virtconsole")
    assert device.most is None


def test_buses() -> None:
    """A port goes to the bus that it names, or to the first; devices keep their order."""
    found = devices(
        f"{BUS},id=a -device virtio-rng-device {BUS},id=b,max_ports=2 "
        "-device virtserialport,chardev=c0,bus=b.0 -device virtserialport,chardev=c1,bus=a.0 "
        f"-device virtserialport,chardev=c2 {chardevs(3)}"
    )
    first, second, third = found
    assert isinstance(first, SerialDevice)
    assert isinstance(third, SerialDevice)
    assert second == EntropyDevice()
    assert [each.chardev.id for each in first.ports] == ["c1", "c2"]
    assert ([each.chardev.id for each in third.ports], third.most) == (["c0"], 2)


def test_largest_numbers() -> None:
    """31 ports of a bus, a name of 255 bytes."""
    words = " ".join(f"-device virtserialport,chardev=c{number}" for number in range(30))
    words += f" -device virtconsole,chardev=c30 -device virtio-rng-device {chardevs(31)}"
    found = devices(f"{BUS},max_ports=31 {words}")[0]
    assert isinstance(found, SerialDevice)
    assert [each.number for each in found.ports] == list(range(31))
    name = "\u00e4" * 127 + "n"
    assert port_of(f"{BUS} -chardev null,id=c -device virtserialport,chardev=c,name={name}").name == name


@pytest.mark.parametrize(
    ("words", "numbers", "added"),
    [
        ("-device virtserialport,chardev=c", [1, 2], 2),
        ("-device virtserialport,chardev=c,nr=2", [1, 2], 1),
        ("-device virtserialport,chardev=d,bus=b.0 -device virtserialport,chardev=c,nr=3", [1, 2, 3], 2),
    ],
)
def test_input_of_a_program(words: str, numbers: list[int], added: int) -> None:
    """The device that has the standard output gets a port more, the first that is free; no other does."""
    line = f"{BUS},id=a {BUS},id=b -chardev stdio,id=c -device virtio-rng-device {words},bus=b.0"
    first, second, third = with_program_input(devices(line + " -chardev null,id=d" * ("=d" in words)))
    assert (first, third) == (SerialDevice(), EntropyDevice())
    assert isinstance(second, SerialDevice)
    assert [each.number for each in second.ports] == numbers
    chosen = Chardev(id="stdin", kind="stdin")
    assert [each for each in second.ports if each.chardev == chosen] == [
        SerialPort(number=added, chardev=chosen)
    ]


@pytest.mark.parametrize("most", [2, 31])
def test_no_room_for_input(most: int) -> None:
    """As many ports as a device can have, number 0 not counted, which is a console's."""
    words = " ".join(f"-device virtserialport,chardev=c{number}" for number in range(most - 2))
    words += f" -device virtserialport,chardev=io {chardevs(most - 2)} -chardev stdio,id=io"
    limit = "" if most == 31 else f",max_ports={most}"
    text = (
        f"got {most - 1} ports of at most {most}, wanted room for one more, which the input of --exec takes"
    )
    with pytest.raises(UsageError, match=re.escape(f"-device virtio-serial-device: {text}")):
        with_program_input(devices(f"{BUS}{limit} {words}"))
    assert with_program_input(
        devices(f"{BUS},max_ports=3 -device virtserialport,chardev=c -chardev stdio,id=c")
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            "-chardev vc,id=c",
            "-chardev: unknown backend 'vc'; known are null, stdio, file, pipe, pty, socket",
        ),
        ("-chardev stdin,id=c", "-chardev: unknown backend 'stdin'"),
        ("-chardev {}", "-chardev: got JSON, wanted backend,key=value"),
        ("-chardev null", "-chardev null: property 'id' is missing"),
        ("-chardev file,id=c", "-chardev file: property 'path' is missing"),
        ("-chardev pipe,id=c", "-chardev pipe: property 'path' is missing"),
        ("-chardev stdio,id=c,mux=on", "-chardev stdio: unknown property 'mux'; known are id"),
        ("-chardev socket,id=c", "-chardev socket: wanted path, or host and port"),
        ("-chardev socket,id=c,host=h", "-chardev socket: wanted path, or host and port"),
        ("-chardev socket,id=c,port=1", "-chardev socket: wanted path, or host and port"),
        ("-chardev socket,id=c,path=p,host=h", "-chardev socket: wanted path, or host and port"),
        ("-chardev socket,id=c,path=p,port=1", "-chardev socket: wanted path, or host and port"),
        ("-chardev socket,id=c,path=p,host=h,port=1", "-chardev socket: wanted path, or host and port"),
        ("-chardev socket,id=c,host=h,port=65536", "property 'port': got '65536', wanted a number 0..65535"),
        ("-chardev socket,id=c,path=p,wait=on", "property 'wait': wanted server=on with it"),
        ("-chardev socket,id=c,path=p,wait=on,server=off", "property 'wait': wanted server=on with it"),
        ("-chardev socket,id=c,path=p,reconnect=1", "unknown property 'reconnect'"),
        ("-chardev null,id=c -chardev null,id=c", "-chardev: id 'c' is taken"),
        ("-chardev null,id=c", "chardev 'c': wanted a -device virtserialport,chardev=c that has it"),
        (f"{BUS} -device virtserialport", "-device virtserialport: property 'chardev' is missing"),
        (f"{BUS} -device virtconsole,name=n", "-device virtconsole: unknown property 'name'"),
        (
            f"{BUS} -device virtserialport,chardev=c",
            "virtserialport: property 'chardev': got 'c', there are none that are free",
        ),
        (
            f"{BUS} -device virtserialport,chardev=c -device virtserialport,chardev=c -chardev null,id=c",
            "virtserialport: property 'chardev': got 'c', there are none that are free",
        ),
        (
            f"-device virtserialport,chardev=c -chardev null,id=c {BUS}",
            "-device virtserialport: wanted a -device virtio-serial-device before it",
        ),
        (
            f"{BUS},id=a -device virtserialport,chardev=c,bus=b.0 -chardev null,id=c",
            "wanted a -device virtio-serial-device before it, with the id in bus=b.0",
        ),
        (f"{BUS},max_ports=0", "property 'max_ports': got '0', wanted a number 1..31"),
        (f"{BUS},max_ports=32", "property 'max_ports': got '32', wanted a number 1..31"),
        (
            f"{BUS},max_ports=1 -device virtserialport,chardev=c -chardev null,id=c",
            "-device virtserialport: got number 1, wanted one below max_ports=1 that is free",
        ),
        (
            f"{BUS},max_ports=2 -device virtserialport,chardev=c,nr=2 -chardev null,id=c",
            "-device virtserialport: got number 2, wanted one below max_ports=2 that is free",
        ),
        (f"{BUS} -device virtserialport,chardev=c,nr=0", "property 'nr': got '0', wanted a number 1..30"),
        (f"{BUS} -device virtconsole,chardev=c,nr=31", "property 'nr': got '31', wanted a number 0..30"),
        (
            f"{BUS} -device virtserialport,chardev=c,nr=1 -device virtconsole,chardev=d,nr=1",
            "-device: property 'nr': wanted another number for each port of a bus",
        ),
        (
            f"{BUS} -device virtserialport,chardev=c0,name=n -device virtserialport,chardev=c1,name=n "
            + chardevs(2),
            "-device virtserialport: property 'name': 'n' is taken",
        ),
        (f"{BUS} -device virtserialport,chardev=c,name=", "property 'name': got '', wanted 1 to 255 bytes"),
        (f"{BUS} -device virtserialport,chardev=c,name={'n' * 256}", "wanted 1 to 255 bytes"),
        (f"{BUS} -device virtserialport,chardev=c,name={chr(0xE4) * 128}", "wanted 1 to 255 bytes"),
        (f"{BUS} -device virtserialport,chardev=c,name=a\0b", "wanted 1 to 255 bytes"),
        (
            f"{BUS} -device virtserialport,chardev=c {BUS},id=b -device virtconsole,chardev=d,bus=b.0 "
            "-chardev stdio,id=c -chardev stdio,id=d",
            "-chardev stdio: wanted one of them at most",
        ),
        (
            f"{BUS} -device virtserialport,chardev=c -device virtconsole,chardev=d "
            "-chardev stdio,id=c -chardev stdio,id=d",
            "-chardev stdio: wanted one of them at most",
        ),
        ("-device virtio-serial-pci", "unknown driver 'virtio-serial-pci'; known are virtio-blk-device"),
    ],
)
def test_refusals(words: str, text: str) -> None:
    """QEMU refuses, or it is not modelled: option, got, wanted."""
    with pytest.raises(UsageError, match=re.escape(text)):
        devices(words)
