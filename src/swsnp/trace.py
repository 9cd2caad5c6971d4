"""Typed trace events: one per hop of a request, free when nobody listens.

A party holds a `Trace` and writes::

    if (emit := self._trace.emit) is not None:
        emit(MessageSealed(...))

so that without a listener a hop costs one attribute look-up. What happens at every exit of a guest goes
through `emit_exit` likewise, for listeners that want so much. Events never carry keys or plaintext secrets.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "ApStarted",
    "CertsRead",
    "CertsWanted",
    "CompletionTaken",
    "FirmwareCommand",
    "GuestLeft",
    "GuestReplied",
    "IoctlCalled",
    "IoctlReturned",
    "LaunchStep",
    "MessageOpened",
    "MessageSealed",
    "MsrProtocol",
    "PageStateChange",
    "ReportSigned",
    "RunEnded",
    "Trace",
    "TraceEvent",
    "Vmgexit",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class IoctlCalled:
    """A program called the guest driver."""

    vm: str
    command: int
    msg_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class IoctlReturned:
    """The guest driver answered: `result` is 0, a positive value or -errno."""

    vm: str
    command: int
    result: int
    exitinfo2: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSealed:
    """A guest message was encrypted; `by` is "guest" or "firmware"."""

    by: str
    vmpck: int
    seqno: int
    msg_type: int
    payload_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageOpened:
    """A guest message was decrypted and found in order; `by` is "guest" or "firmware"."""

    by: str
    vmpck: int
    seqno: int
    msg_type: int
    payload_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Vmgexit:
    """KVM took a GHCB event."""

    vm: str
    vcpu: int
    exit_code: int
    info1: int
    info2: int
    rax: int
    rbx: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MsrProtocol:
    """KVM answered a GHCB MSR request; a request that leaves to userspace is answered later."""

    vm: str
    vcpu: int
    request: int
    reply: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CertsWanted:
    """KVM left to userspace for certificates; `address` is gfn or gpa as the profile has it."""

    vm: str
    vcpu: int
    exit_reason: int
    address: int
    npages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CertsRead:
    """The VMM looked for certificates: `ret` is what it put into kvm_run, `size` the blob's bytes."""

    vm: str
    vcpu: int
    source: str
    size: int
    npages: int
    ret: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionTaken:
    """KVM consumed the completion of an exit."""

    vm: str
    vcpu: int
    exit_reason: int
    ret: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageStateChange:
    """The VMM converted a range at the guest's request."""

    vm: str
    gpa: int
    npages: int
    private: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FirmwareCommand:
    """The firmware ended a mailbox command."""

    command: int
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSigned:
    """The firmware built a report; `signing_key` as in the report, `tcb` is REPORTED_TCB."""

    version: int
    signing_key: int
    tcb: int
    vmpl: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchStep:
    """KVM ended a launch command; `result` is the ioctl's."""

    vm: str
    command: int
    result: int
    error: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ApStarted:
    """AP creation made a vCPU runnable."""

    vm: str
    vcpu: int
    vmsa_gpa: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestReplied:
    """KVM wrote its reply into the GHCB."""

    vm: str
    vcpu: int
    info1: int
    info2: int
    rbx: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestLeft:
    """A processor left machine code at `rip`; `exit` is the kind of `hardware.exits`."""

    vm: str
    vcpu: int
    rip: int
    exit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """KVM_RUN returned to the VMM: `result` is 0 or -errno, `exit_reason` valid only with 0 (or -EFAULT)."""

    vm: str
    vcpu: int
    result: int
    exit_reason: int


TraceEvent: TypeAlias = (
    IoctlCalled
    | IoctlReturned
    | MessageSealed
    | MessageOpened
    | Vmgexit
    | MsrProtocol
    | CertsWanted
    | CertsRead
    | CompletionTaken
    | PageStateChange
    | FirmwareCommand
    | ReportSigned
    | LaunchStep
    | ApStarted
    | GuestReplied
    | GuestLeft
    | RunEnded
)

_Listener: TypeAlias = "Callable[[TraceEvent], None]"


class Trace:
    """Where events go. `emit` is None while nobody listens, `emit_exit` while nobody wants single exits."""

    __slots__ = ("_listeners", "emit", "emit_exit")

    def __init__(self) -> None:
        self._listeners: tuple[tuple[_Listener, bool], ...] = ()
        self.emit: _Listener | None = None
        self.emit_exit: _Listener | None = None

    @contextmanager
    def listen(self, listener: _Listener, *, exits: bool = True) -> Iterator[None]:
        """Call `listener` for every event inside the block; calls come from the threads that act.

        Args:
            listener: takes the events.
            exits: those of single exits too, of which a kernel's boot has tens of thousands: `GuestLeft`,
                `RunEnded`, `CompletionTaken`, `MsrProtocol`, `PageStateChange`, `GuestReplied`.
        """
        mine = listener, exits
        self._set((*self._listeners, mine))
        try:
            yield
        finally:
            rest = list(self._listeners)
            rest.remove(mine)
            self._set(tuple(rest))

    def _set(self, listeners: tuple[tuple[_Listener, bool], ...]) -> None:
        self._listeners = listeners
        self.emit = self._tell if listeners else None
        self.emit_exit = self._tell_exit if any(exits for _, exits in listeners) else None

    def _tell(self, event: TraceEvent) -> None:
        for listener, _ in self._listeners:
            listener(event)

    def _tell_exit(self, event: TraceEvent) -> None:
        for listener, exits in self._listeners:
            if exits:
                listener(event)
