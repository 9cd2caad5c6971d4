"""Why a vCPU's run loop came back."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final, TypeAlias

__all__ = [
    "EntryFailed",
    "GuestShutdown",
    "Idle",
    "InternalError",
    "PowerSwitch",
    "PoweredOff",
    "RESET",
    "RunFailed",
    "StopReason",
    "Terminated",
    "TimedOut",
    "UnhandledExit",
]

RESET: Final = "reset"


@dataclass(frozen=True, slots=True)
class Idle:
    """The guest has nothing to do; run it again when it has. `mp_state` is what KVM_GET_MP_STATE says."""

    mp_state: int


@dataclass(frozen=True, slots=True)
class Terminated:
    """The guest asked to be ended. Set and code are None when the VMM could not learn them."""

    reason_set: int | None
    reason_code: int | None
    ghcb_msr: int


@dataclass(frozen=True, slots=True)
class GuestShutdown:
    """KVM_EXIT_SHUTDOWN: the guest triple-faulted."""


@dataclass(frozen=True, slots=True)
class EntryFailed:
    """KVM_EXIT_FAIL_ENTRY: the processor would not enter the guest."""

    reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM_EXIT_INTERNAL_ERROR."""

    suberror: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunFailed:
    """KVM_RUN, or a call that its exit asked for, failed; `errno` is positive, 0 where there is none."""

    errno: int
    detail: str


@dataclass(frozen=True, slots=True)
class UnhandledExit:
    """An exit that this VMM has no answer to."""

    exit_reason: int
    detail: str


@dataclass(frozen=True, slots=True)
class PoweredOff:
    """A device switched the VM off: `how` is for people, `status` the guest's exit status if it gave one."""

    how: str
    status: int | None = None

    @property
    def is_reset(self) -> bool:
        """Whether the guest wants to be started again."""
        return self.how == RESET


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The time that the VM was given is over.

    `threads` are the places, by vCPU, where each one's thread was then: module, function and line.
    """

    seconds: float
    threads: tuple[str, ...] = field(default=(), compare=False)


StopReason: TypeAlias = (
    Idle
    | Terminated
    | GuestShutdown
    | EntryFailed
    | InternalError
    | RunFailed
    | UnhandledExit
    | PoweredOff
    | TimedOut
)


class PowerSwitch:
    """What devices end a VM with. The first to press says how; the vCPU that did the access stops at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.pressed: PoweredOff | None = None

    def press(self, how: str, status: int | None = None) -> None:
        """Switch off, as a reset or a debug exit port does."""
        with self._lock:
            if self.pressed is None:
                self.pressed = PoweredOff(how, status)
