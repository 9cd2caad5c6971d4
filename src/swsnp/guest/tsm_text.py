"""What configfs-tsm makes of written text, and its errors. Source: Linux, lib/kstrtox.c, lib/uuid.c."""

from __future__ import annotations

import errno
import re
from typing import Final

from swsnp.errors import SwsnpError

__all__ = ["NULL_GUID", "TsmError", "parse_guid", "parse_u32"]

NULL_GUID: Final = bytes(16)
_U32_MAX: Final = 0xFFFF_FFFF
_U64_MAX: Final = 0xFFFF_FFFF_FFFF_FFFF
_DIGITS: Final = {8: re.compile(rb"[0-7]*"), 10: re.compile(rb"[0-9]*"), 16: re.compile(rb"[0-9a-fA-F]*")}
_HEX_PREFIX: Final = re.compile(rb"0[xX][0-9a-fA-F]")
_GUID: Final = re.compile(rb"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class TsmError(SwsnpError):
    """An operation of configfs-tsm failed.

    Attributes:
        errno: what the system call ends with, positive.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"configfs-tsm: {errno.errorcode.get(number, number)}")
        self.errno = number


def parse_u32(text: bytes) -> int:
    """An unsigned integer as kstrtouint reads it with base 0.

    One `+` may lead, one newline may follow; `0x` is hexadecimal, a leading 0 octal. A NUL ends the text.

    Raises:
        TsmError: EINVAL for anything else, ERANGE beyond 32 bits.
    """
    string = text.partition(b"\0")[0].removeprefix(b"+")
    if _HEX_PREFIX.match(string):
        base, string = 16, string[2:]
    else:
        base = 8 if string.startswith(b"0") else 10
    digits = _DIGITS[base].match(string)
    number = int(digits[0], base) if digits and digits[0] else None
    if number is not None and number > _U64_MAX:
        raise TsmError(errno.ERANGE)  # noticed while the digits are read, before what follows them
    if digits is None or number is None or string[digits.end() :] not in (b"", b"\n"):
        raise TsmError(errno.EINVAL)
    if number > _U32_MAX:
        raise TsmError(errno.ERANGE)
    return number


def parse_guid(text: bytes) -> bytes:
    """A GUID's 16 bytes in guid_t order, from its 36 characters; what follows them is not looked at.

    Raises:
        TsmError: EINVAL.
    """
    if not _GUID.match(text):
        raise TsmError(errno.EINVAL)
    raw = bytes.fromhex(text[:36].decode().replace("-", ""))
    return raw[3::-1] + raw[5:3:-1] + raw[7:5:-1] + raw[8:]
