"""For operators: certificate tables, certificates and CRLs as the key service issues them.

* `parse`, `pack`: a table's entries; `build_table`: a table from files in any order and encoding.
* `take_apart`, `put_together`: a table as files, and back byte for byte.
* `lint_table`: what is wrong with a table, by the numbered rules of `RULES`.
* `replace`, `updating`: put a blob where VMMs read it, under the lock that they respect.

What some bytes are, by content: `swsnp.certs.classify`.

Importing this package loads nothing else; names are fetched when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swsnp.certs.blob_file import Update, replace, updating
    from swsnp.certs.build import build_table
    from swsnp.certs.lint import RULES, Expected, Finding, LintResult, Severity, lint_table
    from swsnp.certs.manifest import put_together, take_apart
    from swsnp.certs.table import TableEntry, pack, parse

__all__ = [
    "Expected",
    "Finding",
    "LintResult",
    "RULES",
    "Severity",
    "TableEntry",
    "Update",
    "build_table",
    "lint_table",
    "pack",
    "parse",
    "put_together",
    "replace",
    "take_apart",
    "updating",
]

_HOMES = {
    **dict.fromkeys(("Update", "replace", "updating"), "blob_file"),
    "build_table": "build",
    **dict.fromkeys(("RULES", "Expected", "Finding", "LintResult", "Severity", "lint_table"), "lint"),
    **dict.fromkeys(("put_together", "take_apart"), "manifest"),
    **dict.fromkeys(("TableEntry", "pack", "parse"), "table"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'swsnp.certs' has no attribute {name!r}")
    from importlib import import_module  # the import is what is put off

    return getattr(import_module(f"swsnp.certs.{_HOMES[name]}"), name)
