"""SNP_DOWNLOAD_FIRMWARE_EX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, DownloadFirmwareEx, InitEx, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.firmware.download import FirmwareImage, image
from swsnp.firmware.settings import ApiVersion

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import Rig

NEWER_TCB = TcbVersion.encode(Product.GENOA, boot_loader=0x0A, snp=0x18, microcode=0x54)
NEWER = ApiVersion(major=1, minor=58, build=3)
GOOD = FirmwareImage.parse(image(version=NEWER, tcb=NEWER_TCB))


def _download(rig: Rig, data: bytes, **fields: Any) -> int:
    page = rig.page(data=data)
    record = DownloadFirmwareEx(length=0x18, fw_paddr=page, fw_len=len(data)).but(**fields)
    return rig.command(Command.SNP_DOWNLOAD_FIRMWARE_EX, record)


def test_other_firmware_runs(rig: Rig) -> None:
    """AMD 56860: CURRENT moves, COMMITTED does not; what a new RMP needs is known at the next init."""
    committed = rig.chip.variables.committed_tcb
    assert _download(rig, bytes(GOOD)) == S.SUCCESS
    variables = rig.chip.variables
    assert (variables.current_tcb, variables.current_version) == (NEWER_TCB, NEWER)
    assert (variables.committed_tcb, variables.reported_tcb) == (committed, committed)
    rig.platform.state = PlatformState.UNINIT
    assert rig.command(Command.SNP_INIT_EX, InitEx()) == S.RMP_INIT_REQUIRED


def test_commit_at_once(rig: Rig) -> None:
    """AMD 56860: COMMIT=1 is SNP_COMMIT after the update; LEN is not looked at."""
    assert _download(rig, bytes(GOOD), flags=1, length=0) == S.SUCCESS
    assert rig.chip.variables.committed_tcb == NEWER_TCB
    assert rig.chip.variables.committed_version == NEWER
    back = image(version=ApiVersion(major=1, minor=55, build=25), tcb=NEWER_TCB)
    assert _download(rig, back) == S.UPDATE_FAILED


@pytest.mark.parametrize(
    ("change", "fields", "status"),
    [
        ({}, {"reserved_04": 1, "fw_paddr": 1}, S.INVALID_PARAM),
        ({}, {"flags": 2, "fw_paddr": 1}, S.INVALID_PARAM),
        ({}, {"fw_paddr": 0x7777_7777_7010}, S.INVALID_ADDRESS),
        ({}, {"fw_paddr": 0x7777_7777_7000}, S.INVALID_ADDRESS),
        ({"magic": b"$PS1", "form": 9}, {}, S.BAD_SIGNATURE),
        ({}, {"fw_len": 0}, S.BAD_SIGNATURE),
        ({"form": 2, "api_minor": 1}, {}, S.BAD_VERSION),
        ({"tcb": TcbVersion(1 << 16)}, {}, S.BAD_VERSION),
        ({"api_minor": 54}, {}, S.UPDATE_FAILED),
        ({"tcb": TcbVersion.encode(Product.GENOA, snp=0xFF)}, {}, S.UPDATE_FAILED),
    ],
)
def test_refusals(rig: Rig, change: dict[str, Any], fields: dict[str, Any], status: S) -> None:
    """AMD 56860: reserved bits, address, image, version, no way back; nothing changes."""
    before = rig.chip.variables
    changed = {name: value.ljust(8, b"\0") if name == "magic" else value for name, value in change.items()}
    assert _download(rig, bytes(GOOD.but(**changed)), **fields) == status
    assert rig.chip.variables is before
