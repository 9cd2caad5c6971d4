"""The options of `swsnp verify`, for one report and for a batch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import Product
from swsnp.cli import common

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CERTIFICATE_OPTIONS", "ENGINES", "LIKE", "parse"]

ENGINES: Final = ("cryptography", "awscrt")
LIKE: Final = ("go-sev-guest",)
CERTIFICATE_OPTIONS: Final = ("certs", "vcek", "vlek", "chain")
"""Options whose files hold certificates; the host's word, judged like everything else."""
_EPILOG: Final = """\
exit code 0 means accepted: genuine, every rule of the policy holds, and report data and a measurement were
given and matched. Without them: exit code 1, authenticated but not accepted. --authentic-only asks for less.

Every file is told by its content: a report may be 1184 bytes, MSG_REPORT_RSP, an HCL envelope or hexadecimal
text; certificates and revocation lists may be DER, PEM or a certificate table. - is standard input, once."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; usage errors end the program with exit code 2."""
    command = _parser()
    options = command.parse_args(arguments)
    if (options.batch is None) is (options.report is None):
        command.error("wanted either REPORT or --batch")
    if options.batch is None and (options.out or options.jobs):
        command.error("--out and --jobs go with --batch")
    if options.cache is not None and not options.kds:
        command.error("--cache goes with --kds")
    names = ("report", "policy", *CERTIFICATE_OPTIONS, "crl", "roots")
    given = [value for name in names for value in _several(getattr(options, name))]
    if given.count("-") > 1:
        command.error("standard input can be read once only, got - more than once")
    options.product = Product(options.product.capitalize()) if options.product else None
    return options


def _several(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _parser() -> argparse.ArgumentParser:
    command = common.parser("verify", epilog=_EPILOG)
    command.add_argument("report", nargs="?", metavar="REPORT", help="the report to judge")
    _add_evidence(command)
    _add_demands(command)
    _add_source(command)
    _add_batch(command)
    command.add_argument("--json", action="store_true", help="machine-readable output")
    return command


def _add_evidence(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("evidence (each may be given several times)")
    for name, text in (
        ("certs", "the certificate table of an extended report, or any certificates"),
        ("vcek", "the chip's certificate"),
        ("vlek", "the provider's certificate"),
        ("chain", "ASK or ASVK, and ARK"),
        ("crl", "revocation list of the root"),
    ):
        group.add_argument(f"--{name}", action="append", metavar="FILE", help=text)
    group.add_argument(
        "--roots",
        action="append",
        metavar="FILE",
        help="trust these roots (ARK certificates) instead of AMD's: emulated or private hierarchies",
    )


def _add_demands(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what is wanted")
    group.add_argument("--policy", metavar="FILE", help="JSON or TOML, described in docs/policy.md")
    group.add_argument(
        "--report-data", type=_hex(64), metavar="HEX", help="64 bytes that REPORT_DATA has to be"
    )
    group.add_argument(
        "--measurement", type=_hex(48), metavar="HEX", help="48 bytes that MEASUREMENT has to be"
    )
    group.add_argument(
        "--authentic-only",
        action="store_true",
        help="exit code 0 for a genuine report that breaks no rule, though nothing was given to compare with",
    )
    group.add_argument(
        "--at", type=common.moment, metavar="TIME", help=f"judge at this time (default: now): {common.TIMES}"
    )
    group.add_argument(
        "--product", choices=[each.value.lower() for each in Product], help="for reports that do not say"
    )
    group.add_argument("--like", choices=LIKE, help="tell, but do not refuse, what that verifier lets pass")
    group.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[0], help=f"library for P-384 (default: {ENGINES[0]})"
    )


def _add_source(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("certificates that were not given")
    group.add_argument("--kds", metavar="URL", help="fetch them from this key service, and keep them on disk")
    group.add_argument(
        "--offline", action="store_true", help="use no network (the default); with --kds, use what was kept"
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        help="where its answers are kept, also by `swsnp kds mirror` (default: in the user's cache folder)",
    )


def _add_batch(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("many reports")
    group.add_argument("--batch", metavar="PATH", help="judge every report of a directory or a Parquet file")
    group.add_argument(
        "--out",
        metavar="FILE",
        help="write results here, a line each (JSON); go on where an earlier run ended",
    )
    group.add_argument("--jobs", type=common.positive, metavar="N", help="workers (default: one per core)")


def _hex(size: int) -> Callable[[str], bytes]:
    def read(text: str) -> bytes:
        try:
            value = bytes.fromhex(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {size} bytes in hexadecimal") from None
        if len(value) != size:
            raise argparse.ArgumentTypeError(f"got {len(value)} bytes, wanted {size}")
        return value

    return read
