"""A vCPU's registers in KVM's user interface. Source: Linux, arch/x86/include/uapi/asm/kvm.h."""

from __future__ import annotations

from swsnp.abi.record import Record, blob, mbz, record, sub, u8, u16, u32, u64, words

__all__ = ["KvmDtable", "KvmRegs", "KvmSegment", "KvmSregs"]


@record(size=144, source="Linux, struct kvm_regs (x86)")
class KvmRegs(Record):
    """General registers."""

    rax: int = u64(0)
    rbx: int = u64(8)
    rcx: int = u64(16)
    rdx: int = u64(24)
    rsi: int = u64(32)
    rdi: int = u64(40)
    rsp: int = u64(48)
    rbp: int = u64(56)
    r8_to_r15: tuple[int, ...] = words(64, 8)
    rip: int = u64(128)
    rflags: int = u64(136)


@record(size=24, source="Linux, struct kvm_segment (x86)")
class KvmSegment(Record):
    """A segment register with its hidden part."""

    base: int = u64(0)
    limit: int = u32(8)
    selector: int = u16(12)
    type: int = u8(14)
    present: int = u8(15)
    dpl: int = u8(16)
    db: int = u8(17)
    s: int = u8(18)
    l: int = u8(19)  # noqa: E741  # the structure's name
    g: int = u8(20)
    avl: int = u8(21)
    unusable: int = u8(22)
    padding: int = u8(23)


@record(size=16, source="Linux, struct kvm_dtable (x86)")
class KvmDtable(Record):
    """A descriptor table register."""

    base: int = u64(0)
    limit: int = u16(8)
    padding: bytes = mbz(10, 6)


@record(size=312, source="Linux, struct kvm_sregs (x86)")
class KvmSregs(Record):
    """Segments, tables and control registers."""

    cs: KvmSegment = sub(0, KvmSegment)
    ds: KvmSegment = sub(24, KvmSegment)
    es: KvmSegment = sub(48, KvmSegment)
    fs: KvmSegment = sub(72, KvmSegment)
    gs: KvmSegment = sub(96, KvmSegment)
    ss: KvmSegment = sub(120, KvmSegment)
    tr: KvmSegment = sub(144, KvmSegment)
    ldt: KvmSegment = sub(168, KvmSegment)
    gdt: KvmDtable = sub(192, KvmDtable)
    idt: KvmDtable = sub(208, KvmDtable)
    cr0: int = u64(224)
    cr2: int = u64(232)
    cr3: int = u64(240)
    cr4: int = u64(248)
    cr8: int = u64(256)
    efer: int = u64(264)
    apic_base: int = u64(272)
    interrupt_bitmap: bytes = blob(280, 32)
