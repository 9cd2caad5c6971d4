"""`swsnp certs pack FILE...`: build a certificate table and put it where VMMs read it."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from swsnp.certs.build import build_table
from swsnp.certs.lint import Severity, lint_table
from swsnp.certs.manifest import is_manifest, put_together
from swsnp.certs.table import npages
from swsnp.cli import BAD_VERDICT, GOOD, common
from swsnp.cli.certs import parser
from swsnp.cli.inputs import read
from swsnp.errors import InputError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from swsnp.certs.lint import LintResult

__all__ = ["run"]

_WANTED = "certificates, a CRL, a certificate table or a manifest"
_EPILOG = """\
Files are told by content: certificates and CRLs in DER or PEM, chains as the key service
serves them, other tables (whose unknown entries are kept), or the one manifest that
`swsnp certs unpack` wrote, from which the table comes out as it was, byte for byte.
BLOB is replaced as a whole, under the lock that VMMs and other updaters respect.
A table with errors is not written, except from a manifest or with --force."""


def run(arguments: Sequence[str], *, now: Callable[[], datetime] = common.utc_now) -> int:
    """The sub-verb."""
    options = _options(arguments)
    contents = [(name, read(name, wanted=_WANTED)) for name in options.files]
    manifests = [name for name, data in contents if is_manifest(data)]
    if manifests and len(contents) + len(options.entry) > 1:
        raise UsageError(f"{manifests[0]}: a manifest describes a whole table; leave out the other files")
    if manifests:
        blob = _from_manifest(*contents[0])
    else:
        others = [(guid, read(name, wanted="an entry's data")) for guid, name in options.entry]
        blob = build_table(contents, others=others)
    result = lint_table(blob, at=common.at_of(options, now=now))
    errors = any(each.severity is Severity.ERROR for each in result.findings)
    written = not errors or options.force or bool(manifests)
    if written:
        _write(blob, options)
    _tell(blob, result, options, written=written)
    return GOOD if written else BAD_VERDICT


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("pack", epilog=_EPILOG)
    command.add_argument("files", nargs="+", metavar="FILE", help="what goes in, in any order")
    command.add_argument("--out", required=True, metavar="BLOB", help="where to put it; - is stdout")
    command.add_argument(
        "--entry",
        action="append",
        default=[],
        type=_entry,
        metavar="GUID=FILE",
        help="an entry that others define, taken as it is; may be given several times",
    )
    common.add_lock_timeout(command)
    common.add_at(command, "when the certificates have to be valid")
    command.add_argument("--force", action="store_true", help="write a table that has errors")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    options = command.parse_intermixed_args(arguments)
    if options.out == "-" and options.json:
        raise UsageError("--out -: the table is the output; leave out --json")
    return options


def _entry(text: str) -> tuple[UUID, str]:
    guid, _, name = text.partition("=")
    try:
        return UUID(guid if name else ""), name
    except ValueError:
        raise ArgumentTypeError(f"got {text!r}, wanted a GUID, = and a file") from None


def _from_manifest(name: str, data: bytes) -> bytes:
    folder = Path(name).parent
    try:
        return put_together(data, lambda file: read(str(folder / file), wanted="an entry's data"))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _write(blob: bytes, options: argparse.Namespace) -> None:
    if options.out == "-":
        sys.stdout.buffer.write(blob)
        sys.stdout.buffer.flush()
        return
    from swsnp.certs.blob_file import replace

    replace(options.out, blob, timeout_s=options.lock_timeout)


def _tell(blob: bytes, result: LintResult, options: argparse.Namespace, *, written: bool) -> None:
    size, pages = len(blob), npages(len(blob))
    if options.json:
        shown = {"out": options.out, "written": written, "size": size, "npages": pages, **result.as_dict()}
        print(json.dumps(shown, indent=2))
        return
    for finding in result.findings:
        print(f"swsnp certs pack: {finding}", file=sys.stderr)
    if not written:
        print(f"swsnp certs pack: {options.out}: not written, because of the errors above", file=sys.stderr)
    elif options.out != "-":
        print(f"{options.out}: {size} bytes, {pages} page(s)")
