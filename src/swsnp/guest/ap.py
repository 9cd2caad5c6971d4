"""Starting further vCPUs. Source: AMD 56421, SNP AP creation; Linux, wakeup_cpu_via_vmgexit."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import PAGE, ExitCode
from swsnp.abi.vmsa import Vmsa
from swsnp.errors import LayoutError, SwsnpError
from swsnp.guest.ghcb_page import EsResult, es_result

if TYPE_CHECKING:
    from collections.abc import Generator

    from swsnp.guest.cpu import GuestCpu
    from swsnp.guest.ghcb_page import GhcbPage

__all__ = ["ApCreation", "ApRefused", "place_vmsa", "start_ap"]

_FEATURES_AT: Final = Vmsa.offset_of("sev_features")
_TARGET_VMPL: Final = 1
"""RMPADJUST by VMPL0 cannot name VMPL0; Linux names VMPL1 and gives it nothing."""


class ApCreation(IntEnum):
    """Low half of SW_EXITINFO1 of an AP creation event."""

    CREATE_ON_INIT = 0
    CREATE = 1
    DESTROY = 2


class ApRefused(SwsnpError):
    """The processor refused the VMSA page, or the host refused the vCPU."""


def place_vmsa(cpu: GuestCpu, gpa: int, vmsa: bytes) -> None:
    """Accept a private page and write a VMSA into it.

    Raises:
        LayoutError: not 4096 bytes.
        ApRefused: PVALIDATE failed.
    """
    if len(vmsa) != PAGE:
        raise LayoutError(f"VMSA: got {len(vmsa)} bytes, wanted {PAGE} (AMD 24593)")
    code, _ = cpu.memory.pvalidate(gpa, validate=True)
    if code:
        raise ApRefused(f"VMSA page {gpa:#x}: PVALIDATE {code}")
    cpu.memory.write(gpa, vmsa, private=True)


def start_ap(cpu: GuestCpu, ghcb: GhcbPage, apic_id: int, vmsa_gpa: int) -> Generator[None, None, None]:
    """Make a page a VMSA and have the host run a vCPU from it.

    Args:
        cpu: the vCPU that asks.
        ghcb: its registered GHCB.
        apic_id: of the vCPU to start.
        vmsa_gpa: a validated private page that holds the VMSA; hosts refuse one that is 2 MiB aligned.

    Raises:
        ApRefused: RMPADJUST failed, or the host refused.
    """
    memory = cpu.memory
    features = int.from_bytes(memory.read(vmsa_gpa + _FEATURES_AT, 8, private=True), "little")
    if code := memory.rmpadjust(vmsa_gpa, vmpl=_TARGET_VMPL, permissions=0, vmsa=True):
        raise ApRefused(f"VMSA page {vmsa_gpa:#x}: RMPADJUST {code}")
    ghcb.ask(ExitCode.AP_CREATION, apic_id << 32 | ApCreation.CREATE, vmsa_gpa, rax=features)
    yield
    info1, info2 = ghcb.reply()
    if es_result(info1, info2) is not EsResult.OK:
        raise ApRefused(f"AP creation, APIC id {apic_id}: reply info1={info1:#x} info2={info2:#x}")
