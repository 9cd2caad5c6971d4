"""Instructions that only SNP hardware traps, replaced by port writes that any KVM reports.

Each is four bytes, as is `OUT imm8, AL; NOP; NOP`, so code keeps its shape; OUT changes no register or flag.
Replacing happens in memory after the launch, so the launch digest is that of the unchanged code.
The search knows nothing of instruction boundaries: name ranges that hold code only.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final

__all__ = ["INSTRUCTIONS", "Rewrites", "Site", "replacement"]


class Site(IntEnum):
    """What was at a place in the code; the value is the port that now stands for it."""

    VMGEXIT = 0xE8
    PVALIDATE = 0xE9
    RMPADJUST = 0xEA


INSTRUCTIONS: Final = {
    Site.VMGEXIT: b"\xf3\x0f\x01\xd9",
    Site.PVALIDATE: b"\xf2\x0f\x01\xff",
    Site.RMPADJUST: b"\xf3\x0f\x01\xfe",
}
"""Encodings. Source: AMD 24594 (APM volume 3)."""

_SITES: Final = {code: site for site, code in INSTRUCTIONS.items()}
_MIDDLE: Final = re.compile(rb"\x0f\x01(?=[\xd9\xff\xfe])")
"""What they all have behind their first byte: two fixed bytes are found ten times faster than a choice."""
_OUT_IMM8_AL: Final = 0xE6
_NOP: Final = 0x90


def replacement(site: Site) -> bytes:
    """The four bytes that stand in for the instruction."""
    return bytes((_OUT_IMM8_AL, site, _NOP, _NOP))


class Rewrites:
    """The table of what was replaced where, by guest physical address."""

    def __init__(self) -> None:
        self.sites: dict[int, Site] = {}

    def rewrite(self, code: memoryview, gpa: int) -> int:
        """Replace every such instruction in `code`, which lies at `gpa`.

        Returns:
            How many there were; code that was rewritten before has none left.
        """
        starts = (match.start() - 1 for match in _MIDDLE.finditer(code))
        found = [(at, site) for at in starts if (site := _SITES.get(bytes(code[at : at + 4]))) is not None]
        for offset, site in found:
            code[offset : offset + 4] = replacement(site)
            self.sites[gpa + offset] = site
        return len(found)

    def original(self, code: bytes, gpa: int) -> bytes:
        """What `code`, read at `gpa`, was before: whole replaced instructions are put back in the copy."""
        result = bytearray(code)
        for at, site in self.sites.items():
            offset = at - gpa
            if 0 <= offset <= len(code) - 4 and result[offset : offset + 4] == replacement(site):
                result[offset : offset + 4] = INSTRUCTIONS[site]
        return bytes(result)
