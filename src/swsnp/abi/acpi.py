"""The few ACPI tables that a guest kernel needs to find its processors and interrupt controllers.

Source: ACPI 6.5, chapters 5.2.5 (RSDP), 5.2.8 (XSDT), 5.2.12 (MADT).
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["IOAPIC_ADDRESS", "LOCAL_APIC_ADDRESS", "acpi_tables"]

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


def acpi_tables(gpa: int, vcpus: int) -> bytes:
    """RSDP, XSDT and MADT for one IOAPIC and `vcpus` processors, to be placed at `gpa`, where the RSDP is.

    There is no interrupt source override: KVM's default routing has the timer on IOAPIC pin 0.
    """
    xsdt_at = -(-_RSDP.size // 16) * 16
    madt_at = xsdt_at + -(-(_HEADER.size + _XSDT_ENTRY.size) // 16) * 16
    xsdt = _table(b"XSDT", 1, _XSDT_ENTRY.pack(gpa + madt_at))
    parts = ((0, _rsdp(gpa + xsdt_at)), (xsdt_at, xsdt), (madt_at, _madt(vcpus)))
    result = bytearray()
    for offset, table in parts:
        result = result.ljust(offset, b"\0") + table
    return bytes(result)


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
