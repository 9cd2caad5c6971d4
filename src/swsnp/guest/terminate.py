"""The GHCB MSR protocol, and the guest's way to give up. Source: AMD 56421; Linux, sev-common.h."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NoReturn

from swsnp.abi.ghcb import MsrCode, TerminateRequest
from swsnp.errors import SwsnpError

if TYPE_CHECKING:
    from collections.abc import Generator

    from swsnp.guest.cpu import GuestCpu

__all__ = ["GeneralReason", "GuestTerminated", "LinuxReason", "ReasonSet", "msr_call", "terminate"]


class ReasonSet(IntEnum):
    """Who defines the reason code."""

    GENERAL = 0
    LINUX = 1


class GeneralReason(IntEnum):
    """Set 0, of the GHCB specification."""

    GENERAL_REQUEST = 0
    PROTOCOL_UNSUPPORTED = 1
    SNP_UNSUPPORTED = 2


class LinuxReason(IntEnum):
    """Set 1: GHCB_TERM_* of Linux."""

    REGISTER = 0
    PSC = 1
    PVALIDATE = 2
    NOT_VMPL0 = 3
    CPUID = 4
    CPUID_HV = 5
    SECRETS_PAGE = 6
    NO_SVSM = 7
    SVSM_VMPL0 = 8
    SVSM_CAA = 9
    SECURE_TSC = 10
    SVSM_CA_REMAP_FAIL = 11
    SECURE_AVIC = 12


class GuestTerminated(SwsnpError):
    """The guest gave up and told the host.

    Attributes:
        reason_set: 0 of the specification, 1 of Linux.
        reason_code: within the set.
    """

    def __init__(self, reason_set: ReasonSet, reason_code: int, why: str) -> None:
        super().__init__(f"guest terminated, set {int(reason_set)} code {int(reason_code)}: {why}")
        self.reason_set = reason_set
        self.reason_code = reason_code


def msr_call(cpu: GuestCpu, request: int) -> Generator[None, None, int]:
    """One round of the MSR protocol: returns what the host left in the MSR."""
    cpu.ghcb_msr = int(request)
    yield
    return cpu.ghcb_msr


def terminate(
    cpu: GuestCpu, reason_set: ReasonSet, reason_code: int, why: str
) -> Generator[None, None, NoReturn]:
    """Ask the host to end the guest.

    Raises:
        GuestTerminated: always, should the host let the guest go on.
    """
    yield from msr_call(
        cpu, TerminateRequest.of(code=MsrCode.TERM_REQ, reason_set=reason_set, reason_code=reason_code)
    )
    raise GuestTerminated(reason_set, reason_code, why)
