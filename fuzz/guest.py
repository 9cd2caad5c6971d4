"""A booted VM of a seeded machine, made anew when an execution has ended it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from swsnp.hardware import GuestAccessFault
from swsnp.machine import Machine
from swsnp.machine.answers import GuestStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from swsnp.guest.boot import BootedGuest
    from swsnp.machine import VirtualMachine

__all__ = ["Clock", "FuzzedVm"]


class Clock:
    """Time moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds


class FuzzedVm:
    """One VM; `vm` boots another when the last one is no longer good for anything."""

    def __init__(self, profile: str) -> None:
        self._machine = Machine(seed=b"fuzz", profile=profile, clock=Clock())
        self._vm: VirtualMachine | None = None
        self._guest: BootedGuest | None = None

    @property
    def vm(self) -> VirtualMachine:
        if self._vm is None:
            self._vm = self._machine.create_vm(certs=b"\xc5" * 5000)
            self._guest = self._vm.boot()
        return self._vm

    @property
    def guest(self) -> BootedGuest:
        self.vm  # noqa: B018  # boots
        assert self._guest is not None
        return self._guest

    def discard(self) -> None:
        if self._vm is not None:
            self._vm.close()
        self._vm = None

    def execute(self, program: Callable[[Any, int], Generator[None, None, Any]]) -> tuple[Any, str]:
        """Run a guest program, which gets its processor and the address of its GHCB.

        Args:
            program: the program.

        Returns:
            What it returned and "", or None and how the guest stopped. A guest that KVM or VMM stopped, and
            one that touched memory it had given away, is discarded: both are ends that a guest may have.
        """
        vm = self.vm
        cpu = vm.vcpus[0]
        try:
            return vm.execute(0, program(cpu, self.guest.ghcbs[0].gpa)), ""
        except (GuestStopped, GuestAccessFault) as end:
            kind = type(getattr(end, "reason", end)).__name__
            with suppress(GuestStopped):
                self.discard()
            return None, kind
