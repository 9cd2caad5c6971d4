"""Command buffers to the mailbox: a status for any command and buffer, never an exception."""

from __future__ import annotations

import struct

from fuzz.chip import FuzzedChip
from swsnp.abi.snp_command import Command

__all__ = ["one", "seeds"]

_WORDS = struct.Struct("<8Q")
_chips: list[FuzzedChip] = []


def _chip() -> FuzzedChip:
    if not _chips or len(_chips[0].mailbox.platform.guests) != 1:
        _chips[:] = [FuzzedChip()]
    return _chips[0]


def seeds() -> list[bytes]:
    """Two bytes of command, one for where its buffer lies, then the buffer. Words below 8 are pages."""
    bodies = [
        (0, 2, 5, 7, 0, 0, 0, 0),
        (2, 0, 0, 0, 0, 0, 0, 0),
        (0, 1 << 1, 3, 0, 0, 0, 0, 0),
        (8, 0x30000, 0, 0, 0, 0, 0, 0),
        (0x40, 0x2, 0, 0, 0, 0, 0, 0),
    ]
    return [
        struct.pack("<HB", command, n) + _WORDS.pack(*body)
        for n, body in enumerate(bodies)
        for command in Command
    ]


def one(data: bytes) -> object:
    """One command on pages in the states that they begin with."""
    chip = _chip()
    chip.reset()
    command, place = struct.unpack("<HB", data[:3].ljust(3, b"\0"))
    words = _WORDS.unpack(data[3:67].ljust(_WORDS.size, b"\0"))
    body = _WORDS.pack(*(_address(chip, word) for word in words))
    buffer = chip.pages[2] if place & 1 else chip.buffer
    chip.memory.write(buffer, body + data[67:128])
    status = chip.mailbox.command(command, buffer)
    assert isinstance(status, int)
    assert 0 <= status <= 0xFFFF
    if status == 0 and command in (Command.SNP_INIT, Command.SNP_INIT_EX, Command.SNP_ACTIVATE):
        _chips.clear()
    return command if command in set(Command) else -1, status


def _address(chip: FuzzedChip, word: int) -> int:
    """Numbers whose low 12 bits are below 8 and that are otherwise small name a page."""
    return chip.pages[word & 7] + (word >> 3 << 3 & 0xFFF) if word < 0x1000 and word & 8 == 0 else word
