"""Direct boot: what takes firmware's place when a kernel is started without any. This is its layout 2.

A launch measures these pages by rising GPA, then one VMSA per vCPU. All are NORMAL but the two named so.

======================  ================================================================================
GPA                     content
======================  ================================================================================
7000h                   `boot_params`
8000h                   `setup_data` of type 7 with the `cc_blob_sev_info`; from 8800h the GDT
B000h                   the stub: machine code, the boot processor's first instructions
C000h                   the stub's list: first and last + 1 of each range that the launch does not fill
D000h                   ACPI: RSDP, XSDT, MADT; with devices FADT, FACS and DSDT too
10000h                  command line, zero-terminated
20000h                  page tables: all memory 1:1 by 2 MiB pages with the C-bit
the ELF's addresses     the kernel's segments, without the zeros behind their bytes
high                    CPUID page (type CPUID) and secrets page (type SECRETS), in 2 MiB of their own
behind those            initial RAM disk: 2 MiB aligned, as high as the kernel allows below 3 GiB
======================  ================================================================================

Of each 2 MiB that something NORMAL lies in the launch fills the rest with zeros, so that it can be one page
of the RMP. The 2 MiB with the CPUID and secrets pages, which are 4 KiB each, are reserved: the rest of them
is never validated. The stub runs PVALIDATE on its list, 2 MiB at once where that can be, as firmware does
before it hands memory over; when one fails it asks to be terminated (set 1, code 2). It ends in the kernel's
64-bit entry with RSI at `boot_params`. The kernel's decompressor does not run, so there is no KASLR.

Layout 1 had CPUID and secrets pages at 9000h and A000h, its RAM disk was page aligned, and the stub validated
by 4 KiB what the launch left free around each part.

Source: Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"; AMD 24593.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.acpi import VirtioPlace, acpi_tables
from swsnp.abi.kvm_registers import KvmDtable, KvmRegs, KvmSegment, KvmSregs
from swsnp.abi.linux_boot import (
    CC_BLOB_MAGIC,
    SETUP_CC_BLOB,
    CcBlobSevInfo,
    E820Entry,
    E820Type,
    SetupData,
    boot_params,
)
from swsnp.abi.snp_page import VMSA_GPA, PageType
from swsnp.abi.vmsa_registers import vmsa_of
from swsnp.errors import UsageError
from swsnp.measure.digest import PAGE, extend, extend_range, page_contents
from swsnp.measure.vmsa_pages import RESET_EIP, SNP_ACTIVE, Vmm, reset_page

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from swsnp.abi.snp_launch import CpuidPage
    from swsnp.measure.kernel_image import KernelImage

__all__ = ["DirectBoot", "LAYOUT", "MOST_DEVICES", "Part", "STUB", "virtio_places"]

LAYOUT: Final = 2
"""The layout that is described above; another one has another launch digest for the same kernel."""

# fmt: off
_INSTRUCTIONS: Final = (
    # 0x00  next: RBX at the list
    "48 8b 3b",                 # mov   rdi, [rbx]
    "48 8b 6b 08",              # mov   rbp, [rbx+8]
    "48 83 c3 10",              # add   rbx, 0x10
    "48 85 ed",                 # test  rbp, rbp
    "74 57",                    # je    done
    # 0x10  page:
    "48 39 ef",                 # cmp   rdi, rbp
    "73 eb",                    # jae   next
    "f7 c7 ff ff 1f 00",        # test  edi, 0x1fffff
    "75 28",                    # jne   small
    "4c 8d 87 00 00 20 00",     # lea   r8, [rdi+0x200000]
    "49 39 e8",                 # cmp   r8, rbp
    "77 1c",                    # ja    small
    "48 89 f8",                 # mov   rax, rdi
    "b9 01 00 00 00",           # mov   ecx, 1           2 MiB
    "ba 01 00 00 00",           # mov   edx, 1           validate
    "f2 0f 01 ff",              # pvalidate
    "72 34",                    # jc    fail             it was validated already
    "85 c0",                    # test  eax, eax
    "74 22",                    # je    large
    "83 f8 06",                 # cmp   eax, 6           FAIL_SIZEMISMATCH
    "75 2b",                    # jne   fail
    # 0x45  small:
    "48 89 f8",                 # mov   rax, rdi
    "31 c9",                    # xor   ecx, ecx         4 KiB
    "ba 01 00 00 00",           # mov   edx, 1
    "f2 0f 01 ff",              # pvalidate
    "72 1b",                    # jc    fail
    "85 c0",                    # test  eax, eax
    "75 17",                    # jne   fail
    "48 81 c7 00 10 00 00",     # add   rdi, 0x1000
    "eb ae",                    # jmp   page
    # 0x62  large:
    "4c 89 c7",                 # mov   rdi, r8
    "eb a9",                    # jmp   page
    # 0x67  done: the kernel's entry is in R12
    "31 db",                    # xor   ebx, ebx
    "31 ed",                    # xor   ebp, ebp
    "31 ff",                    # xor   edi, edi
    "41 ff e4",                 # jmp   r12
    # 0x70  fail:
    "b9 30 01 01 c0",           # mov   ecx, 0xc0010130
    "b8 00 11 02 00",           # mov   eax, 0x21100     termination, set 1, code 2
    "31 d2",                    # xor   edx, edx
    "0f 30",                    # wrmsr
    "f3 0f 01 d9",              # vmgexit
    # 0x82  stop:
    "f4",                       # hlt
    "eb fd",                    # jmp   stop
)
# fmt: on

STUB: Final = bytes.fromhex("".join(_INSTRUCTIONS))

_BOOT_PARAMS, _SETUP, _STUB, _LIST, _ACPI = 0x7000, 0x8000, 0xB000, 0xC000, 0xD000
_GDT: Final = _SETUP + 0x800
_CMDLINE: Final = 0x10000
_TABLES: Final = 0x20000
_LOW_END: Final = 0x9F000
_RESERVED: Final = range(_SETUP, _CMDLINE)
_DEVICES: Final = 0xFEB0_0000
_FIRST_INTERRUPT: Final = 16
MOST_DEVICES: Final = 8
"""As many as KVM's IOAPIC has pins that no legacy device can have."""
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_LARGE: Final = 2 << 20
_FOUR_GIB: Final = 1 << 32
_INITRD_LIMIT: Final = 3 * _GIB
_CODE, _DATA = 0x10, 0x18
_DESCRIPTORS: Final = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
_PRESENT_WRITABLE: Final = 3
_LARGE_PAGE: Final = 0x80
_CR0: Final = 0x80050033  # PG AM WP NE ET MP PE
_CR4_PAE: Final = 0x20
_EFER_LMA_LME: Final = 0x500
_APIC_BASE: Final = 0xFEE0_0900
_LOADER_UNDEFINED: Final = 0xFF
_LOADED_HIGH: Final = 1
_MOST_RANGES: Final = PAGE // 16 - 1
_U64: Final = struct.Struct("<Q")


class Part(NamedTuple):
    """Consecutive pages of one type: `origin` is for people, `data` whole pages."""

    origin: str
    page_type: PageType
    gpa: int
    data: bytes

    @property
    def end(self) -> int:
        """First GPA behind it."""
        return self.gpa + len(self.data)


class DirectBoot:
    """One kernel with its initial RAM disk and command line, laid out in a guest's memory.

    Args:
        kernel: what `kernel_image` made of the file.
        initrd: contents of the initial RAM disk; empty for none.
        cmdline: the command line.
        memory: GPA and bytes of each range of RAM, rising, the first from 0.
        vcpus: how many.
        c_bit: position of the C-bit; None for a guest without SNP.
        cpuid: the CPUID page; None likewise.
        devices: where virtio-mmio devices are, which ACPI tells the kernel.

    A guest without SNP is laid out in the same way. It has no C-bit, none of the pages that only SNP guests
    have and no zeros between its parts, and starts at the kernel's entry, since nothing is to be validated.

    Raises:
        UsageError: it does not fit: field, got, wanted.
    """

    def __init__(
        self,
        kernel: KernelImage,
        *,
        initrd: bytes = b"",
        cmdline: str = "",
        memory: tuple[tuple[int, int], ...],
        vcpus: int,
        c_bit: int | None,
        cpuid: CpuidPage | None,
        devices: Sequence[VirtioPlace] = (),
    ) -> None:
        self._kernel, self._memory, self._vcpus = kernel, memory, vcpus
        self._snp, self._private = cpuid is not None, 0 if c_bit is None else 1 << c_bit
        self._devices = devices
        self._low_end = memory[0][1]
        line = cmdline.encode() + b"\0"
        longest = min(kernel.header.cmdline_size, _TABLES - _CMDLINE - 1)
        if len(line) - 1 > longest:
            raise UsageError(f"-append: got {len(line) - 1} bytes, wanted at most {longest}")
        if kernel.start < _MIB:
            raise UsageError(f"kernel: begins at {kernel.start:#x}, wanted {_MIB:#x} or above")
        if kernel.end > self._low_end:
            raise UsageError(
                f"-m: got {self._low_end:#x} bytes below 4 GiB, wanted at least {kernel.end:#x}, where the "
                "kernel ends"
            )
        tables = self._page_tables()
        if _TABLES + len(tables) > _LOW_END:
            raise UsageError(f"-m: got {sum(size for _, size in memory):#x} bytes, wanted less: 1 GiB pages")
        initrd_gpa = self._initrd_gpa(len(initrd))
        self._special = initrd_gpa - _LARGE
        parts = (
            self._part("boot parameters", _BOOT_PARAMS, self._boot_params(initrd_gpa, len(initrd))),
            self._part("setup data and GDT", _SETUP, self._setup_page()),
            *(self._stub_parts() if self._snp else []),
            self._part("ACPI", _ACPI, self._acpi()),
            self._part("command line", _CMDLINE, line),
            self._part("page tables", _TABLES, tables),
            *self._kernel_parts(),
            *([] if cpuid is None else self._special_parts(cpuid)),
            *([self._part("initial RAM disk", initrd_gpa, initrd)] if initrd else []),
        )
        self.parts: tuple[Part, ...] = parts
        if self._snp:
            filled = tuple(self._filled(parts))
            ranges = _pack_ranges(self._free(filled))
            self.parts = tuple(each._replace(data=ranges) if each.gpa == _LIST else each for each in filled)

    @property
    def executable(self) -> tuple[range, ...]:
        """Where code lies that may have instructions of SNP in it."""
        return (range(_STUB, _STUB + len(STUB)), *self._kernel.code)

    def registers(self) -> tuple[KvmRegs, KvmSregs]:
        """The boot processor's at its first instruction."""
        data = KvmSegment(limit=0xFFFFFFFF, selector=_DATA, type=3, present=1, s=1, g=1, db=1)
        code = KvmSegment(limit=0xFFFFFFFF, selector=_CODE, type=11, present=1, s=1, g=1, l=1)
        sregs = KvmSregs(
            cs=code,
            ds=data,
            es=data,
            fs=data,
            gs=data,
            ss=data,
            tr=KvmSegment(limit=0xFFFF, type=11, present=1),
            ldt=KvmSegment(limit=0xFFFF, type=2, present=1),
            gdt=KvmDtable(base=_GDT, limit=8 * len(_DESCRIPTORS) - 1),
            idt=KvmDtable(),
            cr0=_CR0,
            cr3=_TABLES | self._private,
            cr4=_CR4_PAE,
            efer=_EFER_LMA_LME,
            apic_base=_APIC_BASE,
        )
        r12 = (0, 0, 0, 0, self._kernel.entry, 0, 0, 0)
        rip = _STUB if self._snp else self._kernel.entry
        return KvmRegs(rip=rip, rbx=_LIST, rsi=_BOOT_PARAMS, r8_to_r15=r12, rflags=2), sregs

    def digest(self, *, signature: int, features: int = SNP_ACTIVE) -> bytes:
        """The launch digest, 48 bytes. The CPUID and secrets pages count with their place only.

        Args:
            signature: CPUID Fn1 EAX of the CPU model, in RDX of the application processors at reset.
            features: SEV_FEATURES.
        """
        digest = bytes(48)
        for part in self.parts:
            digest = extend_range(digest, part.data, page_type=part.page_type, gpa=part.gpa)
        first = bytes(vmsa_of(*self.registers(), features=features))
        other = reset_page(Vmm.QEMU, eip=RESET_EIP, features=features, signature=signature)
        for page in (first, *[other] * (self._vcpus - 1)):
            contents = page_contents(PageType.VMSA, page)
            digest = extend(digest, contents, page_type=PageType.VMSA, gpa=VMSA_GPA)
        return digest

    def runs(self) -> Iterator[Part]:
        """The parts as one launches them: those of one type that touch are one, as 2 MiB may hold several."""
        run: list[Part] = []
        for part in self.parts:
            if run and (part.page_type, part.gpa) != (run[-1].page_type, run[-1].end):
                yield _joined(run)
                run = []
            run.append(part)
        yield _joined(run)

    # The parts

    @staticmethod
    def _part(origin: str, gpa: int, data: bytes) -> Part:
        return Part(origin, PageType.NORMAL, gpa, data.ljust(-(-len(data) // PAGE) * PAGE, b"\0"))

    def _stub_parts(self) -> Iterator[Part]:
        yield self._part("stub", _STUB, STUB)
        yield self._part("stub's list", _LIST, b"\0")

    def _special_parts(self, cpuid: CpuidPage) -> Iterator[Part]:
        yield Part("CPUID page", PageType.CPUID, self._special, bytes(cpuid))
        yield Part("secrets page", PageType.SECRETS, self._special + PAGE, bytes(PAGE))

    def _filled(self, parts: Sequence[Part]) -> Iterator[Part]:
        """These parts by rising GPA, with zeros in all that is left of each 2 MiB that has a NORMAL one."""
        normal = [each for each in parts if each.page_type is PageType.NORMAL]
        begun = {at for each in normal for at in range(each.gpa & -_LARGE, each.end, _LARGE)}
        zeros = []
        for start, end in self._free(parts):
            first = min(end, -(-start // _LARGE) * _LARGE)
            last = max(first, end & -_LARGE)
            for at, upto in ((start, first), (last, end)):
                if at < upto and at & -_LARGE in begun:
                    zeros.append(self._part("zeros", at, bytes(upto - at)))
        yield from sorted([*parts, *zeros], key=lambda each: each.gpa)

    def _kernel_parts(self) -> Iterator[Part]:
        """The segments, in whole pages; two that share a page are one part."""
        gpa, data = 0, bytearray()
        for segment in sorted(self._kernel.segments, key=lambda each: each.gpa):
            if not segment.data:
                continue
            if data and segment.gpa & -PAGE >= gpa + len(data):
                yield self._part("kernel", gpa, bytes(data))
                data = bytearray()
            if not data:
                gpa = segment.gpa & -PAGE
            data = data.ljust(segment.gpa - gpa, b"\0") + segment.data
        yield self._part("kernel", gpa, bytes(data))

    def _initrd_gpa(self, size: int) -> int:
        limit = min(self._low_end, _INITRD_LIMIT, self._kernel.header.initrd_addr_max + 1)
        gpa = (limit - size) & -_LARGE
        needed = _LARGE if self._snp else 0
        if (size or needed) and gpa < self._kernel.end + needed:
            wanted = -(-self._kernel.end // _LARGE) * _LARGE + needed + -(-size // _LARGE) * _LARGE
            raise UsageError(
                f"-m: got {self._low_end:#x} bytes below 4 GiB, wanted {wanted:#x} for kernel and initrd"
            )
        return gpa

    def _boot_params(self, initrd_gpa: int, initrd_size: int) -> bytes:
        header = self._kernel.header.but(
            type_of_loader=_LOADER_UNDEFINED,
            loadflags=self._kernel.header.loadflags | _LOADED_HIGH,
            ramdisk_image=initrd_gpa if initrd_size else 0,
            ramdisk_size=initrd_size,
            cmd_line_ptr=_CMDLINE,
            setup_data=_SETUP if self._snp else 0,
        )
        return boot_params(header, tuple(self._memory_map()), rsdp=_ACPI)

    def _memory_map(self) -> Iterator[E820Entry]:
        # with devices Linux maps the tables once more, as private only where the type is ACPI
        reserved_end = _ACPI if self._devices else _RESERVED.stop
        low = [(0, _SETUP, E820Type.RAM), (_RESERVED.start, reserved_end, E820Type.RESERVED)]
        if self._devices:
            low.append((_ACPI, _RESERVED.stop, E820Type.ACPI))
        high = [(_MIB, self._low_end, E820Type.RAM)]
        if self._snp:
            special = range(self._special, self._special + _LARGE)
            high = [
                (_MIB, special.start, E820Type.RAM),
                (special.start, special.stop, E820Type.RESERVED),
                (special.stop, self._low_end, E820Type.RAM),
            ]
        for start, end, kind in (*low, (_CMDLINE, _LOW_END, E820Type.RAM), *high):
            if start < end:
                yield E820Entry(addr=start, size=end - start, type=kind)
        for gpa, size in self._memory[1:]:
            yield E820Entry(addr=gpa, size=size, type=E820Type.RAM)

    def _setup_page(self) -> bytes:
        info = CcBlobSevInfo(
            magic=CC_BLOB_MAGIC,
            version=1,
            secrets_phys=self._special + PAGE,
            secrets_len=PAGE,
            cpuid_phys=self._special,
            cpuid_len=PAGE,
        )
        # struct cc_setup_data: the head is followed by the blob's address
        info_gpa = _SETUP + 0x40
        head = bytes(SetupData(type=SETUP_CC_BLOB, len=4)) + struct.pack("<I", info_gpa)
        page = head.ljust(0x40, b"\0") + bytes(info)
        return page.ljust(_GDT - _SETUP, b"\0") + b"".join(map(_U64.pack, _DESCRIPTORS))

    def _acpi(self) -> bytes:
        tables = acpi_tables(_ACPI, self._vcpus, self._devices)
        if len(tables) > _CMDLINE - _ACPI:
            raise UsageError(f"-smp: got {self._vcpus}, wanted fewer: ACPI tables take {len(tables)} bytes")
        return tables

    def _page_tables(self) -> bytes:
        """PML4, PDPTs as needed for one PML4 entry, and a directory for each GiB."""
        end = max(gpa + size for gpa, size in self._memory)
        private = self._private
        directories = -(-end // _GIB)
        pdpt, first = _TABLES + PAGE, _TABLES + 2 * PAGE
        entries = [first + number * PAGE | private | _PRESENT_WRITABLE for number in range(directories)]
        pages = [_table([pdpt | private | _PRESENT_WRITABLE]), _table(entries)]
        for number in range(directories):
            base = number * _GIB
            flags = private | _LARGE_PAGE | _PRESENT_WRITABLE
            pages.append(_table([at | flags for at in range(base, base + _GIB, _LARGE)]))
        return b"".join(pages)

    def _free(self, parts: Iterable[Part]) -> Iterator[tuple[int, int]]:
        """RAM that none of these parts fills, without the 2 MiB that are reserved for the special ones."""
        filled = sorted([*((each.gpa, each.end) for each in parts), (self._special, self._special + _LARGE)])
        for gpa, size in self._memory:
            at, end = gpa, gpa + size
            for start, stop in filled:
                if stop <= at or start >= end:
                    continue
                if at < start:
                    yield at, start
                at = stop
            if at < end:
                yield at, end


def virtio_places(count: int) -> tuple[VirtioPlace, ...]:
    """Where so many virtio-mmio devices are: a page and an interrupt each.

    Raises:
        UsageError: more than there are interrupts for.
    """
    if count > MOST_DEVICES:
        raise UsageError(f"virtio devices: got {count}, wanted at most {MOST_DEVICES}")
    pages = (_DEVICES + number * PAGE for number in range(count))
    return tuple(
        VirtioPlace(range(page, page + PAGE), _FIRST_INTERRUPT + number) for number, page in enumerate(pages)
    )


def _joined(run: list[Part]) -> Part:
    return run[0]._replace(data=b"".join(each.data for each in run)) if len(run) > 1 else run[0]


def _table(entries: list[int]) -> bytes:
    return struct.pack(f"<{len(entries)}Q", *entries).ljust(PAGE, b"\0")


def _pack_ranges(ranges: Iterable[tuple[int, int]]) -> bytes:
    packed = b"".join(_U64.pack(start) + _U64.pack(end) for start, end in ranges)
    if len(packed) > 16 * _MOST_RANGES:
        raise UsageError(f"kernel: {len(packed) // 16} ranges between its segments, wanted {_MOST_RANGES}")
    return packed.ljust(PAGE, b"\0")
