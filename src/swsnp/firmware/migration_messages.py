"""Messages that move guests: EXPORT, IMPORT, ABSORB, ABSORB_NOMA, VMRK. Source: AMD 56860, chapter 7.

Handlers as in `messages.py`. An IMI is an initial migration image: a guest launched with IMI_EN whose place a
migrated guest takes. REPORT_ID of an absorbing guest stays; UNVERIFIED for ABSORB_NOMA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from swsnp.abi.record import Record
from swsnp.abi.snp_command import FirmwareStatus
from swsnp.abi.snp_migration import (
    CONTEXT_SIZE,
    CONTEXT_VERSION,
    ExportedContext,
    MetadataEntry,
    MsgExportReq,
    MsgExportRsp,
    MsgImportReq,
    MsgStatusRsp,
    MsgVmrkReq,
)
from swsnp.firmware.context import GuestState
from swsnp.firmware.faults import FirmwareFault, require
from swsnp.firmware.guests import forget
from swsnp.firmware.migration import export_context, import_context
from swsnp.firmware.platform import AsidState
from swsnp.hardware.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.firmware.context import GuestContext
    from swsnp.firmware.platform import Platform

__all__ = ["absorb", "absorb_noma", "export", "import_", "vmrk"]

_R = TypeVar("_R", bound=Record)
_PAGE_MASK: Final = PAGE - 1
_COUNTS_PER_MESSAGE: Final = 2


def _parse(kind: type[_R], payload: bytes) -> _R:
    return kind.parse(payload[: kind.SIZE].ljust(kind.SIZE, b"\0"))


def export(platform: Platform, caller: GuestContext, payload: bytes, vmpck: int) -> bytes:
    """MSG_EXPORT_REQ: the context of a guest, for its agent or for itself.

    1. Reserved bits: INVALID_PARAM.
    2. No guest context: INVALID_GUEST.
    3. Guest not RUNNING: INVALID_GUEST_STATE.
    4. The caller is neither its agent nor, when it has none, itself: INVALID_GUEST.
    5. Itself, but not under VMPCK0: INVALID_GUEST.

    Without IMI_EN the guest ends and its page goes Context -> Firmware. With IMI_EN it lives on, and the root
    metadata entry is left out. In its own context a guest finds the counter as it is after the answer: the
    old one would let two messages share an IV (UNVERIFIED).
    """
    request = _parse(MsgExportReq, payload)
    try:
        guest = _exported(platform, caller, request, vmpck)
    except FirmwareFault as fault:
        return bytes(MsgExportRsp(status=fault.status))
    context = ExportedContext.parse(export_context(guest))
    if guest is caller:
        counts = list(context.msg_counts)
        counts[vmpck] += _COUNTS_PER_MESSAGE
        context = context.but(msg_counts=tuple(counts))
    if request.flags.imi_en:
        context = context.but(root_md_entry=MetadataEntry())
    else:
        forget(platform, guest)
    return bytes(
        MsgExportRsp(context_size=CONTEXT_SIZE, context_version=CONTEXT_VERSION, context=bytes(context))
    )


def _exported(platform: Platform, caller: GuestContext, request: MsgExportReq, vmpck: int) -> GuestContext:
    reserved = request.gctx_paddr & _PAGE_MASK or request.flags.unnamed() or request.reserved_0c
    require(not reserved, FirmwareStatus.INVALID_PARAM)
    guest = platform.guest(request.gctx_paddr)
    require(guest.state is GuestState.RUNNING, FirmwareStatus.INVALID_GUEST_STATE)
    if guest is caller and not guest.has_migration_agent:
        require(vmpck == 0, FirmwareStatus.INVALID_GUEST)
    else:
        require(_is_agent(caller, guest), FirmwareStatus.INVALID_GUEST)
    return guest


def _is_agent(caller: GuestContext, guest: GuestContext) -> bool:
    return guest.ma_paddr == caller.gctx_paddr and guest.report_id_ma == caller.report_id


def _answered(handle: Callable[[], None]) -> bytes:
    try:
        handle()
    except FirmwareFault as fault:
        return bytes(MsgStatusRsp(status=fault.status))
    return bytes(MsgStatusRsp())


def _require_form(request: MsgImportReq) -> None:
    known = request.context_size == CONTEXT_SIZE and request.context_version == CONTEXT_VERSION
    require(known, FirmwareStatus.INVALID_PARAM)


def _require_reserved(request: MsgImportReq, address_mask: int) -> None:
    reserved = request.gctx_paddr & address_mask or any(request.reserved_010)
    require(not reserved, FirmwareStatus.INVALID_PARAM)


def _run(platform: Platform, guest: GuestContext) -> None:
    guest.state = GuestState.RUNNING
    if guest.asid:
        guest.active = True
        platform.asids[guest.asid] = AsidState.IN_USE


def import_(platform: Platform, caller: GuestContext, payload: bytes, _vmpck: int) -> bytes:
    """MSG_IMPORT_REQ: INIT -> RUNNING; the caller becomes the guest's agent, REPORT_ID is new.

    1. Reserved bits, size, version: INVALID_PARAM.
    2. No guest context: INVALID_GUEST.
    3. Guest not in INIT: INVALID_GUEST_STATE.
    4. The root metadata entry is not VALID: INVALID_MDATA_ENTRY.
    """
    request = _parse(MsgImportReq, payload)

    def handle() -> None:
        _require_reserved(request, _PAGE_MASK)
        _require_form(request)
        guest = platform.guest(request.gctx_paddr)
        require(guest.state is GuestState.INIT, FirmwareStatus.INVALID_GUEST_STATE)
        valid = bool(request.context.root_md_entry.page.valid)
        require(valid, FirmwareStatus.INVALID_MDATA_ENTRY)
        import_context(guest, request.context)
        guest.report_id = platform.chip.entropy(len(guest.report_id))
        guest.ma_paddr, guest.report_id_ma = caller.gctx_paddr, caller.report_id
        _run(platform, guest)

    return _answered(handle)


def absorb(platform: Platform, _caller: GuestContext, payload: bytes, _vmpck: int) -> bytes:
    """MSG_ABSORB_REQ: a guest takes the place of an IMI in LAUNCH; LAUNCH -> RUNNING.

    1. Reserved bits: INVALID_PARAM.
    2. No guest context: INVALID_GUEST.
    3. Guest not in LAUNCH with IMI_EN: INVALID_GUEST_STATE.
    4. The root metadata entry is VALID: INVALID_MDATA_ENTRY.
    5. IMD of the context is not the IMI's launch digest: BAD_MEASUREMENT.
    6. Size, version: INVALID_PARAM.
    """
    request = _parse(MsgImportReq, payload)

    def handle() -> None:
        _require_reserved(request, _PAGE_MASK)
        guest = platform.guest(request.gctx_paddr)
        launching = guest.state is GuestState.LAUNCH and guest.imi_en
        require(launching, FirmwareStatus.INVALID_GUEST_STATE)
        unused = not request.context.root_md_entry.page.valid
        require(unused, FirmwareStatus.INVALID_MDATA_ENTRY)
        require(request.context.imd == guest.ld, FirmwareStatus.BAD_MEASUREMENT)
        _require_form(request)
        import_context(guest, request.context)
        _run(platform, guest)

    return _answered(handle)


def absorb_noma(_platform: Platform, caller: GuestContext, payload: bytes, _vmpck: int) -> bytes:
    """MSG_ABSORB_NOMA_REQ: the caller, an IMI without agent that runs, becomes the guest of the context.

    Such an IMI was launched without IMI_EN and all of its pages as IMI pages: IMD is its launch digest.
    The answer goes out under the key that the request came under; the next message needs the new ones.

    1. Reserved bits: INVALID_PARAM.
    2. The caller has an agent: INVALID_GUEST.
    3. IMD of the context is not the caller's launch digest and IMD: BAD_MEASUREMENT.
    4. Size, version: INVALID_PARAM.
    """
    request = _parse(MsgImportReq, payload)

    def handle() -> None:
        _require_reserved(request, -1)
        require(not caller.has_migration_agent, FirmwareStatus.INVALID_GUEST)
        measured = request.context.imd == caller.ld == caller.imd
        require(measured, FirmwareStatus.BAD_MEASUREMENT)
        _require_form(request)
        import_context(caller, request.context)

    return _answered(handle)


def vmrk(platform: Platform, caller: GuestContext, payload: bytes, vmpck: int) -> bytes:
    """MSG_VMRK_REQ: an agent gives its guest the VM root key.

    1. Not under VMPCK0, or reserved bits: INVALID_PARAM.
    2. No guest context: INVALID_GUEST.
    3. Guest not in LAUNCH, or an IMI: INVALID_GUEST_STATE.
    4. The caller is not its agent: INVALID_GUEST.
    """
    request = _parse(MsgVmrkReq, payload)

    def handle() -> None:
        require(vmpck == 0, FirmwareStatus.INVALID_PARAM)
        reserved = request.gctx_paddr & _PAGE_MASK or any(request.reserved_08)
        require(not reserved, FirmwareStatus.INVALID_PARAM)
        guest = platform.guest(request.gctx_paddr)
        launching = guest.state is GuestState.LAUNCH and not guest.imi_en
        require(launching, FirmwareStatus.INVALID_GUEST_STATE)
        require(_is_agent(caller, guest), FirmwareStatus.INVALID_GUEST)
        guest.vmrk = request.vmrk

    return _answered(handle)
