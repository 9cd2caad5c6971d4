"""The table of kernel hashes."""

from __future__ import annotations

import hashlib
import struct
from uuid import UUID

import pytest

from swsnp.errors import LayoutError
from swsnp.measure.kernel_hashes import NO_INITRD, TABLE_SIZE, KernelHashes

KERNEL = hashlib.sha256(b"kernel").digest()
INITRD = hashlib.sha256(b"initrd").digest()


def entry(guid: str, digest: bytes) -> bytes:
    return UUID(guid).bytes_le + struct.pack("<H", 50) + digest


def test_table() -> None:
    """QEMU: header of length 168, then command line, initial RAM disk and kernel; zeros up to 176."""
    table = KernelHashes(KERNEL, INITRD, b"quiet").table()
    assert table == b"".join(
        [
            UUID("9438d606-4f22-4cc9-b479-a793d411fd21").bytes_le,
            struct.pack("<H", 168),
            entry("97d02dd8-bd20-4c94-aa78-e7714d36ab2a", hashlib.sha256(b"quiet\0").digest()),
            entry("44baf731-3a2f-4bd7-9af1-41e29169781d", INITRD),
            entry("4de79437-abd2-427f-b835-d5b172d2045b", KERNEL),
            bytes(8),
        ]
    )
    assert len(table) == TABLE_SIZE == 176


def test_what_is_not_given() -> None:
    """No initial RAM disk is an empty one; an empty command line is its final zero byte."""
    hashes = KernelHashes(KERNEL)
    assert hashes.initrd == NO_INITRD == hashlib.sha256(b"").digest()
    assert hashes.cmdline == hashlib.sha256(b"\0").digest()


@pytest.mark.parametrize("offset", [0, 0xC00, 4096 - 176])
def test_page(offset: int) -> None:
    """EDK II: the table lies at the firmware's address, the rest of the page is zero."""
    hashes = KernelHashes(KERNEL)
    page = hashes.page(0x81_0000 + offset)
    assert page == bytes(offset) + hashes.table() + bytes(4096 - 176 - offset)


def test_table_beyond_its_page() -> None:
    """The page is all that is measured, so the table cannot leave it."""
    with pytest.raises(LayoutError, match="hash table base: got 0x810f51, wanted 176 bytes before the page"):
        KernelHashes(KERNEL).page(0x81_0F51)


@pytest.mark.parametrize("digests", [(b"", INITRD), (KERNEL, KERNEL[1:])])
def test_digests_of_another_size(digests: tuple[bytes, bytes]) -> None:
    """SHA-256 has 32 bytes."""
    with pytest.raises(LayoutError, match="hash: got .* bytes, wanted 32"):
        KernelHashes(*digests)
