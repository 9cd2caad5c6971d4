"""SNP_VERIFY_MITIGATION, firmware 1.58 and later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, DownloadFirmwareEx, GctxAddress, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_message import MsgReportReq
from swsnp.abi.snp_mitigation import MitigationFlags, MitigationStatus, VerifyMitigation
from swsnp.abi.snp_report import AttestationReport
from swsnp.errors import UsageError
from swsnp.firmware.download import image
from swsnp.firmware.mitigations import GUESTS_EXIST
from swsnp.firmware.settings import ApiVersion
from swsnp.hardware.rmp import RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import Arm, MakeRig, Rig, RigGuest

NOWHERE = 0x7777_7777_7000
V1_58 = ApiVersion(major=1, minor=58, build=1)
VERIFY = {"subcommand": 1}


@pytest.fixture
def later(make_rig: MakeRig) -> Rig:
    """A part of 1.58: mitigations 0 and 1 in force, 4 and 5 to be had, 5 without guests only."""
    return make_rig(
        current_version=V1_58, report_version=5, mit_vector=3, mit_supported=0x30, mit_needs_no_guests=0x20
    )


def _ask(rig: Rig, page: int | None = None, **fields: Any) -> int:
    flags = MitigationFlags.of(dst_paddr_en=page is not None)
    record = VerifyMitigation(length=0x40, flags=flags, dst_paddr=page or 0)
    return rig.command(Command.SNP_VERIFY_MITIGATION, record.but(**fields))


def _result(rig: Rig, **fields: Any) -> MitigationStatus:
    page = rig.page()
    assert _ask(rig, page, **fields) == S.SUCCESS
    return MitigationStatus.parse(rig.memory.read(page, 0x14))


def _vectors(rig: Rig, guest: RigGuest) -> tuple[int, int]:
    report = AttestationReport.parse(rig.request(guest, bytes(MsgReportReq())).payload[0x20:])
    return report.launch_mit_vector, report.current_mit_vector


def test_status(later: Rig) -> None:
    """AMD 56860: STATUS tells verified and supported mitigations, and changes nothing, whatever VECTOR is."""
    before = later.chip.variables
    for vector in (0, 0x10, 0xFFFF):
        assert _result(later, vector=vector) == MitigationStatus(verified_vector=3, supported_vector=0x33)
    assert later.chip.variables is before


def test_verify(later: Rig) -> None:
    """AMD 56860: VERIFY brings one mitigation into force; once more is no fault."""
    for _ in range(2):
        result = _result(later, vector=0x10, **VERIFY)
        assert result == MitigationStatus(verified_vector=0x13, supported_vector=0x33)
    assert _result(later, vector=1, **VERIFY).verified_vector == 0x13


def test_reports_tell(later: Rig) -> None:
    """AMD 56860, report: CURRENT_MIT_VECTOR moves at once, LAUNCH_MIT_VECTOR with the next guest."""
    guest = later.running(1)
    assert _vectors(later, guest) == (3, 3)
    assert _ask(later, vector=0x10, **VERIFY) == S.SUCCESS
    assert _vectors(later, guest) == (3, 0x13)
    assert _vectors(later, later.running(2)) == (0x13, 0x13)


def test_a_report_tells_the_mitigations_at_its_end(later: Rig, meanwhile: Arm) -> None:
    """VERIFY during the signature: the report is made and signed again."""
    guest = later.running(1)
    signed = meanwhile(lambda: _ask(later, vector=0x10, **VERIFY))
    assert _vectors(later, guest) == (3, 0x13)
    assert len(signed) == 2


def test_some_want_a_platform_without_guests(later: Rig) -> None:
    """A verification that fails is SUCCESS with FAILURE_STATUS; when the guests are gone it goes through."""
    gctx = later.create()
    failed = _result(later, vector=0x20, **VERIFY)
    assert failed == MitigationStatus(verified_vector=3, supported_vector=0x33, failure_status=GUESTS_EXIST)
    assert _result(later).failure_status == 0
    assert _result(later, vector=0x10, **VERIFY).failure_status == 0
    assert later.command(Command.SNP_DECOMMISSION, GctxAddress(gctx_paddr=gctx)) == S.SUCCESS
    assert _result(later, vector=0x20, **VERIFY).verified_vector == 0x33
    later.create()
    assert _result(later, vector=0x20, **VERIFY).failure_status == 0, "in force already"


def test_without_a_place_for_the_result(later: Rig) -> None:
    """AMD 56860: DST_EN clear: the address is not looked at, and nothing is written."""
    page = later.page()
    assert _ask(later, dst_paddr=NOWHERE, vector=0x10, **VERIFY) == S.SUCCESS
    assert _ask(later, dst_paddr=page) == S.SUCCESS
    assert not any(later.memory.read(page, 4096))
    assert later.chip.variables.mit_vector == 0x13


def test_checks_in_order(later: Rig) -> None:
    """Faults are taken away one by one, the next one shows; nothing is verified by a refused command."""
    page = later.page(RmpEntry())
    bad_vector: dict[str, Any] = {"vector": 0x40, **VERIFY}
    later.platform.state = PlatformState.UNINIT
    for bad in (
        {"length": 0x3F},
        {"length": 0x41},
        {"reserved_06": 1},
        {"flags": MitigationFlags(4)},
        {"flags": MitigationFlags(1 << 31)},
        {"reserved_14": 1},
        {"reserved_28": bytes(23) + b"\1"},
        {"subcommand": 2},
        {"dst_paddr": page + 0xFED},
    ):
        assert _ask(later, page, **(bad_vector | bad)) == S.INVALID_PARAM
    both = {"flags": MitigationFlags.of(dst_paddr_en=1, src_paddr_en=1)}
    assert _ask(later, NOWHERE, **bad_vector, **both, src_paddr=NOWHERE) == S.INVALID_PLATFORM_STATE
    later.platform.state = PlatformState.INIT
    assert _ask(later, page, **bad_vector, **both, src_paddr=NOWHERE) == S.INVALID_ADDRESS
    assert _ask(later, NOWHERE, **bad_vector) == S.INVALID_ADDRESS
    assert _ask(later, page, **bad_vector) == S.INVALID_PAGE_STATE
    later.rmp[page] = RmpEntry(assigned=True, immutable=True)
    for vector in (0x40, 0, 0x11, 0x50, 1 << 63):
        assert _ask(later, page, vector=vector, **VERIFY) == S.INVALID_PARAM
    assert not any(later.memory.read(page, 4096))
    assert later.chip.variables.mit_vector == 3
    assert _ask(later, page + 0xFEC, **both, src_paddr=page) == S.SUCCESS


def test_an_update_brings_the_command(make_rig: MakeRig) -> None:
    """Firmware 1.55: INVALID_COMMAND. Live update to 1.58 with guests is what the command was made for."""
    rig = make_rig(mit_supported=1)
    assert _ask(rig) == S.INVALID_COMMAND
    data = image(version=V1_58, tcb=rig.chip.variables.current_tcb)
    record = DownloadFirmwareEx(length=0x18, fw_paddr=rig.page(data=data), fw_len=len(data))
    assert rig.command(Command.SNP_DOWNLOAD_FIRMWARE_EX, record) == S.SUCCESS
    assert _result(rig, vector=1, **VERIFY) == MitigationStatus(verified_vector=1, supported_vector=1)


def test_the_chip_names_what_it_lacks(later: Rig) -> None:
    """For hosts in Python: several at once, and unsupported ones are refused by name."""
    later.chip.verify_mitigation(0x30)
    assert later.chip.variables.mit_vector == 0x33
    with pytest.raises(UsageError, match="got 0x40 beside the supported 0x33"):
        later.chip.verify_mitigation(0x41)
