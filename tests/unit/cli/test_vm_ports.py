"""`swsnp vm -kernel` with consoles and streams: who is at the host's end, and where the terminal goes."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.unit.cli.conftest import vm

from swsnp.abi.virtio import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, ConsoleEvent, ConsoleFeature
from swsnp.cli.qemu_devices import devices_of
from swsnp.cli.vm_devices import VmDevices
from swsnp.testing.tiny_kernel import GOOD, bz_image, elf_image
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.bus import Bus
from swsnp.vmm.stop import PowerSwitch

if TYPE_CHECKING:
    from pathlib import Path

    from swsnp.vmm.devices.virtio_mmio import VirtioMmio

FEATURES: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM | ConsoleFeature.MULTIPORT
BUS: Final = ("device", "virtio-serial-device")
CONSOLE: Final = ("device", "virtconsole,chardev=c")
ON_STDIO: Final = (
    *("-device", "virtio-serial-device", "-device", "virtconsole,chardev=c", "-chardev", "stdio,id=c"),
)
STDIO_PORT: Final = "-device virtio-serial-device -device virtserialport,chardev=c -chardev stdio,id=c"


class Vm:
    """A guest's memory and interrupt lines."""

    def __init__(self) -> None:
        self.ram = DriverMemory()

    def interrupt_line(self, number: int) -> Any:
        return lambda level: None


class Guest:
    """A driver of the first device, whose port 0 it has opened."""

    def __init__(self, devices: VmDevices) -> None:
        vm: Any = Vm()
        bus = Bus()
        devices.attach(vm, bus, PowerSwitch())
        found = bus._memory.look_up(devices.places[0].registers.start, 4)
        assert found is not None
        device: Any = found[0]
        self.device: VirtioMmio = device
        self.queues = [VirtioDriver(self.device, vm.ram, queue=queue) for queue in range(4)]
        self.queues[0].start(FEATURES, others=self.queues[1:])
        self.queues[0].chain([], [64])
        self.queues[0].offer(0)
        self.queues[3].request([struct.pack("<IHH", 0, ConsoleEvent.PORT_OPEN, 1)], [])

    def write(self, data: bytes) -> None:
        self.queues[1].request([data], [])

    def read(self) -> bytes:
        """The first that comes."""
        until = time.monotonic() + 20
        while not self.queues[0].used()[0]:
            assert time.monotonic() < until
            time.sleep(0.005)
        size = self.queues[0].used()[1][0][1]
        return bytes(self.queues[0].memory.raw[0x4000 : 0x4000 + size])


def devices(chardev: str) -> VmDevices:
    return VmDevices(devices_of([BUS, CONSOLE, ("chardev", chardev)]))


# Ends


def test_null() -> None:
    """What is written is gone."""
    with devices("null,id=c") as made:
        Guest(made).write(b"x")
        assert made.stdio is None


def test_file(tmp_path: Path) -> None:
    """A guest that resets goes on in the same file."""
    with devices(f"file,id=c,path={tmp_path}/out") as made:
        for text in (b"one ", b"two"):
            Guest(made).write(text)
            made.detach()
    assert (tmp_path / "out").read_bytes() == b"one two"


def test_pipe(tmp_path: Path) -> None:
    """Named pipes, both ways."""
    for name in ("p.in", "p.out"):
        os.mkfifo(tmp_path / name)
    with devices(f"pipe,id=c,path={tmp_path}/p") as made:
        guest = Guest(made)
        (tmp_path / "p.in").write_bytes(b"in")
        assert guest.read() == b"in"
        with (tmp_path / "p.out").open("rb") as out:
            guest.write(b"out")
            assert out.read(3) == b"out"


def test_pty(capsys: pytest.CaptureFixture[str]) -> None:
    """Its name is on stderr."""
    with devices("pty,id=c") as made:
        guest = Guest(made)
        _, found, name = capsys.readouterr().err.rstrip().partition("swsnp vm: chardev c is ")
        assert found
        fd = os.open(name, os.O_RDWR | os.O_NOCTTY)
        os.write(fd, b"in")
        assert guest.read() == b"in"
        guest.write(b"out")
        assert os.read(fd, 3) == b"out"
        os.close(fd)


def test_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it listens is on stderr; a peer may come after the guest has begun."""
    path = tmp_path / "s"
    with (
        devices(f"socket,id=c,path={path},server=on,wait=off") as made,
        socket.socket(socket.AF_UNIX) as peer,
    ):
        assert capsys.readouterr().err == f"swsnp vm: chardev c listens at {path}\n"
        guest = Guest(made)
        peer.connect(str(path))
        peer.sendall(b"in")
        assert guest.read() == b"in"
        guest.write(b"out")
        assert peer.recv(3) == b"out"


def test_server_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wait=on, which is the default: there is no guest before somebody has connected."""
    path, peer = tmp_path / "s", socket.socket(socket.AF_UNIX)

    class Connects(io.StringIO):
        """Comes when it is told where."""

        def write(self, text: str) -> int:
            if "waits for a connection at" in text:
                peer.connect(str(path))
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Connects())
    with peer, devices(f"socket,id=c,path={path},server=on") as made:
        Guest(made).write(b"out")
        assert peer.recv(3) == b"out"


def test_client() -> None:
    """Who listens is there before the guest begins."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()[:2]
        with devices(f"socket,id=c,host={host},port={port}") as made:
            Guest(made).write(b"out")
            peer, _ = server.accept()
            with peer:
                assert peer.recv(3) == b"out"


def test_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    """The guest's bytes come out, those of the standard input go to its port; a stopped one goes on."""
    with devices("stdio,id=c") as made:
        assert made.stdio is not None
        made.stdio.stop()
        guest = Guest(made)
        guest.write(b"out\n")
        made.stdio.receive(b"typed")
        assert guest.read() == b"typed"
        heard: list[bool] = []
        made.on_output = lambda: heard.append(True)
        guest.write(b"more\n")
        assert heard == [True]
    assert capfd.readouterr().out == "out\nmore\n"


def test_last_words(tmp_path: Path) -> None:
    """What the guest wrote before it ended comes out although its end was full; its memory is left alone."""
    with devices(f"file,id=c,path={tmp_path}/out") as made:
        guest = Guest(made)
        (console,) = made._consoles
        send = console.ports[0].end.send
        console.ports[0].end.send = lambda data, *, must=False: must and send(data)  # type: ignore[method-assign]
        guest.queues[1].chain([b"last words"], [])
        guest.queues[1].offer(0)
        assert guest.queues[1].used()[0] == 0
        made.detach()
        assert guest.queues[1].used()[0] == 1
        assert not guest.device.read(0x70, 4)
    assert (tmp_path / "out").read_bytes() == b"last words"


# The command


def test_ends_that_cannot_be(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 and the name, before the host is looked at."""
    ports = ["-device", "virtio-serial-device", "-device", "virtconsole,chardev=c", "-chardev"]
    for chardev, text in (
        (f"file,id=c,path={tmp_path}/none/f", "none/f: cannot be written"),
        (f"pipe,id=c,path={tmp_path}/none", "none: cannot be opened"),
        (f"socket,id=c,path={tmp_path}/none", "none: cannot be connected to"),
        (f"socket,id=c,path={tmp_path}/none/s,server=on", "none/s: cannot be listened at"),
    ):
        assert vm("-kernel", kernel, *ports, chardev) == 3
        assert text in capsys.readouterr().err


@pytest.mark.usefixtures("any_kvm")
def test_console_beside_a_port(kernel: str, capfd: pytest.CaptureFixture[str]) -> None:
    """With a port on stdio the serial console is on stderr."""
    line = ("-kernel", kernel, "-append", "hello", "-m", "32M", "-no-reboot")
    assert vm(*line, *ON_STDIO) == GOOD
    out, err = capfd.readouterr()
    assert (out, "hello\n" in err) == ("", True)


@pytest.mark.usefixtures("any_kvm")
def test_input_goes_to_the_port(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe as standard input whose bytes nobody reads does not keep the guest from ending."""
    reads, writes = os.pipe()
    os.write(writes, bytes(30_000))
    with os.fdopen(reads) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert vm("-kernel", kernel, "-append", "x", "-m", "32M", "-no-reboot", *ON_STDIO) == GOOD
    os.close(writes)


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", None),
        ("--exec", "serial port"),
        (f"{STDIO_PORT} --exec", "virtio port"),
        (STDIO_PORT, None),
        (f"{STDIO_PORT.replace('stdio', 'null')} --exec", "serial port"),
    ],
)
def test_statistics_tell_the_output(
    kernel: str, static_program: str, tmp_path: Path, words: str, found: str | None
) -> None:
    """Where a program's output leaves the guest."""
    line = ["-kernel", kernel, "-m", "32M", "-no-reboot", "--stats", str(tmp_path / "stats"), *words.split()]
    vm(*line, *([static_program] if "--exec" in words else []))
    assert json.loads((tmp_path / "stats").read_text())["output_by"] == found


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize(
    ("words", "found"), [("", 0xFF), ("--exec", 0x60), (f"{STDIO_PORT} --exec", 0xFF), (STDIO_PORT, 0xFF)]
)
def test_second_serial_port(static_program: str, tmp_path: Path, words: str, found: int) -> None:
    """It is there for a program's output, and for nothing else."""
    code = tmp_path / "code"
    # mov dx, 2FDh; in al, dx; out F4h, al: the line status register, all ones where none is
    code.write_bytes(bz_image(elf_image(bytes.fromhex("66 ba fd 02 ec e6 f4 f3 0f 01 d9"))))
    line = ["-kernel", str(code), "-m", "32M", "-no-reboot", *words.split()]
    assert vm(*line, *([static_program] if "--exec" in words else [])) == found


def test_output_of_a_program(kernel: str, static_program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A console would change what the program writes."""
    assert vm("-kernel", kernel, *ON_STDIO, "--exec", static_program) == 2
    assert "-chardev stdio: with --exec wanted a virtserialport, not a virtconsole" in capsys.readouterr().err
