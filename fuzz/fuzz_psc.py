"""Page state changes in the GHCB page: the guest is answered or stops for a reason; nothing raises."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from fuzz.guest import FuzzedVm
from swsnp.abi.ghcb import PSC_MAX_ENTRIES, ExitCode, GhcbField, valid_mask

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["one", "seeds"]

_MASK = valid_mask(
    GhcbField.SW_EXIT_CODE, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2, GhcbField.SW_SCRATCH
)
_VMS = {name: FuzzedVm(name) for name in ("linux-7.2", "linux-6.12")}


def _entry(gfn: int, operation: int, *, large: int = 0, done: int = 0) -> bytes:
    return struct.pack("<Q", done | gfn << 12 | operation << 52 | large << 56)


def seeds() -> list[bytes]:
    """First byte: which kernel. Then the header and the entries."""
    head = struct.pack("<HHI", 0, 2, 0)
    there = head + b"".join(_entry(0x600 + n, 2) for n in range(3))
    back = head + b"".join(_entry(0x600 + n, 1) for n in range(3))
    large = struct.pack("<HHI", 0, 0, 0) + _entry(0x800, 2, large=1)
    partly = struct.pack("<HHI", 0, 0, 0) + _entry(0x800, 2, large=1, done=500)
    full = struct.pack("<HHI", 0, PSC_MAX_ENTRIES - 1, 0) + _entry(0x700, 2) * PSC_MAX_ENTRIES
    nowhere = struct.pack("<HHI", 0, 0, 0) + _entry((1 << 40) - 1, 1)
    return [bytes([n % 2]) + each for n, each in enumerate((there, back, large, partly, full, nowhere, b""))]


def one(data: bytes) -> object:
    """Ask for the change, again as long as there is progress, as Linux does."""
    fuzzed = _VMS["linux-6.12" if data[:1] == b"\1" else "linux-7.2"]
    buffer = data[1:][:0x7F0]

    def program(cpu: Any, ghcb: int) -> Generator[None, None, tuple[int, int, int]]:
        cpu.memory.write(ghcb + 0x800, buffer.ljust(0x7F0, b"\0"), private=False)
        fields = struct.pack("<QQQQ", ExitCode.PSC, 0, 0, ghcb + 0x800)
        cpu.memory.write(ghcb + GhcbField.SW_EXIT_CODE, fields, private=False)
        cpu.memory.write(ghcb + GhcbField.VALID_BITMAP, _MASK.to_bytes(16, "little"), private=False)
        cpu.ghcb_msr = ghcb
        yield
        reply = cpu.memory.read(ghcb + GhcbField.SW_EXIT_INFO_1, 16, private=False)
        current = cpu.memory.read(ghcb + 0x800, 2, private=False)
        return (*struct.unpack("<QQ", reply), int.from_bytes(current, "little"))

    reply, stopped = fuzzed.execute(program)
    if stopped:
        return stopped
    info1, info2, current = reply
    (end,) = struct.unpack_from("<H", buffer.ljust(4, b"\0"), 2)
    assert info1 & 0xFFFFFFFF in (0, 2)
    # without an error every entry was done
    assert info1 or info2 or current > end or current == 0
    return info1, info2 >> 32, info2 & 0xFF
