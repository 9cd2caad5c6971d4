"""The registers of a vCPU before its first instruction, as each VMM sets them: one page, which is measured.

Built by offset, not as `abi.vmsa.Vmsa`, whose record takes longer to load than a measurement takes; a test
holds `FIELDS` against it.

Source: AMD 24593 (APM volume 2), VMSA layout; the values of sev-snp-measure, which QEMU, EC2 and GCE gave.
"""

from __future__ import annotations

import struct
from enum import Enum

from swsnp.abi.snp_page import PAGE
from swsnp.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

__all__ = [
    "CPU_SIGNATURES",
    "FIELDS",
    "RESET_EIP",
    "SNP_ACTIVE",
    "Vmm",
    "cpu_signature",
    "reset_page",
    "signature_of_model",
    "svsm_page",
    "with_fields",
]

RESET_EIP: Final = 0xFFFF_FFF0
"""Where the boot processor starts, linear."""
SNP_ACTIVE: Final = 1
"""SEV_FEATURES of a guest that asks for nothing else."""
_EIP_HIGH: Final = 0xFFFF_0000

FIELDS: Final[Mapping[str, tuple[int, int]]] = {
    **{
        f"{name}.{part}": (0x10 * number + offset, size)
        for number, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr"))
        for part, offset, size in (("selector", 0, 2), ("attrib", 2, 2), ("limit", 4, 4), ("base", 8, 8))
    },
    "efer": (0x0D0, 8),
    "cr4": (0x148, 8),
    "cr0": (0x158, 8),
    "dr7": (0x160, 8),
    "dr6": (0x168, 8),
    "rflags": (0x170, 8),
    "rip": (0x178, 8),
    "g_pat": (0x268, 8),
    "rdx": (0x310, 8),
    "sev_features": (0x3B0, 8),
    "xcr0": (0x3E8, 8),
    "mxcsr": (0x408, 4),
    "x87_fcw": (0x410, 2),
}
"""Offset and size of every field that some VMM sets."""


class Vmm(Enum):
    """Who starts the guest; the values are sev-snp-measure's names."""

    QEMU = "QEMU"
    EC2 = "ec2"
    GCE = "gce"


CPU_SIGNATURES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("EPYC", "EPYC-v1", "EPYC-v2", "EPYC-IBPB", "EPYC-v3", "EPYC-v4"), 0x0080_0F12),
    **dict.fromkeys(("EPYC-Rome", "EPYC-Rome-v1", "EPYC-Rome-v2", "EPYC-Rome-v3"), 0x0083_0F10),
    **dict.fromkeys(("EPYC-Milan", "EPYC-Milan-v1", "EPYC-Milan-v2"), 0x00A0_0F11),
    **dict.fromkeys(("EPYC-Genoa", "EPYC-Genoa-v1"), 0x00A1_0F10),
    "EPYC-Turin": 0x00B0_0F00,
}
"""CPUID Fn1 EAX of QEMU's CPU models."""

_DATA: Final = {"attrib": 0x93, "limit": 0xFFFF}
_TABLE: Final = {"limit": 0xFFFF}
_COMMON: Final = {
    "efer": 0x1000,
    "cr4": 0x40,
    "cr0": 0x10,
    "dr7": 0x400,
    "dr6": 0xFFFF_0FF0,
    "rflags": 2,
    "xcr0": 1,
}
_X86_PAT: Final = 0x0007_0406_0007_0406
_OF_VMM: Final[Mapping[Vmm, dict[str, int]]] = {
    Vmm.QEMU: {"g_pat": _X86_PAT, "mxcsr": 0x1F80, "x87_fcw": 0x37F},
    Vmm.EC2: {"ss.attrib": 0x92, "tr.attrib": 0x83, "g_pat": _X86_PAT, "rdx": 0x600},
    Vmm.GCE: {"g_pat": 0x0000_0000_0007_0106, "rdx": 0x600},
}
_RESET_SEGMENTS: Final = {
    **dict.fromkeys(("es", "ss", "ds", "fs", "gs"), _DATA),
    **dict.fromkeys(("gdtr", "idtr"), _TABLE),
    "ldtr": {"attrib": 0x82, "limit": 0xFFFF},
    "tr": {"attrib": 0x8B, "limit": 0xFFFF},
}
_FLAT_DATA: Final = {"selector": 0x10, "attrib": 0xC93, "limit": 0xFFFF_FFFF}
_SVSM_SEGMENTS: Final = {
    **_RESET_SEGMENTS,
    **dict.fromkeys(("es", "ss", "ds", "fs"), _FLAT_DATA),
    "cs": {"selector": 0x8, "attrib": 0xC9B, "limit": 0xFFFF_FFFF},
}
_FAMILY_MAX: Final = 0xF + 0xFF
_FORMATS: Final = {2: struct.Struct("<H"), 4: struct.Struct("<I"), 8: struct.Struct("<Q")}


def cpu_signature(family: int, model: int, stepping: int) -> int:
    """CPUID Fn1 EAX of a display family (0..270), model (0..255) and stepping (0..15).

    Raises:
        UsageError: one of them is out of range.
    """
    for name, value, limit in (
        ("family", family, _FAMILY_MAX),
        ("model", model, 0xFF),
        ("stepping", stepping, 0xF),
    ):
        if not 0 <= value <= limit:
            raise UsageError(
                f"vCPU {name}: got {value}, wanted 0..{limit} (AMD 24594, CPUID Fn0000_0001_EAX)"
            )
    base = min(family, 0xF)
    return (family - base) << 20 | (model >> 4) << 16 | base << 8 | (model & 0xF) << 4 | stepping


def signature_of_model(name: str) -> int | None:
    """CPUID Fn1 EAX of a QEMU CPU model; versions of a model differ in features only. None: not known."""
    if name in CPU_SIGNATURES:
        return CPU_SIGNATURES[name]
    model, dash, version = name.rpartition("-v")
    return CPU_SIGNATURES.get(model) if dash and version.isdecimal() else None


def reset_page(vmm: Vmm, *, eip: int, features: int, signature: int = 0) -> bytes:
    """A processor at reset, in real mode, as the VMM leaves it: 4096 bytes.

    Args:
        vmm: who starts it.
        eip: where it starts, linear; `RESET_EIP` for the boot processor.
        features: SEV_FEATURES.
        signature: CPUID Fn1 EAX of the CPU model; only QEMU puts it into RDX.

    Raises:
        UsageError: a number that does not fit its field.
    """
    fields = _flat(_RESET_SEGMENTS) | _COMMON | _OF_VMM[vmm]
    fields |= {
        "cs.selector": 0xF000,
        "cs.attrib": 0x9A if vmm is Vmm.EC2 and eip == RESET_EIP else 0x9B,
        "cs.limit": 0xFFFF,
        "cs.base": eip & _EIP_HIGH,
        "rip": eip & ~_EIP_HIGH,
        "sev_features": features,
    }
    if vmm is Vmm.QEMU:
        fields["rdx"] = signature
    return with_fields(bytes(PAGE), fields)


def svsm_page(*, rip: int, features: int, signature: int) -> bytes:
    """A processor that starts in an SVSM, in flat protected mode, under QEMU: 4096 bytes.

    X87_FCW is zero here, as in sev-snp-measure; a VMM that sets it is measured with `with_fields`.

    Raises:
        UsageError: a number that does not fit its field.
    """
    fields = _flat(_SVSM_SEGMENTS) | _COMMON | _OF_VMM[Vmm.QEMU]
    fields |= {"cr0": 0x11, "rip": rip, "rdx": signature, "sev_features": features, "x87_fcw": 0}
    return with_fields(bytes(PAGE), fields)


def _flat(segments: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {f"{name}.{part}": value for name, parts in segments.items() for part, value in parts.items()}


def with_fields(page: bytes, values: Mapping[str, int]) -> bytes:
    """A VMSA page with some fields changed; names as in `FIELDS`.

    Raises:
        UsageError: a name that is not there, or a number that does not fit.
    """
    changed = bytearray(page)
    for name, value in values.items():
        if name not in FIELDS:
            raise UsageError(f"VMSA field: got {name!r}, wanted one of {', '.join(FIELDS)}")
        offset, size = FIELDS[name]
        if value >> 8 * size:
            raise UsageError(f"VMSA field {name}: got {value:#x}, wanted {size} bytes unsigned (AMD 24593)")
        _FORMATS[size].pack_into(changed, offset, value)
    return bytes(changed)
