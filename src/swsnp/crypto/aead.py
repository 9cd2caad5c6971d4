"""AES-256-GCM over plain bytes, ciphertext and tag apart; the envelope of guest messages is in `seal.py`."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swsnp.crypto.seal import TagMismatch

__all__ = ["TAG_SIZE", "open_bytes", "seal_bytes"]

TAG_SIZE: Final = 16


def seal_bytes(key: bytes, iv: bytes, data: bytes, aad: bytes = b"") -> tuple[bytes, bytes]:
    """Encrypt: ciphertext of the data's size and a tag of 16 bytes.

    Args:
        key: 32 bytes.
        iv: 12 bytes; never the same for two plaintexts under one key.
        data: plaintext.
        aad: authenticated, not encrypted.
    """
    sealed = AESGCM(key).encrypt(iv, data, aad)
    return sealed[:-TAG_SIZE], sealed[-TAG_SIZE:]


def open_bytes(key: bytes, iv: bytes, data: bytes, tag: bytes, aad: bytes = b"") -> bytes:
    """Check and decrypt what `seal_bytes` made.

    Raises:
        TagMismatch: key, IV, ciphertext, tag or AAD differ from what was sealed.
    """
    try:
        return AESGCM(key).decrypt(iv, data + tag, aad)
    except InvalidTag:
        raise TagMismatch("AES-256-GCM: authentication tag does not match") from None
