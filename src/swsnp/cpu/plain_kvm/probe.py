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

__all__ = ["Verdict", "probe", "probe_for_linux"]

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

# fmt: off
_LINUX_CODE: Final = bytes.fromhex("".join((
    "bc 00 a0 00 00",                       # mov      esp, 0xa000
    "0f 20 e0",                             # mov      rax, cr4
    "0d 00 06 00 00",                       # or       eax, 0x600      OSFXSR, OSXMMEXCPT
    "0f 22 e0",                             # mov      cr4, rax
    "b8 0f 0f 00 00",                       # mov      eax, 0xf0f
    "f3 0f b8 d8",                          # popcnt   ebx, eax        8
    "66 48 0f 6e c0",                       # movq     xmm0, rax
    "66 0f fe c0",                          # paddd    xmm0, xmm0
    "f2 0f 2a cb",                          # cvtsi2sd xmm1, ebx
    "f2 0f 59 c9",                          # mulsd    xmm1, xmm1
    "f2 0f 2c c9",                          # cvttsd2si ecx, xmm1      64
    "bf 30 a0 00 00",                       # mov      edi, 0xa030     gate 3 of the IDT at 0xa000
    "b8 7b 80 08 00",                       # mov      eax, 0x8807b    CS 8, handler's low half
    "89 07",                                # mov      [rdi], eax
    "c7 47 04 00 8e 00 00",                 # mov      dword [rdi+4], 0x8e00
    "48 c7 47 08 00 00 00 00",              # mov      qword [rdi+8], 0
    "66 c7 04 25 00 b0 00 00 ff 0f",        # mov      word [0xb000], 0xfff
    "48 c7 04 25 02 b0 00 00 00 a0 00 00",  # mov      qword [0xb002], 0xa000
    "0f 01 1c 25 00 b0 00 00",              # lidt     [0xb000]
    "31 d2",                                # xor      edx, edx
    "cc",                                   # int3
    "8d 04 11",                             # lea      eax, [rcx+rdx]  69
    "31 d2",                                # xor      edx, edx
    "b9 30 01 01 c0",                       # mov      ecx, 0xc0010130
    "0f 30",                                # wrmsr
    "f3 0f 01 d9",                          # vmgexit
    "f4",                                   # hlt
    # 0x7b  handler:
    "83 c2 05",                             # add      edx, 5
    "48 cf",                                # iretq
)))
# fmt: on
_LINUX_RESULT: Final = 69


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
    def runs(self) -> tuple[list[int], list[int]]:
        return [0], [MemoryAttribute.PRIVATE]


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
    wanted = f"/dev/kvm: a tiny guest ended with {{}}; wanted VMGEXIT, HLT, {_REQUEST:#x}"
    return _verdict(host, _CODE, _REQUEST, wanted)


def probe_for_linux(host: HostKvm | None = None) -> Verdict:
    """Run a guest with what kernels of Linux use and some hosts' KVM cannot emulate.

    POPCNT, SSE2 arithmetic, LIDT, INT3 to a handler and IRETQ back: a KVM that runs kernel code by emulation
    ends with an internal error at the first that it lacks.
    """
    wanted = f"{DEVICE}: this KVM lacks instructions that Linux needs (a probe ended with {{}})"
    return _verdict(host, _LINUX_CODE, _LINUX_RESULT, wanted)


def _verdict(host: HostKvm | None, code: bytes, result: int, wanted: str) -> Verdict:
    host = host if host is not None else LinuxKvm()
    try:
        ended = _run(host, code, result)
    except HostError as error:
        reason, _, remedy = str(error).partition("; remedy: ")
        return Verdict(usable=False, reason=reason, remedy=remedy)
    if ended is None:
        return Verdict(usable=True)
    return Verdict(
        usable=False,
        reason=wanted.format(ended),
        remedy="another host kernel, or hardware virtualization",
    )


def _run(host: HostKvm, code: bytes, result: int) -> str | None:
    """How a guest ended, or None when it left by VMGEXIT with `result` in the GHCB MSR, then by HLT."""
    memory = _PrivateOnly()
    tables = boot_pages(_TABLES_GPA, c_bit=c_bit_position(host))
    memory.view[_TABLES_GPA : _TABLES_GPA + len(tables)] = tables
    memory.view[_CODE_GPA : _CODE_GPA + len(code)] = code
    start = FlatStart(entry=_CODE_GPA, tables=_TABLES_GPA)
    text = range(_CODE_GPA, _CODE_GPA + len(code))
    processor = PlainKvmProcessor(HostVm(host, memory, [text]), memory, start=start)
    try:
        exits = processor.run(), processor.run()
    finally:
        processor.close()
    if exits == (Vmgexit(), Halt()) and processor.ghcb_msr == result:
        return None
    return f"{exits[0]}, {exits[1]}, GHCB MSR {processor.ghcb_msr:#x}"
