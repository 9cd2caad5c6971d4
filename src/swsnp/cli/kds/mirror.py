"""`swsnp kds mirror FLEET --out DIR`: what a fleet's verification needs, fetched ahead."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsnp.certs.kds_fleet import fleet_requests, mirror
from swsnp.cli import BAD_VERDICT, GOOD, NOT_HERE
from swsnp.cli.inputs import read, read_report
from swsnp.cli.kds import parser
from swsnp.cli.kds_options import PRODUCTS, add_client, client_of, product_of
from swsnp.cli.progress import progress
from swsnp.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swsnp.certs.kds_errors import KdsError
    from swsnp.certs.kds_fleet import Mirrored

__all__ = ["run"]

_EPILOG = """\
a line of the fleet file is one of
  FILE                       a report; its name counts from the fleet file's folder
  PRODUCT CHIP-ID LEVELS     Milan 0a1b… bl=4,tee=0,snp=24,ucode=219
  URL                        of a VCEK, as the key service has it
and lines that begin with # are passed over

DIR is a cache: give it to --cache, with --offline where there is no network.
A run that was interrupted goes on where it stopped.
Exit code 0: everything is there; 1: the service has no answer to something; 4: it was away, try again."""


def run(arguments: Sequence[str]) -> int:
    """The sub-verb."""
    command = parser("mirror", epilog=_EPILOG)
    command.add_argument("fleet", metavar="FLEET", help="file with a chip or report per line; - is stdin")
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to fill")
    command.add_argument("--product", choices=PRODUCTS, help="of reports that do not say it")
    add_client(command, cache=False)
    command.add_argument("--json", action="store_true", help="machine-readable output")
    options = command.parse_args(arguments)
    base = Path() if options.fleet == "-" else Path(options.fleet).parent
    requests = fleet_requests(
        _text(options.fleet),
        options.fleet,
        lambda name: read_report(str(base / name)),
        product=product_of(options.product),
    )
    client = client_of(options, folder=options.out, offline=False)
    with progress("mirror", len(requests)) as advance:

        def tell(error: KdsError | None) -> None:
            if error is not None:
                print(f"swsnp kds mirror: {error}", file=sys.stderr)
            advance(1)

        done = mirror(requests, client, tell)
    print(json.dumps(_as_dict(done), indent=2) if options.json else _as_text(done, options.out))
    if done.unavailable:
        return NOT_HERE
    return GOOD if done.complete else BAD_VERDICT


def _text(name: str) -> str:
    try:
        return read(name, wanted="a fleet file").decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: got {error.reason} at byte {error.start}, wanted text in UTF-8") from None


def _as_dict(done: Mirrored) -> dict[str, Any]:
    return {
        "complete": done.complete,
        "kept": done.kept,
        "fetched": done.fetched,
        "failed": [
            {"url": each.url, "kind": type(each).__name__, "reason": each.reason} for each in done.failed
        ],
        "not_tried": done.not_tried,
    }


def _as_text(done: Mirrored, folder: Path) -> str:
    lines = [f"{folder}: {done.fetched} fetched, {done.kept} were there, {len(done.failed)} failed"]
    if done.not_tried:
        lines.append(
            f"the key service is away: {len(done.not_tried)} not tried; the same command goes on there"
        )
    return "\n".join(lines)
