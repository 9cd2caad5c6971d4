"""`swsnp report show FILE`: explain a report field by field."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import REPORT_SIZE, AttestationReport, Product
from swsnp.cli import GOOD, common
from swsnp.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

_LARGEST: Final = 1 << 20
_RESPONSE_SIZES: Final = (MsgReportRspHeader.SIZE + REPORT_SIZE, 4000)


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    command = common.parser("report")
    verbs = command.add_subparsers(dest="what", required=True, metavar="show")
    show = verbs.add_parser("show", help="explain a report field by field", allow_abbrev=False)
    show.add_argument(
        "file",
        metavar="FILE",
        help="a report of 1184 bytes, or the guest driver's 4000-byte answer; - is stdin",
    )
    show.add_argument(
        "--product", choices=[each.value.lower() for each in Product], help="for reports that do not say"
    )
    show.add_argument("--json", action="store_true", help="machine-readable output")
    options = command.parse_args(arguments)
    report = AttestationReport.parse(extract(read(options.file), options.file))
    product = Product(options.product.capitalize()) if options.product else None
    from swsnp.cli.describe import as_dict, as_lines

    if options.json:
        print(json.dumps(as_dict(report, product), indent=2))
    else:
        print("\n".join(as_lines(report, product)))
    return GOOD


def read(name: str) -> bytes:
    """The bytes of a small file, or of standard input for `-`.

    Raises:
        InputError: it cannot be read, or is too large to be what is wanted.
    """
    try:
        if name == "-":
            data = sys.stdin.buffer.read(_LARGEST + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise InputError(f"{name}: got more than {_LARGEST} bytes, wanted a report")
    return data


def extract(data: bytes, name: str) -> bytes:
    """The 1,184 bytes of the report, alone or inside MSG_REPORT_RSP.

    Raises:
        InputError: neither form.
    """
    if len(data) == REPORT_SIZE:
        return data
    if len(data) in _RESPONSE_SIZES:
        header = MsgReportRspHeader.parse(data[: MsgReportRspHeader.SIZE])
        if header.status or header.report_size != REPORT_SIZE:
            raise InputError(
                f"{name}: MSG_REPORT_RSP holds no report: "
                f"status {header.status:#x}, report_size {header.report_size}"
            )
        return data[MsgReportRspHeader.SIZE : MsgReportRspHeader.SIZE + REPORT_SIZE]
    sizes = ", ".join(str(size) for size in (REPORT_SIZE, *_RESPONSE_SIZES))
    raise InputError(
        f"{name}: got {len(data)} bytes, wanted a report: {sizes} bytes (AMD 56860, ATTESTATION_REPORT)"
    )
