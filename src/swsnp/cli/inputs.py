"""What the verbs read: files of bounded size, told by their content and never by their name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.errors import InputError

__all__ = ["LARGEST", "REPORT_FORMS", "read", "read_report", "report_in"]

LARGEST: Final = 1 << 20
"""Bytes: no report, certificate, table, revocation list or policy comes near."""
REPORT_FORMS: Final = (
    "1184 bytes, the guest driver's answer (MSG_REPORT_RSP), Azure's HCL envelope, or hexadecimal text"
)


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
        return data  # a report to whoever asks for one; what tells other forms loads slowly
    from swsnp.certs.classify import classify

    found = classify(data, name)
    if found.report is None:
        raise InputError(f"{name}: got {found.form}, wanted a report: {REPORT_FORMS}")
    return found.report
