"""The built-in processor: guest code is a Python generator, and `yield` is VMGEXIT.

Source: AMD 24593 (APM volume 2), SEV-ES: the guest is left by VMGEXIT, HLT or a nested page fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from swsnp.errors import UsageError
from swsnp.hardware.exits import GuestAccessFault, GuestExit, Halt, Vmgexit

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["BuiltinProcessor", "GuestPhysicalMemory", "MemorySlot"]


class MemorySlot(Protocol):
    """A range of guest physical memory, as a real processor has to map it."""

    @property
    def gpa(self) -> int:
        """First guest physical address."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def shared_view(self) -> memoryview | None:
        """The VMM's mapping: what accesses without the C-bit reach; None when the VMM has unmapped it."""

    @property
    def private_view(self) -> memoryview | None:
        """The guest_memfd: what accesses with the C-bit reach; None when the slot has none."""


class GuestPhysicalMemory(Protocol):
    """Guest memory as the nested page table and the RMP let this guest see it.

    Every access may raise `GuestAccessFault`, which carries the exit to report.
    """

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        """Copy `size` bytes out; `private` is the C-bit of the access."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview, *, private: bool) -> None:
        """Copy `data` in; `private` is the C-bit of the access."""

    def pvalidate(self, gpa: int, *, validate: bool) -> tuple[int, bool]:
        """PVALIDATE of a 4 KiB page: EAX and the carry flag (True: nothing changed)."""

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool) -> int:
        """RMPADJUST of a 4 KiB page: EAX."""

    def slots(self) -> tuple[MemorySlot, ...]:
        """All memory, for processors that map it instead of asking."""


_VMGEXIT: Final = Vmgexit()
_HALT: Final = Halt()


class BuiltinProcessor:
    """One vCPU whose guest code is a Python program.

    A program is a generator that owns the vCPU from `start` until it returns. It reaches memory through
    `memory`, puts the GHCB's address or an MSR request into `ghcb_msr` and yields; `run` lets it go on.

    An access that the nested page table or the RMP refuses ends the program: a real processor would restart
    the instruction after the exit was handled, a Python generator cannot restart a call. `run` reports the
    exit that the fault carries, `result` raises the fault.

    Attributes:
        ghcb_msr: MSR C001_0130h. The hypervisor writes the reset value (the SEV information word) and
            its replies.
        memory: what the program reads and writes.
    """

    def __init__(self, memory: GuestPhysicalMemory) -> None:
        self.ghcb_msr = 0
        self.memory = memory
        self._program: Generator[None, None, Any] | None = None
        self._ended = False
        self._value: Any = None
        self._error: BaseException | None = None

    def start(self, program: Generator[None, None, Any]) -> None:
        """Give the vCPU a program; it begins at the next `run`.

        Raises:
            UsageError: the previous program has not ended.
        """
        if self._program is not None:
            raise UsageError("built-in processor: a program is running, wanted its end before the next start")
        self._program = program
        self._ended, self._value, self._error = False, None, None

    def run(self) -> GuestExit:
        """Run guest code until it leaves.

        Returns:
            `Vmgexit` at a yield; `Halt` when there is no program, or it has ended by itself or by an
            exception, which `result` raises; after a refused access, the exit that the fault carries.
        """
        if self._program is None:
            return _HALT
        try:
            next(self._program)
        except StopIteration as end:
            self._end(value=end.value)
            return _HALT
        except GuestAccessFault as fault:
            self._end(error=fault)
            return fault.reason
        except Exception as error:
            self._end(error=error)
            return _HALT
        except (
            BaseException
        ) as error:  # an interrupt is the host's: it ends the program, and is not ours to keep
            self._end(error=error)
            raise
        return _VMGEXIT

    @property
    def busy(self) -> bool:
        """Whether a program was started and has not ended."""
        return self._program is not None

    def result(self) -> Any:
        """What the last program returned.

        Raises:
            UsageError: no program has ended since the last `start`.
            Exception: whatever ended the program, `GuestAccessFault` included.
        """
        if not self._ended:
            raise UsageError("built-in processor: no result, wanted a program that has ended")
        if self._error is not None:
            raise self._error
        return self._value

    def abandon(self) -> None:
        """Give up the program, as when its VM has ended; without a program nothing happens.

        It is closed where it stands, so that it lets go of what it holds, the driver's mutex for one.
        """
        if self._program is not None:
            self._program.close()
            self._end(error=UsageError("built-in processor: the program was abandoned, it has no result"))

    def _end(self, *, value: Any = None, error: BaseException | None = None) -> None:
        self._program = None
        self._ended, self._value, self._error = True, value, error
