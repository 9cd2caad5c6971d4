"""The envelope of guest messages: AES-256-GCM over one page. Source: AMD 56860, guest messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swsnp.errors import LayoutError, SwsnpError

if TYPE_CHECKING:
    from swsnp.abi.snp_message import MessageHeader

__all__ = ["KEY_SIZE", "MessageKey", "TagMismatch"]

KEY_SIZE: Final = 32
_HDR_SIZE: Final = 0x60
_SEQNO: Final = slice(0x20, 0x28)
_AAD: Final = slice(0x30, 0x60)
_TAG_SIZE: Final = 16
_IV_TAIL: Final = bytes(4)


class TagMismatch(SwsnpError):
    """The message was not sealed with this key under this sequence number, or was changed since."""


class MessageKey:
    """One VMPCK. The IV is the sequence number, so a number must never cover two plaintexts."""

    __slots__ = ("_aead",)

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise LayoutError(f"VMPCK: got {len(key)} bytes, wanted {KEY_SIZE} (AMD 56860, guest messages)")
        self._aead = AESGCM(key)

    def __repr__(self) -> str:
        return "MessageKey(withheld)"

    def seal(self, header: MessageHeader | bytes, payload: bytes) -> bytes:
        """Encrypt a payload under the header's sequence number.

        Args:
            header: the record or its 96 bytes; its authtag is ignored and replaced.
            payload: `header.msg_size` bytes.

        Returns:
            Header with authtag, then the ciphertext: 60h + len(payload) bytes.
        """
        raw = bytes(header)
        sealed = self._aead.encrypt(raw[_SEQNO] + _IV_TAIL, payload, raw[_AAD])
        return sealed[-_TAG_SIZE:] + raw[_TAG_SIZE:] + sealed[:-_TAG_SIZE]

    def open(self, message: bytes, msg_size: int) -> bytes:
        """Check and decrypt a message; everything is taken from the bytes that came in.

        Args:
            message: header and at least `msg_size` bytes of ciphertext.
            msg_size: payload bytes.

        Raises:
            TagMismatch: any authenticated bit differs from what was sealed.
        """
        sealed = message[_HDR_SIZE : _HDR_SIZE + msg_size] + message[:_TAG_SIZE]
        try:
            return self._aead.decrypt(message[_SEQNO] + _IV_TAIL, sealed, message[_AAD])
        except InvalidTag:
            raise TagMismatch("guest message: authentication tag does not match (AMD 56860)") from None
