"""SNP AP creation: one vCPU gives another a VMSA page, or takes it away.

Source: AMD 56421 (GHCB 2.0), SNP AP creation; Linux, arch/x86/kvm/svm/sev.c, sev_snp_ap_creation.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import GhcbError
from swsnp.hypervisor.outcomes import RESUMED

if TYPE_CHECKING:
    from swsnp.hypervisor.outcomes import Outcome
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.hypervisor.vmgexit import GhcbEvent

__all__ = ["NewVmsa", "Request", "handle"]

_logger = logging.getLogger(__name__)

_PAGE: Final = 4096
_LARGE_PAGE: Final = 2 << 20


class Request(IntEnum):
    """Low half of exit info 1."""

    CREATE_ON_INIT = 0
    CREATE = 1
    DESTROY = 2


@dataclass(frozen=True, slots=True)
class NewVmsa:
    """What a vCPU will run from when it next looks; `gpa` None: nothing, it is destroyed."""

    gpa: int | None
    on_init: bool = False


def handle(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Serve one AP creation event: every fault in it is answered as invalid input."""
    request, apic_id = event.info1 & 0xFFFFFFFF, event.info1 >> 32
    target = vcpu.vm.vcpus.get(apic_id)
    if target is None:
        return _refuse(vcpu, event, f"no vCPU has APIC id {apic_id:#x}")
    if (fault := _fault(vcpu, event, request)) is not None:
        if vcpu.vm.profile.ap_refusal_stops_target:
            # Request 0 with other features stops the target at once, with a bad address at its next INIT.
            at_once = request != Request.CREATE_ON_INIT or not _same_features(vcpu, event)
            target.startup.ask_new_vmsa(NewVmsa(None, on_init=not at_once))
        return _refuse(vcpu, event, fault)
    if request == Request.DESTROY:
        target.startup.ask_new_vmsa(NewVmsa(None))
    else:
        target.startup.ask_new_vmsa(NewVmsa(event.info2, on_init=request == Request.CREATE_ON_INIT))
    return RESUMED


def _refuse(vcpu: Vcpu, event: GhcbEvent, fault: str) -> Outcome:
    _logger.warning("%s vCPU %d: AP creation refused: %s", vcpu.vm.name, vcpu.id, fault)
    return event.refuse(GhcbError.INVALID_INPUT)


def _same_features(vcpu: Vcpu, event: GhcbEvent) -> bool:
    """Whether RAX agrees with the VM's SEV features, as far as this KVM compares them."""
    sev = vcpu.vm.sev
    features = sev.vmsa_features if sev is not None else 0
    return not (event.rax ^ features) & vcpu.vm.profile.ap_features_mask


def _fault(vcpu: Vcpu, event: GhcbEvent, request: int) -> str | None:
    """Why the request cannot be served, or None."""
    if request == Request.DESTROY:
        return None
    if request not in (Request.CREATE_ON_INIT, Request.CREATE):
        return f"request {request:#x}"
    gpa = event.info2
    if not _same_features(vcpu, event):
        return f"SEV features {event.rax:#x} are not the VM's"
    if gpa % _PAGE or gpa >> vcpu.gpa_bits:
        return f"VMSA address {gpa:#x}"
    if gpa % _LARGE_PAGE == 0:
        # An erratum of the processor: a VMSA at such an address can collide with a 2 MiB RMP entry.
        return f"VMSA address {gpa:#x} is 2 MiB aligned"
    return None
