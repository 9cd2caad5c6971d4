"""A guest of about ninety instructions that does what every SNP guest does first, by real instructions.

It negotiates, asks for the hypervisor's features, makes its GHCB page shared and registers it, then sends one
event through that page. What it saw lies afterwards in a private page, a mark in both planes; then it halts.
Every answer is checked as Linux does; a wrong one ends in the termination request that Linux would send.
Its instructions are all known to KVM's emulator, so that a KVM without hardware virtualization runs it too.

Source: AMD 56421 (GHCB 2.0), MSR protocol; reason codes of termination: Linux.
"""

from __future__ import annotations

from typing import Final

from swsnp.abi.record import Record, record, u32, u64
from swsnp.cpu.plain_kvm.longmode import FlatStart, boot_pages

__all__ = [
    "CODE",
    "EXECUTABLE",
    "GHCB_GPA",
    "MARK",
    "MEMORY_SIZE",
    "RESULT_GPA",
    "SHARED_MARK_GPA",
    "START",
    "TinyGuestResult",
    "tiny_guest_image",
]

_PAGE: Final = 4096
MEMORY_SIZE: Final = 0x10000
"""Bytes of guest memory, from GPA 0."""
TABLES_GPA: Final = 0x1000
CODE_GPA: Final = 0x8000
STACK_GPA: Final = 0x9000
RESULT_GPA: Final = 0xA000
GHCB_GPA: Final = 0xB000
SHARED_MARK_GPA: Final = GHCB_GPA + 0x800
MARK: Final = 0x504E5357
"""The four letters WSNP: written when all went well."""

START: Final = FlatStart(entry=CODE_GPA, tables=TABLES_GPA, stack=STACK_GPA + _PAGE)
EXECUTABLE: Final = (range(CODE_GPA, CODE_GPA + _PAGE),)


@record(size=64, source="swsnp, result of the tiny guest")
class TinyGuestResult(Record):
    """At `RESULT_GPA` in private memory: every answer as the guest saw it."""

    sev_info: int = u64(0x00)
    hv_features: int = u64(0x08)
    pvalidate_code: int = u32(0x10)
    pvalidate_carry: int = u32(0x14)
    page_state_change: int = u64(0x18)
    registration: int = u64(0x20)
    ghcb_info_2: int = u64(0x28)
    sev_status: int = u64(0x30)
    mark: int = u64(0x38)


# fmt: off
_INSTRUCTIONS: Final = (
    # 0x000  rbx: the result record, rdi: the GHCB through its shared address
    "bb 00 a0 00 00",                   # mov   ebx, 0xa000
    "bf 00 b0 00 40",                   # mov   edi, 0x4000b000
    # 0x00a  SEV_STATUS
    "b9 31 01 01 c0",                   # mov   ecx, 0xc0010131
    "0f 32",                            # rdmsr
    "89 43 30",                         # mov   dword [rbx+0x30], eax
    "89 53 34",                         # mov   dword [rbx+0x34], edx
    # 0x017  step 1, SEV information: reply code 1, maximum version at least 2
    "b8 02 00 00 00",                   # mov   eax, 0x2
    "31 d2",                            # xor   edx, edx
    "e8 31 01 00 00",                   # call  exchange
    "89 03",                            # mov   dword [rbx], eax
    "89 53 04",                         # mov   dword [rbx+0x4], edx
    "be 00 01 00 00",                   # mov   esi, 0x100
    "25 ff 0f 00 00",                   # and   eax, 0xfff
    "83 f8 01",                         # cmp   eax, 0x1
    "0f 85 0e 01 00 00",                # jne   terminate
    "c1 ea 10",                         # shr   edx, 0x10
    "83 fa 02",                         # cmp   edx, 0x2
    "0f 82 02 01 00 00",                # jb    terminate
    # 0x047  step 2, hypervisor features: reply code 0x81, bit 0 (SNP) set
    "b8 80 00 00 00",                   # mov   eax, 0x80
    "31 d2",                            # xor   edx, edx
    "e8 01 01 00 00",                   # call  exchange
    "89 43 08",                         # mov   dword [rbx+0x8], eax
    "89 53 0c",                         # mov   dword [rbx+0xc], edx
    "be 00 01 02 00",                   # mov   esi, 0x20100
    "25 ff 1f 00 00",                   # and   eax, 0x1fff
    "3d 81 10 00 00",                   # cmp   eax, 0x1081
    "0f 85 db 00 00 00",                # jne   terminate
    # 0x06e  rescind the GHCB page's validation, before it is given away
    "b8 00 b0 00 00",                   # mov   eax, 0xb000
    "31 c9",                            # xor   ecx, ecx
    "31 d2",                            # xor   edx, edx
    "f2 0f 01 ff",                      # pvalidate
    "89 43 10",                         # mov   dword [rbx+0x10], eax
    "19 d2",                            # sbb   edx, edx
    "89 53 14",                         # mov   dword [rbx+0x14], edx
    "be 00 11 02 00",                   # mov   esi, 0x21100
    "09 d0",                            # or    eax, edx
    "0f 85 b9 00 00 00",                # jne   terminate
    # 0x090  step 3, page state change of the GHCB page to shared
    "b8 14 b0 00 00",                   # mov   eax, 0xb014
    "ba 00 00 20 00",                   # mov   edx, 0x200000
    "e8 b5 00 00 00",                   # call  exchange
    "89 43 18",                         # mov   dword [rbx+0x18], eax
    "89 53 1c",                         # mov   dword [rbx+0x1c], edx
    "be 00 11 01 00",                   # mov   esi, 0x11100
    "83 f8 15",                         # cmp   eax, 0x15
    "0f 85 96 00 00 00",                # jne   terminate
    "85 d2",                            # test  edx, edx
    "0f 85 8e 00 00 00",                # jne   terminate
    # 0x0bb  step 4, register the GHCB: the reply names the same frame
    "b8 12 b0 00 00",                   # mov   eax, 0xb012
    "31 d2",                            # xor   edx, edx
    "e8 8d 00 00 00",                   # call  exchange
    "89 43 20",                         # mov   dword [rbx+0x20], eax
    "89 53 24",                         # mov   dword [rbx+0x24], edx
    "be 00 11 00 00",                   # mov   esi, 0x1100
    "3d 13 b0 00 00",                   # cmp   eax, 0xb013
    "75 70",                            # jne   terminate
    "85 d2",                            # test  edx, edx
    "75 6c",                            # jne   terminate
    # 0x0dd  through the GHCB: the hypervisor's features once more; three fields are marked valid
    "b8 fd ff 00 80",                   # mov   eax, 0x8000fffd
    "48 89 87 90 03 00 00",             # mov   qword [rdi+0x390], rax
    "31 c0",                            # xor   eax, eax
    "48 89 87 98 03 00 00",             # mov   qword [rdi+0x398], rax
    "48 89 87 a0 03 00 00",             # mov   qword [rdi+0x3a0], rax
    "89 87 fc 0f 00 00",                # mov   dword [rdi+0xffc], eax
    "66 c7 87 fa 0f 00 00 02 00",       # mov   word [rdi+0xffa], 0x2
    "c6 87 fe 03 00 00 1c",             # mov   byte [rdi+0x3fe], 0x1c
    "b8 00 b0 00 00",                   # mov   eax, 0xb000
    "31 d2",                            # xor   edx, edx
    "e8 39 00 00 00",                   # call  exchange
    "48 8b 87 a0 03 00 00",             # mov   rax, qword [rdi+0x3a0]
    "48 89 43 28",                      # mov   qword [rbx+0x28], rax
    "be 00 01 00 00",                   # mov   esi, 0x100
    "48 83 bf 98 03 00 00 00",          # cmp   qword [rdi+0x398], 0x0
    "75 14",                            # jne   terminate
    # 0x135  all went well
    "c7 87 00 08 00 00 57 53 4e 50",    # mov   dword [rdi+0x800], 0x504e5357
    "c7 43 38 57 53 4e 50",             # mov   dword [rbx+0x38], 0x504e5357
    # 0x146  done:
    "f4",                               # hlt
    "eb fd",                            # jmp   done
    # 0x149  terminate: esi is the request
    "89 f0",                            # mov   eax, esi
    "31 d2",                            # xor   edx, edx
    "e8 02 00 00 00",                   # call  exchange
    "eb f2",                            # jmp   done
    # 0x154  exchange: edx:eax out through the GHCB MSR, the answer back in edx:eax
    "b9 30 01 01 c0",                   # mov   ecx, 0xc0010130
    "0f 30",                            # wrmsr
    "f3 0f 01 d9",                      # vmgexit
    "0f 32",                            # rdmsr
    "c3",                               # ret
)
# fmt: on

CODE: Final = bytes.fromhex("".join(_INSTRUCTIONS))


def tiny_guest_image(c_bit: int) -> list[tuple[int, bytes, bool]]:
    """What a VMM loads as measured private memory before the guest starts at `START`.

    Args:
        c_bit: the C-bit's position on the host that runs it (`c_bit_position`).

    Returns:
        GPA, whole pages of content, and whether the content is code to be rewritten.
    """
    tables = boot_pages(TABLES_GPA, c_bit=c_bit)
    data = ((gpa, bytes(_PAGE), False) for gpa in (STACK_GPA, RESULT_GPA, GHCB_GPA))
    return [(TABLES_GPA, tables, False), (CODE_GPA, CODE.ljust(_PAGE, b"\0"), True), *data]
