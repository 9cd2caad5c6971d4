"""A VMGEXIT from the GHCB page to its handler: snapshot, the checks in KVM's order, dispatch.

Source: AMD 56421 (GHCB 2.0); Linux, arch/x86/kvm/svm/sev.c, sev_handle_vmgexit.
"""

from __future__ import annotations

import errno
import logging
import struct
from typing import TYPE_CHECKING, Final

from swsnp import trace
from swsnp.abi.ghcb import (
    EVENT_INPUTS,
    PAGE,
    ApJumpTable,
    ExitCode,
    GhcbError,
    GhcbField,
    Reply,
    describe_termination,
    field_bit,
    valid_mask,
)
from swsnp.abi.kvm import VmType
from swsnp.hardware import BusError
from swsnp.hypervisor import ap_creation, device_io, guest_request, instructions, msr_protocol, page_state
from swsnp.hypervisor.outcomes import RESUMED, ResetHold, Terminated, VmmErrno
from swsnp.hypervisor.startup import Hold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from swsnp.hypervisor.outcomes import Outcome
    from swsnp.hypervisor.vcpu import Vcpu

__all__ = ["GhcbEvent", "handle"]

_logger = logging.getLogger(__name__)


def _snapshot_format() -> str:
    """`struct` format of the fields below, in order of offset, with the gaps between them."""
    wanted = [
        (GhcbField.RAX, 1),
        (GhcbField.RCX, 3),  # RCX, RDX, RBX
        (GhcbField.SW_EXIT_CODE, 4),  # code, info 1, info 2, scratch
        (GhcbField.VALID_BITMAP, 2),
    ]
    text, at = "<", 0
    for offset, count in wanted:
        text += f"{offset - at}x{count}Q"
        at = offset + 8 * count
    return text


_SNAPSHOT: Final = struct.Struct(_snapshot_format())
_USAGE: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_TWO_U64: Final = struct.Struct("<QQ")
_THREE_U64: Final = struct.Struct("<QQQ")
_NO_BITS: Final = bytes(16)

_RAX: Final = int(GhcbField.RAX)
_RCX: Final = int(GhcbField.RCX)
_INFO: Final = int(GhcbField.SW_EXIT_INFO_1)
_BITMAP: Final = int(GhcbField.VALID_BITMAP)
_USAGE_AT: Final = int(GhcbField.GHCB_USAGE)


def _byte_and_bits(*offsets: int) -> tuple[int, int]:
    """Where in the page the valid bits of these fields lie: one byte's offset, and the bits in it."""
    where = {_BITMAP + field_bit(each) // 8 for each in offsets}
    mask = 0
    for each in offsets:
        mask |= 1 << field_bit(each) % 8
    (byte,) = where
    return byte, mask


_RAX_BYTE, _RAX_BIT = _byte_and_bits(GhcbField.RAX)
_RCX_BYTE, _RCX_BITS = _byte_and_bits(GhcbField.RCX, GhcbField.RDX, GhcbField.RBX)
_INFO_BYTE, _INFO_BITS = _byte_and_bits(GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2)

_BIT_RAX: Final = valid_mask(GhcbField.RAX)
_BIT_RCX: Final = valid_mask(GhcbField.RCX)
_BIT_RDX: Final = valid_mask(GhcbField.RDX)
_BIT_RBX: Final = valid_mask(GhcbField.RBX)
_BIT_CODE: Final = valid_mask(GhcbField.SW_EXIT_CODE)
_BIT_INFO_1: Final = valid_mask(GhcbField.SW_EXIT_INFO_1)
_BIT_INFO_2: Final = valid_mask(GhcbField.SW_EXIT_INFO_2)
_BIT_SCRATCH: Final = valid_mask(GhcbField.SW_SCRATCH)
_BIT_XCR0: Final = valid_mask(GhcbField.XCR0)
_EXIT_FIELDS: Final = _BIT_CODE | _BIT_INFO_1 | _BIT_INFO_2
_CERT_BUFFER: Final = _BIT_RAX | _BIT_RBX
_ALL_USED: Final = _EXIT_FIELDS | _BIT_RAX | _BIT_RCX | _BIT_RDX | _BIT_RBX | _BIT_SCRATCH


class GhcbEvent:
    """What KVM keeps of a VMGEXIT: the registers, the exit fields, and the page to answer in.

    The page is read once. Fields without their valid bit count as zero. CPL is read by VMMCALL; of XCR0
    only the valid bit is looked at, RSI and XSS have no use here. `outside` is a scratch area beyond the
    page: its address and the copy that goes back at the next entry.
    """

    __slots__ = (
        "code",
        "gpa",
        "info1",
        "info2",
        "outside",
        "page",
        "rax",
        "rbx",
        "rcx",
        "rdx",
        "reply_info1",
        "reply_info2",
        "scratch",
        "valid",
    )

    def __init__(self, page: memoryview, gpa: int) -> None:
        rax, rcx, rdx, rbx, code, info1, info2, scratch, low, high = _SNAPSHOT.unpack_from(page)
        valid = high << 64 | low
        page[_BITMAP : _BITMAP + 16] = _NO_BITS
        self.page = page
        self.gpa = gpa
        self.outside: tuple[int, memoryview] | None = None
        self.valid: int = valid
        self.rax, self.rcx, self.rdx, self.rbx = rax, rcx, rdx, rbx
        self.code, self.info1, self.info2, self.scratch = code, info1, info2, scratch
        self.reply_info1, self.reply_info2 = info1, info2
        if valid & _ALL_USED != _ALL_USED:
            self._drop_unmarked(valid)

    def _drop_unmarked(self, valid: int) -> None:
        if not valid & _BIT_RAX:
            self.rax = 0
        if not valid & _BIT_RCX:
            self.rcx = 0
        if not valid & _BIT_RDX:
            self.rdx = 0
        if not valid & _BIT_RBX:
            self.rbx = 0
        if not valid & _BIT_CODE:
            self.code = 0
        if not valid & _BIT_INFO_1:
            self.info1 = 0
        if not valid & _BIT_INFO_2:
            self.info2 = 0
        if not valid & _BIT_SCRATCH:
            self.scratch = 0

    def has_cert_buffer(self) -> bool:
        """Whether RAX and RBX are marked valid."""
        return self.valid & _CERT_BUFFER == _CERT_BUFFER

    def answer(self, info2: int, info1: int = 0) -> None:
        """Store both exit info fields in the page, with their valid bits."""
        page = self.page
        _TWO_U64.pack_into(page, _INFO, info1, info2)
        page[_INFO_BYTE] |= _INFO_BITS
        self.reply_info1, self.reply_info2 = info1, info2

    def refuse(self, reason: int) -> Outcome:
        """Answer that the input is malformed; `reason` is a `GhcbError`."""
        self.answer(reason, Reply.MALFORMED_INPUT)
        return RESUMED

    def write_back(self) -> None:
        """Give RAX, RBX, RCX and RDX back, with their valid bits: just before the guest is entered."""
        page = self.page
        _U64.pack_into(page, _RAX, self.rax)
        _THREE_U64.pack_into(page, _RCX, self.rcx, self.rdx, self.rbx)
        page[_RAX_BYTE] |= _RAX_BIT
        page[_RCX_BYTE] |= _RCX_BITS


def handle(vcpu: Vcpu) -> Outcome:
    """Take the VMGEXIT that the processor reported.

    Args:
        vcpu: whose GHCB MSR says where the request is; its `event` is replaced by that request.

    Returns:
        How it ends; `RESUMED` with the answer in the page (or in the MSR) when KVM has served it.
    """
    msr = vcpu.processor.ghcb_msr
    if msr & 0xFFF:
        return msr_protocol.handle(vcpu, msr)
    vm = vcpu.vm
    try:
        page = vm.memory.host_view(msr, PAGE) if msr else None
    except BusError:
        page = None
    if page is None or page.readonly:
        _logger.warning("%s vCPU %d: GHCB at %#x cannot be mapped; resumed unanswered", vm.name, vcpu.id, msr)
        return RESUMED
    vcpu.event = event = GhcbEvent(page, msr)
    if (emit := vm.trace.emit) is not None:
        emit(
            trace.Vmgexit(
                vm=vm.name,
                vcpu=vcpu.id,
                exit_code=event.code,
                info1=event.info1,
                info2=event.info2,
                rax=event.rax,
                rbx=event.rbx,
            )
        )
    return _checked(vcpu, event)


def _checked(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Run the checks that come before every handler, in KVM's order, then the handler."""
    vm, code = vcpu.vm, event.code
    is_snp = vm.vm_type == VmType.SNP
    if is_snp and event.gpa != vcpu.registered_ghcb:
        _logger.warning("%s vCPU %d: GHCB at %#x is not registered", vm.name, vcpu.id, event.gpa)
        if (error := vm.profile.unregistered_ghcb_errno) is not None:
            return VmmErrno(error)
        return event.refuse(GhcbError.NOT_REGISTERED)
    if _USAGE.unpack_from(event.page, _USAGE_AT)[0]:
        return event.refuse(GhcbError.INVALID_USAGE)
    if not is_snp and code in _SNP_ONLY:
        return event.refuse(vm.profile.snp_only_event_error)
    required = _REQUIRED.get(code, _EXIT_FIELDS)
    if (more := _CONDITIONAL.get(code)) is not None:
        required |= more(event)
    if event.valid & required != required:
        return event.refuse(GhcbError.MISSING_INPUT)
    handler = _HANDLERS.get(code)
    if handler is None:
        return event.refuse(GhcbError.INVALID_EVENT)
    event.answer(0)
    return handler(vcpu, event)


_SNP_ONLY: Final = frozenset(
    {ExitCode.PSC, ExitCode.GUEST_REQUEST, ExitCode.EXT_GUEST_REQUEST, ExitCode.AP_CREATION}
)

_REQUIRED: Final[Mapping[int, int]] = {
    code: _EXIT_FIELDS | valid_mask(*fields) for code, fields in EVENT_INPUTS.items()
}


def _cpuid_inputs(event: GhcbEvent) -> int:
    return _BIT_XCR0 if event.rax == 0xD else 0


def _ioio_inputs(event: GhcbEvent) -> int:
    string, read = event.info1 & 1 << 2, event.info1 & 1
    if string:
        return _BIT_SCRATCH
    return 0 if read else _BIT_RAX


def _msr_inputs(event: GhcbEvent) -> int:
    return _BIT_RAX | _BIT_RDX if event.info1 else 0


def _ap_creation_inputs(event: GhcbEvent) -> int:
    return 0 if event.info1 & 0xFFFFFFFF == ap_creation.Request.DESTROY else _BIT_RAX


_CONDITIONAL: Final[Mapping[int, Callable[[GhcbEvent], int]]] = {
    ExitCode.CPUID: _cpuid_inputs,
    ExitCode.IOIO: _ioio_inputs,
    ExitCode.MSR: _msr_inputs,
    ExitCode.AP_CREATION: _ap_creation_inputs,
}


def _unsupported(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    _logger.error(
        "%s vCPU %d: the guest met an event that it does not support: info 1 %#x, info 2 %#x",
        vcpu.vm.name,
        vcpu.id,
        event.info1,
        event.info2,
    )
    return VmmErrno(-errno.EINVAL)


def _features(_: Vcpu, event: GhcbEvent) -> Outcome:
    event.answer(msr_protocol.FEATURES)
    return RESUMED


def _terminate(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    # Userspace is told only the GHCB's address. The reason is in KVM's log and nowhere else: the page's
    # exit info fields were set to 0 before any handler ran.
    reason = describe_termination(event.gpa, event.info1)
    _logger.info("%s vCPU %d: the guest ends: %s (%#x)", vcpu.vm.name, vcpu.id, reason, event.info1)
    return Terminated(vcpu.processor.ghcb_msr)


def _nothing(_: Vcpu, __: GhcbEvent) -> Outcome:
    return RESUMED


def _hold(vcpu: Vcpu, _: GhcbEvent) -> Outcome:
    vcpu.startup.hold(Hold.PAGE)
    return ResetHold()


def _jump_table(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """SEV-ES guests keep the address of their APs' entry points here; KVM lets SNP guests do so too."""
    sev = vcpu.vm.sev
    if sev is not None and event.info1 == ApJumpTable.SET:
        sev.ap_jump_table = event.info2
    elif sev is not None and event.info1 == ApJumpTable.GET:
        event.answer(sev.ap_jump_table)
    else:
        return event.refuse(GhcbError.INVALID_INPUT)
    return RESUMED


_HANDLERS: Final[Mapping[int, Callable[[Vcpu, GhcbEvent], Outcome]]] = {
    ExitCode.GUEST_REQUEST: guest_request.plain,
    ExitCode.EXT_GUEST_REQUEST: guest_request.extended,
    ExitCode.PSC: page_state.begin,
    ExitCode.AP_CREATION: ap_creation.handle,
    ExitCode.HV_FEATURES: _features,
    ExitCode.TERM_REQUEST: _terminate,
    ExitCode.UNSUPPORTED_EVENT: _unsupported,
    ExitCode.NMI_COMPLETE: _nothing,
    ExitCode.AP_HLT_LOOP: _hold,
    ExitCode.AP_JUMP_TABLE: _jump_table,
    ExitCode.MMIO_READ: device_io.mmio,
    ExitCode.MMIO_WRITE: device_io.mmio,
    ExitCode.IOIO: device_io.port_io,
    ExitCode.CPUID: instructions.cpuid,
    ExitCode.MSR: instructions.msr,
    ExitCode.RDPMC: instructions.rdpmc,
    ExitCode.RDTSC: instructions.rdtsc,
    ExitCode.RDTSCP: instructions.rdtscp,
    ExitCode.VMMCALL: instructions.vmmcall,
    **dict.fromkeys(instructions.NO_OPERATIONS, instructions.no_operation),
}
