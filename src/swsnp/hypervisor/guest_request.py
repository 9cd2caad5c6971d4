"""Guest requests: from the event to the firmware and back, with the way through userspace for certificates.

Source: AMD 56421 (GHCB 2.0), SNP Guest Request and SNP Extended Guest Request; Linux,
arch/x86/kvm/svm/sev.c, snp_handle_guest_req and snp_handle_ext_guest_req; the series of June 2024.
"""

from __future__ import annotations

import errno
import logging
import struct
from typing import TYPE_CHECKING, Final, assert_never

from swsnp import trace
from swsnp.abi.ghcb import CertTableEntry, VmmError
from swsnp.abi.snp_command import Command
from swsnp.abi.snp_message import MSG_TYPE_OFFSET, MessageType
from swsnp.hardware import BusError
from swsnp.hypervisor.outcomes import RESUMED, CertsWanted, VmmErrno
from swsnp.hypervisor.profiles import FirmwareErrors, RequestPages

if TYPE_CHECKING:
    from swsnp.hypervisor.neighbours import SevContext
    from swsnp.hypervisor.outcomes import Outcome
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.hypervisor.vmgexit import GhcbEvent

__all__ = ["complete", "extended", "plain", "put_certs_exit"]

_logger = logging.getLogger(__name__)

_PAGE: Final = 4096
_IN_PAGE: Final = _PAGE - 1
_COMMAND: Final = struct.Struct("<QQQ")  # SNP_GUEST_REQUEST: context, request, response
_GUEST_REQUEST: Final = int(Command.SNP_GUEST_REQUEST)
_REPORT_REQ: Final = int(MessageType.REPORT_REQ)
_EMPTY_TABLE: Final = bytes(CertTableEntry.SIZE)
_INVALID_LEN: Final = VmmError.INVALID_LEN << 32
_BUSY: Final = VmmError.BUSY << 32
_NOT_POSSIBLE: Final = VmmErrno(-errno.EINVAL)
_NO_ACCESS: Final = VmmErrno(-errno.EIO)


def plain(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Serve SNP Guest Request: exit info 1 is the request's address, exit info 2 the response's."""
    refused = _check_pages(vcpu, event)
    return _send(vcpu, event) if refused is None else refused


def extended(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Serve SNP Extended Guest Request: as `plain`, and for a report request certificates at RAX.

    The type of the message is read here, apart from the message itself: a guest that changes it in between
    only changes who supplies its certificates.

    Returns:
        `CertsWanted` when userspace has asked to be asked; `complete` goes on from there.
    """
    vm = vcpu.vm
    if (refused := _check_pages(vcpu, event)) is not None:
        return refused
    try:
        msg_type = vm.memory.host_read(event.info1 + MSG_TYPE_OFFSET, 1)[0]
    except BusError:
        return _no_ext_access(vcpu, event)
    if msg_type != _REPORT_REQ:
        return _send(vcpu, event)
    if not event.has_cert_buffer() or event.rax & _IN_PAGE:
        if (error := vm.profile.bad_cert_buffer_error) is not None:
            return event.refuse(error)
        return _generic(vcpu, event)
    layout = vm.profile.cert_exit
    if layout is not None and (vm.coco_mask & 1 if vm.profile.cap_exit_coco else vm.req_certs):
        return CertsWanted(event.rax, event.rbx, layout, event)
    if event.rbx:
        try:
            vm.memory.host_write(event.rax, _EMPTY_TABLE)
        except BusError:
            return _no_ext_access(vcpu, event)
    return _send(vcpu, event)


def put_certs_exit(vcpu: Vcpu, wanted: CertsWanted) -> None:
    """Fill `kvm_run` for a certificate exit."""
    layout = wanted.layout
    address = vcpu.run.put_certs(layout, wanted.gpa, wanted.npages)
    if (emit := vcpu.vm.trace.emit) is not None:
        emit(
            trace.CertsWanted(
                vm=vcpu.vm.name,
                vcpu=vcpu.id,
                exit_reason=layout.exit_reason,
                address=address,
                npages=vcpu.run.certs_npages(layout),
            )
        )


def complete(vcpu: Vcpu, wanted: CertsWanted, ret: int) -> Outcome:
    """Go on with an extended guest request after userspace was asked for certificates.

    The event's saved fields are used, the request page is read only now. What userspace wrote to the
    certificate buffer, if anything, is not looked at.

    Args:
        vcpu: whose request it is.
        wanted: the request that was left.
        ret: what userspace answered, read once.

    Returns:
        The request's end; VmmErrno for an answer that the profile does not know. Never CertsWanted.
    """
    event, layout = wanted.event, wanted.layout
    if ret == layout.ok:
        return _send(vcpu, event)
    if ret == layout.too_small:
        event.rbx = vcpu.run.certs_npages(layout)
        event.answer(_INVALID_LEN)
        return RESUMED
    if ret == layout.retry:
        event.answer(_BUSY)
        return RESUMED
    if ret == layout.generic or layout.unknown_ret == "generic":
        return _generic(vcpu, event)
    _logger.warning(
        "%s vCPU %d: certificate exit: ret is %d, wanted 0, %s, %s or %s",
        vcpu.vm.name,
        vcpu.id,
        ret,
        layout.too_small,
        layout.retry,
        layout.generic,
    )
    return _NOT_POSSIBLE


def _check_pages(vcpu: Vcpu, event: GhcbEvent) -> Outcome | None:
    """Refuse misaligned or equal request and response addresses; None when they are in order."""
    if (event.info1 | event.info2) & _IN_PAGE:
        error = vcpu.vm.profile.misaligned_request_error
        return _NOT_POSSIBLE if error is None else event.refuse(error)
    if event.info1 == event.info2 and (error := vcpu.vm.profile.equal_request_pages_error) is not None:
        return event.refuse(error)
    return None


def _generic(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    event.answer(vcpu.vm.profile.generic_vmm_error << 32)
    return RESUMED


def _no_ext_access(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """The type byte cannot be read, or the empty table not written."""
    error = vcpu.vm.profile.ext_access_errno
    return _generic(vcpu, event) if error is None else VmmErrno(error)


def _send(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    sev = vcpu.vm.sev
    if sev is None or sev.gctx is None:
        return _NOT_POSSIBLE
    if vcpu.vm.profile.request_pages is RequestPages.BOUNCE:
        return _send_by_bounce_pages(vcpu, event, sev, sev.gctx)
    return _send_guest_pages(vcpu, event, sev, sev.gctx)


def _send_by_bounce_pages(vcpu: Vcpu, event: GhcbEvent, sev: SevContext, gctx: int) -> Outcome:
    vm = vcpu.vm
    memory, system = vm.memory, vm.driver.memory
    with sev.request_mutex:
        try:
            system.write(sev.request_page, memory.host_read(event.info1, _PAGE))
        except BusError:
            return _NO_ACCESS
        command = _COMMAND.pack(gctx, sev.request_page, sev.response_page)
        result = vm.driver.issue_by_fd(vm.task, sev.sev_fd, _GUEST_REQUEST, command)
        if result.ret and not result.fw:
            return VmmErrno(result.ret)
        try:
            # also after a firmware status: the guest then sees what the page held before
            memory.host_write(event.info2, system.view(sev.response_page, _PAGE))
        except BusError:
            return _NO_ACCESS
    event.answer(result.fw)
    return RESUMED


def _send_guest_pages(vcpu: Vcpu, event: GhcbEvent, sev: SevContext, gctx: int) -> Outcome:
    """As the series did: the firmware gets the guest's own pages, nothing serialises requests."""
    vm = vcpu.vm
    try:
        request = vm.memory.host_page_address(event.info1)
    except BusError:
        return _NOT_POSSIBLE
    try:
        response = vm.memory.host_page_address(event.info2)
    except BusError:
        # The series returns a positive EINVAL here: the guest is resumed and sees success.
        _logger.error("%s vCPU %d: no response page at %#x", vm.name, vcpu.id, event.info2)
        return RESUMED
    if vm.driver.make_firmware(response):
        return _NOT_POSSIBLE
    command = _COMMAND.pack(gctx, request, response)
    result = vm.driver.issue_by_fd(vm.task, sev.sev_fd, _GUEST_REQUEST, command)
    handling = vm.profile.firmware_errors
    if result.ret and handling is FirmwareErrors.ALL_TO_VMM:
        _logger.error("%s vCPU %d: response page %#x stays with the firmware", vm.name, vcpu.id, response)
        return VmmErrno(result.ret)
    if vm.driver.reclaim(response):
        _logger.error("%s vCPU %d: response page %#x is leaked", vm.name, vcpu.id, response)
        return _NO_ACCESS
    if handling is FirmwareErrors.ALL_TO_GUEST:
        vmm_error = vm.profile.generic_vmm_error if result.ret else 0
        event.answer(vmm_error << 32 | result.fw)
    elif handling is FirmwareErrors.ALL_TO_VMM or handling is FirmwareErrors.STATUS_TO_GUEST:
        event.answer(result.fw)
    else:
        assert_never(handling)
    return RESUMED
