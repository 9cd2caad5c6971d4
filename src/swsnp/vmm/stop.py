"""Why a vCPU's run loop came back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "EntryFailed",
    "GuestShutdown",
    "Idle",
    "InternalError",
    "RunFailed",
    "StopReason",
    "Terminated",
    "UnhandledExit",
]


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


StopReason: TypeAlias = (
    Idle | Terminated | GuestShutdown | EntryFailed | InternalError | RunFailed | UnhandledExit
)
