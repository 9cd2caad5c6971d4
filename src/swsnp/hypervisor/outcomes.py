"""How an event of the guest ends for KVM: what its handlers return, what KVM_RUN makes of it.

In the kernel these are 1, 0 and -errno with side effects on `kvm_run`; here each has a name and its data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from swsnp.hardware import MmioAccess, PortAccess
    from swsnp.hypervisor.page_state import PageStateChange
    from swsnp.hypervisor.profiles import CertExit
    from swsnp.hypervisor.vmgexit import GhcbEvent

__all__ = [
    "AccessWanted",
    "CertsWanted",
    "Departure",
    "EntryFailed",
    "GuestHalted",
    "GuestResumed",
    "GuestShutdown",
    "HypercallWanted",
    "InternalError",
    "Kicked",
    "MapGpaRange",
    "MemoryFault",
    "MmioWanted",
    "Outcome",
    "PortIoWanted",
    "RESUMED",
    "ResetHold",
    "Terminated",
    "UserspaceWanted",
    "VmmErrno",
    "WaitsForSipi",
]


@dataclass(frozen=True, slots=True)
class GuestResumed:
    """The guest goes on at once."""


@dataclass(frozen=True, slots=True)
class CertsWanted:
    """Userspace is asked for the certificates of an extended guest request.

    `gpa` and `npages` are RAX and RBX as the guest gave them; `layout` is the exit of the
    profile, `event` what the completion goes on with.
    """

    gpa: int
    npages: int
    layout: CertExit = field(repr=False, compare=False)
    event: GhcbEvent = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class MapGpaRange:
    """Userspace is asked to convert pages (KVM_HC_MAP_GPA_RANGE).

    `npages` counts 4 KiB pages, `page_size` is a hint: 4096 or 2 MiB.
    `change` is the list of entries being worked on; None: asked through the GHCB MSR.
    """

    gpa: int
    npages: int
    private: bool
    page_size: int
    change: PageStateChange | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class HypercallWanted:
    """Userspace is asked to serve KVM_HC_MAP_GPA_RANGE that the guest called: address, pages, attributes."""

    args: tuple[int, int, int]
    event: GhcbEvent = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class PortIoWanted:
    """Userspace is asked to read or write a port: `count` items of `size` bytes, `data` those to write.

    `buffer` is what is left of the string form's scratch area, these items included; None: RAX.
    """

    read: bool
    size: int
    port: int
    count: int
    data: bytes
    event: GhcbEvent = field(repr=False, compare=False)
    buffer: memoryview | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class MmioWanted:
    """Userspace is asked to read or write device memory at `gpa`; `buffer` is what is left of the data."""

    gpa: int
    write: bool
    buffer: memoryview = field(repr=False, compare=False)
    event: GhcbEvent = field(repr=False, compare=False)

    @property
    def length(self) -> int:
        """Bytes of this exit: at most 8."""
        return min(8, len(self.buffer))


@dataclass(frozen=True, slots=True)
class AccessWanted:
    """Userspace is asked to serve an access that guest code made itself: a processor left with it."""

    access: PortAccess | MmioAccess


@dataclass(frozen=True, slots=True)
class Terminated:
    """The guest asked to be terminated; the value of its GHCB MSR goes to userspace."""

    ghcb_msr: int


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """An access and the memory attribute of its page differ, or there is no memory: -EFAULT."""

    gpa: int
    private: bool


@dataclass(frozen=True, slots=True)
class Kicked:
    """A signal came to the thread that runs the vCPU: the guest can go on at once."""


@dataclass(frozen=True, slots=True)
class GuestHalted:
    """Nothing to run: KVM_RUN ends as if a signal had come."""


@dataclass(frozen=True, slots=True)
class ResetHold:
    """The guest asked to be held until a SIPI: as `GuestHalted`, with its own MP state."""


@dataclass(frozen=True, slots=True)
class WaitsForSipi:
    """INIT came and no SIPI yet: as `GuestHalted`; the MP state stays."""


@dataclass(frozen=True, slots=True)
class GuestShutdown:
    """Shutdown intercept (triple fault)."""

    reason: str


@dataclass(frozen=True, slots=True)
class InternalError:
    """The processor cannot go on; `data` are the numbers that userspace gets."""

    suberror: int
    reason: str
    data: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EntryFailed:
    """VMRUN failed, or was not tried because the vCPU has no VMSA."""

    reason: int


@dataclass(frozen=True, slots=True)
class VmmErrno:
    """KVM_RUN ends with this error; `errno` is negative."""

    errno: int


UserspaceWanted: TypeAlias = (
    CertsWanted | MapGpaRange | HypercallWanted | PortIoWanted | MmioWanted | AccessWanted
)
"""Outcomes that wait for userspace: the next KVM_RUN completes them."""

Departure: TypeAlias = (
    UserspaceWanted
    | Terminated
    | MemoryFault
    | Kicked
    | GuestHalted
    | ResetHold
    | WaitsForSipi
    | GuestShutdown
    | InternalError
    | EntryFailed
    | VmmErrno
)
"""Outcomes that end KVM_RUN."""

Outcome: TypeAlias = GuestResumed | Departure

RESUMED: Final = GuestResumed()
"""The one value of its kind that handlers return."""
