"""`swsnp vm -kernel` with a shared folder: its daemon is judged before the guest, and gets memory from it."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.unit.cli.conftest import reader_of, vm
from tests.unit.devices.vhost_backend import ALL_FEATURES, Backend, PassableDriverMemory

from swsnp.abi.virtio import MmioRegister
from swsnp.cli import main
from swsnp.cli.qemu_devices import devices_of
from swsnp.cli.vm_devices import VmDevices
from swsnp.testing.tiny_kernel import GOOD
from swsnp.testing.virtio_driver import VirtioDriver
from swsnp.vmm.devices.bus import Bus
from swsnp.vmm.devices.vhost_mmio import VhostMmio
from swsnp.vmm.stop import PowerSwitch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FOLDER: Final = "vhost-user-fs-device,chardev=c,tag=t,queue-size=32"


class Daemon:
    """Listens at a path; whoever connects first gets a `Backend`, which is what it is waited for."""

    def __init__(self, path: Path, features: int = ALL_FEATURES) -> None:
        self.path = path
        self._features = features
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with self._listener:
            peer, _ = self._listener.accept()
        self._backend = Backend(features=self._features, peer=peer)

    def backend(self) -> Backend:
        """What became of it."""
        self._thread.join()
        self._backend.join(10)
        return self._backend

    def options(self) -> list[str]:
        """Those that name it."""
        return ["-chardev", f"socket,id=c,path={self.path}", "-device", FOLDER]


class Vm:
    """A guest's memory and interrupt lines."""

    def __init__(self) -> None:
        self.ram = PassableDriverMemory()

    def interrupt_line(self, number: int) -> Callable[[bool], None]:
        return lambda level: None


def test_device(tmp_path: Path) -> None:
    """The folder is a device by its daemon, of as many descriptors as asked for; it ends with the rest."""
    daemon = Daemon(tmp_path / "s")
    wanted = devices_of([("chardev", f"socket,id=c,path={daemon.path}"), ("device", FOLDER)])
    with VmDevices(wanted) as devices:
        assert devices.passable_memory
        vm: Any = Vm()
        bus = Bus()
        devices.attach(vm, bus, PowerSwitch())
        found: Any = bus._memory.look_up(devices.places[0].registers.start, 4)
        assert isinstance(found[0], VhostMmio)
        driver = VirtioDriver(found[0], vm.ram, size=32)
        driver.start()
        devices.detach()
    assert daemon.backend().requests()[-2:] == ["SET_VRING_ENABLE", "GET_VRING_BASE"]


def test_other_devices(tmp_path: Path) -> None:
    """Memory is passable for a folder, and for nothing else."""
    (tmp_path / "d").write_bytes(bytes(512))
    others = [("device", "virtio-rng-device"), ("drive", f"file={tmp_path}/d,format=raw,if=virtio")]
    with VmDevices(devices_of(others)) as devices:
        assert not devices.passable_memory


def test_wrong_daemons(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 for a daemon that is not there, 4 for one that cannot be used, with the remedy."""
    nobody = ["-chardev", f"socket,id=c,path={tmp_path}/none", "-device", FOLDER]
    assert main(["vm", "-kernel", kernel, *nobody]) == 3
    assert "none: cannot be connected to: No such file or directory; remedy: start" in capsys.readouterr().err
    daemon = Daemon(tmp_path / "s", features=0)
    assert main(["vm", "-kernel", kernel, *daemon.options()]) == 4
    assert "s: GET_FEATURES: got 0x0, wanted VIRTIO_F_VERSION_1" in capsys.readouterr().err
    daemon.backend()


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize("snp", [True, False])
def test_guest(tmp_path: Path, snp: bool) -> None:
    """Guest code reads what device it is; the daemon had nothing of the guest before its driver was ready."""
    path, stats, daemon = tmp_path / "code", tmp_path / "stats", Daemon(tmp_path / "s")
    path.write_bytes(reader_of(MmioRegister.DEVICE_ID))
    line = ["-kernel", str(path), "-m", "32M", "-no-reboot", "--stats", str(stats), *daemon.options()]
    assert vm(*line, *([] if snp else ["-machine", "q35"])) == 26
    assert json.loads(stats.read_text())["snp"] is snp
    assert "SET_MEM_TABLE" not in daemon.backend().requests()


@pytest.mark.usefixtures("any_kvm")
def test_measurement(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`swsnp measure kernel` counts it as any other device, and asks no daemon."""
    stats, daemon = tmp_path / "stats", Daemon(tmp_path / "s")
    same = ["-kernel", kernel, "-append", "x", "-m", "32M"]
    assert vm(*same, *daemon.options(), "-no-reboot", "--stats", str(stats)) == GOOD
    found = json.loads(stats.read_text())
    capsys.readouterr()
    cbitpos = str(found["cbitpos"])
    assert main(["measure", "kernel", "--cbitpos", cbitpos, *same, "-device", "virtio-rng-device"]) == 0
    assert main(["measure", "kernel", "--cbitpos", cbitpos, *same, *daemon.options()]) == 0
    assert capsys.readouterr().out.split() == [found["measurement"]] * 2
    daemon.backend()
