"""The flat start: page tables that carry the C-bit, and the registers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.kvm_registers import KvmSregs
from swsnp.cpu.plain_kvm.longmode import BOOT_PAGES_SIZE, SHARED_BASE, FlatStart, boot_pages

TABLES = 0x1000
C_BIT = 47
PRIVATE = 1 << C_BIT
GIB = 1 << 30
PAGES = boot_pages(TABLES, c_bit=C_BIT)


def entry(table: int, index: int) -> int:
    """A table's entry; the table must lie in private memory."""
    assert table & PRIVATE
    offset = (table & ~PRIVATE & ~0xFFF) - TABLES + 8 * index
    return int.from_bytes(PAGES[offset : offset + 8], "little")


def walk(linear: int) -> int | None:
    """Linear to physical, C-bit included, as the processor walks (AMD 24593, 4-level with 2 MiB pages)."""
    table = TABLES | PRIVATE
    for shift in (39, 30, 21):
        table = entry(table, linear >> shift & 0x1FF)
        if not table & 1:
            return None
    assert table & 0x80
    assert table & 2
    return (table & ~0x1FFFFF) | (linear & 0x1FFFFF)


@given(st.integers(0, GIB - 1))
def test_two_views_of_one_gpa(gpa: int) -> None:
    """AMD 24593: the C-bit in the last entry makes an access private; the second GiB is without it."""
    assert walk(gpa) == gpa | PRIVATE
    assert walk(gpa + SHARED_BASE) == gpa


@given(st.integers(2 * GIB, (1 << 47) - 1))
def test_nothing_else_is_mapped(linear: int) -> None:
    """Only the first two GiB have translations."""
    assert walk(linear) is None


def test_size() -> None:
    """Four tables and the GDT, one page each."""
    assert len(PAGES) == BOOT_PAGES_SIZE == 5 * 4096


def test_registers() -> None:
    """AMD 24593: long mode is EFER.LMA and LME, CR0.PG and PE, CR4.PAE, and a code segment with L set."""
    start = FlatStart(entry=0x8000, tables=TABLES, stack=0xA000, rsi=0x7000)
    sregs = start.sregs(KvmSregs(apic_base=0xFEE00900), C_BIT)
    assert sregs.efer & 0x500 == 0x500
    assert sregs.cr0 & 0x80000001 == 0x80000001
    assert sregs.cr4 & 0x20
    assert sregs.cr3 == TABLES | PRIVATE
    assert (sregs.cs.l, sregs.cs.db, sregs.cs.selector) == (1, 0, 0x08)
    assert (sregs.ss.selector, sregs.ss.type) == (0x10, 3)
    assert sregs.apic_base == 0xFEE00900
    regs = start.regs()
    assert (regs.rip, regs.rsp, regs.rsi, regs.rflags) == (0x8000, 0xA000, 0x7000, 2)


def test_gdt_has_the_selectors() -> None:
    """AMD 24593: descriptor 1 is 64-bit code (L, bit 53), descriptor 2 is data (bit 43 clear)."""
    sregs = FlatStart(entry=0, tables=TABLES).sregs(KvmSregs(), C_BIT)
    offset = sregs.gdt.base - TABLES
    null, code, data = (int.from_bytes(PAGES[at : at + 8], "little") for at in range(offset, offset + 24, 8))
    assert null == 0
    assert sregs.gdt.limit == 23
    assert code >> 53 & 1
    assert code >> 43 & 1
    assert not data >> 43 & 1
