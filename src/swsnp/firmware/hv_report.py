"""SNP_HV_REPORT_REQ: a report that the hypervisor asks for. Firmware 1.56 and later.

Source: Linux, patch series "SEV-SNP hypervisor report request" v6. UNVERIFIED: the firmware's checks; here
they are those of SNP_GUEST_REQUEST and of MSG_REPORT_REQ, with an unusable KEY_SEL as STATUS in the response.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import FirmwareStatus, HvReportReq
from swsnp.firmware.context import GuestState
from swsnp.firmware.faults import require
from swsnp.firmware.messages import report_response
from swsnp.hardware.memory import PAGE
from swsnp.hardware.rmp import PageState

if TYPE_CHECKING:
    from swsnp.firmware.platform import Platform

__all__ = ["HV_REPORT_VMPL", "hv_report_request"]

HV_REPORT_VMPL: Final = 0xFFFF_FFFF
"""VMPL in a report that no guest asked for."""
_PAGE_MASK: Final = PAGE - 1
_KEY_SEL: Final = 3
_NO_REPORT_DATA: Final = bytes(64)


def hv_report_request(platform: Platform, buffer: HvReportReq) -> None:
    """SNP_HV_REPORT_REQ: MSG_REPORT_RSP in plaintext, with REPORT_DATA zero.

    As SNP_GUEST_REQUEST it starts again when other commands changed what the report stands on meanwhile.

    1. LEN or reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. A page that is not memory: INVALID_ADDRESS.
    4. No guest context: INVALID_GUEST.
    5. Report page not Firmware: INVALID_PAGE_STATE; in a 2 MiB entry: INVALID_PAGE_SIZE.
    6. Guest not RUNNING: INVALID_GUEST_STATE.
    """
    while not _answer(platform, buffer):
        pass


def _answer(platform: Platform, buffer: HvReportReq) -> bool:
    misaligned = (buffer.gctx_paddr | buffer.hv_report_paddr) & _PAGE_MASK
    reserved = buffer.key_sel & ~_KEY_SEL
    well_formed = buffer.length == HvReportReq.SIZE and not (misaligned or reserved)
    require(well_formed, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    page = platform.look_up(buffer.hv_report_paddr)
    guest = platform.guest(buffer.gctx_paddr)
    require(page.state is PageState.FIRMWARE, FirmwareStatus.INVALID_PAGE_STATE)
    require(not page.page_size, FirmwareStatus.INVALID_PAGE_SIZE)
    require(guest.state is GuestState.RUNNING, FirmwareStatus.INVALID_GUEST_STATE)
    variables = platform.chip.variables
    with platform.aside:
        answer = report_response(
            platform, guest, vmpl=HV_REPORT_VMPL, report_data=_NO_REPORT_DATA, key_sel=buffer.key_sel
        )
    if not platform.is_unchanged(
        variables, gctx_paddr=buffer.gctx_paddr, guest=guest, page=buffer.hv_report_paddr, entry=page
    ):
        return False
    platform.memory.write(buffer.hv_report_paddr, answer)
    return True
