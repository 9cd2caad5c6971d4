"""Key derivation and reproducible randomness: HKDF-SHA384 (RFC 5869).

Nothing here equals what silicon derives: the secrets are this project's own.
"""

from __future__ import annotations

import hmac
import threading
from typing import Final

from swsnp.errors import LayoutError

__all__ = ["P384_ORDER", "SeededEntropy", "hkdf_sha384", "p384_scalar"]

P384_ORDER: Final = int(
    "FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16
)
"""Order of the group of P-384 (FIPS 186-4, D.1.2.4)."""
_HASH_SIZE: Final = 48
_EXPAND_MAX: Final = 255 * _HASH_SIZE
_SCALAR_MATERIAL: Final = 56
_RNG_SALT: Final = b"swsnp/rng/v1"


def _extract(ikm: bytes, salt: bytes) -> bytes:
    return hmac.digest(salt, ikm, "sha384")


def _expand(prk: bytes, info: bytes, length: int) -> bytes:
    if length <= _HASH_SIZE:
        return hmac.digest(prk, info + b"\x01", "sha384")[:length]
    blocks = [b""]
    for number in range(1, -(-length // _HASH_SIZE) + 1):
        blocks.append(hmac.digest(prk, blocks[-1] + info + bytes((number,)), "sha384"))
    return b"".join(blocks)[:length]


def hkdf_sha384(ikm: bytes, *, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF with SHA-384 (RFC 5869).

    Args:
        ikm: input keying material.
        salt: names the domain; empty counts as 48 zero bytes.
        info: names the output inside the domain.
        length: bytes wanted, 0..12240.

    Raises:
        LayoutError: a length that HKDF cannot give.
    """
    if not 0 <= length <= _EXPAND_MAX:
        raise LayoutError(f"HKDF-SHA384 length: got {length}, wanted 0..{_EXPAND_MAX} bytes (RFC 5869)")
    return _expand(_extract(ikm, salt), info, length)


def p384_scalar(material: bytes) -> int:
    """A private scalar of P-384 from 56 uniform bytes: little-endian, mod (n-1), plus 1.

    The 64 bits beyond the order make the bias negligible; the result is in 1..n-1.

    Raises:
        LayoutError: not 56 bytes.
    """
    if len(material) != _SCALAR_MATERIAL:
        raise LayoutError(f"P-384 scalar material: got {len(material)} bytes, wanted {_SCALAR_MATERIAL}")
    return int.from_bytes(material, "little") % (P384_ORDER - 1) + 1


class SeededEntropy:
    """Randomness that a seed repeats: a stand-in for `os.urandom` in reproducible runs.

    Call number i of the stream of one purpose is HKDF-SHA384(seed, salt "swsnp/rng/v1", info purpose + i).
    Equal seeds and an equal order of calls give equal bytes, in any process. Calls may come from any thread.
    """

    __slots__ = ("_counter", "_lock", "_prk", "_purpose")

    def __init__(self, seed: bytes) -> None:
        self._prk = _extract(seed, _RNG_SALT)
        self._purpose = b""
        self._counter = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"SeededEntropy(seed withheld, {self._counter} calls)"

    def __call__(self, size: int) -> bytes:
        """The next `size` bytes of this stream.

        Raises:
            LayoutError: more than 12,240 bytes at once, or a negative size.
        """
        if not 0 <= size <= _EXPAND_MAX:
            raise LayoutError(f"SeededEntropy size: got {size}, wanted 0..{_EXPAND_MAX} bytes (RFC 5869)")
        with self._lock:
            number = self._counter
            self._counter = number + 1
        return _expand(self._prk, self._purpose + number.to_bytes(8, "little"), size)

    def child(self, purpose: str) -> SeededEntropy:
        """An independent stream of the same seed; it does not depend on what was drawn here.

        Children of equal purpose repeat each other, so a purpose names one use.
        """
        other = SeededEntropy.__new__(SeededEntropy)
        name = purpose.encode()
        other._prk = self._prk
        # with its length in front, no path of names reads as another path
        other._purpose = self._purpose + len(name).to_bytes(2, "little") + name
        other._counter = 0
        other._lock = threading.Lock()
        return other
