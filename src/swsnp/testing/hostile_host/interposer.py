"""A host that is not honest, between a guest on built-in processors and its KVM.

It reaches what a real one reaches: shared memory, the GHCB, the GHCB MSR. It decides whether KVM is asked.
"""

from __future__ import annotations

import struct
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, cast
from unittest.mock import patch

from swsnp.abi.ghcb import ExitCode, GhcbField
from swsnp.hardware.exits import GuestAccessFault
from swsnp.testing.seen import StillRunning

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from swsnp.cpu.builtin import BuiltinProcessor, GuestPhysicalMemory, MemorySlot
    from swsnp.machine.virtual_machine import VirtualMachine

__all__ = ["Attack", "Departure", "HostileHost"]

_U64: Final = struct.Struct("<Q")
_REQUESTS: Final = (ExitCode.GUEST_REQUEST, ExitCode.EXT_GUEST_REQUEST)
_CODE: Final = 0xFFF


class Departure:
    """One exit of the guest, as the host sees it: what was asked, and everything that the host can change.

    Attributes:
        msr: the GHCB MSR when the guest left.
        code: SW_EXITCODE; None for a request of the MSR protocol.
        info1: SW_EXITINFO1 of the request: for a guest request, the address of the request page.
        info2: SW_EXITINFO2 of the request: the address of the response page.
    """

    def __init__(self, cpu: BuiltinProcessor, memory: GuestPhysicalMemory) -> None:
        self._cpu, self._memory = cpu, memory
        self.msr = cpu.ghcb_msr
        self.code: int | None = None
        self.info1 = self.info2 = 0
        if not self.msr & _CODE and self.msr:
            self.code = self.read_u64(self.msr + GhcbField.SW_EXIT_CODE)
            self.info1 = self.read_u64(self.msr + GhcbField.SW_EXIT_INFO_1)
            self.info2 = self.read_u64(self.msr + GhcbField.SW_EXIT_INFO_2)

    @property
    def msr_request(self) -> int | None:
        """The code of a request of the MSR protocol; None for an event in the GHCB."""
        return None if self.code is not None else self.msr & _CODE

    @property
    def is_guest_request(self) -> bool:
        """Whether it is a guest request, plain or extended."""
        return self.code in _REQUESTS

    @property
    def is_extended(self) -> bool:
        """Whether it is an extended guest request."""
        return self.code == ExitCode.EXT_GUEST_REQUEST

    def read(self, gpa: int, size: int) -> bytes:
        """Copy shared memory out; zeros where the guest has none."""
        try:
            return self._memory.read(gpa, size, private=False)
        except GuestAccessFault:
            return bytes(size)

    def write(self, gpa: int, data: bytes) -> None:
        """Copy into shared memory; nothing where the guest has none."""
        try:
            self._memory.write(gpa, data, private=False)
        except GuestAccessFault:
            return

    def read_u64(self, gpa: int) -> int:
        """A number in shared memory."""
        return int(_U64.unpack(self.read(gpa, 8))[0])

    def reply(self, info1: int, info2: int, *, rbx: int | None = None) -> None:
        """Put a reply into the GHCB."""
        self.write(self.msr + GhcbField.SW_EXIT_INFO_1, _U64.pack(info1) + _U64.pack(info2))
        if rbx is not None:
            self.write(self.msr + GhcbField.RBX, _U64.pack(rbx))

    def reply_msr(self, value: int) -> None:
        """Put a reply into the GHCB MSR."""
        self._cpu.ghcb_msr = value

    def save(self) -> tuple[bytes, bytes]:
        """The GHCB and the request page, for `restore`."""
        return self.read(self.msr, 4096), self.read(self.info1, 4096)

    def restore(self, saved: tuple[bytes, bytes]) -> None:
        """Put the request back as it was, so that KVM can be asked once more."""
        self.write(self.msr, saved[0])
        self.write(self.info1, saved[1])


class Attack:
    """What a host does around the exits of a guest. This one is honest; override what it shall do."""

    def left(self, departure: Departure) -> bool:
        """The guest has left and KVM has not looked yet.

        Returns:
            True: KVM is not asked at all, the guest goes on with what is there.
        """
        del departure
        return False

    def back(self, departure: Departure) -> bool:
        """KVM has answered and the guest has not gone on yet.

        Returns:
            True: KVM is asked once more before the guest goes on.
        """
        del departure
        return False

    def fetched(self, departure: Departure, gpa: int, size: int) -> None:
        """The guest has read `size` bytes of shared memory at `gpa` since its last exit."""
        del departure, gpa, size


class _WatchedMemory:
    """Guest memory that tells of every shared read, after the guest has its copy."""

    def __init__(self, inner: GuestPhysicalMemory, host: HostileHost) -> None:
        self._inner, self._host = inner, host

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        data = self._inner.read(gpa, size, private=private)
        if not private:
            self._host._fetched(gpa, size)
        return data

    def write(self, gpa: int, data: bytes | bytearray | memoryview, *, private: bool) -> None:
        self._inner.write(gpa, data, private=private)

    def pvalidate(self, gpa: int, *, validate: bool) -> tuple[int, bool]:
        return self._inner.pvalidate(gpa, validate=validate)

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool) -> int:
        return self._inner.rmpadjust(gpa, vmpl=vmpl, permissions=permissions, vmsa=vmsa)

    def slots(self) -> tuple[MemorySlot, ...]:
        return self._inner.slots()


class HostileHost:
    """Lets an attack happen around every exit of a guest.

    with HostileHost(Busy()).between(vm):
        vm.report(nonce)

    One vCPU at a time: an attack sees the exits of one guest program after the other.

    Args:
        attack: what the host does.
        budget: how often one guest program may leave; a program that loops for ever, as Linux does while a
            host makes no progress, then ends with `StillRunning`.
    """

    def __init__(self, attack: Attack, *, budget: int = 1000) -> None:
        self.attack, self.budget = attack, budget
        self.exits = 0
        """Exits of the program that runs, or ran last."""
        self._departure: Departure | None = None

    @contextmanager
    def between(self, vm: VirtualMachine) -> Iterator[HostileHost]:
        """Stand between a VM and its KVM for the length of a block.

        Before or after its boot; but `Attack.fetched` hears of reads of the GHCB only when the guest booted
        inside the block.
        """
        with ExitStack() as undo:
            for processor in vm.vcpus.values():
                memory, start = processor.memory, processor.start
                undo.enter_context(patch.object(processor, "memory", _WatchedMemory(memory, self)))
                undo.enter_context(
                    patch.object(
                        processor,
                        "start",
                        lambda program, start=start, cpu=processor, memory=memory: start(
                            self.around(program, cpu, memory)
                        ),
                    )
                )
            yield self

    def around(
        self, program: Generator[None, None, Any], cpu: BuiltinProcessor, memory: GuestPhysicalMemory
    ) -> Generator[None, None, Any]:
        """The same guest program under this host; for processors that are not a `VirtualMachine`'s.

        Raises:
            StillRunning: the budget is used up.
        """
        self.exits, self._departure = 0, None
        try:
            while True:
                try:
                    next(program)
                except StopIteration as end:
                    return cast("object", end.value)
                if self.exits == self.budget:
                    raise StillRunning(self.exits)
                self.exits += 1
                departure = Departure(cpu, memory)
                again = not self.attack.left(departure)
                while again:
                    yield
                    again = self.attack.back(departure)
                self._departure = departure
        finally:
            program.close()  # what it holds, a driver's mutex for one, is let go

    def _fetched(self, gpa: int, size: int) -> None:
        if self._departure is not None:
            self.attack.fetched(self._departure, gpa, size)
