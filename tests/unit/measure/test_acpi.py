"""ACPI tables: as bytes, as Intel's compiler reads them, and as Linux takes them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.unit.guest_program.emulated import command_of, package_of, run

from swsnp.abi import aml
from swsnp.abi.acpi import acpi_tables
from swsnp.measure.direct_boot import virtio_places
from swsnp.vmm.guest_init import InitPlan, build_init
from swsnp.vmm.initramfs import prepare_program
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    from tests.conftest import Skip

BUILD = Path(__file__).resolve().parents[3] / "build"
GPA = 0xD000


def tables_of(raw: bytes, gpa: int = GPA) -> dict[str, bytes]:
    """Every table that is reached from the root, by signature."""
    assert raw[:8] == b"RSD PTR "
    assert sum(raw[:20]) % 256 == sum(raw[:36]) % 256 == 0
    found: dict[str, bytes] = {}

    def table(at: int) -> bytes:
        at -= gpa
        (length,) = struct.unpack_from("<I", raw, at + 4)
        body = raw[at : at + length]
        assert len(body) == length
        assert body[:4] == b"FACS" or sum(body) % 256 == 0
        found[body[:4].decode()] = body
        return body

    (xsdt,) = struct.unpack_from("<Q", raw, 24)
    for (entry,) in struct.iter_unpack("<Q", table(xsdt)[36:]):
        body = table(entry)
        if body[:4] == b"FACP":
            facs, dsdt = struct.unpack_from("<II", body, 36)
            assert facs % 64 == 0
            table(facs)
            table(dsdt)
            assert struct.unpack_from("<Q", body, 140) == (dsdt,)
    return found


def test_processors() -> None:
    """ACPI 6.5, 5.2.12: the MADT has every processor and the IOAPIC; without devices there is no more."""
    tables = tables_of(acpi_tables(GPA, 300))
    assert set(tables) == {"XSDT", "APIC"}
    body, entries, at = tables["APIC"], [], 44
    while at < len(body):
        entries.append((body[at], body[at + 1]))
        at += body[at + 1]
    assert entries == [(0, 8)] * 255 + [(9, 16)] * 45 + [(1, 12)]


def test_devices() -> None:
    """5.2.9: a FADT of a PC whose registers the VMM has; 5.2.10: FACS; a namespace that names each device."""
    tables = tables_of(acpi_tables(GPA, 1, virtio_places(3)))
    assert set(tables) == {"XSDT", "APIC", "FACP", "FACS", "DSDT"}
    fadt = tables["FACP"]
    assert (len(fadt), fadt[8], len(tables["FACS"])) == (276, 6, 64)
    assert struct.unpack_from("<H", fadt, 46) == (9,)
    assert struct.unpack_from("<6I", fadt, 48) == (0, 0, 0x600, 0, 0x604, 0)
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 0, 0x64, 0xFE)
    assert tables["DSDT"].count(b"LNRO0005\0") == 3
    for place in virtio_places(3):
        assert struct.pack("<II", place.registers.start, 0x1000) in tables["DSDT"]


@pytest.mark.parametrize(
    ("value", "raw"),
    [(0, "00"), (1, "01"), (2, "0a 02"), (255, "0a ff"), (256, "0b 00 01"), (0x1_0000, "0c 00 00 01 00")],
)
def test_integers(value: int, raw: str) -> None:
    """20.2.3: the shortest form."""
    assert aml.uint(value) == bytes.fromhex(raw)


@pytest.mark.parametrize(
    ("size", "length"), [(58, "3f"), (59, "41 04"), (4089, "4f ff"), (4090, "81 00 01"), (70_000, "87 17 11")]
)
def test_lengths(size: int, length: str) -> None:
    """20.2.4: PkgLength counts itself; its first byte says how many follow, and has four bits of it then."""
    raw = bytes.fromhex(length)
    assert aml.scope("A", bytes(size)) == b"\x10" + raw + b"A___" + bytes(size)
    lead = raw[0] & 0x3F if len(raw) == 1 else raw[0] & 0xF | int.from_bytes(raw[1:], "little") << 4
    assert lead == len(raw) + 4 + size


def iasl() -> str | None:
    """The compiler, installed or unpacked."""
    unpacked = BUILD / "acpica-tools" / "usr" / "bin" / "iasl"
    return shutil.which("iasl") or (str(unpacked) if unpacked.exists() else None)


def test_intels_compiler_agrees(cannot_run: Skip, tmp_path: Path) -> None:
    """Taken apart and compiled again the namespace is the same, without a warning."""
    compiler = iasl()
    if compiler is None:
        cannot_run("no iasl", "apt-get install acpica-tools")
    dsdt = tables_of(acpi_tables(GPA, 1, virtio_places(8)))["DSDT"]
    (tmp_path / "a.aml").write_bytes(dsdt)
    for arguments in (["-d", "a.aml"], ["-oa", "-p", "b", "a.dsl"]):
        done = subprocess.run(
            [compiler, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
    assert "0 Errors, 0 Warnings, 0 Remarks" in done.stdout
    assert (tmp_path / "b.aml").read_bytes()[36:] == dsdt[36:]


# Linux


@pytest.mark.slow
@pytest.mark.parametrize("name", ["debian-12", "debian-13"])
def test_linux_takes_them(cannot_run: Skip, tmp_path: Path, name: str) -> None:
    """A kernel under QEMU that is pointed at our tables in place of QEMU's finds the devices, without a word.

    There is nothing at the devices' addresses: the driver says that, which shows that it came by.
    """
    package = package_of(name, cannot_run)
    gpa = 0x1F00_0000
    (tmp_path / "tables").write_bytes(acpi_tables(gpa, 1, virtio_places(2)))
    (tmp_path / "program").write_bytes(build_init(InitPlan(argv=("/none",))))
    made = prepare_program([str(tmp_path / "program")], modules=find_modules(package, ("virtio_mmio",)))
    command = command_of(package, tmp_path, made, f"loglevel=7 acpi_rsdp={gpa:#x} memmap=64K#{gpa:#x}")
    done = run([*command, "-device", f"loader,file={tmp_path / 'tables'},addr={gpa:#x},force-raw=on"])
    console = done.stdout.decode(errors="replace")
    assert "ACPI: Interpreter enabled" in console
    assert "supports S0 S5" in console
    assert [each for each in ("ACPI Error", "ACPI BIOS", "ACPI Warning") if each in console] == []
    assert all(f"LNRO0005:0{number}: Wrong magic value" in console for number in (0, 1)), console
