"""The memory that KVM and userspace share for one vCPU: `struct kvm_run` and two pages behind it.

KVM writes only the members that an exit has; bytes between them keep what earlier exits left.
Source: Linux, include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import (
    EXIT_UNION,
    MAP_GPA_RANGE,
    VCPU_MMAP_SIZE,
    ExitReason,
    MapGpaRange,
    MemoryAttribute,
    RunOffset,
    SystemEvent,
)

if TYPE_CHECKING:
    from swsnp.hypervisor.profiles import CertExit

__all__ = ["KvmRun"]

_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_TWO_U32: Final = struct.Struct("<II")
_TWO_U64: Final = struct.Struct("<QQ")
_THREE_U64: Final = struct.Struct("<QQQ")
_HYPERCALL: Final = struct.Struct("<QQQQ")  # nr, args[0..2]
_FAIL_ENTRY: Final = struct.Struct("<QI")
_SYSTEM_EVENT: Final = struct.Struct("<IIQ")
_BY_WIDTH: Final = {32: _U32, 64: _U64}
_EXIT_REASON: Final = int(RunOffset.EXIT_REASON)
_IMMEDIATE_EXIT: Final = int(RunOffset.IMMEDIATE_EXIT)
_FLAGS: Final = int(RunOffset.FLAGS)
_HYPERCALL_RET: Final = int(RunOffset.HYPERCALL_RET)
_VALID_REGS: Final = int(RunOffset.VALID_REGS)
_PAGE_SIZE: Final = 4096


class KvmRun:
    """KVM's side of the shared memory; `memory` is all 12,288 bytes of it."""

    __slots__ = ("memory",)

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(VCPU_MMAP_SIZE))

    @property
    def immediate_exit(self) -> bool:
        """Whether userspace wants KVM_RUN to end before the guest runs."""
        return self.memory[_IMMEDIATE_EXIT] != 0

    @property
    def exit_reason(self) -> int:
        """Why KVM_RUN returned."""
        (value,) = _U32.unpack_from(self.memory, _EXIT_REASON)
        return int(value)

    @exit_reason.setter
    def exit_reason(self, value: int) -> None:
        _U32.pack_into(self.memory, _EXIT_REASON, value)

    def clear_flags(self) -> None:
        """`flags` := 0, as at each start of KVM_RUN."""
        _U16.pack_into(self.memory, _FLAGS, 0)

    def sync_regs(self) -> int:
        """kvm_valid_regs and kvm_dirty_regs together: every bit that is set in either."""
        valid, dirty = _TWO_U64.unpack_from(self.memory, _VALID_REGS)
        return int(valid | dirty)

    def put_certs(self, layout: CertExit, gpa: int, npages: int) -> int:
        """Fill the certificate exit of a profile; `npages` is cut to the width of its field.

        Returns:
            The address as userspace sees it: a frame number or a guest physical address.
        """
        memory = self.memory
        address = gpa >> 12 if layout.address_is_gfn else gpa
        self.exit_reason = layout.exit_reason
        if layout.exit_reason == ExitReason.COCO:
            memory[EXIT_UNION] = 0  # nr: KVM_EXIT_COCO_REQ_CERTS; the padding behind it stays
        _U64.pack_into(memory, layout.address_offset, address)
        width = layout.npages_width
        _BY_WIDTH[width].pack_into(memory, layout.npages_offset, npages & ((1 << width) - 1))
        _BY_WIDTH[layout.ret_width].pack_into(memory, layout.ret_offset, 0)
        return address

    def certs_ret(self, layout: CertExit) -> int:
        """What userspace answered."""
        (value,) = _BY_WIDTH[layout.ret_width].unpack_from(self.memory, layout.ret_offset)
        return int(value)

    def certs_npages(self, layout: CertExit) -> int:
        """How many pages userspace says it needs."""
        (value,) = _BY_WIDTH[layout.npages_width].unpack_from(self.memory, layout.npages_offset)
        return int(value)

    def put_map_gpa_range(
        self, gpa: int, npages: int, *, private: bool, page_size: int, preset_ret: bool
    ) -> None:
        """Fill KVM_EXIT_HYPERCALL; args[3..5] and flags are not KVM's, `ret` only with `preset_ret`."""
        attributes = (MapGpaRange.ENCRYPTED if private else 0) | (
            MapGpaRange.PAGE_SIZE_2M if page_size > _PAGE_SIZE else 0
        )
        self.exit_reason = ExitReason.HYPERCALL
        _HYPERCALL.pack_into(self.memory, EXIT_UNION, MAP_GPA_RANGE, gpa, npages, attributes)
        if preset_ret:
            _U64.pack_into(self.memory, _HYPERCALL_RET, 0)

    def hypercall_ret(self) -> int:
        """What userspace answered to a hypercall; a value, no negative errno."""
        (value,) = _U64.unpack_from(self.memory, _HYPERCALL_RET)
        return int(value)

    def put_termination(self, ghcb_msr: int) -> None:
        """Fill KVM_EXIT_SYSTEM_EVENT: SEV_TERM with one datum."""
        self.exit_reason = ExitReason.SYSTEM_EVENT
        _SYSTEM_EVENT.pack_into(self.memory, EXIT_UNION, SystemEvent.SEV_TERM, 1, ghcb_msr)

    def put_memory_fault(self, gpa: int, *, private: bool) -> None:
        """Fill KVM_EXIT_MEMORY_FAULT for the 4 KiB page around `gpa`."""
        self.exit_reason = ExitReason.MEMORY_FAULT
        flags = MemoryAttribute.PRIVATE if private else 0
        _THREE_U64.pack_into(self.memory, EXIT_UNION, flags, gpa & -_PAGE_SIZE, _PAGE_SIZE)

    def put_internal_error(self, suberror: int) -> None:
        """Fill KVM_EXIT_INTERNAL_ERROR without data."""
        self.exit_reason = ExitReason.INTERNAL_ERROR
        _TWO_U32.pack_into(self.memory, EXIT_UNION, suberror, 0)

    def put_fail_entry(self, reason: int) -> None:
        """Fill KVM_EXIT_FAIL_ENTRY; the host CPU is always number 0 here."""
        self.exit_reason = ExitReason.FAIL_ENTRY
        _FAIL_ENTRY.pack_into(self.memory, EXIT_UNION, reason, 0)
