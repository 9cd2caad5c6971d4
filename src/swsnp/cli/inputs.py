"""What the verbs read: files of bounded size, told by their content and never by their name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.errors import InputError

__all__ = ["LARGEST", "REPORT_FORMS", "read", "read_report", "report_in"]

LARGEST: Final = 1 << 20
"""Bytes: no report, certificate, table, revocation list or policy comes near."""
REPORT_FORMS: Final = (
    "1184 bytes, the guest driver's answer (MSG_REPORT_RSP), Azure's HCL envelope, or hexadecimal text"
)
_RESPONSE_SIZES: Final = (MsgReportRspHeader.SIZE + REPORT_SIZE, 4000)
_HCL_MAGIC: Final = b"HCLA"
_HCL_HEADER: Final = 0x20


def read(name: str, *, wanted: str = "a report") -> bytes:
    """The bytes of a small file, or of standard input for `-`.

    Raises:
        InputError: it cannot be read, or is too large to be what is wanted.
    """
    try:
        if name == "-":
            data = sys.stdin.buffer.read(LARGEST + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{name}: cannot be read: {why}") from None
    if len(data) > LARGEST:
        raise InputError(f"{name}: got more than {LARGEST} bytes, wanted {wanted}")
    return data


def read_report(name: str) -> bytes:
    """The 1,184 bytes of the report in a file.

    Raises:
        InputError: it cannot be read, or holds no report in a form known here.
    """
    return report_in(read(name), name)


def report_in(data: bytes, name: str) -> bytes:
    """The report in one of `REPORT_FORMS`.

    Raises:
        InputError: none of them, or an envelope without a report.
    """
    if len(data) == REPORT_SIZE:
        return data
    if data[: len(_HCL_MAGIC)] == _HCL_MAGIC:
        return _cut(data, _HCL_HEADER, f"{name}: HCL envelope")
    if len(data) in _RESPONSE_SIZES:
        header = MsgReportRspHeader.parse_at(data, 0)
        if header.status or header.report_size != REPORT_SIZE:
            raise InputError(
                f"{name}: MSG_REPORT_RSP holds no report: "
                f"status {header.status:#x}, report_size {header.report_size}"
            )
        return _cut(data, MsgReportRspHeader.SIZE, f"{name}: MSG_REPORT_RSP")
    decoded = _from_hex(data)
    if decoded is not None:
        return report_in(decoded, f"{name}, as hexadecimal text")
    raise InputError(f"{name}: got {len(data)} bytes, wanted a report: {REPORT_FORMS}")


def _cut(data: bytes, start: int, where: str) -> bytes:
    report = data[start : start + REPORT_SIZE]
    if len(report) != REPORT_SIZE:
        raise InputError(f"{where}: {len(report)} bytes after its header, wanted {REPORT_SIZE}")
    return report


def _from_hex(data: bytes) -> bytes | None:
    """What hexadecimal digits, with any white space between the bytes, stand for; None if there is more."""
    if len(data) < 2 * REPORT_SIZE:
        return None
    try:
        return bytes.fromhex(data.decode("ascii"))
    except ValueError:
        return None
