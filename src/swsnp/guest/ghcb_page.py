"""The guest's handle on its GHCB page: ask, leave, read the reply. Source: AMD 56421 (GHCB 2.0)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import PAGE, GhcbField, Reply, valid_mask

if TYPE_CHECKING:
    from swsnp.guest.cpu import GuestCpu

__all__ = ["EsResult", "GhcbPage", "es_result"]

_QWORD: Final = struct.Struct("<Q")
_REPLY: Final = struct.Struct("<QQ")
# sw_exit_code, sw_exit_info_1 and _2, sw_scratch, reserved_3b0, xcr0, valid_bitmap: one run of 70h bytes
_REQUEST: Final = struct.Struct("<QQQQ56x8xQQ")
_TRAILER: Final = struct.Struct("<HI")
_LOW: Final = 0xFFFF_FFFF_FFFF_FFFF

_EXIT_MASK: Final = valid_mask(GhcbField.SW_EXIT_CODE, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2)
_RAX_MASK: Final = valid_mask(GhcbField.RAX)
_RBX_MASK: Final = valid_mask(GhcbField.RBX)
_SCRATCH_MASK: Final = valid_mask(GhcbField.SW_SCRATCH)

# plain integers: an IntEnum member costs a call wherever it is used as a number
_REQUEST_AT: Final = int(GhcbField.SW_EXIT_CODE)
_REPLY_AT: Final = int(GhcbField.SW_EXIT_INFO_1)
_TRAILER_AT: Final = int(GhcbField.PROTOCOL_VERSION)
_RAX_AT: Final = int(GhcbField.RAX)
_RBX_AT: Final = int(GhcbField.RBX)


class EsResult(IntEnum):
    """How Linux reads a reply (enum es_result). Values above 0 reach the caller of the ioctl as they are."""

    OK = 0
    VMM_ERROR = 2
    EXCEPTION = 4


_UD: Final = 6
_GP: Final = 13
_TYPE_EXCEPTION: Final = 3
_EVENT_VALID: Final = 1 << 31


def es_result(info1: int, info2: int) -> EsResult:
    """Judge the exit information of a reply.

    Only #UD and #GP of type 3 with the valid bit count as exceptions; anything else that is not "no action"
    is a VMM error. Source: Linux, arch/x86/coco/sev, verify_exception_info.
    """
    action = info1 & 0xFFFF_FFFF
    if action == Reply.NO_ACTION:
        return EsResult.OK
    sane = info2 & _EVENT_VALID and info2 & 0xFF in (_UD, _GP) and info2 >> 8 & 7 == _TYPE_EXCEPTION
    if action == Reply.ISSUE_EXCEPTION and sane:
        return EsResult.EXCEPTION
    return EsResult.VMM_ERROR


class GhcbPage:
    """One vCPU's registered GHCB.

    Use: `ask`, then `yield` (VMGEXIT), then `reply` and, where the event returns one, `rbx`.

    Args:
        cpu: the vCPU that owns the page.
        gpa: page aligned; the page is shared.
        version: the negotiated protocol version.
    """

    __slots__ = ("_memory", "_trailer", "cpu", "gpa")

    def __init__(self, cpu: GuestCpu, gpa: int, version: int) -> None:
        self.cpu = cpu
        self.gpa = gpa
        self._memory = cpu.memory
        self._trailer = _TRAILER.pack(version, 0)

    def clear(self) -> None:
        """Zero the page, as once after it was shared."""
        self._memory.write(self.gpa, bytes(PAGE), private=False)

    def ask(
        self,
        exit_code: int,
        info1: int,
        info2: int,
        *,
        rax: int | None = None,
        rbx: int | None = None,
        scratch: int | None = None,
    ) -> None:
        """Invalidate the GHCB, put an event into it and point the MSR at it.

        What is None is marked invalid. Stale registers stay in memory, as the document allows.
        """
        write, gpa = self._memory.write, self.gpa
        mask = _EXIT_MASK
        if rax is not None:
            write(gpa + _RAX_AT, _QWORD.pack(rax), private=False)
            mask |= _RAX_MASK
        if rbx is not None:
            write(gpa + _RBX_AT, _QWORD.pack(rbx), private=False)
            mask |= _RBX_MASK
        if scratch is not None:
            mask |= _SCRATCH_MASK
        request = _REQUEST.pack(exit_code, info1, info2, scratch or 0, mask & _LOW, mask >> 64)
        write(gpa + _REQUEST_AT, request, private=False)
        write(gpa + _TRAILER_AT, self._trailer, private=False)
        self.cpu.ghcb_msr = gpa

    def reply(self) -> tuple[int, int]:
        """SW_EXITINFO1 and SW_EXITINFO2. Like Linux, this does not look at their valid bits."""
        info1, info2 = _REPLY.unpack(self._memory.read(self.gpa + _REPLY_AT, 16, private=False))
        return info1, info2

    def rbx(self) -> int:
        """RBX of the reply."""
        value: int = _QWORD.unpack(self._memory.read(self.gpa + _RBX_AT, 8, private=False))[0]
        return value

    def read_shared_buffer(self, size: int) -> bytes:
        """The first `size` bytes of the shared buffer."""
        return self._memory.read(self.gpa + GhcbField.SHARED_BUFFER, size, private=False)

    def write_shared_buffer(self, data: bytes) -> None:
        """Fill the start of the shared buffer (at most 7F0h bytes)."""
        self._memory.write(self.gpa + GhcbField.SHARED_BUFFER, data, private=False)
