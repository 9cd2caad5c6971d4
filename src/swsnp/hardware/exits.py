"""Why a processor stops running guest code: reported by both kinds, handled by the hypervisor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = [
    "GuestAccessFault",
    "GuestExit",
    "Halt",
    "Interrupted",
    "MmioAccess",
    "NestedPageFault",
    "PortAccess",
    "ProcessorError",
    "Shutdown",
    "Vmgexit",
]


@dataclass(frozen=True, slots=True)
class Vmgexit:
    """The guest executed VMGEXIT; the GHCB MSR says what it wants."""


@dataclass(frozen=True, slots=True)
class Halt:
    """The guest has nothing to do (HLT)."""


@dataclass(frozen=True, slots=True)
class NestedPageFault:
    """An access whose C-bit does not match the memory attribute, or where no memory is."""

    gpa: int
    private: bool
    write: bool


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Triple fault, or the end of a built-in program by an error of its own; `reason` is for people."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class ProcessorError:
    """A real processor or its KVM could not go on (KVM_EXIT_INTERNAL_ERROR)."""

    suberror: int
    reason: str = ""


@dataclass(slots=True, unsafe_hash=True)
class PortAccess:
    """IN or OUT by guest code itself: `count` items of `size` bytes at one port, `data` those to write.

    A processor of SEV hardware raises #VC instead; one that stands in for it leaves with the access.

    Not frozen but Final, since the constructor of a frozen one takes three times as long: a kernel's boot has
    a thousand of them.
    """

    read: Final[bool]
    size: Final[int]
    port: Final[int]
    count: Final[int] = 1
    data: Final[bytes] = b""


@dataclass(frozen=True, slots=True)
class MmioAccess:
    """A shared access where no memory is: `size` bytes at `gpa`, `data` those to write, None for a read."""

    gpa: int
    size: int
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Somebody in the host wanted the processor out of its guest, which can go on at once."""


GuestExit: TypeAlias = (
    Vmgexit | Halt | NestedPageFault | PortAccess | MmioAccess | Interrupted | Shutdown | ProcessorError
)


class GuestAccessFault(Exception):
    """An access of guest code that the nested page table or the RMP refused; carries the exit to report."""

    def __init__(self, reason: GuestExit) -> None:
        super().__init__(repr(reason))
        self.reason = reason
