"""SNP_FEATURE_INFO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, FeatureInfo, FeatureInfoOutput, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_report import Product
from swsnp.firmware.platform import status_buffer
from swsnp.firmware.settings import ApiVersion
from swsnp.hardware.rmp import RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

NOWHERE = 0x7777_7777_7000


def _ask(rig: Rig, address: int, ecx_in: int = 0, length: int = 16) -> int:
    record = FeatureInfo(length=length, ecx_in=ecx_in, feature_info_paddr=address)
    return rig.command(Command.SNP_FEATURE_INFO, record)


def _answer(rig: Rig, ecx_in: int) -> FeatureInfoOutput:
    page = rig.page()
    assert _ask(rig, page + 0xFF0, ecx_in) == S.SUCCESS
    return FeatureInfoOutput.parse(rig.memory.read(page + 0xFF0, 16))


def test_checks_in_order(rig: Rig) -> None:
    """AMD 56860: LEN and ECX_IN, alignment and page, page state; faults are taken away one by one."""
    page = rig.page(RmpEntry())
    assert _ask(rig, page + 0xFF2, 2, 15) == S.INVALID_PARAM
    assert _ask(rig, page + 0xFF2, 2) == S.INVALID_PARAM
    assert _ask(rig, page + 0xFF2) == S.INVALID_ADDRESS
    for misaligned_or_crossing in (0xFE1, 0xFE2, 0xFF4):
        assert _ask(rig, page + misaligned_or_crossing) == S.INVALID_ADDRESS
    assert _ask(rig, NOWHERE) == S.INVALID_PARAM
    assert _ask(rig, page + 0xFF0) == S.INVALID_PAGE_STATE
    rig.platform.state = PlatformState.UNINIT
    assert _ask(rig, page + 0xFF0) == S.SUCCESS


@pytest.mark.parametrize(
    ("product", "changes", "ecx"),
    [
        (Product.GENOA, {}, 3),  # VLEK and X86_SNP_SHUTDOWN, as firmware 1.55 answers
        (Product.TURIN, {}, 0x37),
        (Product.TURIN, {"ciphertext_hiding_cap": True}, 0x3F),
        (Product.GENOA, {"policy_highest_bit": 22, "feature_info_more": 1 << 20}, 0x100033),
        (Product.GENOA, {"current_version": ApiVersion(major=1, minor=57, build=9)}, 3),
        (Product.GENOA, {"current_version": ApiVersion(major=1, minor=58, build=1)}, 0x2003),
    ],
)
def test_features_follow_the_settings(
    make_rig: MakeRig, product: Product, changes: dict[str, Any], ecx: int
) -> None:
    """AMD 56860, ECX_IN 0: highest index, and features that the policy bits of the part imply."""
    assert _answer(make_rig(product=product, **changes), 0) == FeatureInfoOutput(eax=1, ecx=ecx)


def test_all_guest_messages_are_known(rig: Rig) -> None:
    """AMD 56860, ECX_IN 1: all nine messages, and the firmware answers each of them."""
    assert _answer(rig, 1) == FeatureInfoOutput(eax=0x1FF)
    guest = rig.running()
    statuses = [rig.request(guest, bytes(0x320), msg_type).status for msg_type in range(1, 19, 2)]
    assert statuses == [S.SUCCESS] * 9


def test_the_status_buffer_says_that_the_command_exists(rig: Rig) -> None:
    """AMD 56860, SNP_PLATFORM_STATUS: bit 3 of dword 8."""
    assert status_buffer(rig.platform).flags & 8
