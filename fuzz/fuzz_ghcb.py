"""A GHCB page to KVM: the guest goes on or stops for a reason; nothing in KVM or the VMM raises."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from fuzz.guest import FuzzedVm
from swsnp.abi.ghcb import ExitCode, GhcbField, MsrCode, valid_mask
from swsnp.hypervisor.profiles import PROFILES

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["one", "seeds"]

_NAMES = sorted(PROFILES)
_VMS: dict[str, FuzzedVm] = {}
_FIELDS = (
    GhcbField.RAX,
    GhcbField.RBX,
    GhcbField.RCX,
    GhcbField.RDX,
    GhcbField.SW_EXIT_CODE,
    GhcbField.SW_EXIT_INFO_1,
    GhcbField.SW_EXIT_INFO_2,
    GhcbField.SW_SCRATCH,
)
_ALL = valid_mask(*_FIELDS)
_INPUT = struct.Struct("<BQ16s8Q")  # profile, MSR (0: the GHCB's address), valid bits, the fields


def seeds() -> list[bytes]:
    """Each event with valid fields, each request of the MSR protocol."""
    valid = _ALL.to_bytes(16, "little")
    events = [
        _INPUT.pack(n % 4, 0, valid, 0x5000, 1, 1, 0, code, 0x3000, 0x4000, 0)
        for n, code in enumerate(ExitCode)
    ]
    return events + [_INPUT.pack(3, code | 1 << 52 | 0x5000, valid, *[0] * 8) for code in MsrCode]


def one(data: bytes) -> object:
    """The first bytes choose kernel, MSR and fields; what follows goes into the shared buffer."""
    which, msr, valid, *fields = _INPUT.unpack(data[: _INPUT.size].ljust(_INPUT.size, b"\0"))
    name = _NAMES[which % len(_NAMES)]
    rest = data[_INPUT.size :][:0x7F0]
    pages = _VMS.setdefault(name, FuzzedVm(name))

    def program(cpu: Any, ghcb: int) -> Generator[None, None, tuple[int, int]]:
        page = bytearray(4096)
        for offset, value in zip(_FIELDS, fields, strict=True):
            page[offset : offset + 8] = value.to_bytes(8, "little")
        page[0x3F0:0x400] = valid
        page[0x800 : 0x800 + len(rest)] = rest
        page[0xFFA:0xFFC] = b"\x02\0"
        cpu.memory.write(ghcb, bytes(page), private=False)
        cpu.ghcb_msr = msr or ghcb
        yield
        reply = cpu.memory.read(ghcb + GhcbField.SW_EXIT_INFO_1, 16, private=False)
        info1, info2 = struct.unpack("<QQ", reply)
        return info1, info2

    reply, stopped = pages.execute(program)
    if stopped:
        return name, stopped
    assert reply is not None
    pages.guest.ghcbs[0].clear()
    if fields[4] == ExitCode.AP_CREATION or msr:
        pages.discard()  # its vCPU may run elsewhere, its GHCB may be another
    return name, fields[4] if fields[4] in set(ExitCode) else -1, reply[0] & 0xFFFFFFFF, reply[1] >> 32
