"""What commands that boot a kernel are given."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.cli import main
from swsnp.cpu.plain_kvm import Verdict, probe
from swsnp.testing.tiny_kernel import bz_image, elf_image, tiny_kernel

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip

GOOD_HOST = Verdict(usable=True)


def vm(*arguments: str) -> int:
    """`swsnp vm`: its exit status."""
    return main(["vm", *arguments])


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinuz"
    path.write_bytes(tiny_kernel())
    return str(path)


def reader_of(offset: int) -> bytes:
    """A kernel that ends with the byte at this offset of the first device's registers, FEB00000h.

    It maps them by the directory of the fourth GiB.
    """
    code = (
        "bf 00 00 40 00"  # mov edi, 0x400000
        "b8 83 00 a0 fe"  # mov eax, 0xfea00083
        "48 89 87 a8 0f 00 00"  # mov [rdi+0xfa8], rax: 2 MiB entry 1F5h
        "c7 04 25 18 10 02 00 03 00 40 00"  # mov dword [0x21018], 0x400003
        f"b8 {offset:02x} 00 b0 fe"  # mov eax, 0xfeb00000 + offset
        "8b 18"  # mov ebx, [rax]
        "88 d8"  # mov al, bl
        "e6 f4"  # out 0xf4, al
        "f3 0f 01 d9"  # vmgexit
    )
    return bz_image(elf_image(bytes.fromhex(code)))


@pytest.fixture
def static_program(tmp_path: Path) -> str:
    """An ELF-64 program that needs no interpreter."""
    program = tmp_path / "p"
    program.write_bytes(b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 2, 62, *[0] * 11))
    return str(program)


@pytest.fixture
def any_kvm(cannot_run: Skip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose KVM runs tiny guests; the tiny kernel needs no more, whatever Linux would."""
    verdict = probe()
    if not verdict.usable:
        cannot_run(verdict.reason, verdict.remedy, avoidable=False)
    monkeypatch.setattr("swsnp.cli.vm_kernel.probe_for_linux", lambda: GOOD_HOST)
