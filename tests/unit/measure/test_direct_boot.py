"""How a kernel is laid out without firmware, and what is measured of it."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from swsnp.abi.linux_boot import BOOT_PARAMS_SIZE, CcBlobSevInfo, E820Entry, SetupData, SetupHeader
from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_launch import CpuidPage
from swsnp.errors import UsageError
from swsnp.measure.digest import extend, extend_range, page_contents
from swsnp.measure.direct_boot import MOST_DEVICES, STUB, DirectBoot, virtio_places
from swsnp.measure.kernel_image import KernelImage, Segment, parse_kernel
from swsnp.measure.vmsa_pages import RESET_EIP, Vmm, reset_page
from swsnp.testing.tiny_kernel import ENTRY, tiny_kernel

MIB = 1 << 20
C_BIT = 47
KERNEL = parse_kernel(tiny_kernel(), "k")


def boot(
    *,
    initrd: bytes = b"",
    cmdline: str = "console=ttyS0",
    memory: tuple[tuple[int, int], ...] = ((0, 64 * MIB),),
    vcpus: int = 1,
    kernel: KernelImage = KERNEL,
    devices: int = 0,
) -> DirectBoot:
    return DirectBoot(
        kernel,
        initrd=initrd,
        cmdline=cmdline,
        memory=memory,
        vcpus=vcpus,
        c_bit=C_BIT,
        cpuid=CpuidPage(count=1),
        devices=virtio_places(devices),
    )


def placed(start: int, size: int) -> KernelImage:
    """A kernel that is no more than one segment."""
    return KernelImage(KERNEL.header, start, (Segment(start, b"\xf4", size),), ())


def ordinary(kernel: KernelImage, initrd: bytes = b"", mib: int = 64) -> DirectBoot:
    """Without SNP."""
    memory = ((0, mib * MIB),)
    return DirectBoot(kernel, initrd=initrd, cmdline="", memory=memory, vcpus=1, c_bit=None, cpuid=None)


def part(one: DirectBoot, origin: str) -> bytes:
    (found,) = (each.data for each in one.parts if each.origin == origin)
    return found


def test_parts_do_not_overlap() -> None:
    """SNP_LAUNCH_UPDATE: no page is launched twice; each part is whole pages in RAM."""
    parts = sorted(boot(initrd=b"x" * 5000, vcpus=200).parts, key=lambda each: each.gpa)
    assert all(before.end <= after.gpa for before, after in pairwise(parts))
    assert all(each.gpa % 4096 == 0 and each.data and len(each.data) % 4096 == 0 for each in parts)
    special = {each.page_type: each.gpa for each in parts if each.page_type is not PageType.NORMAL}
    assert special == {PageType.CPUID: 60 * MIB, PageType.SECRETS: 60 * MIB + 4096}


def test_launched_by_2_mib() -> None:
    """AMD 56860, SNP_LAUNCH_UPDATE takes 2 MiB: what is NORMAL is there by whole 2 MiB, filled with zeros.

    Of the 2 MiB with the CPUID and secrets pages nothing else is launched or validated.
    """
    segments = (Segment(ENTRY + 4096, b"a" * MIB, MIB), Segment(ENTRY + 5 * MIB + 4096, b"b", 3 * MIB))
    kernel = KernelImage(KERNEL.header, ENTRY + 4096, segments, ())
    one = boot(kernel=kernel, initrd=b"x" * (3 * MIB))
    normal = [(each.gpa, each.end) for each in one.runs() if each.page_type is PageType.NORMAL]
    start = ENTRY
    assert normal == [
        (0, 2 * MIB),
        (start, start + 2 * MIB),
        (start + 4 * MIB, start + 6 * MIB),
        (60 * MIB, 64 * MIB),
    ]
    zeros = [each for each in one.parts if each.origin == "zeros"]
    assert all(not any(each.data) for each in zeros)
    assert {(each.gpa, each.end) for each in zeros} >= {(start, start + 4096), (63 * MIB, 64 * MIB)}
    ranges = struct.unpack("<512Q", part(one, "stub's list"))
    assert ranges[:10] == (
        *(2 * MIB, start),
        *(start + 2 * MIB, start + 4 * MIB),
        *(start + 6 * MIB, 58 * MIB),
        *(0, 0),
        *(0, 0),
    )


def test_memory_that_ends_inside_2_mib() -> None:
    """What no part lies in is validated by the stub, by 4 KiB where memory ends before 2 MiB do."""
    one = boot(memory=((0, 65 * MIB), (1 << 32, 3 * MIB)), initrd=b"x")
    ranges = struct.unpack("<512Q", part(one, "stub's list"))
    assert ranges[2:8] == (18 * MIB, 62 * MIB, 1 << 32, (1 << 32) + 3 * MIB, 0, 0)


def test_zeros_end_with_memory() -> None:
    """A RAM disk may lie where memory ends inside 2 MiB: zeros fill no more than there is."""
    one = boot(memory=((0, 65 * MIB),), initrd=b"x" * 4097)
    last = one.parts[-1]
    assert (last.origin, last.gpa, last.end) == ("zeros", 64 * MIB + 0x2000, 65 * MIB)


def test_runs() -> None:
    """Parts of one type that touch are launched as one; what is measured stays the same, page by page."""
    one = boot(initrd=b"x" * 5000)
    whole = [(at, each.page_type) for each in one.parts for at in range(each.gpa, each.end, 4096)]
    assert [(at, each.page_type) for each in one.runs() for at in range(each.gpa, each.end, 4096)] == whole
    assert b"".join(each.data for each in one.runs()) == b"".join(each.data for each in one.parts)
    assert [each.page_type for each in one.runs()] == [
        PageType.NORMAL,
        PageType.NORMAL,
        PageType.CPUID,
        PageType.SECRETS,
        PageType.NORMAL,
    ]


def test_ordinary_guest_has_no_zeros() -> None:
    """Without SNP nothing is launched or validated: parts only, and nothing is reserved for special pages."""
    one = ordinary(KERNEL, b"x")
    assert [each.origin for each in one.parts] == [
        *("boot parameters", "setup data and GDT", "ACPI", "command line", "page tables", "kernel"),
        "initial RAM disk",
    ]
    page = part(one, "boot parameters")
    entries = [E820Entry.parse_at(page, 0x2D0 + 20 * number) for number in range(page[0x1E8])]
    assert [(each.addr, each.addr + each.size) for each in entries][-1] == (MIB, 64 * MIB)


def test_boot_parameters() -> None:
    """Linux, zero page: header with loader fields, memory map, root pointer, setup data with the CC blob."""
    one = boot(initrd=b"ram disk", memory=((0, 64 * MIB), (1 << 32, 32 * MIB)))
    page = part(one, "boot parameters")
    assert len(page) == BOOT_PARAMS_SIZE
    header = SetupHeader.parse(page[0x1F1 : 0x1F1 + SetupHeader.SIZE])
    assert (header.type_of_loader, header.loadflags & 1, header.cmd_line_ptr) == (0xFF, 1, 0x10000)
    assert (header.ramdisk_image, header.ramdisk_size) == (62 * MIB, 8)
    assert struct.unpack_from("<Q", page, 0x70) == (0xD000,)
    entries = [E820Entry.parse_at(page, 0x2D0 + 20 * number) for number in range(page[0x1E8])]
    assert [(each.addr, each.addr + each.size, each.type) for each in entries] == [
        (0, 0x8000, 1),
        (0x8000, 0x10000, 2),
        (0x10000, 0x9F000, 1),
        (MIB, 60 * MIB, 1),
        (60 * MIB, 62 * MIB, 2),
        (62 * MIB, 64 * MIB, 1),
        (1 << 32, (1 << 32) + 32 * MIB, 1),
    ]
    setup = part(one, "setup data and GDT")
    head = SetupData.parse_at(setup, 0)
    assert (header.setup_data, head.type, head.len, head.next) == (0x8000, 7, 4, 0)
    (info_gpa,) = struct.unpack_from("<I", setup, 16)
    info = CcBlobSevInfo.parse_at(setup, info_gpa - 0x8000)
    assert (info.magic, info.secrets_phys, info.cpuid_phys) == (0x45444D41, 60 * MIB + 4096, 60 * MIB)
    assert (info.secrets_len, info.cpuid_len) == (4096, 4096)


def test_memory_of_the_tables() -> None:
    """Linux maps ACPI memory as private in SNP guests, other reserved memory as shared."""
    page = part(boot(devices=1), "boot parameters")
    entries = [E820Entry.parse_at(page, 0x2D0 + 20 * number) for number in range(page[0x1E8])]
    assert [(each.addr, each.addr + each.size, each.type) for each in entries[1:3]] == [
        (0x8000, 0xD000, 2),
        (0xD000, 0x10000, 3),
    ]


def test_places_of_devices() -> None:
    """A page and an interrupt of the IOAPIC's own each, below its registers; not more than there are."""
    places = virtio_places(MOST_DEVICES)
    assert [each.interrupt for each in places] == list(range(16, 24))
    assert [each.registers.start for each in places] == list(range(0xFEB0_0000, 0xFEB0_8000, 0x1000))
    assert {len(each.registers) for each in places} == {0x1000}
    with pytest.raises(UsageError, match="virtio devices: got 9, wanted at most 8"):
        virtio_places(9)


def test_stub_validates_what_is_not_launched() -> None:
    """AMD 56860: launched pages are valid already; the list and the parts together are all memory, once."""
    memory = ((0, 64 * MIB), (1 << 32, 2 * MIB))
    one = boot(initrd=b"x" * 5000, memory=memory)
    numbers = struct.unpack("<512Q", part(one, "stub's list"))
    ranges = [(start, end) for start, end in zip(numbers[::2], numbers[1::2], strict=True) if end]
    launched = [(each.gpa, each.end) for each in one.parts]
    together = sorted([*ranges, *launched, (60 * MIB + 2 * 4096, 62 * MIB)])  # reserved
    assert [start for start, _ in together if start not in (0, 1 << 32)] == [
        end for _, end in together if end not in (64 * MIB, (1 << 32) + 2 * MIB)
    ]
    assert together[0][0] == 0
    assert together[-1][1] == (1 << 32) + 2 * MIB


def test_registers() -> None:
    """Linux, 64-bit boot protocol: long mode, CS 10h, DS 18h, interrupts off, RSI at the boot parameters."""
    regs, sregs = boot().registers()
    assert (regs.rip, regs.rsi, regs.rflags, regs.r8_to_r15[4]) == (0xB000, 0x7000, 2, ENTRY)
    assert (sregs.cs.selector, sregs.cs.l, sregs.ds.selector) == (0x10, 1, 0x18)
    assert sregs.cr3 == 0x20000 | 1 << C_BIT
    assert (sregs.cr0 & 0x80000001, sregs.cr4 & 0x20, sregs.efer) == (0x80000001, 0x20, 0x500)
    assert part(boot(), "stub").startswith(STUB)


@pytest.mark.parametrize("gib", [1, 5])
def test_page_tables(gib: int) -> None:
    """AMD 24593: every GiB of memory is mapped 1:1 and private, also above 4 GiB."""
    memory = ((0, 64 * MIB),) if gib == 1 else ((0, 2 << 30), (1 << 32, 1 << 30))
    tables = part(boot(memory=memory), "page tables")
    assert len(tables) == (2 + gib) * 4096
    address = (gib - 1 << 30) + 5 * (2 * MIB)
    (pdpt,) = struct.unpack_from("<Q", tables, 0)
    assert pdpt == 0x21003 | 1 << C_BIT
    (directory,) = struct.unpack_from("<Q", tables, 4096 + 8 * (gib - 1))
    (entry,) = struct.unpack_from("<Q", tables, (directory & 0xFFFFF000) - 0x20000 + 8 * 5)
    assert entry == address | 0x83 | 1 << C_BIT


def test_digest() -> None:
    """AMD 56860: LD over the parts in order, then one VMSA per vCPU."""
    one = boot(vcpus=2)
    regs, sregs = one.registers()
    from swsnp.abi.vmsa_registers import vmsa_of

    digest = bytes(48)
    for each in one.parts:
        digest = extend_range(digest, each.data, page_type=each.page_type, gpa=each.gpa)
    other = reset_page(Vmm.QEMU, eip=RESET_EIP, features=1, signature=0x00A00F11)
    for page in (bytes(vmsa_of(regs, sregs, features=1)), other):
        contents = page_contents(PageType.VMSA, page)
        digest = extend(digest, contents, page_type=PageType.VMSA, gpa=0xFFFFFFFFF000)
    assert one.digest(signature=0x00A00F11) == digest


def test_digest_sees_everything() -> None:
    """What a verifier relies on: kernel, initial RAM disk, command line and memory size are measured."""
    reference = boot().digest(signature=0)
    other = KernelImage(KERNEL.header, ENTRY, (Segment(ENTRY, b"\xf4" * 64, 64),), ())
    changed = (
        boot(cmdline="console=ttyS1"),
        boot(initrd=b"x"),
        boot(memory=((0, 66 * MIB),)),
        boot(vcpus=2),
        boot(kernel=other),
        boot(devices=1),
        boot(devices=2),
    )
    digests = {each.digest(signature=0) for each in changed}
    assert len(digests) == len(changed)
    assert reference not in digests


def test_segments_that_share_a_page() -> None:
    """ELF: segments need not begin on a page; a page of two segments is launched once, with both."""
    segments = (Segment(ENTRY, b"a" * 0x1800, 0x1800), Segment(ENTRY + 0x1900, b"b" * 16, 32))
    one = boot(kernel=KernelImage(KERNEL.header, ENTRY, segments, ()))
    data = part(one, "kernel")
    assert data == (b"a" * 0x1800).ljust(0x1900, b"\0") + (b"b" * 16).ljust(0x700, b"\0")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"cmdline": "x" * 2048}, "-append: got 2048 bytes, wanted at most 2047"),
        ({"kernel": placed(MIB - 4096, 4096)}, "kernel: begins at 0xff000, wanted 0x100000 or above"),
        ({"memory": ((0, 16 * MIB),)}, "-m: got 0x1000000 bytes below 4 GiB, wanted at least"),
        ({"initrd": bytes(60 * MIB)}, "wanted 0x5000000 for kernel and initrd"),
        ({"kernel": placed(MIB, 61 * MIB + 1)}, "wanted 0x4200000 for kernel and initrd"),
        ({"kernel": placed(MIB, 59 * MIB + 1), "initrd": bytes(1)}, "wanted 0x4200000 for kernel and initrd"),
        ({"memory": ((0, 2 << 30), (1 << 32, 200 << 30))}, "wanted less"),
        ({"vcpus": 2000}, "-smp: got 2000, wanted fewer"),
    ],
)
def test_refusals(arguments: dict[str, object], text: str) -> None:
    """What does not fit is refused with the option, what it is and what it may be."""
    with pytest.raises(UsageError) as caught:
        boot(**arguments)  # type: ignore[arg-type]  # each row is one valid argument
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cmdline": "x" * 2047},
        {"kernel": placed(MIB, 4096)},
        {"kernel": placed(MIB, 61 * MIB)},
        {"kernel": placed(MIB, 59 * MIB), "initrd": bytes(2 * MIB)},
        {"memory": ((0, 2 << 30), (1 << 32, 121 << 30))},
    ],
)
def test_what_just_fits(arguments: dict[str, object]) -> None:
    """The other side of each refusal: the last byte of a room belongs to it."""
    parts = sorted(boot(**arguments).parts, key=lambda each: each.gpa)  # type: ignore[arg-type]  # as above
    assert all(before.end <= after.gpa for before, after in pairwise(parts))


def test_room_for_an_ordinary_kernel() -> None:
    """Without SNP a kernel may end where memory does, and an initial RAM disk begins behind it."""
    assert ordinary(placed(MIB, 64 * MIB), mib=65).parts[-1].origin == "kernel"
    with pytest.raises(UsageError, match="wanted at least 0x4100001, where the kernel ends"):
        ordinary(placed(MIB, 64 * MIB + 1), mib=65)
    assert ordinary(placed(MIB, 61 * MIB), b"x").parts[-1].gpa == 62 * MIB
    with pytest.raises(UsageError, match="wanted 0x4200000 for kernel and initrd"):
        ordinary(placed(MIB, 61 * MIB + 1), b"x")


def test_acpi_fills_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables may take all three pages below the command line, and no byte more."""
    monkeypatch.setattr("swsnp.measure.direct_boot.acpi_tables", lambda *_: bytes(0x3000))
    assert len(part(boot(), "ACPI")) == 0x3000
    monkeypatch.setattr("swsnp.measure.direct_boot.acpi_tables", lambda *_: bytes(0x3001))
    with pytest.raises(UsageError, match="-smp: got 1, wanted fewer: ACPI tables take 12289 bytes"):
        boot()


def test_too_many_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that lists what the stub validates has a fixed size; a kernel of more pieces is refused."""
    numbers = struct.unpack("<512Q", part(boot(), "stub's list"))
    monkeypatch.setattr("swsnp.measure.direct_boot._MOST_RANGES", sum(map(bool, numbers[1::2])))
    boot()
    monkeypatch.setattr("swsnp.measure.direct_boot._MOST_RANGES", 1)
    with pytest.raises(UsageError, match="ranges between its segments, wanted 1"):
        boot()
