"""Byte layouts: one declaration per structure, offsets beside fields.

A record is a frozen, slotted, keyword-only dataclass over one `struct.Struct`. Reserved ranges are fields, so
any bytes of the right size parse and re-encode to the same bytes; any other size raises `LayoutError`.
Gaps, overlaps and wrong totals fail when the class is defined.
Every field may be left out of the constructor and is then zero.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Self, TypeVar, dataclass_transform

from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Record", "Word", "bits", "blob", "mbz", "record", "sub", "u8", "u16", "u32", "u64", "words"]

_R = TypeVar("_R", bound="Record")
_FREE_THREADED: Final = "t" in sys.abiflags
"""Built to run without the interpreter lock: such a one stops every thread to change an object's class."""


class _Spec(NamedTuple):
    """Where a field lies and how its `struct` value becomes a Python value."""

    offset: int
    size: int
    code: str
    default: Any
    decode: Callable[[Any], Any] | None = None
    encode: Callable[[Any], bytes] | None = None


class _Reader(NamedTuple):
    """What `parse` needs, in one look-up: bytes to values, what decodes which, what takes all of them.

    `fill` makes a draft: an instance of the record's class but for being frozen, since to fill a frozen one
    costs more than all else for a report of forty fields. Where classes should not be changed it fills a
    frozen one.
    """

    unpack: Callable[[bytes | bytearray | memoryview], tuple[Any, ...]]
    decoders: tuple[tuple[int, Callable[[Any], Any]], ...]
    fill: Callable[..., Any]


def _integer(offset: int, size: int, code: str, word: type[int]) -> _Spec:
    return _Spec(offset, size, code, word(0), None if word is int else word)


# The field functions return Any: the annotation beside the declaration says what a reader gets.


def u8(offset: int, word: type[int] = int) -> Any:
    """One byte, unsigned; `word` is the type to read it as."""
    return _integer(offset, 1, "B", word)


def u16(offset: int, word: type[int] = int) -> Any:
    """Two bytes, little-endian, unsigned."""
    return _integer(offset, 2, "H", word)


def u32(offset: int, word: type[int] = int) -> Any:
    """Four bytes, little-endian, unsigned."""
    return _integer(offset, 4, "I", word)


def u64(offset: int, word: type[int] = int) -> Any:
    """Eight bytes, little-endian, unsigned."""
    return _integer(offset, 8, "Q", word)


def blob(offset: int, size: int) -> Any:
    """Bytes without inner structure: `size` of them at `offset`."""
    return _Spec(offset, size, f"{size}s", bytes(size))


def mbz(offset: int, size: int) -> Any:
    """A reserved range. Whatever came in goes out again; zero unless given."""
    return blob(offset, size)


def sub(offset: int, kind: type[Record]) -> Any:
    """A record inside a record."""
    return _Spec(offset, kind.SIZE, f"{kind.SIZE}s", kind(), kind.parse, bytes)


def words(offset: int, count: int, code: str = "Q") -> Any:
    """An array of `count` integers of `struct` code `code` at `offset`; a tuple to the reader."""
    array = struct.Struct(f"<{count}{code}")
    return _Spec(
        offset, array.size, f"{array.size}s", (0,) * count, array.unpack, lambda values: array.pack(*values)
    )


class Record:
    """Base of every layout; see the module's text for the law that holds for all of them."""

    __slots__ = ()
    SIZE: ClassVar[int] = 0
    SOURCE: ClassVar[str] = ""
    _struct: ClassVar[struct.Struct] = struct.Struct("")
    _specs: ClassVar[dict[str, _Spec]] = {}
    _reader: ClassVar[_Reader | None] = None
    _values: ClassVar[Callable[[Any], tuple[Any, ...]]] = lambda _: ()
    _encoders: ClassVar[tuple[tuple[int, Callable[[Any], bytes]], ...]] = ()
    _blobs: ClassVar[tuple[tuple[str, int], ...]] = ()

    def __post_init__(self) -> None:
        # `struct` pads and cuts byte strings silently
        for name, size in self._blobs:
            if len(getattr(self, name)) != size:
                got = len(getattr(self, name))
                raise LayoutError(
                    f"{type(self).__name__}.{name}: got {got} bytes, wanted {size} ({self.SOURCE})"
                )

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Self:
        """Read exactly `SIZE` bytes.

        Raises:
            LayoutError: any other number of bytes.
        """
        unpack, decoders, fill = cls._reader or cls._make_reader()
        try:
            values: Any = unpack(data)
        except struct.error:
            raise LayoutError(
                f"{cls.__name__}: got {len(data)} bytes, wanted {cls.SIZE} ({cls.SOURCE})"
            ) from None
        if decoders:
            values = list(values)
            for index, decode in decoders:
                values[index] = decode(values[index])
        self = fill(*values)
        if not _FREE_THREADED:
            self.__class__ = cls  # same bases, same slots: from here on it is frozen
        return self  # type: ignore[no-any-return]

    @classmethod
    def _make_reader(cls) -> _Reader:
        """Made for the first bytes: most records of a program are never read."""
        cls._reader = _Reader(
            cls._struct.unpack,
            tuple((i, s.decode) for i, s in enumerate(cls._specs.values()) if s.decode is not None),
            _by_field(cls) if _FREE_THREADED else _draft(cls),
        )
        return cls._reader

    @classmethod
    def packing(cls) -> struct.Struct:
        """Bare values by offset, for what is done so often that a record would cost more than the rest."""
        return cls._struct

    @classmethod
    def parse_at(cls, data: bytes | bytearray | memoryview, offset: int) -> Self:
        """Read `SIZE` bytes at `offset`; LayoutError when fewer are left."""
        return cls.parse(data[offset : offset + cls.SIZE])

    def __bytes__(self) -> bytes:
        values: Any = self._values()
        if self._encoders:
            values = list(values)
            for index, encode in self._encoders:
                values[index] = encode(values[index])
        try:
            return self._struct.pack(*values)
        except struct.error as error:
            raise LayoutError(self._out_of_range(error)) from None

    def _out_of_range(self, error: struct.error) -> str:
        for name, size in ((each.name, each.metadata["size"]) for each in fields(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, int) and not 0 <= value < 1 << (8 * size):
                where = f"{type(self).__name__}.{name}"
                return f"{where}: got {value:#x}, wanted {size} bytes unsigned ({self.SOURCE})"
        return f"{type(self).__name__}: {error} ({self.SOURCE})"

    def but(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[type-var]

    @classmethod
    def layout(cls) -> Iterator[tuple[str, int, int]]:
        """Name, offset and size of every field, in order of offset."""
        for each in fields(cls):  # type: ignore[arg-type]
            yield each.name, each.metadata["offset"], each.metadata["size"]

    @classmethod
    def offset_of(cls, name: str) -> int:
        """Offset of one field, in bytes."""
        return next(offset for each, offset, _ in cls.layout() if each == name)


def _draft(cls: type[Record]) -> Callable[..., Any]:
    """The record's class but for being frozen."""
    annotations = dict.fromkeys(cls._specs, object)
    draft = type(cls.__name__, cls.__bases__, {"__annotations__": annotations})
    return dataclass(slots=True, eq=False, repr=False)(draft)


def _by_field(cls: type[_R]) -> Callable[..., _R]:
    """What makes a record of its values by writing each into its slot."""
    slots = [vars(cls)[name].__set__ for name in cls._specs]

    def fill(*values: object) -> _R:
        self = object.__new__(cls)
        for write, value in zip(slots, values, strict=True):
            write(self, value)
        return self

    return fill


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(*, size: int, source: str) -> Callable[[type[_R]], type[_R]]:
    """Turn a class of field declarations into a layout of `size` bytes, as printed in `source`.

    Raises:
        LayoutError: a gap, an overlap or a wrong total, when the class is defined.
    """

    def decorate(cls: type[_R]) -> type[_R]:
        specs = {name: value for name, value in vars(cls).items() if isinstance(value, _Spec)}
        end = 0
        for name, spec in specs.items():
            if spec.offset != end:
                raise LayoutError(f"{cls.__name__}.{name}: at {spec.offset:#x}, wanted {end:#x} ({source})")
            end += spec.size
            info = {"offset": spec.offset, "size": spec.size}
            setattr(cls, name, field(default=spec.default, metadata=info))
        if end != size:
            raise LayoutError(f"{cls.__name__}: fields end at {end:#x}, wanted {size:#x} ({source})")
        made: Any = dataclass(frozen=True, slots=True, kw_only=True)(cls)
        listed = list(specs.items())
        made.SIZE, made.SOURCE = size, source
        made._struct = struct.Struct("<" + "".join(spec.code for _, spec in listed))
        made._values = _getter([name for name, _ in listed])
        made._specs, made._reader = specs, None
        made._encoders = tuple((i, s.encode) for i, (_, s) in enumerate(listed) if s.encode is not None)
        made._blobs = tuple((name, s.size) for name, s in listed if s.code.endswith("s") and s.decode is None)
        return made  # type: ignore[no-any-return]

    return decorate


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) == 1:
        return lambda self: (getattr(self, names[0]),)
    get = attrgetter(*names)
    return lambda self: get(self)  # a function, so that it binds as a method


class bits:  # reads as a declaration, like the field functions above
    """A range of bits, named as the document names it: `debug = bits(19, 19)`."""

    def __init__(self, high: int, low: int) -> None:
        self.high, self.low = high, low
        self.mask = ((1 << (high - low + 1)) - 1) << low

    def __get__(self, word: Word | None, owner: type[Word]) -> Any:
        return self if word is None else (word & self.mask) >> self.low


class Word(int):
    """An integer with named ranges of bits; bits without a name survive."""

    _ranges: ClassVar[dict[str, bits]] = {}
    _named: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        cls._ranges = {
            **cls._ranges,
            **{name: value for name, value in vars(cls).items() if isinstance(value, bits)},
        }
        for span in cls._ranges.values():
            cls._named |= span.mask

    @classmethod
    def ranges(cls) -> dict[str, bits]:
        """The named ranges in order of declaration."""
        return cls._ranges

    @classmethod
    def of(cls, **values: int) -> Self:
        """Build from named ranges; the others are zero."""
        return cls(0).but(**values)

    def but(self, **values: int) -> Self:
        """A copy with some ranges changed.

        Raises:
            LayoutError: a value too large for its range, or a name that does not exist.
        """
        word = int(self)
        ranges = self.ranges()
        for name, value in values.items():
            if name not in ranges:
                raise LayoutError(f"{type(self).__name__}: no range named {name}")
            span = ranges[name]
            if not 0 <= value <= span.mask >> span.low:
                raise LayoutError(
                    f"{type(self).__name__}.{name}: got {value:#x}, wanted bits {span.high}:{span.low}"
                )
            word = word & ~span.mask | value << span.low
        return type(self)(word)

    @classmethod
    def named(cls) -> int:
        """The bits of every named range."""
        return cls._named

    def unnamed(self) -> int:
        """The bits outside every named range, in place."""
        return self & ~self._named

    def decoded(self) -> dict[str, int]:
        """Every named range and its value."""
        return {name: getattr(self, name) for name in self.ranges()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self):#x})"
