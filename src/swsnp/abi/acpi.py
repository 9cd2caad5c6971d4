"""The few ACPI tables that a guest kernel needs to find its processors, interrupt controllers and devices.

Source: ACPI 6.5, chapters 5.2.5 (RSDP), 5.2.8 (XSDT), 5.2.9 (FADT), 5.2.10 (FACS), 5.2.12 (MADT); 4.8 (the
power management registers). Virtual I/O Device 1.2, chapter 4.2, leaves the discovery of virtio-mmio devices
to the platform; Linux, drivers/virtio/virtio_mmio.c, takes those whose _HID is LNRO0005.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi import aml
from swsnp.abi.record import Record, mbz, record, u8, u16, u32, u64

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "IOAPIC_ADDRESS",
    "LOCAL_APIC_ADDRESS",
    "PM1_CONTROL",
    "PM1_EVENT",
    "POWER_OFF_TYPE",
    "VirtioPlace",
    "acpi_tables",
]

LOCAL_APIC_ADDRESS: Final = 0xFEE0_0000
IOAPIC_ADDRESS: Final = 0xFEC0_0000
_OEM: Final = b"SWSNP "
_HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
_RSDP: Final = struct.Struct("<8sB6sBIIQB3s")
_XSDT_ENTRY: Final = struct.Struct("<Q")
_MADT_BODY: Final = struct.Struct("<II")
_LOCAL_APIC: Final = struct.Struct("<BBBBI")
_LOCAL_X2APIC: Final = struct.Struct("<BBHIII")
_IOAPIC: Final = struct.Struct("<BBBBII")
_CHECKSUM_AT: Final = 9
_PCAT_COMPAT: Final = 1
_ENABLED: Final = 1
_MADT_REVISION: Final = 3
_APIC_IDS: Final = 255
"""Local APIC ids from here on take the x2APIC form."""
_FADT_REVISION: Final = 6
_DSDT_REVISION: Final = 2
_FACS_VERSION: Final = 2
_ALIGNMENT: Final = 64
"""That of the FACS; the others want less."""

PM1_EVENT: Final = range(0x600, 0x604)
"""Ports of status and enable register, two bytes each."""
PM1_CONTROL: Final = range(0x604, 0x606)
POWER_OFF_TYPE: Final = 5
"""SLP_TYP that the namespace gives for S5."""
_SCI: Final = 9
_KEYBOARD_COMMAND: Final = 0x64
_PULSE_RESET: Final = 0xFE
_CENTURY: Final = 0x32
_VIRTIO_MMIO: Final = "LNRO0005"

_LEGACY_DEVICES, _NO_VGA, _NO_MSI = 1 << 0, 1 << 2, 1 << 3
_WBINVD, _C1, _NO_POWER_BUTTON, _NO_SLEEP_BUTTON, _NO_CLOCK_WAKE, _RESET_REGISTER = (
    1 << bit for bit in (0, 2, 4, 5, 6, 10)
)


@record(size=240, source="ACPI 6.5, chapter 5.2.9, FADT, without the 36 bytes of every table's header")
class _Fadt(Record):
    """Offsets count from behind the header. Zero-filled ranges are registers that this machine lacks."""

    firmware_ctrl: int = u32(0x00)
    dsdt: int = u32(0x04)
    reserved_08: bytes = mbz(0x08, 1)
    preferred_pm_profile: int = u8(0x09)
    sci_int: int = u16(0x0A)
    reserved_0c: bytes = mbz(0x0C, 8)
    pm1a_evt_blk: int = u32(0x14)
    pm1b_evt_blk: int = u32(0x18)
    pm1a_cnt_blk: int = u32(0x1C)
    reserved_20: bytes = mbz(0x20, 20)
    pm1_evt_len: int = u8(0x34)
    pm1_cnt_len: int = u8(0x35)
    reserved_36: bytes = mbz(0x36, 6)
    p_lvl2_lat: int = u16(0x3C)
    p_lvl3_lat: int = u16(0x3E)
    reserved_40: bytes = mbz(0x40, 8)
    century: int = u8(0x48)
    iapc_boot_arch: int = u16(0x49)
    reserved_4b: bytes = mbz(0x4B, 1)
    flags: int = u32(0x4C)
    reset_reg: int = u32(0x50)
    reset_reg_address: int = u64(0x54)
    reset_value: int = u8(0x5C)
    arm_boot_arch: int = u16(0x5D)
    minor_version: int = u8(0x5F)
    x_firmware_ctrl: int = u64(0x60)
    x_dsdt: int = u64(0x68)
    x_pm1a_evt: int = u32(0x70)
    x_pm1a_evt_address: int = u64(0x74)
    x_pm1b_evt: bytes = mbz(0x7C, 12)
    x_pm1a_cnt: int = u32(0x88)
    x_pm1a_cnt_address: int = u64(0x8C)
    reserved_94: bytes = mbz(0x94, 92)


class VirtioPlace(NamedTuple):
    """Where a virtio-mmio device is: its registers, and its global system interrupt."""

    registers: range
    interrupt: int


def acpi_tables(gpa: int, vcpus: int, devices: Sequence[VirtioPlace] = ()) -> bytes:
    """The tables, to be placed at `gpa`, where the RSDP is.

    RSDP, XSDT and MADT for one IOAPIC and `vcpus` processors; for devices FADT, FACS and DSDT too, with which
    a kernel starts its interpreter. There is no interrupt source override: KVM's default routing has the
    timer on IOAPIC pin 0.
    """
    placed = _Placed(gpa, reserved=_RSDP.size)
    entries = []
    if devices:
        entries.append(placed.put(_fadt(placed.put(_facs()), placed.put(_dsdt(devices)))))
    entries.append(placed.put(_madt(vcpus)))
    xsdt = placed.put(_table(b"XSDT", 1, b"".join(map(_XSDT_ENTRY.pack, entries))))
    return placed.with_head(_rsdp(xsdt))


class _Placed:
    """Tables one after the other, behind room for the first."""

    def __init__(self, gpa: int, *, reserved: int) -> None:
        self._gpa = gpa
        self._raw = bytearray(reserved)

    def put(self, table: bytes) -> int:
        """Add a table; its address."""
        self._raw += bytes(-len(self._raw) % _ALIGNMENT)
        at = self._gpa + len(self._raw)
        self._raw += table
        return at

    def with_head(self, head: bytes) -> bytes:
        """All of it."""
        return head + bytes(self._raw[len(head) :])


def _dsdt(devices: Sequence[VirtioPlace]) -> bytes:
    """The namespace: how to power off, and the devices."""
    found = [
        aml.device(
            f"VR{number:02X}",
            aml.name("_HID", aml.text(_VIRTIO_MMIO)),
            aml.name("_UID", aml.uint(number)),
            aml.name("_CCA", aml.uint(1)),
            aml.name("_CRS", aml.resources(aml.memory(each.registers), aml.interrupt(each.interrupt))),
        )
        for number, each in enumerate(devices)
    ]
    off = aml.package(aml.uint(POWER_OFF_TYPE), aml.uint(POWER_OFF_TYPE), aml.uint(0), aml.uint(0))
    return _table(b"DSDT", _DSDT_REVISION, aml.name("_S5", off) + aml.scope("_SB", *found))


def _fadt(facs: int, dsdt: int) -> bytes:
    """A PC's, already in ACPI mode, with the reset line at the keyboard controller."""
    fixed = _Fadt(
        firmware_ctrl=facs,
        dsdt=dsdt,
        sci_int=_SCI,
        pm1a_evt_blk=PM1_EVENT.start,
        pm1a_cnt_blk=PM1_CONTROL.start,
        pm1_evt_len=len(PM1_EVENT),
        pm1_cnt_len=len(PM1_CONTROL),
        p_lvl2_lat=0xFFF,
        p_lvl3_lat=0xFFF,
        century=_CENTURY,
        iapc_boot_arch=_LEGACY_DEVICES | _NO_VGA | _NO_MSI,
        flags=_WBINVD | _C1 | _NO_POWER_BUTTON | _NO_SLEEP_BUTTON | _NO_CLOCK_WAKE | _RESET_REGISTER,
        reset_reg=_io_register(1),
        reset_reg_address=_KEYBOARD_COMMAND,
        reset_value=_PULSE_RESET,
        x_dsdt=dsdt,
        x_pm1a_evt=_io_register(len(PM1_EVENT)),
        x_pm1a_evt_address=PM1_EVENT.start,
        x_pm1a_cnt=_io_register(len(PM1_CONTROL)),
        x_pm1a_cnt_address=PM1_CONTROL.start,
    )
    return _table(b"FACP", _FADT_REVISION, bytes(fixed))


def _io_register(size: int) -> int:
    """The first four bytes of a generic address structure: ports, width in bits, from bit 0, any access."""
    system_io = 1
    return system_io | 8 * size << 8


def _facs() -> bytes:
    return struct.pack("<4sI24xB31x", b"FACS", 64, _FACS_VERSION)


def _rsdp(xsdt: int) -> bytes:
    revision = 2
    raw = bytearray(_RSDP.pack(b"RSD PTR ", 0, _OEM, revision, 0, _RSDP.size, xsdt, 0, bytes(3)))
    raw[8] = -sum(raw[:20]) & 0xFF
    raw[32] = -sum(raw) & 0xFF
    return bytes(raw)


def _madt(vcpus: int) -> bytes:
    entries = [_MADT_BODY.pack(LOCAL_APIC_ADDRESS, _PCAT_COMPAT)]
    for vcpu in range(vcpus):
        if vcpu < _APIC_IDS:
            entries.append(_LOCAL_APIC.pack(0, _LOCAL_APIC.size, vcpu, vcpu, _ENABLED))
        else:
            entries.append(_LOCAL_X2APIC.pack(9, _LOCAL_X2APIC.size, 0, vcpu, _ENABLED, vcpu))
    entries.append(_IOAPIC.pack(1, _IOAPIC.size, 0, 0, IOAPIC_ADDRESS, 0))
    return _table(b"APIC", _MADT_REVISION, b"".join(entries))


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    head = _HEADER.pack(signature, length, revision, 0, _OEM, b"SWSNPVMM", 1, b"SNP ", 1)
    raw = bytearray(head + body)
    raw[_CHECKSUM_AT] = -sum(raw) & 0xFF
    return bytes(raw)
