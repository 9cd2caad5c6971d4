"""The values and comma lists of QEMU's command line.

A converter takes the text of one property and raises ValueError with what was wanted.

Source: the manual page qemu(1).
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar

from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

__all__ = [
    "Converter",
    "Parts",
    "base64_bytes",
    "boolean",
    "comma_list",
    "convert_all",
    "kind_and_rest",
    "name_value",
    "number",
    "one_of",
    "path_value",
    "size",
    "text_value",
]

T = TypeVar("T")
Converter: TypeAlias = "Callable[[str], Any]"
_UNITS: Final = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_BOOLEANS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}


def number(low: int, high: int) -> Converter:
    """A number, decimal or 0x, within the bounds."""

    def convert(text: str) -> int:
        wanted = f"a number {low}..{high:#x}" if high > 1 << 16 else f"a number {low}..{high}"
        try:
            value = int(text, 0)
        except ValueError:
            raise ValueError(wanted) from None
        if not low <= value <= high:
            raise ValueError(wanted)
        return value

    return convert


def size(default_unit: int) -> Converter:
    """Bytes, in whole pages; a number without a suffix counts `default_unit` bytes."""

    def convert(text: str) -> int:
        digits, unit = text, default_unit
        if text[-1:].lower() in _UNITS and not text.lower().startswith("0x"):
            digits, unit = text[:-1], _UNITS[text[-1:].lower()]
        try:
            value = int(digits, 0) * unit
        except ValueError:
            raise ValueError("a size such as 512M or 4G") from None
        if value <= 0 or value % 4096:
            raise ValueError("a size of whole 4 KiB pages, at least one")
        return value

    return convert


def name_value(most: int) -> Converter:
    """A name that the guest is told, of up to `most` bytes."""

    def convert(text: str) -> str:
        if "\0" in text or not 1 <= len(text.encode(errors="surrogateescape")) <= most:
            raise ValueError(f"1 to {most} bytes")
        return text

    return convert


def one_of(*words: str) -> Converter:
    """One of these words."""

    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(" or ".join(words))
        return text

    return convert


def boolean(text: str) -> bool:
    """QEMU's words for yes and no."""
    try:
        return _BOOLEANS[text]
    except KeyError:
        raise ValueError("on or off") from None


def base64_bytes(size: int, *, exactly: bool = True) -> Converter:
    """Base64 of `size` bytes, or of at most so many."""

    def convert(text: str) -> bytes:
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError:
            raise ValueError("base64") from None
        if len(data) > size or (exactly and len(data) != size):
            how = "exactly" if exactly else "at most"
            raise ValueError(f"base64 of {how} {size} bytes (these are {len(data)})")
        return data

    return convert


def text_value(text: str) -> str:
    """Anything but nothing."""
    if not text:
        raise ValueError("a value")
    return text


def path_value(text: str) -> Path:
    """A file's name."""
    return Path(text_value(text))


def comma_list(text: str, implied: str, where: str, *, many: Collection[str] = ()) -> dict[str, str]:
    """Take a list `key=value,key=value` apart; `,,` in a value is one comma.

    Args:
        text: the list.
        implied: the key of a first item without `=`.
        where: what to call this list in an error.
        many: keys that may come again; commas are between their values then.

    Raises:
        UsageError: an item without `=` after the first, an empty key, or a key given twice.
    """
    found: dict[str, str] = {}
    for position, item in enumerate(_items(text)):
        key, equals, value = item.partition("=")
        if not equals and position == 0:
            key, value = implied, item
        elif not equals or not key:
            raise UsageError(f"{where}: got {item!r}, wanted key=value")
        if key in found and key in many:
            value = f"{found[key]},{value}"
        elif key in found:
            raise UsageError(f"{where}: property {key!r} given twice")
        found[key] = value
    return found


def convert_all(found: Mapping[str, str], known: Mapping[str, Converter], where: str) -> dict[str, Any]:
    """The values of a list.

    Raises:
        UsageError: a key that is not known, or a value that its converter refuses; `where` is its list.
    """
    values = {}
    for key, text in found.items():
        if key not in known:
            raise UsageError(f"{where}: unknown property {key!r}; known are {', '.join(known)}")
        try:
            values[key] = known[key](text)
        except ValueError as error:
            raise UsageError(f"{where}: property {key!r}: got {text!r}, wanted {error}") from None
    return values


def kind_and_rest(
    text: str, key: str, known: Collection[str], where: str, *, word: str, many: Collection[str] = ()
) -> tuple[str, dict[str, str]]:
    """A list that begins with the kind of thing that its other properties are of.

    Args:
        text: the option's value.
        key: property that the kind may be given by, too.
        known: kinds.
        where: the option.
        word: what a kind is called.
        many: as for `comma_list`.

    Raises:
        UsageError: JSON, a kind that is not known, or as `comma_list`.
    """
    if text.startswith("{"):
        raise UsageError(f"{where}: got JSON, wanted {word},key=value,...")
    found = comma_list(text, key, where, many=many)
    kind = found.pop(key, "")
    if kind not in known:
        raise UsageError(f"{where}: unknown {word} {kind!r}; known are {', '.join(known)}")
    return kind, found


def _items(text: str) -> list[str]:
    items, rest = [""], text
    while rest:
        head, comma, rest = rest.partition(",")
        items[-1] += head
        if comma and rest.startswith(","):
            items[-1] += ","
            rest = rest[1:]
        elif comma:
            items.append("")
    return items


class Parts(Generic[T]):
    """Parts of the command line that devices name, each for one device.

    Args:
        word: what such a part is called.
        remedy: the device that would have it.
    """

    def __init__(self, word: str, remedy: str) -> None:
        self._word, self._remedy = word, remedy
        self._free: dict[str, T] = {}

    def add(self, option: str, identity: str, part: T) -> None:
        """Keep it; UsageError when the id is taken."""
        if identity in self._free:
            raise UsageError(f"{option}: id {identity!r} is taken")
        self._free[identity] = part

    def take(self, where: str, values: Mapping[str, Any]) -> T:
        """The part that a device's properties name, which is no other's then."""
        if self._word not in values:
            raise UsageError(f"{where}: property {self._word!r} is missing")
        if (name := values[self._word]) not in self._free:
            there = ", ".join(self._free) or "none"
            raise UsageError(
                f"{where}: property {self._word!r}: got {name!r}, there are {there} that are free"
            )
        return self._free.pop(name)

    def refuse_unused(self) -> None:
        """UsageError for a part that no device has."""
        for name in self._free:
            raise UsageError(f"{self._word} {name!r}: wanted a {self._remedy}={name} that has it")
