"""The secrets page in guest memory: keys, message counters, wiping.

Source: AMD 56860, secrets page; AMD 56421, guest reserved area; Linux, struct snp_secrets_page.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_launch import SecretsPage
from swsnp.crypto.seal import KEY_SIZE
from swsnp.errors import LayoutError, UsageError

if TYPE_CHECKING:
    from swsnp.guest.cpu import GuestMemory

__all__ = ["Secrets", "VmpckSlot"]

_U32: Final = struct.Struct("<I")
_VERSION_MIN: Final = 2
_KEYS: Final = 4
_KEY_AT: Final = SecretsPage.offset_of("vmpck0")
_SEQNO_AT: Final = SecretsPage.offset_of("msg_seqno_low")
_SVSM_SIZE_AT: Final = SecretsPage.offset_of("svsm_size")
_SVSM_CAA_AT: Final = SecretsPage.offset_of("svsm_caa")
_SVSM_VMPL_AT: Final = SecretsPage.offset_of("svsm_guest_vmpl")
_NO_KEY: Final = bytes(KEY_SIZE)


class VmpckSlot:
    """One VMPCK and its counter, as they lie in the secrets page.

    The counter is 32 bits wide: Linux ignores the high half that GHCB 2.01 adds.
    """

    __slots__ = ("_key_gpa", "_memory", "_seqno_gpa", "_span", "vmpck_id")

    def __init__(self, memory: GuestMemory, page: int, vmpck_id: int) -> None:
        self.vmpck_id = vmpck_id
        self._memory = memory
        self._key_gpa = page + _KEY_AT + KEY_SIZE * vmpck_id
        self._seqno_gpa = page + _SEQNO_AT + _U32.size * vmpck_id
        self._span = self._seqno_gpa + _U32.size - self._key_gpa

    def __repr__(self) -> str:
        return f"VmpckSlot(vmpck_id={self.vmpck_id}, key withheld)"

    def key(self) -> bytes | None:
        """The 32 key bytes; None when they are all zero."""
        key = self._memory.read(self._key_gpa, KEY_SIZE, private=True)
        return None if key == _NO_KEY else key

    def stored(self) -> int | None:
        """The last sequence number used under this key; None when the key bytes are all zero."""
        span = self._memory.read(self._key_gpa, self._span, private=True)
        if span.startswith(_NO_KEY):
            return None
        value: int = _U32.unpack_from(span, self._span - _U32.size)[0]
        return value

    def store(self, seqno: int) -> None:
        """Write the counter."""
        self._memory.write(self._seqno_gpa, _U32.pack(seqno), private=True)

    def wipe(self) -> None:
        """Zero the key. The counter stays; the other keys are not touched."""
        self._memory.write(self._key_gpa, _NO_KEY, private=True)


class Secrets:
    """The secrets page of one guest.

    Args:
        memory: the guest's memory; the page is private.
        gpa: of the page.
    """

    __slots__ = ("_memory", "gpa")

    def __init__(self, memory: GuestMemory, gpa: int) -> None:
        self._memory = memory
        self.gpa = gpa

    def __repr__(self) -> str:
        return f"Secrets(gpa={self.gpa:#x}, keys withheld)"

    @property
    def version(self) -> int:
        """Version of the page."""
        return self._u32(0)

    def check_version(self) -> None:
        """Refuse a page whose layout is not the one that consumers know.

        Raises:
            LayoutError: version below 2.
        """
        if (version := self.version) < _VERSION_MIN:
            raise LayoutError(f"secrets page: version {version}, wanted {_VERSION_MIN} or more (AMD 56860)")

    def slot(self, vmpck_id: int) -> VmpckSlot:
        """One key with its counter.

        Raises:
            UsageError: no such key.
        """
        if not 0 <= vmpck_id < _KEYS:
            raise UsageError(f"vmpck_id: got {vmpck_id}, wanted 0..{_KEYS - 1} (AMD 56860, secrets page)")
        return VmpckSlot(self._memory, self.gpa, vmpck_id)

    @property
    def svsm_present(self) -> bool:
        """An SVSM has handed this page on."""
        return any(self._memory.read(self.gpa + _SVSM_SIZE_AT, 8, private=True))

    @property
    def svsm_guest_vmpl(self) -> int:
        """The privilege level that the SVSM runs this guest at."""
        return self._memory.read(self.gpa + _SVSM_VMPL_AT, 1, private=True)[0]

    @property
    def svsm_caa(self) -> int:
        """Address of the SVSM's calling area."""
        return int.from_bytes(self._memory.read(self.gpa + _SVSM_CAA_AT, 8, private=True), "little")

    def _u32(self, offset: int) -> int:
        return int.from_bytes(self._memory.read(self.gpa + offset, 4, private=True), "little")
