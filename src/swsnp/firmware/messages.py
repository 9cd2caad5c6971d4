"""What the firmware answers to the messages of a guest. Source: AMD 56860, chapter 7.

A handler gets a decrypted payload and returns the payload of the response; a bad request is a status in that,
not a fault of the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from swsnp.abi.snp_command import FirmwareStatus
from swsnp.abi.snp_message import (
    REPORT_RSP_SIZE,
    KeySel,
    MessageType,
    MsgKeyReq,
    MsgKeyRsp,
    MsgReportReq,
    MsgReportRspHeader,
)
from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.firmware.keys import derived_key
from swsnp.firmware.report import build_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.firmware.context import GuestContext
    from swsnp.firmware.platform import Platform

__all__ = ["HIGHEST_VERSION", "REQUESTS", "Request", "key_request", "report_request"]

Handler: TypeAlias = "Callable[[Platform, GuestContext, bytes, int], bytes]"
_VMPL_MAX: Final = 3
_REPORT_OK: Final = bytes(MsgReportRspHeader(status=FirmwareStatus.SUCCESS, report_size=REPORT_SIZE))
_NO_REPORT: Final = bytes(REPORT_SIZE)


class Request(NamedTuple):
    """One kind of request: payload size, size of the response's payload, what answers it.

    The handler is given platform, guest, payload and the number of the VMPCK it came under.
    """

    size: int
    response_size: int
    handler: Handler


def _key_sel_status(platform: Platform, guest: GuestContext, key_sel: int) -> FirmwareStatus:
    """INVALID_KEY: 3; 2 without VLEK; 1 with VCEK_DIS; 0 with VCEK_DIS and no VLEK."""
    has_vlek = platform.chip.variables.vlek is not None
    usable = {
        KeySel.VLEK_ELSE_VCEK: has_vlek or not guest.vcek_dis,
        KeySel.VCEK: not guest.vcek_dis,
        KeySel.VLEK: has_vlek,
    }
    return FirmwareStatus.SUCCESS if usable.get(key_sel, False) else FirmwareStatus.INVALID_KEY  # type: ignore[call-overload]  # any int may come


def _vmpl_allowed(platform: Platform, vmpl: int, vmpck: int) -> bool:
    return vmpl >= vmpck and (vmpl <= _VMPL_MAX or not platform.chip.settings.strict_vmpl)


def _report_status(
    platform: Platform, guest: GuestContext, request: MsgReportReq, vmpck: int
) -> FirmwareStatus:
    if request.flags.unnamed() or any(request.reserved_48):
        return FirmwareStatus.INVALID_PARAM
    status = _key_sel_status(platform, guest, request.flags.key_sel)
    if status is not FirmwareStatus.SUCCESS:
        return status
    allowed = _vmpl_allowed(platform, request.vmpl, vmpck)
    return FirmwareStatus.SUCCESS if allowed else FirmwareStatus.INVALID_PARAM


def report_request(platform: Platform, guest: GuestContext, payload: bytes, vmpck: int) -> bytes:
    """MSG_REPORT_REQ: a report in MSG_REPORT_RSP.

    1. Reserved bits: INVALID_PARAM.
    2. KEY_SEL not usable: INVALID_KEY.
    3. VMPL below the VMPCK's, or (AMD 56860, not firmware 1.55) above 3: INVALID_PARAM.

    On error the report is zero, REPORT_SIZE is given all the same.
    """
    request = MsgReportReq.parse(payload)
    status = _report_status(platform, guest, request, vmpck)
    if status is not FirmwareStatus.SUCCESS:
        return bytes(MsgReportRspHeader(status=status, report_size=REPORT_SIZE)) + _NO_REPORT
    return _REPORT_OK + build_report(
        platform,
        guest,
        vmpl=request.vmpl,
        report_data=request.report_data,
        key_sel=request.flags.key_sel,
    )


def _key_status(platform: Platform, guest: GuestContext, request: MsgKeyReq, vmpck: int) -> FirmwareStatus:
    flags, select = request.flags, request.guest_field_select
    if flags.unnamed() or any(request.reserved_04):
        return FirmwareStatus.INVALID_PARAM
    if not flags.root_key_select:
        if platform.chip.variables.mask_chip_key:
            return FirmwareStatus.INVALID_KEY
        status = _key_sel_status(platform, guest, flags.key_sel)
        if status is not FirmwareStatus.SUCCESS:
            return status
    refused = (
        not _vmpl_allowed(platform, request.vmpl, vmpck)
        or select.unnamed()
        or (select.tcb_version and not platform.chip.may_derive(request.tcb_version))
        or (select.guest_svn and request.guest_svn > guest.id_block.guest_svn)
    )
    return FirmwareStatus.INVALID_PARAM if refused else FirmwareStatus.SUCCESS


def key_request(platform: Platform, guest: GuestContext, payload: bytes, vmpck: int) -> bytes:
    """MSG_KEY_REQ version 1: a derived key in MSG_KEY_RSP.

    1. Reserved bits: INVALID_PARAM.
    2. Root VCEK/VLEK: MASK_CHIP_KEY, then KEY_SEL not usable: INVALID_KEY.
    3. VMPL as for reports: INVALID_PARAM.
    4. Bits of GUEST_FIELD_SELECT without meaning: INVALID_PARAM.
    5. TCB_VERSION selected and a component above the committed TCB, or reserved bytes: INVALID_PARAM.
    6. GUEST_SVN selected and above the ID block's: INVALID_PARAM.

    On error the key is zero.
    """
    request = MsgKeyReq.parse(payload)
    status = _key_status(platform, guest, request, vmpck)
    if status is not FirmwareStatus.SUCCESS:
        return bytes(MsgKeyRsp(status=status))
    key = derived_key(_root(platform, guest, request), guest, request)
    return bytes(MsgKeyRsp(derived_key=key))


def _root(platform: Platform, guest: GuestContext, request: MsgKeyReq) -> bytes:
    if request.flags.root_key_select:
        return guest.vmrk
    chip = platform.chip
    vlek = chip.variables.vlek
    if request.flags.key_sel != KeySel.VCEK and vlek is not None:
        return vlek.root  # not derived again for the requested TCB: only its issuer could
    selected = request.guest_field_select.tcb_version
    return chip.vcek_root(request.tcb_version if selected else chip.reported_tcb)


REQUESTS: Final[dict[int, Request]] = {
    MessageType.KEY_REQ: Request(MsgKeyReq.SIZE, MsgKeyRsp.SIZE, key_request),
    MessageType.REPORT_REQ: Request(MsgReportReq.SIZE, REPORT_RSP_SIZE, report_request),
}
"""The requests that are answered.

CPUID, EXPORT, IMPORT, ABSORB, ABSORB_NOMA, VMRK and TSC_INFO are absent: refused like an unknown type.
"""
HIGHEST_VERSION: Final = 1
"""Highest MSG_VERSION of every request, and MSG_VERSION of every response."""
