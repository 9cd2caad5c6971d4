"""Whether this host can run real guest code, found out by running some."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from swsnp.abi.kvm import MemoryAttribute
from swsnp.cpu.plain_kvm.host import DEVICE, LinuxKvm
from swsnp.cpu.plain_kvm.longmode import FlatStart, boot_pages
from swsnp.cpu.plain_kvm.processor import PlainKvmProcessor
from swsnp.cpu.plain_kvm.vm import HostVm, c_bit_position
from swsnp.errors import HostError
from swsnp.hardware.exits import GuestAccessFault, Halt, NestedPageFault, Vmgexit

if TYPE_CHECKING:
    from swsnp.cpu.plain_kvm.host import HostKvm

__all__ = ["Verdict", "probe"]

_TABLES_GPA: Final = 0x1000
_CODE_GPA: Final = 0x8000
_SIZE: Final = 0x10000
_REQUEST: Final = 2
_CODE: Final = bytes.fromhex(
    "b9 30 01 01 c0"  # mov ecx, 0xC0010130
    "b8 02 00 00 00"  # mov eax, 2; edx is zero at the start
    "0f 30"  # wrmsr
    "f3 0f 01 d9"  # vmgexit
    "f4"  # hlt
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` and `remedy` are for people, and empty when the host is usable."""

    usable: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class _Slot:
    gpa: int
    size: int
    shared_view: None
    private_view: memoryview


class _AllPrivate:
    def run(self, gfn: int) -> tuple[int, int, int]:
        return 0, gfn + _SIZE, MemoryAttribute.PRIVATE


class _PrivateOnly:
    """Memory of one private slot; every access outside it faults."""

    attributes = _AllPrivate()
    generation = 0

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, _SIZE))
        self._slots = (_Slot(0, _SIZE, None, self.view),)

    def slots(self) -> tuple[_Slot, ...]:
        return self._slots

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        self._refuse(gpa, private=private, write=False)

    def write(self, gpa: int, data: bytes, *, private: bool) -> None:
        self._refuse(gpa, private=private, write=True)

    def pvalidate(self, gpa: int, *, validate: bool, page_size: int = 0) -> tuple[int, bool]:
        self._refuse(gpa, private=True, write=validate)

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool, page_size: int = 0) -> int:
        self._refuse(gpa, private=True, write=vmsa)

    def _refuse(self, gpa: int, *, private: bool, write: bool) -> NoReturn:
        raise GuestAccessFault(NestedPageFault(gpa, private, write))


def probe(host: HostKvm | None = None) -> Verdict:
    """Run a guest of five instructions: one write to the GHCB MSR, VMGEXIT, HLT.

    It says nothing about whether the host's KVM knows every instruction that a whole kernel uses.
    """
    host = host if host is not None else LinuxKvm()
    try:
        return _run(host)
    except HostError as error:
        reason, _, remedy = str(error).partition("; remedy: ")
        return Verdict(usable=False, reason=reason, remedy=remedy)


def _run(host: HostKvm) -> Verdict:
    memory = _PrivateOnly()
    tables = boot_pages(_TABLES_GPA, c_bit=c_bit_position(host))
    memory.view[_TABLES_GPA : _TABLES_GPA + len(tables)] = tables
    memory.view[_CODE_GPA : _CODE_GPA + len(_CODE)] = _CODE
    start = FlatStart(entry=_CODE_GPA, tables=_TABLES_GPA)
    code = range(_CODE_GPA, _CODE_GPA + len(_CODE))
    processor = PlainKvmProcessor(HostVm(host, memory, [code]), memory, start=start)
    try:
        exits = processor.run(), processor.run()
    finally:
        processor.close()
    if exits == (Vmgexit(), Halt()) and processor.ghcb_msr == _REQUEST:
        return Verdict(usable=True)
    got = f"{exits[0]}, {exits[1]}, GHCB MSR {processor.ghcb_msr:#x}"
    reason = f"{DEVICE}: a tiny guest ended with {got}; wanted VMGEXIT, HLT, {_REQUEST:#x}"
    return Verdict(usable=False, reason=reason, remedy="another host kernel, or hardware virtualization")
