"""A bzImage of a few hundred bytes of machine code: what `swsnp vm -kernel` loads, without being Linux.

It prints its command line on the console, reads and writes device memory, makes a page shared and finds its
shared bytes; if the command line begins with 2, it starts a second processor in real mode, which prints A.
It ends through the debug exit port with status 42, or 1 where an answer was not the one it wants.
It needs few instructions, so that a KVM that emulates guest code runs it too.

Source: Linux, boot protocol; AMD 56421 (GHCB 2.0), MSR protocol and SNP AP creation.
"""

from __future__ import annotations

import gzip
import struct
from typing import Final

from swsnp.abi.linux_boot import BOOT_FLAG, HEADER_MAGIC, SETUP_HEADER_OFFSET, SetupHeader
from swsnp.abi.vmsa import Segment, SevFeatures, Vmsa

__all__ = ["DEVICE_GPA", "ENTRY", "GHCB_GPA", "GOOD", "bz_image", "elf_image", "tiny_kernel"]

ENTRY: Final = 0x100_0000
GHCB_GPA: Final = 0x30_0000
DEVICE_GPA: Final = 0xD000_0000
"""Four bytes are read there, and one more than they were is written behind them."""
GOOD: Final = 42
_VMSA: Final = 0x1000
_AP_SOURCE: Final = 0x2000
_AP_GPA: Final = 0x9_9000
_SECTOR: Final = 512

# fmt: off
_CODE: Final = (
    # 0x000  start:
    "49 89 f7",                              # mov r15, rsi
    "bc 00 f0 09 00",                        # mov esp, 0x9f000
    "bf 00 00 40 00",                        # mov edi, 0x400000
    "c7 47 08 83 00 20 00",                  # mov dword [rdi+0x8], 0x200083
    "b8 83 00 00 d0",                        # mov eax, 0xd0000083
    "48 89 87 00 04 00 00",                  # mov qword [rdi+0x400], rax
    "c7 04 25 08 10 02 00 03 00 40 00",      # mov dword 0x21008, 0x400003
    "b8 02 00 00 00",                        # mov eax, 0x2
    "31 d2",                                 # xor edx, edx
    "e8 50 01 00 00",                        # call msr
    "41 8b 9f 28 02 00 00",                  # mov ebx, dword [r15+0x228]
    # 0x03e  print:
    "8a 03",                                 # mov al, byte [rbx]
    "84 c0",                                 # test al, al
    "74 0a",                                 # je printed
    "66 ba f8 03",                           # mov dx, 0x3f8
    "ee",                                    # out dx, al
    "48 ff c3",                              # inc rbx
    "eb f0",                                 # jmp print
    # 0x04e  printed:
    "b0 0a",                                 # mov al, 0xa
    "ee",                                    # out dx, al
    "66 ba fd 03",                           # mov dx, 0x3fd
    "ec",                                    # in al, dx
    "3c 60",                                 # cmp al, 0x60
    "0f 85 23 01 00 00",                     # jne bad
    "8b 04 25 00 00 00 50",                  # mov eax, dword 0x50000000
    "ff c0",                                 # inc eax
    "89 04 25 04 00 00 50",                  # mov dword 0x50000004, eax
    "b8 00 00 30 00",                        # mov eax, 0x300000
    "c7 00 44 33 22 11",                     # mov dword [rax], 0x11223344
    "31 c9",                                 # xor ecx, ecx
    "31 d2",                                 # xor edx, edx
    "f2 0f 01 ff",                           # pvalidate
    "0f 82 fa 00 00 00",                     # jb bad
    "85 c0",                                 # test eax, eax
    "0f 85 f2 00 00 00",                     # jne bad
    "b8 14 00 30 00",                        # mov eax, 0x300014
    "ba 00 00 20 00",                        # mov edx, 0x200000
    "e8 e9 00 00 00",                        # call msr
    "83 f8 15",                              # cmp eax, 0x15
    "0f 85 da 00 00 00",                     # jne bad
    "85 d2",                                 # test edx, edx
    "0f 85 d2 00 00 00",                     # jne bad
    "b8 12 00 30 00",                        # mov eax, 0x300012
    "e8 ce 00 00 00",                        # call msr
    "3d 13 00 30 00",                        # cmp eax, 0x300013
    "0f 85 bd 00 00 00",                     # jne bad
    "83 3c 25 00 00 30 40 00",               # cmp dword 0x40300000, 0x0
    "0f 85 af 00 00 00",                     # jne bad
    "41 8b 9f 28 02 00 00",                  # mov ebx, dword [r15+0x228]
    "80 3b 32",                              # cmp byte [rbx], 0x32
    "0f 85 98 00 00 00",                     # jne good
    "b8 00 10 00 01",                        # mov eax, 0x1001000
    "31 c9",                                 # xor ecx, ecx
    "ba 01 00 01 00",                        # mov edx, 0x10001
    "f3 0f 01 fe",                           # rmpadjust
    "85 c0",                                 # test eax, eax
    "0f 85 87 00 00 00",                     # jne bad
    "be 00 20 00 01",                        # mov esi, 0x1002000
    "bf 00 90 09 00",                        # mov edi, 0x99000
    "b9 40 00 00 00",                        # mov ecx, 0x40
    "f3 a4",                                 # rep movs
    "bf 00 00 30 40",                        # mov edi, 0x40300000
    "48 c7 87 f8 01 00 00 01 00 00 00",      # mov qword [rdi+0x1f8], 0x1
    "b8 13 00 00 80",                        # mov eax, 0x80000013
    "48 89 87 90 03 00 00",                  # mov qword [rdi+0x390], rax
    "48 b8 01 00 00 00 01 00 00 00",         # movabs rax, 0x100000001
    "48 89 87 98 03 00 00",                  # mov qword [rdi+0x398], rax
    "48 c7 87 a0 03 00 00 00 10 00 01",      # mov qword [rdi+0x3a0], 0x1001000
    "c6 87 f7 03 00 00 80",                  # mov byte [rdi+0x3f7], 0x80
    "c6 87 fe 03 00 00 1c",                  # mov byte [rdi+0x3fe], 0x1c
    "66 c7 87 fa 0f 00 00 02 00",            # mov word [rdi+0xffa], 0x2
    "b8 00 00 30 00",                        # mov eax, 0x300000
    "31 d2",                                 # xor edx, edx
    "e8 21 00 00 00",                        # call msr
    "48 83 bf 98 03 00 00 00",               # cmp qword [rdi+0x398], 0x0
    "75 11",                                 # jne bad
    # 0x170  waiting:
    "80 3c 25 80 90 09 00 01",               # cmp byte 0x99080, 0x1
    "75 f6",                                 # jne waiting
    # 0x17a  good:
    "b0 2a",                                 # mov al, 0x2a
    "e6 f4",                                 # out 0xf4, al
    # 0x17e  stop:
    "f4",                                    # hlt
    "eb fd",                                 # jmp stop
    # 0x181  bad:
    "b0 01",                                 # mov al, 0x1
    "e6 f4",                                 # out 0xf4, al
    "eb f7",                                 # jmp stop
    # 0x187  msr:
    "b9 30 01 01 c0",                        # mov ecx, 0xc0010130
    "0f 30",                                 # wrmsr
    "f3 0f 01 d9",                           # vmgexit
    "0f 32",                                 # rdmsr
    "c3",                                    # ret
)
_AP_CODE: Final = (
    # 0x000  ap:
    "ba f8 03",                              # mov dx, 0x3f8
    "b0 41",                                 # mov al, 0x41
    "ee",                                    # out dx, al
    "b0 0a",                                 # mov al, 0xa
    "ee",                                    # out dx, al
    "c6 06 80 00 01",                        # mov byte 0x80, 0x1
    # 0x00e  halt:
    "f4",                                    # hlt
    "eb fd",                                 # jmp halt
)
# fmt: on


def tiny_kernel(*, compressed: bool = True) -> bytes:
    """The whole file."""
    data = _segment(0x93, _AP_GPA)
    vmsa = Vmsa(
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        cs=_segment(0x9B, _AP_GPA),
        gdtr=Segment(limit=0xFFFF),
        idtr=Segment(limit=0xFFFF),
        ldtr=Segment(attrib=0x82, limit=0xFFFF),
        tr=Segment(attrib=0x8B, limit=0xFFFF),
        efer=0x1000,
        cr0=0x6000_0010,
        cr4=0x40,
        rflags=2,
        g_pat=0x0007_0406_0007_0406,
        sev_features=SevFeatures.of(snp_active=1),
    )
    image = bytes.fromhex("".join(_CODE)).ljust(_VMSA, b"\0")
    image += bytes(vmsa) + bytes.fromhex("".join(_AP_CODE)).ljust(0x1000, b"\0")
    elf = elf_image(image)
    return bz_image(gzip.compress(elf, mtime=0) if compressed else elf)


def _segment(attributes: int, base: int) -> Segment:
    return Segment(selector=base >> 4 & 0xFFFF, attrib=attributes, limit=0xFFFF, base=base)


def elf_image(code: bytes, *, entry: int = ENTRY, zeros: int = 0x1000) -> bytes:
    """An ELF image of one executable segment at `entry`, with zeros behind it and no sections."""
    size = 64 + 56
    offset = 0x1000
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", 1, 5, offset, entry, entry, len(code), len(code) + zeros, 0x1000)
    assert len(head + program) == size  # noqa: S101
    return (head + program).ljust(offset, b"\0") + code


def bz_image(payload: bytes, **header: int) -> bytes:
    """A bzImage around a payload; `header` replaces fields of its header."""
    fields = {
        "setup_sects": 1,
        "boot_flag": BOOT_FLAG,
        "header": HEADER_MAGIC,
        "version": 0x20F,
        "xloadflags": 1,
        "cmdline_size": 2047,
        "initrd_addr_max": 0x7FFFFFFF,
        "payload_offset": 0,
        "payload_length": len(payload),
    }
    setup = bytearray(2 * _SECTOR)
    setup[SETUP_HEADER_OFFSET : SETUP_HEADER_OFFSET + SetupHeader.SIZE] = bytes(
        SetupHeader(**(fields | header))
    )
    return bytes(setup) + payload
