"""`swsnp vm -kernel` with a network: who the peer is, and what happens where there is none."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.virtio import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, NetConfig
from swsnp.cli import main
from swsnp.cli.qemu_devices import devices_of
from swsnp.cli.vm_devices import VmDevices
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.bus import Bus
from swsnp.vmm.devices.network import framed
from swsnp.vmm.stop import PowerSwitch

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

FEATURES: Final = VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM
FRAME: Final = bytes(range(64))


class Vm:
    """A guest's memory and interrupt lines."""

    def __init__(self) -> None:
        self.ram = DriverMemory()

    def interrupt_line(self, number: int) -> Any:
        return lambda level: None


def driver_of(devices: VmDevices) -> VirtioDriver:
    """The second queue of a guest's only device."""
    vm: Any = Vm()
    bus = Bus()
    devices.attach(vm, bus, PowerSwitch())
    found: Any = bus._memory.look_up(devices.places[0].registers.start, 4)
    receiver, sender = (VirtioDriver(found[0], vm.ram, queue=queue) for queue in range(2))
    receiver.start(FEATURES, others=[sender])
    return sender


def send(driver: VirtioDriver) -> None:
    driver.request([bytes(12) + FRAME], [])


def test_peer_that_listens(tmp_path: Path) -> None:
    """A stream: the guest's address is what was asked for, and a frame comes out behind its length."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        line = f"stream,addr.type=unix,addr.path={path},mac=02:00:00:00:00:01"
        with VmDevices(devices_of([("nic", line)])) as devices:
            driver = driver_of(devices)
            raw = b"".join(driver.device.read(0x100 + at, 1).to_bytes(1, "little") for at in range(8))
            assert NetConfig.parse(raw).mac == bytes.fromhex("020000000001")
            send(driver)
            peer, _ = server.accept()
            with peer:
                assert peer.recv(100) == framed(FRAME)
                devices.detach()


def test_peer_that_connects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server's address is told; nobody waits for a peer, and what is sent before is lost."""
    path = tmp_path / "s"
    line = f"stream,server=on,addr.type=unix,addr.path={path}"
    with VmDevices(devices_of([("nic", line)])) as devices, socket.socket(socket.AF_UNIX) as peer:
        assert capsys.readouterr().err == f"swsnp vm: a network listens at {path}\n"
        driver = driver_of(devices)
        send(driver)
        peer.connect(str(path))
        peer.settimeout(0.02)
        while True:
            send(driver)  # until the listener has seen the peer
            try:
                assert peer.recv(68) == framed(FRAME)
            except TimeoutError:
                continue
            break
        devices.detach()


def test_user_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program passt is started with the ports that were asked for, and ends with the machine."""
    program = tmp_path / "passt"
    program.write_text(
        f"#!/bin/bash\nPATH={os.environ['PATH']}\necho $* > {tmp_path}/told\n"
        f'printf "\\0\\0\\0\\1x" >&$4; head -c 46 <&$4 >/dev/null; cat <&$4 > {tmp_path}/sent\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with VmDevices(devices_of([("nic", "user,hostfwd=tcp::2222-:22")])) as devices:
        send(driver_of(devices))
        devices.detach()
    assert (tmp_path / "told").read_text().endswith("--tcp-ports 2222:22\n")
    assert (tmp_path / "sent").read_bytes() == framed(FRAME)


def test_networks_that_cannot_be(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 for a peer that is not there, 4 for a program that is missing, with the remedy."""
    monkeypatch.setenv("PATH", str(tmp_path))
    stream = f"stream,addr.type=unix,addr.path={tmp_path}/none"
    assert main(["vm", "-kernel", kernel, "-nic", stream]) == 3
    assert "none: cannot be connected to: No such file" in capsys.readouterr().err
    assert main(["vm", "-kernel", kernel, "-nic", "user"]) == 4
    assert "remedy: install the package passt" in capsys.readouterr().err
