"""The argument parser of a verb. A module of its own, so that a short command loads nothing else for it."""

from __future__ import annotations

import argparse
import os
from functools import cache

from swsnp.cli import VERBS

TYPE_CHECKING = False  # `typing` itself would be an eighth of a short command's time
if TYPE_CHECKING:
    from typing import Final

__all__ = ["parser"]

_EXIT_CODES: Final = (
    "exit codes: 0 good, 1 bad verdict, 2 usage, 3 unreadable input, 4 not possible on this host"
)


# argparse looks for a translation of its words, and gettext loads `locale` to find that there is none
vars(argparse)["_"] = str


def parser(verb: str, *, description: str | None = None, epilog: str = "") -> argparse.ArgumentParser:
    """The argument parser of one verb; `description` for a verb below another."""
    return argparse.ArgumentParser(
        prog=f"swsnp {verb}",
        description=VERBS[verb] if description is None else description,
        epilog=f"{epilog}\n\n{_EXIT_CODES}".lstrip(),
        allow_abbrev=False,
        formatter_class=_Formatter,
    )


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal; argparse asks `shutil`, which loads compression libraries for that."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


@cache
def _columns() -> int:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80
