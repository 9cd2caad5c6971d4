"""A flat start in long mode: page tables with the C-bit, a GDT, and the registers.

Linear addresses [0, 1 GiB) are private memory, [1 GiB, 2 GiB) are the same addresses shared.
Source: AMD 24593 (APM volume 2), long-mode page translation and segmentation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from swsnp.abi.kvm_registers import KvmDtable, KvmRegs, KvmSegment, KvmSregs

__all__ = ["BOOT_PAGES_SIZE", "SHARED_BASE", "FlatStart", "boot_pages"]

PAGE: Final = 4096
_GIB: Final = 1 << 30
_LARGE_PAGE: Final = 2 << 20
SHARED_BASE: Final = _GIB
"""Linear address of the shared view of GPA 0."""
BOOT_PAGES_SIZE: Final = 5 * PAGE
"""PML4, PDPT, two page directories, GDT."""

_PRESENT_WRITABLE: Final = 3
_LARGE: Final = 0x80
_CODE: Final = 0x08
_DATA: Final = 0x10
_GDT: Final = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
_CR0: Final = 0x80050033  # PG AM WP NE ET MP PE
_CR4_PAE: Final = 0x20
_EFER_LMA_LME: Final = 0x500
_RFLAGS_FIXED: Final = 2


def boot_pages(gpa: int, *, c_bit: int) -> bytes:
    """Page tables and GDT to be loaded as private memory at `gpa`.

    Args:
        gpa: page aligned, below 1 GiB.
        c_bit: position of the C-bit in a page table entry.

    Returns:
        `BOOT_PAGES_SIZE` bytes.
    """
    private = 1 << c_bit
    pdpt, private_pd, shared_pd = (gpa + index * PAGE for index in (1, 2, 3))
    return b"".join(
        (
            _table([pdpt | private | _PRESENT_WRITABLE]),
            _table([private_pd | private | _PRESENT_WRITABLE, shared_pd | private | _PRESENT_WRITABLE]),
            _directory(private),
            _directory(0),
            _table(_GDT),
        )
    )


def _directory(encryption: int) -> bytes:
    return _table([at | encryption | _LARGE | _PRESENT_WRITABLE for at in range(0, _GIB, _LARGE_PAGE)])


def _table(entries: list[int] | tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(entries)}Q", *entries).ljust(PAGE, b"\0")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatStart:
    """Where and how the guest starts: 64-bit code at privilege level 0, interrupts off, on `boot_pages`.

    Attributes:
        entry: linear address of the first instruction.
        tables: GPA of the `boot_pages`.
        stack: RSP.
        rsi: what RSI holds; a Linux kernel finds its boot parameters there.
    """

    entry: int
    tables: int
    stack: int = 0
    rsi: int = 0

    def regs(self) -> KvmRegs:
        """General registers at the first instruction."""
        return KvmRegs(rip=self.entry, rsp=self.stack, rsi=self.rsi, rflags=_RFLAGS_FIXED)

    def sregs(self, reset: KvmSregs, c_bit: int) -> KvmSregs:
        """System registers at the first instruction; what a flat start does not name stays as after reset."""
        code = _segment(selector=_CODE, type=11, l=1)
        data = _segment(selector=_DATA, type=3, db=1)
        return reset.but(
            **dict.fromkeys(("ds", "es", "fs", "gs", "ss"), data),
            cs=code,
            # the GDT's base is a linear address, which the tables map to private memory
            gdt=KvmDtable(base=self.tables + 4 * PAGE, limit=len(_GDT) * 8 - 1),
            idt=KvmDtable(),
            cr0=_CR0,
            cr3=self.tables | 1 << c_bit,
            cr4=_CR4_PAE,
            efer=_EFER_LMA_LME,
        )


def _segment(*, selector: int, type: int, db: int = 0, l: int = 0) -> KvmSegment:  # noqa: E741
    return KvmSegment(limit=0xFFFFFFFF, selector=selector, type=type, present=1, s=1, g=1, db=db, l=l)
