"""One thing that an operator gets wrong, and what a guest gets then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from swsnp.testing.program_saw import ProgramSaw, ask_report
from swsnp.vmm.certs import CertificateSource

if TYPE_CHECKING:
    from swsnp.machine.machine import Machine

__all__ = ["Arrange", "BlockingCertificates", "OperatorCase", "play_operator"]

Arrange: TypeAlias = Callable[[Path], AbstractContextManager[CertificateSource]]
"""Makes something of an empty folder for the length of a block, and gives the source for a VM."""
_ROOM: Final = 0x4000


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCase:
    """One thing that an operator gets wrong, or does on purpose.

    Attributes:
        name: for test ids.
        rule: what decides the result.
        arrange: puts it into an empty folder for the length of a block; gives the source.
        expected: what SNP_GET_EXT_REPORT with a buffer of 16 KiB gets under each KVM profile.
    """

    name: str
    rule: str
    arrange: Arrange = field(repr=False)
    expected: Mapping[str, ProgramSaw]

    def __str__(self) -> str:
        return self.name


class BlockingCertificates:
    """A certificate callable that waits until a test says so.

    certs = BlockingCertificates(b"late")
    vm = machine.create_vm(certs=certs)   # ask in a thread; certs.entered.wait(); certs.release.set()

    Attributes:
        entered: set when a request has come as far as here.
        release: set it to let every request go on.
    """

    def __init__(self, data: bytes, *, timeout_s: float = 60.0) -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        self._data, self._timeout_s = data, timeout_s

    def __call__(self) -> bytes:
        """The certificates, once released.

        Raises:
            TimeoutError: nobody released it within `timeout_s` seconds.
        """
        self.entered.set()
        if not self.release.wait(self._timeout_s):
            raise TimeoutError(f"certificates: not released within {self._timeout_s} s")
        return self._data


def play_operator(case: OperatorCase, machine: Machine, folder: Path) -> ProgramSaw:
    """Start a VM with the case's certificates and ask for an extended report.

    Args:
        case: from `HOSTILE_OPERATOR`, or a user's own.
        machine: made with `clock=FakeClock()`, or cases in which the guest waits take a minute.
        folder: an empty one.
    """
    with case.arrange(folder) as source, machine.create_vm(certs=source) as vm:
        vm.boot()
        return ask_report(vm, certs_size=_ROOM)
