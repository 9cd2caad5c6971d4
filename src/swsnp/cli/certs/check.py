"""`swsnp certs check BLOB`: what guests, relying parties and other tools would stumble over."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import Product
from swsnp.certs.classify import Form, form_of
from swsnp.certs.lint import RULES, Expected, Severity, lint_table
from swsnp.cli import BAD_VERDICT, GOOD, common
from swsnp.cli.certs import parser
from swsnp.cli.inputs import read, read_report
from swsnp.errors import InputError, LayoutError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from swsnp.certs.lint import LintResult
    from swsnp.verify.roots import Roots

__all__ = ["run"]

_WANTED: Final = "a certificate table"


def run(arguments: Sequence[str], *, now: Callable[[], datetime] = common.utc_now) -> int:
    """The sub-verb."""
    options = _options(arguments)
    if options.rules:
        _tell_rules(as_json=options.json)
        return GOOD
    if options.file is None:
        raise UsageError("wanted a BLOB, or --rules")
    blob = read(options.file, wanted=_WANTED)
    _require_table(blob, options.file)
    result = lint_table(blob, at=common.at_of(options, now=now), expected=_expected(options))
    if options.json:
        print(json.dumps({"file": options.file, **result.as_dict()}, indent=2))
    else:
        print("\n".join(_lines(result, options.file)))
    return GOOD if result.clean else BAD_VERDICT


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("check", epilog="exit code 0: clean, notes aside; 1: there are findings.")
    command.add_argument("file", nargs="?", metavar="BLOB", help="a certificate table; - is stdin")
    command.add_argument("--report", metavar="FILE", help="a report that the table has to fit")
    command.add_argument("--chip-id", metavar="HEX", help="the chip that the VCEK has to be for")
    command.add_argument("--tcb", metavar="LEVELS", help="bl=N,tee=N,snp=N,ucode=N; for Turin also fmc=N")
    command.add_argument(
        "--product",
        type=str.lower,
        choices=[each.value.lower() for each in Product],
        help="the product line that the leaf has to be for",
    )
    common.add_at(command, "when the certificates have to be valid")
    command.add_argument(
        "--roots",
        action="append",
        metavar="FILE",
        help="roots (ARK certificates) to look for instead of AMD's: emulated or private hierarchies",
    )
    command.add_argument("--rules", action="store_true", help="list the rules, and look at nothing")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    return command.parse_args(arguments)


def _require_table(blob: bytes, name: str) -> None:
    """Bytes that are clearly something else are no broken table."""
    try:
        form = form_of(blob)
    except InputError:
        return  # whatever it is, it is meant to be a table: the findings say what is wrong
    if form is not Form.TABLE:
        raise InputError(f"{name}: {form}, wanted {_WANTED}; `swsnp certs pack` makes one")


def _expected(options: argparse.Namespace) -> Expected:
    product = None if options.product is None else Product(options.product.capitalize())
    chip_id, tcb = _machine(options, product)
    return Expected(
        roots=_roots(options.roots).pins,
        product=product,
        chip_id=chip_id,
        tcb=tcb,
        report=None if options.report is None else read_report(options.report),
    )


def _machine(
    options: argparse.Namespace, product: Product | None
) -> tuple[bytes | None, Mapping[str, int] | None]:
    """--chip-id and --tcb, in the product line's forms."""
    if options.chip_id is None and options.tcb is None:
        return None, None
    if product is None:
        raise UsageError("--chip-id and --tcb: wanted --product too, which says how long and which they are")
    from swsnp.certs.chip_words import read_hwid, read_tcb

    chip_id = None if options.chip_id is None else read_hwid(options.chip_id, product)
    tcb = None if options.tcb is None else read_tcb(options.tcb, product).decode(product)
    return chip_id, tcb


def _roots(files: list[str] | None) -> Roots:
    from swsnp.verify.roots import Roots

    if files is None:
        return Roots.amd()
    certificates = []
    for name in files:
        data = read(name, wanted="a root certificate")
        try:
            certificates += [each.der for each in Roots.of(data).certificates]
        except (InputError, LayoutError) as error:
            raise InputError(f"{name}: {error}") from None
    return Roots.of(*certificates)


def _lines(result: LintResult, name: str) -> Iterator[str]:
    for severity in Severity:
        yield from (str(each) for each in result.findings if each.severity is severity)
    counts = {each: sum(found.severity is each for found in result.findings) for each in Severity}
    shown = ", ".join(f"{count} {severity}(s)" for severity, count in counts.items() if count)
    yield f"{name}: {'clean' if result.clean else 'not clean'}{f': {shown}' if shown else ''}"
    for why in dict.fromkeys(result.not_checked.values()):
        rules = ", ".join(rule for rule, each in result.not_checked.items() if each == why)
        yield f"not looked at: {rules}: {why}"


def _tell_rules(*, as_json: bool) -> None:
    if as_json:
        rules = {
            rule: {"severity": each.severity, "text": each.text, "source": each.source}
            for rule, each in RULES.items()
        }
        print(json.dumps(rules, indent=2))
    else:
        print(
            "\n".join(f"{rule:4}{each.severity:9}{each.text} ({each.source})" for rule, each in RULES.items())
        )
