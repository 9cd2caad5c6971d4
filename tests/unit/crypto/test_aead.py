"""AES-256-GCM over plain bytes."""

from __future__ import annotations

import pytest

from swsnp.crypto.aead import open_bytes, seal_bytes
from swsnp.crypto.seal import TagMismatch

KEY = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
IV = bytes.fromhex("cafebabefacedbaddecaf888")
AAD = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
PLAIN = bytes.fromhex(
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
)
CIPHER = bytes.fromhex(
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
)
TAG = bytes.fromhex("76fc6ece0f4e1768cddf8853bb2d551b")


def test_known_answer() -> None:
    """McGrew and Viega, The Galois/Counter Mode of Operation, test case 16."""
    assert seal_bytes(KEY, IV, PLAIN, AAD) == (CIPHER, TAG)
    assert open_bytes(KEY, IV, CIPHER, TAG, AAD) == PLAIN


def test_anything_else_is_refused() -> None:
    """Key, IV, ciphertext, tag and AAD are bound together."""
    for changed in (
        (bytes(32), IV, CIPHER, TAG, AAD),
        (KEY, bytes(12), CIPHER, TAG, AAD),
        (KEY, IV, CIPHER[:-1] + b"\0", TAG, AAD),
        (KEY, IV, CIPHER, bytes(16), AAD),
        (KEY, IV, CIPHER, TAG, b""),
    ):
        with pytest.raises(TagMismatch):
            open_bytes(*changed)
