"""QEMU's options for disks and virtio devices: what they mean, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swsnp.cli.qemu_devices import AnyDevice, DiskDevice, EntropyDevice
from swsnp.cli.qemu_drives import Drive
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.errors import UsageError


def devices(words: str) -> tuple[AnyDevice, ...]:
    return parse_qemu_options(["-kernel", "k", *words.split()]).devices


def drive(name: str, *, read_only: bool = False, format_given: bool = True, snapshot: bool = False) -> Drive:
    return Drive(file=Path(name), read_only=read_only, format_given=format_given, snapshot=snapshot)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", ()),
        ("-drive file=a.img,format=raw,if=virtio", (DiskDevice(drive("a.img")),)),
        (f"-drive file=a,format=raw,if=virtio,serial={'s' * 20}", (DiskDevice(drive("a"), "s" * 20),)),
        (
            "-drive file=a,,b,if=virtio,readonly=on,serial=s1",
            (DiskDevice(drive("a,b", read_only=True, format_given=False), "s1"),),
        ),
        (
            "-device virtio-blk-device,drive=d,serial=x,id=y -drive if=none,id=d,file=a,format=raw",
            (DiskDevice(drive("a"), "x"),),
        ),
        (
            "-blockdev driver=raw,node-name=n,file.driver=file,file.filename=a,read-only=on "
            "-device virtio-blk-device,drive=n",
            (DiskDevice(drive("a", read_only=True)),),
        ),
        (
            "-blockdev file,node-name=n,filename=a -device driver=virtio-blk-device,drive=n",
            (DiskDevice(drive("a")),),
        ),
        (
            "-drive file=a,format=raw,if=virtio,snapshot=on -drive file=b,format=raw,if=virtio",
            (DiskDevice(drive("a", snapshot=True)), DiskDevice(drive("b"))),
        ),
        (
            "-drive file=a,format=raw,if=virtio -snapshot -drive file=b,format=raw,if=virtio,snapshot=off",
            (DiskDevice(drive("a", snapshot=True)), DiskDevice(drive("b"))),
        ),
        (
            "-device virtio-rng-device -drive file=a,if=virtio,id=i -device virtio-rng-device,id=r",
            (EntropyDevice(), DiskDevice(drive("a", format_given=False)), EntropyDevice()),
        ),
    ],
)
def test_devices(words: str, found: tuple[AnyDevice, ...]) -> None:
    """qemu(1): in the order of the command line; a drive with an interface is a device of its own."""
    assert devices(words) == found


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-drive if=virtio", "-drive: property 'file' is missing"),
        ("-drive file=,if=virtio", "-drive: property 'file': got '', wanted a value"),
        ("-drive file=a", "-drive: property 'if' is missing, wanted virtio, or none and a -device"),
        ("-drive file=a,if=ide", "-drive: property 'if': got 'ide', wanted virtio or none"),
        ("-drive file=a,if=none", "-drive: property 'id' is missing, which a -device names"),
        ("-drive file=a,if=virtio,format=qcow2", "property 'format': got 'qcow2', wanted raw"),
        ("-drive file=a,if=virtio,cache=none", "-drive: unknown property 'cache'; known are file, format"),
        ("-drive a", "-drive: unknown property ''"),
        ("-drive file=a,if=none,id=d,serial=s", "'serial': wanted it at the -device"),
        ("-drive file=a,if=virtio,serial=123456789012345678901", "wanted at most 20 ASCII characters"),
        ("-drive file=a,if=virtio,serial=\u00e4", "wanted at most 20 ASCII characters"),
        ("-drive file=a,if=none,id=d", "drive 'd': wanted a -device virtio-blk-device,drive=d that has it"),
        ("-drive file=a,if=none,id=d -drive file=b,if=none,id=d", "-drive: id 'd' is taken"),
        ("-device virtio-blk-device", "-device virtio-blk-device: property 'drive' is missing"),
        ("-device virtio-blk-device,drive=d", "property 'drive': got 'd', there are none that are free"),
        (
            "-drive file=a,if=none,id=d -device virtio-blk-device,drive=d -device virtio-blk-device,drive=d",
            "property 'drive': got 'd', there are none that are free",
        ),
        (
            "-device virtio-net-pci",
            "unknown driver 'virtio-net-pci'; known are virtio-blk-device, virtio-net-device, virtio-rng",
        ),
        ("-device virtio-rng-device,rng=r", "-device virtio-rng-device: unknown property 'rng'"),
        ('-device {"driver":"x"}', "-device: got JSON"),
        ('-blockdev {"driver":"x"}', "-blockdev: got JSON"),
        ("-blockdev raw,file.driver=file,file.filename=a", "-blockdev: property 'node-name' is missing"),
        ("-blockdev raw,node-name=n", "-blockdev: property 'file.filename' is missing"),
        ("-blockdev node-name=n,filename=a", "-blockdev: property 'driver' is missing"),
        (
            "-blockdev raw,node-name=n,filename=a,file.filename=b",
            "property 'filename': wanted 'file.filename'",
        ),
        ("-blockdev file,node-name=n,filename=a,file.filename=b", "'file.filename': wanted 'filename'"),
        ("-blockdev qcow2,node-name=n,file.filename=a", "'driver': got 'qcow2', wanted raw or file"),
        ("-drive", "-drive: wants a value"),
        ("-bios b -drive file=a,if=virtio -machine q35 -cpu EPYC", "-cpu: got model 'EPYC'"),
    ],
)
def test_refusals(words: str, text: str) -> None:
    """QEMU refuses, or it is not modelled: option, got, wanted."""
    with pytest.raises(UsageError, match=re.escape(text)):
        devices(words)


def test_guest_that_does_not_run() -> None:
    """Behind -bios no guest code runs, which could use a device."""
    words = "-bios b -cpu EPYC-Milan -machine q35,confidential-guest-support=s -device virtio-rng-device"
    words += " -object sev-snp-guest,id=s,cbitpos=51,reduced-phys-bits=1"
    with pytest.raises(UsageError, match="-device: wanted -kernel with it, and no -bios"):
        devices(words)
