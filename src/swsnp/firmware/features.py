"""SNP_FEATURE_INFO: what this firmware can do. Source: AMD 56860, command CEh; Linux, psp-sev.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import FeatureEcx, FeatureInfo, FeatureInfoOutput, FirmwareStatus
from swsnp.firmware.faults import require
from swsnp.firmware.mitigations import VERIFY_MITIGATION_SINCE
from swsnp.hardware.memory import PAGE

if TYPE_CHECKING:
    from swsnp.firmware.platform import Platform

__all__ = ["feature_info", "features"]

_HIGHEST_INDEX: Final = 1
_ALL_MESSAGES: Final = 0x1FF
"""CPUID, KEY, REPORT, EXPORT, IMPORT, ABSORB, VMRK, ABSORB_NOMA, TSC_INFO."""
_ALIGNMENT_MASK: Final = 3
_XTS_BIT: Final = 22
_CXL_BIT: Final = 21
_RAPL_BIT: Final = 23


def feature_info(platform: Platform, buffer: FeatureInfo) -> None:
    """SNP_FEATURE_INFO, in any platform state.

    1. LEN not 10h, or ECX_IN above 1: INVALID_PARAM.
    2. The output is not 4-byte aligned, or crosses a page: INVALID_ADDRESS.
    3. No memory there: INVALID_PARAM.
    4. SNP is INIT and the page is not Firmware: INVALID_PAGE_STATE.
    """
    at = buffer.feature_info_paddr
    require(buffer.length == FeatureInfo.SIZE, FirmwareStatus.INVALID_PARAM)
    require(buffer.ecx_in <= _HIGHEST_INDEX, FirmwareStatus.INVALID_PARAM)
    crosses = at % PAGE + FeatureInfoOutput.SIZE > PAGE
    require(not (at & _ALIGNMENT_MASK or crosses), FirmwareStatus.INVALID_ADDRESS)
    entry = platform.look_up(at, FirmwareStatus.INVALID_PARAM)
    platform.require_output(at, FeatureInfoOutput.SIZE, entry)
    platform.memory.write(at, bytes(features(platform, buffer.ecx_in)))


def features(platform: Platform, ecx_in: int) -> FeatureInfoOutput:
    """The answer for one ECX_IN, 0 or 1.

    EBX bit 0 stays clear: of the legacy commands this firmware has GET_ID and NOP only. Features that are
    bits of POLICY follow the policy bits that the firmware knows.
    """
    if ecx_in:
        return FeatureInfoOutput(eax=_ALL_MESSAGES)
    settings = platform.chip.settings
    ecx = FeatureEcx.of(
        vlek=1,
        x86_snp_shutdown=1,
        rapl_dis=settings.policy_highest_bit >= _RAPL_BIT,
        ciphertext_hiding=settings.ciphertext_hiding_cap,
        aes_256_xts=settings.policy_highest_bit >= _XTS_BIT,
        cxl_allow=settings.policy_highest_bit >= _CXL_BIT,
        verify_mitigation=platform.chip.variables.current_version.api >= VERIFY_MITIGATION_SINCE,
    )
    return FeatureInfoOutput(eax=_HIGHEST_INDEX, ecx=ecx | settings.feature_info_more)
