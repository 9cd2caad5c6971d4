"""The forms that values of a policy have: in Python, in a policy file, and in its JSON Schema.

One object per form, so that the dataclass, the reader of policy files and the schema cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol

from swsnp.abi.snp_report import PlatformInfo, Product, TcbComponents, TcbVersion

__all__ = ["Bits", "Choice", "Flag", "Form", "Hex", "HexSet", "Levels", "Number", "Texts", "Version", "Wrong"]

_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})+")
_VERSION: Final = re.compile(r"(0|[1-9][0-9]{0,2})\.(0|[1-9][0-9]{0,2})")
_BYTE: Final = range(256)
_PLATFORM_BITS: Final = {name: span.low for name, span in PlatformInfo.ranges().items()}
_SHOWN: Final = 80


class Wrong(ValueError):
    """A value that a form does not have; `key` counts from the field, "" for the field itself."""

    def __init__(self, got: object, wanted: str, key: str = "", *, shown: str | None = None) -> None:
        text = repr(got) if shown is None else shown
        self.got = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        self.wanted, self.key = wanted, key
        super().__init__(f"got {self.got}, wanted {wanted}")


class Form(Protocol):
    """One form; `keep` and `read` raise `Wrong`. `nothing` is the value that demands nothing."""

    nothing: ClassVar[Any]

    def keep(self, value: Any) -> Any:
        """A value given in Python, as the policy keeps it."""
        ...

    def read(self, value: Any) -> Any:
        """A value of a policy file, as Python has it."""
        ...

    def schema(self) -> dict[str, Any]:
        """The form in the words of JSON Schema."""
        ...


def _sizes(sizes: tuple[int, ...]) -> str:
    return " or ".join(map(str, sizes))


@dataclass(frozen=True, slots=True)
class Hex:
    """Bytes of one of some sizes; hexadecimal digits in a file."""

    nothing: ClassVar[Any] = None
    sizes: tuple[int, ...]

    def keep(self, value: Any) -> bytes | None:
        """None, or the bytes."""
        return None if value is None else self.one(value)

    def one(self, value: Any) -> bytes:
        """The bytes, without None."""
        if not isinstance(value, bytes | bytearray | memoryview):
            raise Wrong(value, f"{_sizes(self.sizes)} bytes")
        if len(value) not in self.sizes:
            raise Wrong(value, f"{_sizes(self.sizes)} bytes", shown=f"{len(value)} bytes")
        return bytes(value)

    def read(self, value: Any) -> bytes:
        """The bytes that the digits spell."""
        wanted = f"{_sizes(tuple(2 * size for size in self.sizes))} hexadecimal digits"
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise Wrong(value, wanted)
        if len(value) // 2 not in self.sizes:
            raise Wrong(value, wanted, shown=f"{len(value)} digits")
        return bytes.fromhex(value)

    def schema(self) -> dict[str, Any]:
        """A string with a pattern."""
        counts = "|".join(f"[0-9a-fA-F]{{{2 * size}}}" for size in self.sizes)
        return {"type": "string", "pattern": f"^({counts})$"}


def _members(value: Any) -> list[Any]:
    if not isinstance(value, tuple | list | AbstractSet):
        raise Wrong(value, "a tuple, list or set")
    return list(value)


def _array(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Wrong(value, "an array")
    if not value:
        raise Wrong(value, "at least one value, or no such key", shown="an empty array")
    return value


def _each(read: Any, values: list[Any]) -> list[Any]:
    found = []
    for number, value in enumerate(values):
        try:
            found.append(read(value))
        except Wrong as wrong:
            raise Wrong(value, wrong.wanted, f"[{number}]", shown=wrong.got) from None
    return found


@dataclass(frozen=True, slots=True)
class HexSet:
    """Any of several; empty: not checked."""

    nothing: ClassVar[Any] = frozenset()
    sizes: tuple[int, ...]

    def keep(self, value: Any) -> frozenset[bytes]:
        """The bytes of each."""
        return frozenset(_each(Hex(self.sizes).one, _members(value)))

    def read(self, value: Any) -> frozenset[bytes]:
        """An array of hexadecimal digits."""
        return frozenset(_each(Hex(self.sizes).read, _array(value)))

    def schema(self) -> dict[str, Any]:
        """An array that is not empty."""
        return {"type": "array", "minItems": 1, "items": Hex(self.sizes).schema()}


@dataclass(frozen=True, slots=True)
class Texts:
    """Any of several texts; empty: not checked."""

    nothing: ClassVar[Any] = frozenset()

    def keep(self, value: Any) -> frozenset[str]:
        """The texts."""
        return frozenset(_each(self.one, _members(value)))

    def one(self, value: Any) -> str:
        """One text."""
        if not isinstance(value, str) or not value:
            raise Wrong(value, "a text that is not empty")
        return value

    def read(self, value: Any) -> frozenset[str]:
        """An array of strings."""
        return frozenset(_each(self.one, _array(value)))

    def schema(self) -> dict[str, Any]:
        """An array that is not empty."""
        return {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}}


@dataclass(frozen=True, slots=True)
class Number:
    """An integer of a range, both ends included."""

    nothing: ClassVar[Any] = None
    low: int
    high: int

    def keep(self, value: Any) -> int | None:
        """None, or the number."""
        return None if value is None else self.read(value)

    def read(self, value: Any) -> int:
        """The number; True is none."""
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise Wrong(value, f"an integer of {self.low} to {self.high}")
        return int(value)

    def schema(self) -> dict[str, Any]:
        """An integer with both limits."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Flag:
    """True or False."""

    nothing: ClassVar[Any] = False

    def keep(self, value: Any) -> bool:
        """The flag."""
        return self.read(value)

    def read(self, value: Any) -> bool:
        """The flag; 0 and 1 are none."""
        if not isinstance(value, bool):
            raise Wrong(value, "true or false")
        return value

    def schema(self) -> dict[str, Any]:
        """A boolean."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Choice:
    """True, False, or None: not checked."""

    nothing: ClassVar[Any] = None

    def keep(self, value: Any) -> bool | None:
        """The choice."""
        return None if value is None else self.read(value)

    def read(self, value: Any) -> bool:
        """A flag."""
        return Flag().read(value)

    def schema(self) -> dict[str, Any]:
        """A boolean."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Version:
    """Major and minor, each 0 to 255; "1.55" in a file."""

    nothing: ClassVar[Any] = None

    def keep(self, value: Any) -> tuple[int, int] | None:
        """None, or the pair."""
        if value is None:
            return None
        if not isinstance(value, tuple) or len(value) != 2 or any(type(each) is not int for each in value):
            raise Wrong(value, "two integers: major, minor")
        return self._limited(value, value)

    def read(self, value: Any) -> tuple[int, int]:
        """The pair that the text spells."""
        found = _VERSION.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise Wrong(value, 'a text "major.minor"')
        return self._limited((int(found[1]), int(found[2])), value)

    def _limited(self, pair: tuple[int, int], shown: object) -> tuple[int, int]:
        if any(each not in _BYTE for each in pair):
            raise Wrong(shown, "major and minor of 0 to 255")
        return pair

    def schema(self) -> dict[str, Any]:
        """A string with a pattern that spells both limits."""
        byte = "(0|[1-9][0-9]?|1[0-9][0-9]|2[0-4][0-9]|25[0-5])"
        return {"type": "string", "pattern": rf"^{byte}\.{byte}$"}


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits of PLATFORM_INFO; in a file an array of names, or numbers for bits that have none."""

    nothing: ClassVar[Any] = None

    def keep(self, value: Any) -> PlatformInfo | None:
        """None, or the bits."""
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 64:
            raise Wrong(value, "some of the 64 bits of PLATFORM_INFO")
        return PlatformInfo(value)

    def read(self, value: Any) -> PlatformInfo:
        """All bits that are listed."""
        word = 0
        for bit in _each(self._bit, _array(value)):
            word |= 1 << bit
        return PlatformInfo(word)

    def _bit(self, value: Any) -> int:
        if isinstance(value, str) and value in _PLATFORM_BITS:
            return _PLATFORM_BITS[value]
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 63:
            return value
        raise Wrong(value, f"one of {', '.join(_PLATFORM_BITS)}, or a bit number of 0 to 63")

    def schema(self) -> dict[str, Any]:
        """An array of names and numbers."""
        one = {"anyOf": [{"enum": list(_PLATFORM_BITS)}, {"type": "integer", "minimum": 0, "maximum": 63}]}
        return {"type": "array", "minItems": 1, "items": one}


@dataclass(frozen=True, slots=True)
class Levels:
    """Security patch levels per product and component; components that are left out may be anything."""

    nothing: ClassVar[Any] = {}

    def keep(self, value: Any) -> dict[Product, TcbComponents]:
        """The levels of each product."""
        if not isinstance(value, Mapping):
            raise Wrong(value, "levels per product")
        found = {}
        for product, levels in value.items():
            if not isinstance(product, Product):
                raise Wrong(product, "a Product")
            found[product] = self._levels(product, levels)
        return found

    def read(self, value: Any) -> dict[Product, TcbComponents]:
        """A table per product, by the product's name."""
        if not isinstance(value, dict) or not value:
            raise Wrong(value, f"a table of {', '.join(each.value for each in Product)}")
        by_name = {each.value: each for each in Product}
        for name in value:
            if name not in by_name:
                raise Wrong(name, f"one of {', '.join(by_name)}")
        return {by_name[name]: self._levels(by_name[name], levels) for name, levels in value.items()}

    def _levels(self, product: Product, levels: Any) -> TcbComponents:
        known = TcbVersion.byte_order(product)
        if not isinstance(levels, Mapping) or not levels:
            raise Wrong(levels, f"levels of {', '.join(known)}", f".{product.value}")
        for name, level in levels.items():
            if name not in known:
                raise Wrong(name, f"one of {', '.join(known)}", f".{product.value}")
            if not isinstance(level, int) or isinstance(level, bool) or level not in _BYTE:
                raise Wrong(level, "an integer of 0 to 255", f".{product.value}.{name}")
        return TcbComponents(levels)

    def schema(self) -> dict[str, Any]:
        """An object per product, an integer per component."""
        level = {"type": "integer", "minimum": 0, "maximum": 255}
        products = {
            product.value: {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": False,
                "properties": dict.fromkeys(TcbVersion.byte_order(product), level),
            }
            for product in Product
        }
        return {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": False,
            "properties": products,
        }
