"""`swsnp report show FILE` and `swsnp report diff A B`: what a report says, and where two differ."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from swsnp.abi.snp_report import AttestationReport, Product
from swsnp.cli import BAD_VERDICT, GOOD, common
from swsnp.cli.inputs import REPORT_FORMS, read_report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    options = _parser().parse_args(arguments)
    product = Product(options.product.capitalize()) if options.product else None
    code: int = options.act(options, product)
    return code


def _parser() -> argparse.ArgumentParser:
    command = common.parser("report", epilog=f"A report may be {REPORT_FORMS}; - is standard input.")
    verbs = command.add_subparsers(required=True, metavar="show|diff")
    show = verbs.add_parser("show", help="explain a report field by field", allow_abbrev=False)
    show.add_argument("file", metavar="FILE", help="the report")
    show.set_defaults(act=_show)
    diff = verbs.add_parser(
        "diff",
        help="the fields in which two reports differ; exit code 0 same, 1 different",
        allow_abbrev=False,
    )
    diff.add_argument("first", metavar="A", help="a report")
    diff.add_argument("second", metavar="B", help="another")
    diff.set_defaults(act=_diff)
    for each in (show, diff):
        each.add_argument(
            "--product", choices=[one.value.lower() for one in Product], help="for reports that do not say"
        )
        each.add_argument("--json", action="store_true", help="machine-readable output")
    return command


def _show(options: argparse.Namespace, product: Product | None) -> int:
    report = AttestationReport.parse(read_report(options.file))
    from swsnp.cli.describe import as_dict, as_lines

    if options.json:
        print(json.dumps(as_dict(report, product), indent=2))
    else:
        print("\n".join(as_lines(report, product)))
    return GOOD


def _diff(options: argparse.Namespace, product: Product | None) -> int:
    first, second = (AttestationReport.parse(read_report(name)) for name in (options.first, options.second))
    from swsnp.cli.report_diff import difference, difference_lines

    found = difference(first, second, product)
    if options.json:
        print(json.dumps({"same": not found, "fields": found}, indent=2))
    elif found:
        print("\n".join(difference_lines(first, second, product)))
    else:
        print("same: no field differs")
    return BAD_VERDICT if found else GOOD
