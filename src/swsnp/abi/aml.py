"""The few words of ACPI's machine language that name a device and what it takes.

Source: ACPI 6.5, chapters 20.2 (AML grammar), 6.4.2 and 6.4.3 (resource descriptors).
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["device", "interrupt", "memory", "name", "package", "resources", "scope", "text", "uint"]

_NAME_OP, _SCOPE_OP, _BUFFER_OP, _PACKAGE_OP = b"\x08", b"\x10", b"\x11", b"\x12"
_DEVICE_OP: Final = b"\x5b\x82"
_ZERO, _ONE = b"\x00", b"\x01"
_STRING_PREFIX: Final = b"\x0d"
_PREFIXES: Final = ((0x0A, "<BB"), (0x0B, "<BH"), (0x0C, "<BI"))
_SEGMENT: Final = 4
_MEMORY_32: Final = struct.Struct("<BHBII")  # tag, length, information, base, size
_EXTENDED_INTERRUPT: Final = struct.Struct("<BHBBI")  # tag, length, flags, count, number
_END_TAG: Final = b"\x79\x00"
_WRITABLE: Final = 1
_CONSUMER: Final = 1


def uint(value: int) -> bytes:
    """An integer of up to 32 bits, in its shortest form."""
    if value < 2:
        return (_ZERO, _ONE)[value]
    size = (value > 0xFF) + (value > 0xFFFF)
    prefix, layout = _PREFIXES[size]
    return struct.pack(layout, prefix, value)


def text(value: str) -> bytes:
    """A string of ASCII characters."""
    return _STRING_PREFIX + value.encode("ascii") + b"\0"


def name(path: str, value: bytes) -> bytes:
    """Name(path, value)."""
    return _NAME_OP + _path(path) + value


def package(*items: bytes) -> bytes:
    """Package() {items}."""
    return _PACKAGE_OP + _sized(bytes([len(items)]) + b"".join(items))


def scope(path: str, *terms: bytes) -> bytes:
    """Scope(path) {terms}."""
    return _SCOPE_OP + _sized(_path(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device(path) {terms}."""
    return _DEVICE_OP + _sized(_path(path) + b"".join(terms))


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate() {descriptors}: a buffer that ends with an end tag without a checksum."""
    raw = b"".join(descriptors) + _END_TAG
    return _BUFFER_OP + _sized(uint(len(raw)) + raw)


def memory(where: range) -> bytes:
    """Memory32Fixed(ReadWrite, base, size)."""
    return _MEMORY_32.pack(0x86, _MEMORY_32.size - 3, _WRITABLE, where.start, len(where))


def interrupt(number: int) -> bytes:
    """Interrupt(ResourceConsumer, Level, ActiveHigh, Exclusive) {number}, a global system interrupt."""
    return _EXTENDED_INTERRUPT.pack(0x89, _EXTENDED_INTERRUPT.size - 3, _CONSUMER, 1, number)


def _path(path: str) -> bytes:
    """A name of one segment, padded with underscores."""
    return path.ljust(_SEGMENT, "_").encode("ascii")


def _sized(body: bytes) -> bytes:
    """PkgLength, which counts itself, and the body."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    for following in (1, 2, 3):
        length = len(body) + 1 + following
        if length < 1 << 4 + 8 * following:
            break
    lead = following << 6 | length & 0xF
    return bytes([lead]) + (length >> 4).to_bytes(following, "little") + body
