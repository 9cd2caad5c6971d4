"""`swsnp kds`: the key service, mirrored or imitated. One module per sub-verb, imported when it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from swsnp.cli import GOOD, USAGE, VERBS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["SUBVERBS", "parser", "run"]

SUBVERBS: Final = {
    "serve": "imitate AMD's key service for chips of swsnp, on request badly",
    "mirror": "fetch a fleet's certificates, chains and revocation lists ahead",
}


def _usage() -> str:
    lines = [f"  {verb:14}{text}" for verb, text in SUBVERBS.items()]
    return "\n".join(
        [
            "usage: swsnp kds VERB [options]    (swsnp kds VERB --help for one verb)",
            "",
            f"{VERBS['kds'].capitalize()}.",
            "",
            *lines,
        ]
    )


def parser(verb: str, *, epilog: str = "") -> argparse.ArgumentParser:
    """The argument parser of one sub-verb."""
    from swsnp.cli import common

    return common.parser(f"kds {verb}", description=SUBVERBS[verb], epilog=epilog)


def run(arguments: Sequence[str]) -> int:
    """The verb: hand over to the sub-verb."""
    from importlib import import_module

    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_usage())
        return GOOD if arguments else USAGE
    verb, *rest = arguments
    if verb not in SUBVERBS:
        print(f"swsnp kds: no verb {verb!r}; known: {', '.join(SUBVERBS)}", file=sys.stderr)
        return USAGE
    return int(import_module(f"swsnp.cli.kds.{verb}").run(rest))
