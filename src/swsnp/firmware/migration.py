"""Guest contexts that leave a host and come back: the exported form, and the model's own saved form.

Source of the exported form: AMD 56860, MSG_EXPORT_REQ. `save_guest` and `restore_guest` are not AMD's: they
stop and continue a whole modelled machine, so they keep what a migration changes or leaves behind (REPORT_ID,
the agent's REPORT_ID, IMI_EN, the mitigation vector at launch).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from swsnp.abi.record import Record, blob, mbz, record, sub, u8, u32, u64
from swsnp.abi.snp_command import PlatformState
from swsnp.abi.snp_migration import ContextFlags, ExportedContext
from swsnp.crypto.seal import KEY_SIZE
from swsnp.errors import UsageError
from swsnp.firmware.context import GuestContext, GuestState
from swsnp.firmware.platform import AsidState
from swsnp.firmware.settings import ApiVersion
from swsnp.hardware.memory import PAGE, BusError
from swsnp.hardware.rmp import PageState, RmpEntry

if TYPE_CHECKING:
    from swsnp.firmware.platform import Platform

__all__ = ["SavedGuest", "export_context", "import_context", "restore_guest", "save_guest"]

_SAVED_VERSION: Final = 1
_SOURCE: Final = "swsnp, saved guest version 1"


@record(size=0x340, source=_SOURCE)
class SavedGuest(Record):
    """A guest of a stopped machine: the exported context and what of a guest AMD's form does not carry."""

    context: ExportedContext = sub(0x000, ExportedContext)
    version: int = u32(0x300)
    has_migration_agent: int = u8(0x304)
    imi_en: int = u8(0x305)
    created_major: int = u8(0x306)
    created_minor: int = u8(0x307)
    report_id_ma: bytes = blob(0x308, 32)
    launch_mit_vector: int = u64(0x328)
    created_build: int = u32(0x330)
    reserved_334: bytes = mbz(0x334, 12)


def export_context(guest: GuestContext) -> bytes:
    """The exported context of a guest, 300h bytes; keys that a guest in INIT does not have yet are zero."""
    vmpcks = guest.vmpcks or (bytes(KEY_SIZE),) * 4
    return bytes(
        ExportedContext(
            ld=guest.ld,
            oek=guest.oek or bytes(KEY_SIZE),
            vmpck0=vmpcks[0],
            vmpck1=vmpcks[1],
            vmpck2=vmpcks[2],
            vmpck3=vmpcks[3],
            vmrk=guest.vmrk or bytes(KEY_SIZE),
            host_data=guest.host_data,
            id_key_digest=guest.id_key_digest,
            author_key_digest=guest.author_key_digest,
            report_id=guest.report_id,
            imd=guest.imd,
            msg_counts=tuple(guest.message_counts),
            root_md_entry=guest.root_md_entry,
            flags=ContextFlags.of(
                author_key_en=guest.author_key_en,
                id_block_en=guest.id_block_en,
                vcek_dis=guest.vcek_dis,
            ),
            policy=guest.policy,
            state=guest.state,
            oek_iv_count=guest.oek_iv_count,
            id_block=guest.id_block,
            gosvw=guest.gosvw,
            desired_tsc_khz=guest.desired_tsc_khz,
            psp_tsc_offset=guest.psp_tsc_offset,
            launch_tcb=guest.launch_tcb,
        )
    )


def import_context(guest: GuestContext, context: ExportedContext) -> None:
    """Fill a guest from an exported context; REPORT_ID, STATE, the agent and the ASID stay as they are.

    Reports made from the guest as it was before are forgotten.
    """
    guest.ld, guest.imd = context.ld, context.imd
    guest.oek, guest.vmrk = context.oek, context.vmrk
    guest.install_vmpcks((context.vmpck0, context.vmpck1, context.vmpck2, context.vmpck3))
    guest.message_counts = list(context.msg_counts)
    guest.host_data = context.host_data
    guest.id_key_digest, guest.author_key_digest = context.id_key_digest, context.author_key_digest
    guest.author_key_en = bool(context.flags.author_key_en)
    guest.id_block_en = bool(context.flags.id_block_en)
    guest.vcek_dis = bool(context.flags.vcek_dis)
    guest.root_md_entry, guest.oek_iv_count = context.root_md_entry, context.oek_iv_count
    guest.policy = context.policy
    guest.id_block = context.id_block
    guest.gosvw = context.gosvw
    guest.desired_tsc_khz, guest.psp_tsc_offset = context.desired_tsc_khz, context.psp_tsc_offset
    guest.launch_tcb = context.launch_tcb
    guest.report_template = None


def save_guest(platform: Platform, gctx_paddr: int) -> bytes:
    """A guest in any state as bytes of `SavedGuest`; the guest is not changed.

    Raises:
        UsageError: there is no guest context at this address.
    """
    guest = platform.guests.get(gctx_paddr)
    if guest is None:
        raise UsageError(f"saved guest: got GCTX_PADDR {gctx_paddr:#x}, wanted the page of a guest context")
    saved = SavedGuest(
        context=ExportedContext.parse(export_context(guest)),
        version=_SAVED_VERSION,
        has_migration_agent=guest.has_migration_agent,
        imi_en=guest.imi_en,
        created_major=guest.created_by.major,
        created_minor=guest.created_by.minor,
        created_build=guest.created_by.build,
        report_id_ma=guest.report_id_ma,
        launch_mit_vector=guest.launch_mit_vector,
    )
    return bytes(saved)


def restore_guest(platform: Platform, gctx_paddr: int, context: bytes, *, asid: int) -> None:
    """Put a saved guest behind a page, as SNP_GCTX_CREATE to SNP_LAUNCH_FINISH left it; Firmware -> Context.

    The guest keeps REPORT_ID, launch TCB, VMPCKs and message counters. Its VEK is new: memory is kept in
    plaintext, so nobody can tell. Pages are the caller's to give back (RMP entries may come before or after).

    Args:
        platform: an initialised platform.
        gctx_paddr: a page in state Firmware.
        context: what `save_guest` gave.
        asid: a clean ASID; 0 when the guest had none.

    Raises:
        LayoutError: the bytes are not of `SavedGuest`'s size.
        UsageError: another version; SNP not INIT; the page is not Firmware; the ASID is not clean; a
            migration agent that is not there (restore agents first).
    """
    saved = SavedGuest.parse(context)
    entry = _checked_target(platform, gctx_paddr, asid, saved)
    guest = GuestContext(
        gctx_paddr=gctx_paddr,
        launch_tcb=saved.context.launch_tcb,
        created_by=ApiVersion(
            major=saved.created_major, minor=saved.created_minor, build=saved.created_build
        ),
        vek=platform.chip.entropy(KEY_SIZE),
    )
    if saved.has_migration_agent:
        guest.ma_paddr = _agent(platform, saved.report_id_ma)
    state = GuestState(saved.context.state)
    if state is not GuestState.INIT:
        import_context(guest, saved.context)
    guest.state = state
    guest.report_id, guest.report_id_ma = saved.context.report_id, saved.report_id_ma
    guest.imi_en = bool(saved.imi_en)
    guest.launch_mit_vector = saved.launch_mit_vector
    if asid:
        guest.asid = asid
        guest.active = state is GuestState.RUNNING
        platform.asids[asid] = AsidState.IN_USE if guest.active else AsidState.ALLOCATED
    platform.memory.write(gctx_paddr, bytes(PAGE))
    platform.rmp[gctx_paddr] = replace(entry, vmsa=True)
    platform.guests[gctx_paddr] = guest


def _checked_target(platform: Platform, gctx_paddr: int, asid: int, saved: SavedGuest) -> RmpEntry:
    if saved.version != _SAVED_VERSION:
        raise UsageError(f"saved guest VERSION: got {saved.version}, wanted {_SAVED_VERSION} ({_SOURCE})")
    if saved.context.state not in GuestState.__members__.values():
        raise UsageError(f"saved guest STATE: got {saved.context.state}, wanted 0..2 ({_SOURCE})")
    if platform.state is not PlatformState.INIT:
        raise UsageError("restored guest: SNP is not initialised, wanted SNP_INIT_EX first")
    try:
        platform.memory.view(gctx_paddr, PAGE)
    except BusError as error:
        raise UsageError(f"restored guest, context page: {error}") from None
    entry = platform.rmp[gctx_paddr]
    if entry.state is not PageState.FIRMWARE or entry.page_size or gctx_paddr % PAGE:
        raise UsageError(
            f"restored guest, context page {gctx_paddr:#x}: got state {entry.state.value}, "
            "wanted a 4 KiB Firmware page (AMD 56860, SNP_GCTX_CREATE)"
        )
    if asid and platform.asids.get(asid) is not AsidState.CLEAN:
        got = platform.asids.get(asid)
        raise UsageError(
            f"restored guest, ASID {asid}: got {'unusable' if got is None else got.value}, wanted clean "
            "(AMD 56860, SNP_ACTIVATE)"
        )
    return entry


def _agent(platform: Platform, report_id: bytes) -> int:
    for gctx_paddr, guest in platform.guests.items():
        if guest.report_id == report_id:
            return gctx_paddr
    raise UsageError(f"restored guest: no guest has its migration agent's REPORT_ID {report_id.hex()[:16]}…")
