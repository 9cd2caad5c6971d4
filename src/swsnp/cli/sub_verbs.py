"""A verb that has verbs of its own: one module per sub-verb, imported when it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from swsnp.cli import GOOD, USAGE, VERBS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

__all__ = ["SubVerbs"]


class SubVerbs:
    """The sub-verbs of a verb: modules of its package, each with `run(arguments) -> int`.

    Args:
        verb: the verb, which is the package's name too.
        texts: sub-verb to what it does.
    """

    def __init__(self, verb: str, texts: Mapping[str, str]) -> None:
        self._verb, self._texts = verb, texts

    def parser(self, name: str, *, epilog: str = "") -> argparse.ArgumentParser:
        """The argument parser of one sub-verb."""
        from swsnp.cli import common

        return common.parser(f"{self._verb} {name}", description=self._texts[name], epilog=epilog)

    def run(self, arguments: Sequence[str]) -> int:
        """The verb: hand over to the sub-verb."""
        from importlib import import_module

        if not arguments or arguments[0] in {"-h", "--help", "help"}:
            print(self._usage())
            return GOOD if arguments else USAGE
        name, *rest = arguments
        if name not in self._texts:
            known = ", ".join(self._texts)
            print(f"swsnp {self._verb}: no verb {name!r}; known: {known}", file=sys.stderr)
            return USAGE
        return int(import_module(f"swsnp.cli.{self._verb}.{name}").run(rest))

    def _usage(self) -> str:
        verb = self._verb
        lines = [f"  {name:14}{text}" for name, text in self._texts.items()]
        return "\n".join(
            [
                f"usage: swsnp {verb} VERB [options]    (swsnp {verb} VERB --help for one verb)",
                "",
                f"{VERBS[verb].capitalize()}.",
                "",
                *lines,
            ]
        )
