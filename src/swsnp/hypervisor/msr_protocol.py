"""The GHCB MSR protocol: requests that need no page.

Source: AMD 56421 (GHCB 2.0), MSR protocol; Linux, arch/x86/kvm/svm/sev.c, sev_handle_vmgexit_msr_protocol.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import GHCB_PROTOCOL_MIN, HvFeature, MsrCode, SevInfo, describe_termination
from swsnp.abi.kvm import VmType
from swsnp.hypervisor import page_state
from swsnp.hypervisor.outcomes import RESUMED, ResetHold, Terminated
from swsnp.hypervisor.startup import Hold

if TYPE_CHECKING:
    from swsnp.hypervisor.outcomes import Outcome
    from swsnp.hypervisor.vcpu import Vcpu

__all__ = ["FEATURES", "PREFERRED_NONE", "handle", "sev_info"]

_logger = logging.getLogger(__name__)

FEATURES: Final = int(HvFeature.SNP | HvFeature.SNP_AP_CREATION)
"""Hypervisor features that both protocols advertise."""
PREFERRED_NONE: Final = 0xFFFFFFFFFFFFF << 12 | MsrCode.PREFERRED_GPA_RESP
"""The reply that the hypervisor prefers no GHCB address."""

_SNP_ONLY: Final = frozenset({MsrCode.PREFERRED_GPA_REQ, MsrCode.REGISTER_GPA_REQ, MsrCode.PSC_REQ})
_INFO: Final = 0xFFF
_VALUE: Final = 0xFFFFFFFF << 32


def sev_info(ghcb_version: int, cbit: int) -> int:
    """The MSR value that tells the protocol versions and the C-bit; also the value after reset."""
    return SevInfo.of(
        code=MsrCode.SEV_INFO_RESP, cbit=cbit, min_version=GHCB_PROTOCOL_MIN, max_version=ghcb_version
    )


def handle(vcpu: Vcpu, msr: int) -> Outcome:
    """Serve the request in the MSR.

    Args:
        vcpu: whose MSR takes the reply.
        msr: the value found, with a non-zero code in its low 12 bits.

    Returns:
        RESUMED when the reply is in the MSR; a request without one leaves the MSR as it was.
    """
    code = msr & _INFO
    if code == MsrCode.TERM_REQ or (code in _SNP_ONLY and vcpu.vm.vm_type != VmType.SNP):
        _logger.info("%s vCPU %d: the guest ends: %s", vcpu.vm.name, vcpu.id, describe_termination(msr))
        return Terminated(msr)
    if code == MsrCode.PSC_REQ:
        return page_state.begin_msr(vcpu, msr)
    vcpu.answer_msr(msr, _reply(vcpu, code, msr))
    if code == MsrCode.AP_RESET_HOLD_REQ:
        vcpu.startup.hold(Hold.MSR)
        return ResetHold()
    return RESUMED


def _reply(vcpu: Vcpu, code: int, msr: int) -> int:
    if code == MsrCode.SEV_INFO_REQ:
        return vcpu.sev_info()
    if code == MsrCode.CPUID_REQ:
        # Bits 31:12 come back as they were asked, which repeats the register's number to the guest.
        value = vcpu.cpuid(msr >> 32)[msr >> 30 & 3]
        return value << 32 | msr & ~_VALUE & ~_INFO | MsrCode.CPUID_RESP
    if code == MsrCode.AP_RESET_HOLD_REQ:
        return MsrCode.AP_RESET_HOLD_RESP
    if code == MsrCode.HV_FEATURES_REQ:
        return FEATURES << 12 | MsrCode.HV_FEATURES_RESP
    if code == MsrCode.PREFERRED_GPA_REQ:
        return PREFERRED_NONE
    if code == MsrCode.REGISTER_GPA_REQ:
        vcpu.registered_ghcb = msr & ~_INFO
        return msr & ~_INFO | MsrCode.REGISTER_GPA_RESP
    return msr
