"""One hostile act of a guest, and what each KVM makes of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from swsnp.errors import UsageError
from swsnp.machine.answers import GuestStopped
from swsnp.testing.raw_guest import RawGuest
from swsnp.testing.seen import Held, Replied, RunError, Running, Seen, StillRunning, Stopped, limited
from swsnp.vmm.certs import BytesSource
from swsnp.vmm.stop import Idle, RunFailed

if TYPE_CHECKING:
    from swsnp.machine.machine import Machine
    from swsnp.machine.virtual_machine import VirtualMachine
    from swsnp.vmm.certs import Acquired

__all__ = [
    "Case",
    "DEFAULT_BUDGET",
    "Program",
    "ProgramFactory",
    "by_profile",
    "everywhere",
    "firmware_status",
    "play",
    "with_exit",
]

Program: TypeAlias = Generator[None, None, Seen]
ProgramFactory: TypeAlias = Callable[[RawGuest], Program]
DEFAULT_BUDGET: Final = 200

_GENERIC_V1: Final = 1 << 63
_PROFILES: Final = ("coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One hostile act.

    Attributes:
        name: for test ids.
        rule: what decides the result, and the document that says so.
        program: makes the guest program; it returns what it saw.
        expected: the result under each KVM profile; a profile that is not there cannot meet the case.
        certs: the VM's certificates; None: its VMM did not enable the certificate exit.
        meanwhile: what a second vCPU does while the first is in its certificate exit.
        vcpus: of the VM; at least 2 with `meanwhile`.
    """

    name: str
    rule: str
    program: ProgramFactory = field(repr=False)
    expected: Mapping[str, Seen]
    certs: bytes | None = field(default=None, repr=False)
    meanwhile: Callable[[RawGuest], Generator[None, None, Any]] | None = field(default=None, repr=False)
    vcpus: int = 1

    def __str__(self) -> str:
        return self.name


def by_profile(*, v1: Seen, v1r: Seen, l612: Seen, l72: Seen) -> Mapping[str, Seen]:
    """Expected results for the series, its revised patch, Linux 6.12 and Linux 7.2."""
    return MappingProxyType(dict(zip(_PROFILES, (v1, v1r, l612, l72), strict=True)))


def everywhere(seen: Seen) -> Mapping[str, Seen]:
    """One result under every profile."""
    return by_profile(v1=seen, v1r=seen, l612=seen, l72=seen)


def with_exit(*, v1: Seen, v1r: Seen | None = None, l72: Seen) -> Mapping[str, Seen]:
    """Expected results where a certificate exit exists: not in Linux 6.12."""
    return MappingProxyType({"coco-v1": v1, "coco-v1-revised": v1r or v1, "linux-7.2": l72})


def firmware_status(status: int, l612: Replied, *, v1r: Replied | None = None) -> Mapping[str, Seen]:
    """Expected results of a request that the firmware refuses with `status`.

    Linux copies its bounce page to the response page all the same. The series hands every firmware error to
    the VMM; its revised patch tells the guest, under the generic hypervisor error.

    Args:
        status: of the mailbox.
        l612: under Linux 6.12 and 7.2.
        v1r: under the revised patch; by default nothing was written to the response page.
    """
    revised = v1r or Replied(info1=0, info2=_GENERIC_V1 | status)
    return by_profile(v1=RunError(5), v1r=revised, l612=l612, l72=l612)


class _Meanwhile(BytesSource):
    """Certificates whose look-up gives a second vCPU time to run."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, name="hostile guest")
        self.act: Callable[[], object] = lambda: None

    def acquire(self, room: int, *, least_wait_s: float = 0.0) -> Acquired:
        self.act()
        return super().acquire(room, least_wait_s=least_wait_s)


def play(case: Case, machine: Machine, *, budget: int = DEFAULT_BUDGET) -> Seen:
    """Boot a VM of its own on the machine and let the case happen in it.

    Args:
        case: from `HOSTILE_GUEST`, or a user's own.
        machine: of any profile in `case.expected`.
        budget: how often the guest may leave before it counts as still running.

    Returns:
        What became of it; compare with `case.expected[machine.profile.name]`.
    """
    source = None if case.certs is None else _Meanwhile(case.certs)
    with machine.create_vm(certs=source, vcpus=max(case.vcpus, 1 if case.meanwhile is None else 2)) as vm:
        booted = vm.boot()
        if source is not None and (meanwhile := case.meanwhile) is not None:
            source.act = lambda: vm.execute(1, meanwhile(RawGuest(vm.vcpus[1], booted, 1)))
        return _run(vm, case.program(RawGuest(vm.vcpus[0], booted)), budget)


def _run(vm: VirtualMachine, program: Program, budget: int) -> Seen:
    try:
        seen: Seen = vm.execute(0, limited(program, budget))
    except StillRunning as still:
        return Running(still.exits)
    except GuestStopped as stopped:
        match stopped.reason:
            case RunFailed(errno=number):
                return RunError(number)
            case Idle():
                return Held()
            case reason:
                return Stopped(reason)
    except UsageError:  # idle, and the program has no result: it waits in its exit
        vm.vcpus[0].abandon()
        return Held()
    return seen
