"""`swsnp certs`: certificates for operators. One module per sub-verb, imported when it runs.

A sub-verb's module has `run(arguments) -> int` and makes its parser with `parser`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from swsnp.cli import GOOD, USAGE, VERBS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["SUBVERBS", "parser", "run"]

SUBVERBS: Final = {
    "check": "say what is wrong with a certificate table, by numbered rules",
    "pack": "build a certificate table and replace a VMM's blob with it",
    "unpack": "take a certificate table apart into files",
    "fetch": "get a chip's certificates from the key service, as files or as a blob",
    "make": "make an emulated hierarchy and a blob of it",
    "show": "explain certificates, CRLs and certificate tables",
}


def _usage() -> str:
    lines = [f"  {verb:14}{text}" for verb, text in SUBVERBS.items()]
    return "\n".join(
        [
            "usage: swsnp certs VERB [options]    (swsnp certs VERB --help for one verb)",
            "",
            f"{VERBS['certs'].capitalize()}.",
            "",
            *lines,
        ]
    )


def parser(verb: str, *, epilog: str = "") -> argparse.ArgumentParser:
    """The argument parser of one sub-verb."""
    from swsnp.cli import common

    return common.parser(f"certs {verb}", description=SUBVERBS[verb], epilog=epilog)


def run(arguments: Sequence[str]) -> int:
    """The verb: hand over to the sub-verb."""
    from importlib import import_module

    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_usage())
        return GOOD if arguments else USAGE
    verb, *rest = arguments
    if verb not in SUBVERBS:
        print(f"swsnp certs: no verb {verb!r}; known: {', '.join(SUBVERBS)}", file=sys.stderr)
        return USAGE
    return int(import_module(f"swsnp.cli.certs.{verb}").run(rest))
