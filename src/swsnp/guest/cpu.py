"""What guest code needs of the vCPU that it runs on. VMGEXIT itself is the `yield` of a guest program."""

from __future__ import annotations

from typing import Protocol

__all__ = ["GuestCpu", "GuestMemory"]


class GuestMemory(Protocol):
    """Guest physical memory with the instructions on its pages.

    Accesses that the host refuses raise `swsnp.hardware.GuestAccessFault`; guest code lets it pass, since the
    processor turns it into an exit.
    """

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        """Copy `size` bytes out; `private` is the C-bit of the access."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview, *, private: bool) -> None:
        """Copy `data` in; `private` is the C-bit of the access."""

    def pvalidate(self, gpa: int, *, validate: bool) -> tuple[int, bool]:
        """PVALIDATE of a 4 KiB page: EAX and the carry flag (True: nothing changed)."""

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool) -> int:
        """RMPADJUST of a 4 KiB page: EAX."""


class GuestCpu(Protocol):
    """One vCPU. Two vCPUs are two objects: the kernel's per-CPU data is found by identity."""

    ghcb_msr: int

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory, as this vCPU sees it."""
