"""Text written to configfs-tsm: a number, a GUID, or TsmError with EINVAL or ERANGE, nothing else."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fuzz.outcome import attempt
from swsnp.guest.tsm_text import TsmError, parse_guid, parse_u32

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["one", "seeds"]

_WRITE_MAX = 4095
_REFUSALS = ("TsmError: configfs-tsm: EINVAL", "TsmError: configfs-tsm: ERANGE")


def seeds() -> list[bytes]:
    """Numbers in their bases, GUIDs, and what is neither."""
    guid = b"c476f1eb-0123-45a5-9641-b4e7dde5bfe3"
    return [b"0", b"3\n", b"+3", b"0x1F\n", b"017", b"4294967296", b"1" * 30, guid, guid + b"\n", b"-1", b""]


def one(data: bytes) -> object:
    """Both readers, on what one write can carry."""
    kinds = []
    readers: tuple[Callable[[bytes], int | bytes], ...] = (parse_u32, parse_guid)
    for reader in readers:
        value, refusal = attempt(partial(reader, data[:_WRITE_MAX]), TsmError)
        if isinstance(value, int):
            assert 0 <= value <= 0xFFFFFFFF
        elif value is not None:
            assert len(value) == 16
        assert refusal in ("", *_REFUSALS)
        kinds.append(refusal or type(value).__name__)
    return tuple(kinds)
