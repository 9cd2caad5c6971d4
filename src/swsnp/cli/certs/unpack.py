"""`swsnp certs unpack BLOB --out-dir DIR`: a certificate table as files, from which `pack` makes it again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from swsnp.certs.blob_file import replace
from swsnp.certs.manifest import MANIFEST, take_apart
from swsnp.cli import GOOD, common
from swsnp.cli.certs import parser
from swsnp.cli.inputs import read
from swsnp.errors import InputError, LayoutError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

_FORMS: Final = ("as-is", "der", "pem")
_EPILOG: Final = """\
Beside a file for each entry there is manifest.json, which has what the files have not:
order, GUIDs, places, and bytes of no entry. `swsnp certs pack DIR/manifest.json` makes
the same table again, byte for byte; `swsnp certs pack DIR/*.der` makes a tidy one."""


def run(arguments: Sequence[str]) -> int:
    """The sub-verb."""
    command = parser("unpack", epilog=_EPILOG)
    command.add_argument("file", metavar="BLOB", help="a certificate table; - is stdin")
    command.add_argument("--out-dir", required=True, metavar="DIR", help="made if it is not there")
    command.add_argument(
        "--form", choices=_FORMS, default=_FORMS[0], help="how certificates are written (default: as-is)"
    )
    command.add_argument("--force", action="store_true", help="overwrite files that are there")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    options = command.parse_args(arguments)
    try:
        files = take_apart(read(options.file, wanted="a certificate table"), options.form)
    except LayoutError as error:
        raise InputError(f"{options.file}: {error}; `swsnp certs check` says all that is wrong") from None
    folder = common.folder(options.out_dir)
    there = [name for name in files if (folder / name).exists()]
    if there and not options.force:
        raise UsageError(f"{folder / there[0]}: is there already; --force overwrites it")
    # the manifest last: with it the folder is complete
    for name in sorted(files, key=lambda each: each == MANIFEST):
        replace(folder / name, files[name])
    if options.json:
        print(json.dumps({"out_dir": options.out_dir, "files": {name: len(files[name]) for name in files}}))
    else:
        print("\n".join(f"{folder / name}: {len(data)} bytes" for name, data in files.items()))
    return GOOD
