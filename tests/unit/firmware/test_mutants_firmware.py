"""What two checks refuse: the first one's status counts. And what only one of them refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import (
    ActivateEx,
    Command,
    DownloadFirmwareEx,
    FeatureInfo,
    GuestStatus,
    HvReportReq,
    LaunchFinish,
)
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_message import MessageType
from swsnp.abi.snp_migration import (
    ExportedContext,
    MetadataEntry,
    MetadataWord,
    MsgImportReq,
    MsgStatusRsp,
)
from swsnp.abi.snp_page_command import DebugCopy, PageMdInit, PageMove, PageSwap
from swsnp.firmware.context import GuestState
from swsnp.firmware.download import image
from swsnp.firmware.settings import ApiVersion

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

NOWHERE = 0x7777_7777_7000


@pytest.mark.parametrize(
    ("command", "kind", "addresses", "others"),
    [
        (Command.SNP_LAUNCH_FINISH, LaunchFinish, (), {}),
        (Command.SNP_GUEST_STATUS, GuestStatus, ("status_paddr",), {}),
        (Command.SNP_ACTIVATE_EX, ActivateEx, ("ids_paddr",), {"length": 0x20, "asid": 1, "numids": 1}),
        (Command.SNP_HV_REPORT_REQ, HvReportReq, ("hv_report_paddr",), {"length": 0x18}),
        (Command.SNP_DBG_DECRYPT, DebugCopy, ("src_paddr", "dst_paddr"), {}),
        (Command.SNP_DBG_ENCRYPT, DebugCopy, ("src_paddr", "dst_paddr"), {}),
        (Command.SNP_PAGE_MD_INIT, PageMdInit, ("page_paddr",), {}),
        (Command.SNP_PAGE_MOVE, PageMove, ("src_paddr", "dst_paddr"), {}),
        (Command.SNP_PAGE_SWAP_OUT, PageSwap, ("src_paddr", "dst_paddr", "mdata_paddr"), {}),
        (Command.SNP_PAGE_SWAP_IN, PageSwap, ("src_paddr", "dst_paddr", "mdata_paddr"), {}),
    ],
)
def test_a_context_that_no_memory_answers_for(
    make_rig: MakeRig, command: int, kind: Any, addresses: tuple[str, ...], others: dict[str, int]
) -> None:
    """AMD 56860: INVALID_ADDRESS where there is no page at all, INVALID_GUEST where it is no context."""
    rig = make_rig(current_version=ApiVersion(major=1, minor=56, build=0))  # SNP_HV_REPORT_REQ is new then
    pages = {name: rig.page() for name in addresses}
    assert rig.command(command, kind(gctx_paddr=NOWHERE, **pages, **others)) == S.INVALID_ADDRESS
    assert rig.command(command, kind(gctx_paddr=rig.page(), **pages, **others)) == S.INVALID_GUEST


def test_a_misaligned_image(rig: Rig) -> None:
    """AMD 56860, SNP_DOWNLOAD_FIRMWARE_EX: an image that is good but not 32-byte aligned is not taken."""
    variables = rig.chip.variables
    data = image(version=variables.current_version, tcb=variables.current_tcb)
    for offset, status in ((0, S.SUCCESS), (32, S.SUCCESS), (16, S.INVALID_ADDRESS)):
        page = rig.page(data=bytes(offset) + data)
        record = DownloadFirmwareEx(length=0x18, fw_paddr=page + offset, fw_len=len(data))
        assert rig.command(Command.SNP_DOWNLOAD_FIRMWARE_EX, record) == status


@pytest.mark.parametrize("length", [0, 15, 17])
def test_feature_info_of_another_length(rig: Rig, length: int) -> None:
    """AMD 56860, SNP_FEATURE_INFO: LEN is 10h, everything else being good."""
    record = FeatureInfo(length=length, feature_info_paddr=rig.page())
    assert rig.command(Command.SNP_FEATURE_INFO, record) == S.INVALID_PARAM
    assert rig.command(Command.SNP_FEATURE_INFO, record.but(length=16)) == S.SUCCESS


def test_an_import_with_reserved_bits_alone(rig: Rig) -> None:
    """AMD 56860, MSG_IMPORT_REQ: reserved bytes refuse a request that is good otherwise."""
    agent, target = rig.running(1), rig.create()
    root = MetadataEntry(page=MetadataWord.of(valid=1, metadata=1))
    request = MsgImportReq(
        gctx_paddr=target,
        context_size=0x300,
        context_version=3,
        context=ExportedContext(root_md_entry=root),
        reserved_010=b"\1" + bytes(15),
    )
    answer = rig.request(agent, bytes(request), MessageType.IMPORT_REQ)
    assert MsgStatusRsp.parse(answer.payload).status == S.INVALID_PARAM
    assert rig.context(target).state is GuestState.INIT
