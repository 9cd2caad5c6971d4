"""Numbers and byte layouts, one module per document; standard library only.

Names are fetched when they are first used: some modules here are light on purpose, and stay so.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from swsnp.abi.record import Record, Word
    from swsnp.errors import LayoutError

__all__ = ["LayoutError", "Record", "Word"]

_HOMES = {"Record": "swsnp.abi.record", "Word": "swsnp.abi.record", "LayoutError": "swsnp.errors"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'swsnp.abi' has no attribute {name!r}")
    from importlib import import_module  # the import is what is put off

    return getattr(import_module(_HOMES[name]), name)
