"""`swsnp certs show FILE`: explain certificates, CRLs and certificate tables."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from swsnp.certs.classify import classify
from swsnp.cli import GOOD
from swsnp.cli.certs import parser
from swsnp.cli.certs.describe import as_dict, as_lines
from swsnp.cli.inputs import read
from swsnp.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """The sub-verb."""
    command = parser("show")
    command.add_argument(
        "file",
        metavar="FILE",
        help="a certificate table, DER, or PEM with one or several; told by content; - is stdin",
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
    options = command.parse_args(arguments)
    data = read(options.file, wanted="a certificate table, certificates or a CRL")
    found = classify(data, options.file)
    if found.report is not None:
        raise InputError(f"{options.file}: {found.form}, which `swsnp report show` explains")
    shown = as_dict(found, len(data))
    print(json.dumps(shown, indent=2) if options.json else "\n".join(as_lines(shown)))
    return GOOD
