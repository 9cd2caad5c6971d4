"""The memory that KVM and userspace share for one vCPU: `struct kvm_run` and two pages behind it.

KVM writes only the members that an exit has; bytes between them keep what earlier exits left.
Source: Linux, include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import (
    EXIT_UNION,
    HYPERCALL_LONG_MODE,
    MAP_GPA_RANGE,
    PIO_PAGE_OFFSET,
    VCPU_MMAP_SIZE,
    ExitHypercall,
    ExitMmio,
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
_IO: Final = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
_HYPERCALL_FLAGS: Final = EXIT_UNION + ExitHypercall.offset_of("flags")
_MMIO_DATA: Final = EXIT_UNION + ExitMmio.offset_of("data")
_MMIO_LEN: Final = EXIT_UNION + ExitMmio.offset_of("len")
_MMIO_IS_WRITE: Final = EXIT_UNION + ExitMmio.offset_of("is_write")
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
        value: int = _U32.unpack_from(self.memory, _EXIT_REASON)[0]
        return value

    @exit_reason.setter
    def exit_reason(self, value: int) -> None:
        _U32.pack_into(self.memory, _EXIT_REASON, value)

    def clear_flags(self) -> None:
        """`flags` := 0, as at each start of KVM_RUN."""
        _U16.pack_into(self.memory, _FLAGS, 0)

    def sync_regs(self) -> int:
        """kvm_valid_regs and kvm_dirty_regs together: every bit that is set in either."""
        valid: int
        dirty: int
        valid, dirty = _TWO_U64.unpack_from(self.memory, _VALID_REGS)
        return valid | dirty

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
        value: int = _BY_WIDTH[layout.ret_width].unpack_from(self.memory, layout.ret_offset)[0]
        return value

    def certs_npages(self, layout: CertExit) -> int:
        """How many pages userspace says it needs."""
        value: int = _BY_WIDTH[layout.npages_width].unpack_from(self.memory, layout.npages_offset)[0]
        return value

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
        value: int = _U64.unpack_from(self.memory, _HYPERCALL_RET)[0]
        return value

    def put_termination(self, ghcb_msr: int) -> None:
        """Fill KVM_EXIT_SYSTEM_EVENT: SEV_TERM with one datum."""
        self.exit_reason = ExitReason.SYSTEM_EVENT
        _SYSTEM_EVENT.pack_into(self.memory, EXIT_UNION, SystemEvent.SEV_TERM, 1, ghcb_msr)

    def put_memory_fault(self, gpa: int, *, private: bool) -> None:
        """Fill KVM_EXIT_MEMORY_FAULT for the 4 KiB page around `gpa`."""
        self.exit_reason = ExitReason.MEMORY_FAULT
        flags = MemoryAttribute.PRIVATE if private else 0
        _THREE_U64.pack_into(self.memory, EXIT_UNION, flags, gpa & -_PAGE_SIZE, _PAGE_SIZE)

    def put_guest_hypercall(self, args: tuple[int, int, int], *, preset_ret: bool) -> None:
        """Fill KVM_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE as the guest called it; args[3..5] stay."""
        self.exit_reason = ExitReason.HYPERCALL
        _HYPERCALL.pack_into(self.memory, EXIT_UNION, MAP_GPA_RANGE, *args)
        _U64.pack_into(self.memory, _HYPERCALL_FLAGS, HYPERCALL_LONG_MODE)
        if preset_ret:
            _U64.pack_into(self.memory, _HYPERCALL_RET, 0)

    def put_port_io(self, *, read: bool, size: int, port: int, count: int, data: bytes) -> None:
        """Fill KVM_EXIT_IO; the data page begins with `data`, or with zeros where userspace is to write."""
        self.exit_reason = ExitReason.IO
        _IO.pack_into(self.memory, EXIT_UNION, not read, size, port, count, PIO_PAGE_OFFSET)
        length = size * count
        self.memory[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + length] = bytes(length) if read else data

    def pio_data(self, length: int) -> bytes:
        """What userspace read from the port."""
        return bytes(self.memory[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + length])

    def put_mmio(self, gpa: int, length: int, data: bytes | None) -> None:
        """Fill KVM_EXIT_MMIO: a write of `data`, or a read (None) of up to 8 bytes."""
        self.exit_reason = ExitReason.MMIO
        _U64.pack_into(self.memory, EXIT_UNION, gpa)
        if data is not None:
            self.memory[_MMIO_DATA : _MMIO_DATA + length] = data
        _U32.pack_into(self.memory, _MMIO_LEN, length)
        self.memory[_MMIO_IS_WRITE] = data is not None

    def mmio_data(self, length: int) -> bytes:
        """What userspace read from the device."""
        return bytes(self.memory[_MMIO_DATA : _MMIO_DATA + length])

    def put_internal_error(self, suberror: int, data: tuple[int, ...] = ()) -> None:
        """Fill KVM_EXIT_INTERNAL_ERROR; of its data only what there is."""
        self.exit_reason = ExitReason.INTERNAL_ERROR
        _TWO_U32.pack_into(self.memory, EXIT_UNION, suberror, len(data))
        struct.pack_into(f"<{len(data)}Q", self.memory, EXIT_UNION + _TWO_U32.size, *data)

    def put_fail_entry(self, reason: int) -> None:
        """Fill KVM_EXIT_FAIL_ENTRY; the host CPU is always number 0 here."""
        self.exit_reason = ExitReason.FAIL_ENTRY
        _FAIL_ENTRY.pack_into(self.memory, EXIT_UNION, reason, 0)
