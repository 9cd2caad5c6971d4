"""What the firmware answers to the messages of a guest. Source: AMD 56860, chapter 7.

A handler gets a decrypted payload and returns the payload of the response; a bad request is a status in that,
not a fault of the command. A payload that is too short reads as if zeros followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from swsnp.abi.snp_command import FirmwareStatus
from swsnp.abi.snp_launch import CpuidPage
from swsnp.abi.snp_message import (
    REPORT_RSP_SIZE,
    TSC_INFO_SIZE,
    GuestFieldSelect,
    GuestFieldSelectV2,
    KeySel,
    MessageType,
    MsgCpuidHeader,
    MsgKeyReq,
    MsgKeyReqV2,
    MsgKeyRsp,
    MsgReportReq,
    MsgReportRspHeader,
    MsgTscInfoRsp,
)
from swsnp.abi.snp_migration import MsgExportReq, MsgExportRsp, MsgImportReq, MsgStatusRsp, MsgVmrkReq
from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.firmware import migration_messages
from swsnp.firmware.cpuid import check_page
from swsnp.firmware.keys import derived_key
from swsnp.firmware.launch import tsc_scale
from swsnp.firmware.report import build_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.firmware.context import GuestContext
    from swsnp.firmware.platform import Platform

__all__ = [
    "REQUESTS",
    "REQUESTS_2",
    "Request",
    "cpuid_request",
    "key_request",
    "key_request_2",
    "report_request",
    "report_response",
    "tsc_info_request",
]

Handler: TypeAlias = "Callable[[Platform, GuestContext, bytes, int], bytes]"
_VMPL_MAX: Final = 3
_VLEK_SELECTED: Final = (KeySel.VLEK_ELSE_VCEK, KeySel.VLEK)
_REPORT_OK: Final = bytes(MsgReportRspHeader(status=FirmwareStatus.SUCCESS, report_size=REPORT_SIZE))
_NO_REPORT: Final = bytes(REPORT_SIZE)


class Request(NamedTuple):
    """One kind of request: payload size, size of the response's payload (0: as the request's), what answers.

    The handler is given platform, guest, payload and the number of the VMPCK it came under. `signs`: the
    handler changes nothing, and other commands may run before it is done.
    """

    size: int
    response_size: int
    handler: Handler
    signs: bool = False


def _key_sel_status(platform: Platform, guest: GuestContext, key_sel: int) -> FirmwareStatus:
    """INVALID_KEY: 3; 2 without VLEK; 1 with VCEK_DIS; 0 with VCEK_DIS and no VLEK."""
    if key_sel == KeySel.VCEK:
        usable = not guest.vcek_dis
    elif platform.chip.variables.vlek is not None:
        usable = key_sel in _VLEK_SELECTED
    else:
        usable = key_sel == KeySel.VLEK_ELSE_VCEK and not guest.vcek_dis
    return FirmwareStatus.SUCCESS if usable else FirmwareStatus.INVALID_KEY


def _vmpl_allowed(platform: Platform, vmpl: int, vmpck: int) -> bool:
    return vmpl >= vmpck and (vmpl <= _VMPL_MAX or not platform.chip.settings.strict_vmpl)


def report_request(platform: Platform, guest: GuestContext, payload: bytes, vmpck: int) -> bytes:
    """MSG_REPORT_REQ: a report in MSG_REPORT_RSP.

    1. Reserved bits: INVALID_PARAM.
    2. KEY_SEL not usable: INVALID_KEY.
    3. VMPL below the VMPCK's, or (AMD 56860, not firmware 1.55) above 3: INVALID_PARAM.

    On error the report is zero, REPORT_SIZE is given all the same.
    """
    request = MsgReportReq.parse(payload[: MsgReportReq.SIZE].ljust(MsgReportReq.SIZE, b"\0"))
    if request.flags.unnamed() or any(request.reserved_48):
        return _no_report(FirmwareStatus.INVALID_PARAM)
    allowed = _vmpl_allowed(platform, request.vmpl, vmpck)
    return report_response(
        platform,
        guest,
        vmpl=request.vmpl if allowed else None,
        report_data=request.report_data,
        key_sel=request.flags.key_sel,
    )


def report_response(
    platform: Platform, guest: GuestContext, *, vmpl: int | None, report_data: bytes, key_sel: int
) -> bytes:
    """MSG_REPORT_RSP, 4C0h bytes.

    A KEY_SEL that is not usable: INVALID_KEY; after that a VMPL that is not allowed (None): INVALID_PARAM.
    """
    status = _key_sel_status(platform, guest, key_sel)
    if status is not FirmwareStatus.SUCCESS:
        return _no_report(status)
    if vmpl is None:
        return _no_report(FirmwareStatus.INVALID_PARAM)
    return _REPORT_OK + build_report(platform, guest, vmpl=vmpl, report_data=report_data, key_sel=key_sel)


def _no_report(status: FirmwareStatus) -> bytes:
    return bytes(MsgReportRspHeader(status=status, report_size=REPORT_SIZE)) + _NO_REPORT


def _key_status(
    platform: Platform, guest: GuestContext, request: MsgKeyReq, vmpck: int, select: GuestFieldSelect
) -> FirmwareStatus:
    flags = request.flags
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
    request = MsgKeyReq.parse(payload[: MsgKeyReq.SIZE].ljust(MsgKeyReq.SIZE, b"\0"))
    status = _key_status(platform, guest, request, vmpck, request.guest_field_select)
    if status is not FirmwareStatus.SUCCESS:
        return bytes(MsgKeyRsp(status=status))
    key = derived_key(_root(platform, guest, request), guest, request)
    return bytes(MsgKeyRsp(derived_key=key))


def key_request_2(platform: Platform, guest: GuestContext, payload: bytes, vmpck: int) -> bytes:
    """MSG_KEY_REQ version 2: as version 1, and the key may be bound to a LAUNCH_MIT_VECTOR.

    A vector with a bit that the guest's own does not have: INVALID_PARAM (UNVERIFIED; modelled after
    TCB_VERSION, which may not exceed the committed one).
    """
    whole = MsgKeyReqV2.parse(payload[: MsgKeyReqV2.SIZE].ljust(MsgKeyReqV2.SIZE, b"\0"))
    request, vector = whole.version_1, whole.launch_mit_vector
    select = GuestFieldSelectV2(request.guest_field_select)
    status = _key_status(platform, guest, request, vmpck, select)
    if any(whole.reserved_28) or (select.launch_mit_vector and vector & ~guest.launch_mit_vector):
        status = status or FirmwareStatus.INVALID_PARAM
    if status is not FirmwareStatus.SUCCESS:
        return bytes(MsgKeyRsp(status=status))
    bound_to = vector if select.launch_mit_vector else 0
    key = derived_key(_root(platform, guest, request), guest, request, launch_mit_vector=bound_to)
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


def cpuid_request(platform: Platform, _guest: GuestContext, payload: bytes, _vmpck: int) -> bytes:
    """MSG_CPUID_REQ: the entries as the firmware would have them; the response is as long as the request.

    COUNT above 64, or reserved bits: INVALID_PARAM, COUNT 0, nothing is corrected. An entry that had to be
    corrected: INVALID_PARAM with the whole corrected list.
    """
    page = CpuidPage.parse(payload.ljust(CpuidPage.SIZE, b"\0"))
    checked = check_page(page, platform.chip)
    walked = checked.accepted or checked.page is not page
    header = MsgCpuidHeader(
        count_or_status=FirmwareStatus.SUCCESS if checked.accepted else FirmwareStatus.INVALID_PARAM,
        count=page.count if walked else 0,
    )
    return (bytes(header) + checked.page.functions)[: len(payload)].ljust(len(payload), b"\0")


def tsc_info_request(platform: Platform, guest: GuestContext, payload: bytes, _vmpck: int) -> bytes:
    """MSG_TSC_INFO_REQ: scale, offset, factor of the guest's time stamp counter; not zero: INVALID_PARAM."""
    if any(payload[:TSC_INFO_SIZE]):
        return bytes(MsgTscInfoRsp(status=FirmwareStatus.INVALID_PARAM))
    return bytes(
        MsgTscInfoRsp(
            guest_tsc_scale=tsc_scale(guest.desired_tsc_khz),
            guest_tsc_offset=guest.psp_tsc_offset,
            tsc_factor=platform.chip.settings.tsc_factor,
        )
    )


_STATUS: Final = MsgStatusRsp.SIZE
_CONTEXT: Final = MsgImportReq.SIZE
REQUESTS: Final[dict[int, Request]] = {
    MessageType.CPUID_REQ: Request(MsgCpuidHeader.SIZE, 0, cpuid_request),
    MessageType.KEY_REQ: Request(MsgKeyReq.SIZE, MsgKeyRsp.SIZE, key_request),
    MessageType.REPORT_REQ: Request(MsgReportReq.SIZE, REPORT_RSP_SIZE, report_request, signs=True),
    MessageType.EXPORT_REQ: Request(MsgExportReq.SIZE, MsgExportRsp.SIZE, migration_messages.export),
    MessageType.IMPORT_REQ: Request(_CONTEXT, _STATUS, migration_messages.import_),
    MessageType.ABSORB_REQ: Request(_CONTEXT, _STATUS, migration_messages.absorb),
    MessageType.VMRK_REQ: Request(MsgVmrkReq.SIZE, _STATUS, migration_messages.vmrk),
    MessageType.ABSORB_NOMA_REQ: Request(_CONTEXT, _STATUS, migration_messages.absorb_noma),
    MessageType.TSC_INFO_REQ: Request(TSC_INFO_SIZE, TSC_INFO_SIZE, tsc_info_request),
}
"""The requests that are answered, MSG_VERSION 1."""
REQUESTS_2: Final[dict[int, Request]] = {
    MessageType.KEY_REQ: Request(MsgKeyReqV2.SIZE, MsgKeyRsp.SIZE, key_request_2),
}
"""Requests that have a MSG_VERSION 2; whether a chip knows it is one of its settings."""
