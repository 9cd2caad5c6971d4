"""The scratch area of a GHCB event: guest memory that an event's data is in.

Source: AMD 56421 (GHCB 2.0), shared buffer area; Linux, arch/x86/kvm/svm/sev.c, setup_vmgexit_scratch.
The rules are those after "KVM: SEV: Require in-GHCB scratch area if GHCB v2+ is in use" (7.1, and stable
kernels such as 6.12.117). What kernels before allowed, among it accesses behind the page, is not modelled.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import SHARED_BUFFER, SHARED_BUFFER_SIZE, GhcbError
from swsnp.hardware import BusError
from swsnp.hypervisor.outcomes import VmmErrno

if TYPE_CHECKING:
    from swsnp.hypervisor.outcomes import Outcome
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.hypervisor.vmgexit import GhcbEvent

__all__ = ["LIMIT", "ghcb_version", "scratch_area", "write_outside"]

_logger = logging.getLogger(__name__)

_PAGE: Final = 4096
_ADDRESSES: Final = 1 << 64
LIMIT: Final = 16 * _PAGE
"""The most that KVM copies from outside the GHCB (protocol version 1)."""


def ghcb_version(vcpu: Vcpu) -> int:
    """The highest GHCB protocol that the VM offers; 2 for a VM without SEV, which has no GHCB."""
    sev = vcpu.vm.sev
    return 2 if sev is None else sev.ghcb_version


def scratch_area(vcpu: Vcpu, event: GhcbEvent, size: int, *, write_back: bool) -> memoryview | Outcome:
    """Find the scratch area of an event that needs at least `size` bytes there.

    Args:
        vcpu: whose event it is.
        event: gives the scratch address; refused when the area breaks a rule.
        size: bytes; positive.
        write_back: an area outside the GHCB, which is a copy, goes back to the guest at its next entry.

    Returns:
        The guest's memory from the scratch address to the end of the shared buffer; with protocol version 1
        also a copy of `size` bytes from elsewhere; or how the event ends instead.
    """
    start = event.scratch
    if not start or start + size >= _ADDRESSES:
        return event.refuse(GhcbError.INVALID_SCRATCH_AREA)
    if start & -_PAGE == event.gpa:
        offset, end = start - event.gpa, SHARED_BUFFER + SHARED_BUFFER_SIZE
        if offset < SHARED_BUFFER or offset + size > end:
            return event.refuse(GhcbError.INVALID_SCRATCH_AREA)
        return event.page[offset:end]
    if ghcb_version(vcpu) >= 2 or size > LIMIT:
        return event.refuse(GhcbError.INVALID_SCRATCH_AREA)
    try:
        copy = memoryview(bytearray(vcpu.vm.memory.host_read(start, size)))
    except BusError:
        return VmmErrno(-errno.EFAULT)
    if write_back:
        event.outside = (start, copy)
    return copy


def write_outside(vcpu: Vcpu, gpa: int, copy: memoryview) -> None:
    """Give the copy of an area outside the GHCB back to the guest; one that cannot be written is lost."""
    try:
        vcpu.vm.memory.host_write(gpa, copy)
    except BusError:
        _logger.warning("%s vCPU %d: scratch area at %#x cannot be written", vcpu.vm.name, vcpu.id, gpa)
