"""`swsnp vm -kernel` with disks: files are judged first, devices are measured, and a guest may power off."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest
from tests.unit.cli.conftest import reader_of, vm

from swsnp.abi.virtio import BlkFeature, BlkStatus
from swsnp.cli import main
from swsnp.cli.qemu_devices import devices_of
from swsnp.cli.vm_devices import VmDevices
from swsnp.testing.tiny_kernel import GOOD, bz_image, elf_image
from swsnp.testing.virtio_driver import DriverMemory, VirtioDriver
from swsnp.vmm.devices.block import Block
from swsnp.vmm.devices.raw_file import RawFile
from swsnp.vmm.devices.virtio_mmio import VirtioMmio

if TYPE_CHECKING:
    from pathlib import Path


VMGEXIT = "f3 0f 01 d9"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def test_wrong_disks(
    tmp_path: Path, kernel: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 and the file's name, before the host is looked at; options before files."""
    monkeypatch.setattr("swsnp.cli.vm_kernel.probe_for_linux", lambda: pytest.fail("the host was looked at"))
    odd, qcow = tmp_path / "odd", tmp_path / "qcow"
    odd.write_bytes(bytes(100))
    qcow.write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    for name, text in (
        ("/nowhere/d", "/nowhere/d: cannot be opened: No such file"),
        (str(odd), "odd: got 100 bytes, wanted whole sectors of 512"),
        (str(qcow), "qcow: is a qcow2 image"),
        (str(tmp_path), "cannot be opened: Is a directory"),
    ):
        assert vm("-kernel", kernel, "-drive", f"file={name},if=virtio") == 3
        assert text in capsys.readouterr().err
    nine = ["-device", "virtio-rng-device"] * 9
    assert vm("-kernel", kernel, *nine) == 2
    assert "virtio devices: got 9, wanted at most 8" in capsys.readouterr().err


def test_disk_in_use(kernel: str, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk has one writer."""
    with RawFile(disk):
        assert vm("-kernel", kernel, "-drive", f"file={disk},format=raw,if=virtio") == 3
    assert "disk.img: is in use by another virtual machine" in capsys.readouterr().err


@pytest.mark.usefixtures("any_kvm")
def test_measurement(kernel: str, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `swsnp measure kernel` computes from the same options is what was launched, devices included."""
    stats = tmp_path / "stats"
    same = ["-kernel", kernel, "-append", "x", "-m", "32M"]
    more = ["-drive", f"file={disk},format=raw,if=virtio", "-device", "virtio-rng-device"]
    assert vm(*same, *more, "-no-reboot", "--stats", str(stats)) == GOOD
    RawFile(disk).close()
    found = json.loads(stats.read_text())
    capsys.readouterr()
    measure = ["measure", "kernel", "--cbitpos", str(found["cbitpos"]), *same]
    assert main([*measure, *more]) == 0
    assert capsys.readouterr().out == found["measurement"] + "\n"
    assert main(measure) == 0
    assert capsys.readouterr().out != found["measurement"] + "\n"


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize("more", [[], ["-no-reboot"]])
def test_power_off(tmp_path: Path, more: list[str]) -> None:
    """ACPI's S5 ends the VM with exit code 0; it is no reset."""
    path = tmp_path / "code"
    # mov dx, 604h; mov ax, 3400h; out dx, ax
    path.write_bytes(bz_image(elf_image(bytes.fromhex(f"66 ba 04 06 66 b8 00 34 66 ef {VMGEXIT}"))))
    assert vm("-kernel", str(path), "-m", "32M", "-device", "virtio-rng-device", *more) == 0


@pytest.mark.usefixtures("any_kvm")
def test_registers_of_a_device(tmp_path: Path) -> None:
    """Guest code finds the magic at the first device's address, and an unclaimed place behind the last."""
    path = tmp_path / "code"
    path.write_bytes(reader_of(0))
    assert vm("-kernel", str(path), "-m", "32M", "-device", "virtio-rng-device", "-no-reboot") == 0x76
    assert vm("-kernel", str(path), "-m", "32M", "-no-reboot") == 0xFF


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize("more", [["-snapshot"], []])
def test_snapshot(kernel: str, disk: Path, more: list[str]) -> None:
    """Guests whose writes are forgotten share a disk with readers; others do not."""
    line = ["-kernel", kernel, "-append", "x", "-m", "32M", "-no-reboot"]
    with RawFile(disk, read_only=True):
        assert vm(*line, "-drive", f"file={disk},format=raw,if=virtio", *more) == (GOOD if more else 3)


def test_kinds_of_disks(disk: Path) -> None:
    """Read-only, forgetting and plain disks, as their features tell."""
    for values, read_only, kept in (
        ("", False, True),
        (",snapshot=on", False, False),
        (",readonly=on", True, True),
        (",readonly=on,snapshot=on", True, True),
    ):
        disk.write_bytes(bytes(4096))
        wanted = devices_of([("drive", f"file={disk},format=raw,if=virtio{values}")])
        with VmDevices(wanted) as devices:
            (make,) = devices._makers
            made, memory = make(), DriverMemory()
            assert isinstance(made, Block)
            driver = VirtioDriver(VirtioMmio(made, memory, lambda _: None), memory)
            assert bool(driver.features() & BlkFeature.RO) is read_only
            driver.start()
            status = driver.request([struct.pack("<IIQ", 1, 0, 0), b"w" * 512], [1])[1]
        assert status == bytes([BlkStatus.IOERR if read_only else BlkStatus.OK])
        assert disk.read_bytes().startswith(b"w") is (kept and not read_only)
