"""Instructions that a guest's #VC handler relays, as KVM's exit handlers treat them.

Source: AMD 56421 (GHCB 2.0), NAE events; Linux, arch/x86/kvm/svm/svm.c (svm_exit_handlers) and
arch/x86/kvm/x86.c.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import GP_EXCEPTION, ExitCode, GhcbField, Reply
from swsnp.abi.kvm import MAP_GPA_RANGE, InternalErrorCode
from swsnp.hypervisor.outcomes import RESUMED, GuestShutdown, HypercallWanted, InternalError

if TYPE_CHECKING:
    from swsnp.hypervisor.outcomes import Outcome
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.hypervisor.vmgexit import GhcbEvent

__all__ = [
    "NO_OPERATIONS",
    "PMU_COUNTERS",
    "complete_hypercall",
    "cpuid",
    "msr",
    "no_operation",
    "rdpmc",
    "rdtsc",
    "rdtscp",
    "vmmcall",
]

_logger = logging.getLogger(__name__)

PMU_COUNTERS: Final = 4
"""Performance counters of a guest without PERFCTR_CORE. No one counts here: each stands at 0."""
NO_OPERATIONS: Final = (
    ExitCode.READ_DR7,
    ExitCode.WRITE_DR7,
    ExitCode.INVD,
    ExitCode.WBINVD,
    ExitCode.MONITOR,
    ExitCode.MWAIT,
)
"""Events that `no_operation` serves."""
_U32: Final = 0xFFFFFFFF
_U64: Final = (1 << 64) - 1
_PAGE: Final = 4096
_VAPIC_POLL_IRQ: Final = 1
_KVM_ENOSYS: Final = 1000
_INDEXED_LEAVES: Final = frozenset(
    {4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1D, 0x1E, 0x1F, 0x24, 0x8000001D, 0x80000026}
)
"""CPUID functions whose ECX chooses a sub-leaf."""


def no_operation(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """INVD, WBINVD, MONITOR, MWAIT: nothing to do. DR7: the processor keeps the guest's own value."""
    _logger.debug("%s vCPU %d: event %#x does nothing", vcpu.vm.name, vcpu.id, event.code)
    return RESUMED


def cpuid(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Answer RAX, RBX, RCX and RDX from the vCPU's CPUID function, which knows sub-leaf 0 only.

    XCR0 must come with function 0Dh but has no effect: the function holds fixed values.
    """
    leaf, subleaf = event.rax & _U32, event.rcx & _U32
    known = not subleaf or leaf not in _INDEXED_LEAVES
    event.rax, event.rbx, event.rcx, event.rdx = vcpu.cpuid(leaf) if known else (0, 0, 0, 0)
    return RESUMED


def msr(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Read (exit info 1 is 0) or write an MSR; what the table refuses is #GP for the guest, by the reply."""
    index = event.rcx & _U32
    if event.info1:
        if vcpu.msrs.write(index, (event.rdx & _U32) << 32 | event.rax & _U32):
            return RESUMED
    elif (value := vcpu.msrs.read(index)) is not None:
        event.rax, event.rdx = value & _U32, value >> 32
        return RESUMED
    _logger.debug("%s vCPU %d: MSR %#x: #GP", vcpu.vm.name, vcpu.id, index)
    event.answer(GP_EXCEPTION, Reply.ISSUE_EXCEPTION)
    return RESUMED


def rdpmc(_: Vcpu, event: GhcbEvent) -> Outcome:
    """A counter that exists reads 0; another is #GP, which KVM injects."""
    if event.rcx & _U32 >= PMU_COUNTERS:
        return _injected("#GP", event)
    event.rax = event.rdx = 0
    return RESUMED


def rdtsc(_: Vcpu, event: GhcbEvent) -> Outcome:
    """KVM checks the event and has no handler: an exit that it did not expect."""
    reason = f"exit code {event.code:#x}: KVM never intercepts RDTSC"
    return InternalError(InternalErrorCode.UNEXPECTED_EXIT_REASON, reason, (event.code, 0))


def rdtscp(_: Vcpu, event: GhcbEvent) -> Outcome:
    """KVM intercepts RDTSCP only for a guest that must not have it: #UD."""
    return _injected("#UD", event)


def _injected(exception: str, event: GhcbEvent) -> Outcome:
    # The exception would arrive at the guest's VMGEXIT. Processors here take none: it ends as a guest whose
    # handler fails too.
    return GuestShutdown(f"exit code {event.code:#x}: KVM injects {exception}, no processor here takes one")


# VMMCALL


def vmmcall(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """KVM's hypercalls: RAX the number, RBX, RCX and RDX arguments, the result to RAX.

    KVM_HC_MAP_GPA_RANGE leaves to userspace where that asked for it; calls that want a paravirtual feature of
    CPUID 4000_0001h are not there.
    """
    result = _refused_hypercall(vcpu, event)
    if result is None:
        return HypercallWanted((event.rbx, event.rcx, event.rdx), event)
    event.rax = result & _U64
    return RESUMED


def _refused_hypercall(vcpu: Vcpu, event: GhcbEvent) -> int | None:
    """The result of a hypercall that ends here; None: userspace is asked."""
    if event.page[GhcbField.CPL]:
        return -errno.EPERM
    if event.rax == _VAPIC_POLL_IRQ:
        return 0
    if event.rax != MAP_GPA_RANGE or not vcpu.vm.exit_hypercall_mask & 1 << MAP_GPA_RANGE:
        return -_KVM_ENOSYS
    gpa, npages = event.rbx, event.rcx
    if gpa % _PAGE or not npages or gpa // _PAGE + npages > _U64:
        return -errno.EINVAL
    return None


def complete_hypercall(asked: HypercallWanted, ret: int) -> Outcome:
    """Give userspace's result, read once, to the guest as it is."""
    asked.event.rax = ret
    return RESUMED
