"""What the launch commands share: an SNP guest's state in KVM, a result, copying from userspace."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from swsnp.abi.record import Record
from swsnp.abi.snp_command import LaunchUpdate, LaunchUpdateInfo
from swsnp.hardware.memory import BusError

if TYPE_CHECKING:
    from swsnp.hypervisor.vm import Vm

__all__ = ["EFAULT", "EINVAL", "ENOTTY", "OK", "SevState", "Step", "copy_in", "update_buffer"]

_R = TypeVar("_R", bound=Record)


@dataclass(slots=True)
class SevState:
    """What KVM keeps of an SNP guest from KVM_SEV_INIT2 on. Pages are system addresses, 0 for none."""

    asid: int
    vmsa_features: int
    ghcb_version: int
    gctx: int | None = None
    sev_fd: int = -1
    policy: int = 0
    request_page: int = 0
    response_page: int = 0
    ap_jump_table: int = 0
    pre_fault_allowed: bool = False
    """The launch is over: pages that the guest has not touched may be given to it."""
    request_mutex: threading.Lock = field(default_factory=threading.Lock)


class Step(NamedTuple):
    """How a command ended; `error` is the firmware's status, None to leave the caller's field alone."""

    ret: int
    error: int | None = None
    copy_back: bool = True


OK: Final = Step(0)
EINVAL: Final = Step(-errno.EINVAL)
EFAULT: Final = Step(-errno.EFAULT)
ENOTTY: Final = Step(-errno.ENOTTY)


def copy_in(vm: Vm, kind: type[_R], address: int) -> _R | None:
    """A structure of the VMM's memory; None (-EFAULT) when it cannot be read."""
    try:
        return kind.parse(vm.task.read(address, kind.SIZE))
    except BusError:
        return None


def update_buffer(sev: SevState, spa: int, page_type: int, *, page_size: int = 0) -> bytes:
    """The firmware's command for one page of 4 KiB (0) or 2 MiB (1); VMPL1 to 3 get no permissions."""
    info = LaunchUpdateInfo.of(page_type=page_type, page_size=page_size)
    return bytes(LaunchUpdate(gctx_paddr=sev.gctx or 0, info=info, page_paddr=spa))
