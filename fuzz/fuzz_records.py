"""Every layout: bytes of its size parse and go out again as they came, any other size is a LayoutError."""

from __future__ import annotations

import importlib
import pkgutil

import swsnp.abi
from swsnp.abi.record import Record, Word
from swsnp.errors import LayoutError

__all__ = ["one", "seeds"]


def _kinds() -> list[type[Record]]:
    found = {}
    for info in pkgutil.iter_modules(swsnp.abi.__path__):
        for value in vars(importlib.import_module(f"swsnp.abi.{info.name}")).values():
            if isinstance(value, type) and issubclass(value, Record) and value is not Record:
                found[f"{value.__module__}.{value.__name__}"] = value
    return [found[name] for name in sorted(found)]


KINDS = _kinds()


def seeds() -> list[bytes]:
    """One of each kind; the first two bytes choose it."""
    return [n.to_bytes(2, "little") + bytes(kind.SIZE) for n, kind in enumerate(KINDS)]


def one(data: bytes) -> object:
    """Parse, look at every field, and put together again."""
    kind, body = KINDS[int.from_bytes(data[:2], "little") % len(KINDS)], data[2:]
    try:
        parsed = kind.parse(body)
    except LayoutError:
        assert len(body) != kind.SIZE
        return kind.__name__, "refused"
    assert bytes(parsed) == body
    for name, _, _ in kind.layout():
        value = getattr(parsed, name)
        if isinstance(value, Word):
            assert sum(value.decoded().values()) >= 0
            assert value.but(**value.decoded()) == value
        repr(value)
    return kind.__name__
