"""Single instructions of real guest code on the host's /dev/kvm, and how each leaves the guest."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from swsnp.cpu.plain_kvm import LinuxKvm, probe
from swsnp.hardware.exits import (
    Halt,
    Interrupted,
    MmioAccess,
    NestedPageFault,
    PortAccess,
    ProcessorError,
    Shutdown,
    Vmgexit,
)

if TYPE_CHECKING:
    from tests.e2e.plain_kvm.conftest import Boot, GuestMemory

HLT = "f4"
VMGEXIT = "f3 0f 01 d9"
PVALIDATE = "f2 0f 01 ff"
RMPADJUST = "f3 0f 01 fe"
RDMSR = "0f 32"
WRMSR = "0f 30"
ECX_GHCB_MSR = "b9 30 01 01 c0"
ECX_SEV_STATUS = "b9 31 01 01 c0"
ECX_SYSCFG = "b9 10 00 01 c0"
STORE_EDX_EAX = "a3 00 a0 00 00 00 00 00 00 89 14 25 04 a0 00 00"  # mov [0xA000], eax; mov [0xA004], edx


def stored(memory: GuestMemory) -> int:
    return int.from_bytes(memory.private[0xA000:0xA008], "little")


def test_probe_agrees(c_bit: int) -> None:
    """Where these tests run, the probe says so without a reason or a remedy."""
    verdict = probe()
    assert (verdict.usable, verdict.reason, verdict.remedy) == (True, "", "")
    assert 30 < c_bit < 52


def test_vmgexit_changes_nothing(boot: Boot, memory: GuestMemory) -> None:
    """AMD 24594, VMGEXIT: no register and no flag is changed, and the guest goes on behind it."""
    # stc; mov eax, 0x12345678; vmgexit; sbb edx, edx; store; hlt
    processor = boot(f"f9 b8 78 56 34 12 {VMGEXIT} 19 d2 {STORE_EDX_EAX} {HLT}")
    assert processor.run() == Vmgexit()
    assert processor.run() == Halt()
    assert stored(memory) == 0xFFFFFFFF_12345678


def test_code_after_the_original_is_kept(boot: Boot) -> None:
    """Each rewritten place is listed with what was there."""
    processor = boot(f"{VMGEXIT} {PVALIDATE} {RMPADJUST}")
    assert processor.sites == {}
    processor.run()
    assert {gpa: site.name for gpa, site in processor.sites.items()} == {
        0x8000: "VMGEXIT",
        0x8004: "PVALIDATE",
        0x8008: "RMPADJUST",
    }


def test_ghcb_msr_both_ways(boot: Boot, memory: GuestMemory) -> None:
    """AMD 56421: guest and hypervisor speak through MSR 0xC0010130, 64 bits each way."""
    # mov eax, 0xB014; mov edx, 0x00200000; wrmsr; vmgexit; rdmsr; store; hlt
    code = f"{ECX_GHCB_MSR} b8 14 b0 00 00 ba 00 00 20 00 {WRMSR} {VMGEXIT} {RDMSR} {STORE_EDX_EAX} {HLT}"
    processor = boot(code)
    assert processor.run() == Vmgexit()
    assert processor.ghcb_msr == 0x20_0000_0000_B014
    processor.ghcb_msr = 0x8000_0000_0000_0015
    assert processor.run() == Halt()
    assert stored(memory) == 0x8000_0000_0000_0015


@pytest.mark.parametrize(("ecx", "value"), [(ECX_SEV_STATUS, 7), (ECX_SYSCFG, 1 << 23)])
def test_msrs_of_sev(boot: Boot, memory: GuestMemory, ecx: str, value: int) -> None:
    """AMD 24593: SEV_STATUS bits 0 to 2 are SEV, SEV-ES, SNP; SYSCFG bit 23 is memory encryption."""
    assert boot(f"{ecx} {RDMSR} {STORE_EDX_EAX} {HLT}").run() == Halt()
    assert stored(memory) == value


def test_sev_status_is_read_only(boot: Boot) -> None:
    """AMD 24593: a write to SEV_STATUS is #GP; without an IDT that is a triple fault."""
    assert boot(f"{ECX_SEV_STATUS} 31 c0 31 d2 {WRMSR} {HLT}").run() == Shutdown("triple fault")


def test_cpuid(boot: Boot, memory: GuestMemory, c_bit: int) -> None:
    """AMD 24594, Fn8000_001F: EAX bits 1, 3, 4 and the C-bit's position in EBX, as the guest sees them."""
    # mov eax, 0x8000001F; xor ecx, ecx; cpuid; mov edx, ebx; store; hlt
    assert boot(f"b8 1f 00 00 80 31 c9 0f a2 89 da {STORE_EDX_EAX} {HLT}").run() == Halt()
    assert stored(memory) == (c_bit | 1 << 6) << 32 | 0b11010


def test_halt_goes_on(boot: Boot, memory: GuestMemory) -> None:
    """HLT leaves the guest; the next run goes on behind it."""
    processor = boot(f"{HLT} b8 07 00 00 00 31 d2 {STORE_EDX_EAX} {HLT}")
    assert processor.run() == Halt()
    assert stored(memory) == 0
    assert processor.run() == Halt()
    assert stored(memory) == 7


def test_triple_fault(boot: Boot) -> None:
    """AMD 24593: UD2 without an IDT is a triple fault, which is a shutdown."""
    assert boot("0f 0b").run() == Shutdown("triple fault")


def test_ports(boot: Boot, memory: GuestMemory) -> None:
    """Linux, KVM_EXIT_IO: an access to a port leaves the guest; what is answered is what it reads."""
    # mov eax, 0x12345641; out 0x80, al; xor eax, eax; in ax, 0x84; xor edx, edx; store; hlt
    processor = boot(f"b8 41 56 34 12 e6 80 31 c0 66 e5 84 31 d2 {STORE_EDX_EAX} {HLT}")
    assert processor.run() == PortAccess(read=False, size=1, port=0x80, data=b"A")
    processor.complete(b"")
    assert processor.run() == PortAccess(read=True, size=2, port=0x84)
    processor.complete(b"\x34\x12")
    assert processor.run() == Halt()
    assert stored(memory) == 0x1234


def test_device_memory(boot: Boot, memory: GuestMemory) -> None:
    """Linux, KVM_EXIT_MMIO: a shared access where no memory is leaves the guest as a device's."""
    # mov dword [0x40020008], 0x04030201; mov eax, [0x40020010]; xor edx, edx; store; hlt
    processor = boot(f"{WRITE.format('08 00 02 40')} {READ.format('10 00 02 40')} {STORE_EDX_EAX} {HLT}")
    assert processor.run() == MmioAccess(0x20008, 4, b"\1\2\3\4")
    processor.complete(b"")
    assert processor.run() == MmioAccess(0x20010, 4)
    processor.complete(b"\x78\x56\x34\x12")
    assert processor.run() == Halt()
    assert stored(memory) == 0x12345678


def test_interrupt(boot: Boot) -> None:
    """Linux, immediate_exit and a signal: a guest that never leaves by itself is left all the same."""
    LinuxKvm.listen_for_interrupts()
    processor = boot("eb fe")  # jmp $
    timer = threading.Timer(0.2, processor.interrupt)
    timer.start()
    assert processor.run() == Interrupted()
    timer.join()


def test_fetch_from_nowhere(boot: Boot) -> None:
    """Linux, KVM_EXIT_INTERNAL_ERROR: KVM cannot fetch code where no memory is; suberror 1 (emulation)."""
    error = boot("b8 00 00 02 00 ff e0").run()  # mov eax, 0x20000; jmp rax
    assert isinstance(error, ProcessorError)
    assert error.suberror == 1
    assert "KVM_EXIT_INTERNAL_ERROR; RIP 0x20000: no memory there" in error.reason


# memory


def test_planes_differ(boot: Boot, memory: GuestMemory) -> None:
    """AMD 24593: the C-bit chooses the plane; the other plane's bytes at the same GPA stay."""
    memory.make_shared(0xB000)
    memory.shared[0xB010:0xB014] = b"host"
    memory.private[0xB010:0xB014] = b"mine"
    # mov eax, [0x4000B010]; mov edx, eax; mov dword [0x4000B020], 0x74736575; store; hlt
    read, write = "8b 04 25 10 b0 00 40", "c7 04 25 20 b0 00 40 75 65 73 74"
    assert boot(f"{read} 31 d2 {write} {STORE_EDX_EAX} {HLT}").run() == Halt()
    assert stored(memory) == int.from_bytes(b"host", "little")
    assert bytes(memory.shared[0xB020:0xB024]) == b"uest"
    assert bytes(memory.private[0xB020:0xB024]) == bytes(4)


READ = "8b 04 25 {} 31 d2"  # mov eax, [address]; xor edx, edx
WRITE = "c7 04 25 {} 01 02 03 04"  # mov dword [address], 0x04030201


@pytest.mark.parametrize(
    ("access", "address", "wanted"),
    [
        (READ, "08 00 02 00", NestedPageFault(0x20008, private=True, write=False)),
        (WRITE, "08 00 02 00", NestedPageFault(0x20008, private=True, write=True)),
        (READ, "10 b0 00 00", NestedPageFault(0xB010, private=True, write=False)),
        (WRITE, "10 b0 00 00", NestedPageFault(0xB010, private=True, write=True)),
        (READ, "10 c0 00 40", NestedPageFault(0xC010, private=False, write=False)),
        (WRITE, "10 c0 00 40", NestedPageFault(0xC010, private=False, write=True)),
    ],
)
def test_nested_page_faults(
    boot: Boot, memory: GuestMemory, access: str, address: str, wanted: NestedPageFault
) -> None:
    """KVM (SNP): an access without memory, or whose C-bit is not the attribute, leaves the guest."""
    memory.make_shared(0xB000)
    processor = boot(f"{access.format(address)} {HLT}")
    assert processor.run() == wanted
    assert processor.run() == wanted, "not mended"


@pytest.mark.parametrize("access", [READ, WRITE])
def test_mended_fault_completes(boot: Boot, memory: GuestMemory, access: str) -> None:
    """An implicit page state change: when the VMM has converted the page, the same instruction completes."""
    memory.shared[0xC010:0xC014] = bytes.fromhex("aa bb cc dd")
    processor = boot(f"{access.format('10 c0 00 40')} {STORE_EDX_EAX} {HLT}")
    assert processor.run() == NestedPageFault(0xC010, private=False, write=access is WRITE)
    memory.make_shared(0xC000)
    assert processor.run() == Halt()
    if access is READ:
        assert stored(memory) == 0xDDCCBBAA
    else:
        assert bytes(memory.shared[0xC010:0xC014]) == bytes.fromhex("01 02 03 04")


def test_conversion_there_and_back(boot: Boot, memory: GuestMemory) -> None:
    """Page state change: after each conversion the guest reaches the plane of the new attribute."""
    memory.private[0xC010:0xC014], memory.shared[0xC010:0xC014] = b"mine", b"host"
    private, shared = READ.format("10 c0 00 00"), READ.format("10 c0 00 40")
    code = (
        f"{private} {STORE_EDX_EAX} {VMGEXIT} {shared} {STORE_EDX_EAX} {VMGEXIT} {private} {STORE_EDX_EAX} f4"
    )
    processor = boot(code)
    seen = []
    for change in (memory.make_shared, memory.make_private):
        assert processor.run() == Vmgexit()
        seen.append(stored(memory).to_bytes(4, "little"))
        change(0xC000)
    assert processor.run() == Halt()
    assert [*seen, stored(memory).to_bytes(4, "little")] == [b"mine", b"host", b"mine"]


# PVALIDATE and RMPADJUST

# mov eax, ADDRESS; mov ecx, SIZE; mov edx, INPUT; INSTRUCTION; sbb edx, edx; store; hlt
CALL = "b8 {address} b9 {size} ba {input} {instruction} 19 d2 " + STORE_EDX_EAX + " f4"


def word(value: int) -> str:
    return value.to_bytes(4, "little").hex(" ")


@pytest.mark.parametrize(
    ("validate", "before", "carry"), [(1, False, 0), (1, True, 1), (0, True, 0), (0, False, 1)]
)
def test_pvalidate(boot: Boot, memory: GuestMemory, validate: int, before: bool, carry: int) -> None:
    """AMD 24594, PVALIDATE: EAX 0, and the carry flag when the page already had that state."""
    if not before:
        memory.validated.discard(0xC000)
    code = CALL.format(address=word(0xC000), size=word(0), input=word(validate), instruction=PVALIDATE)
    assert boot(code).run() == Halt()
    assert stored(memory) == (0xFFFFFFFF << 32 if carry else 0)
    assert (0xC000 in memory.validated) == bool(validate)


def test_pvalidate_large(boot: Boot, memory: GuestMemory) -> None:
    """AMD 24594, PVALIDATE: 2 MiB on entries of 4 KiB gives 6; Linux then goes page by page."""
    code = CALL.format(address=word(0), size=word(1), input=word(1), instruction=PVALIDATE)
    assert boot(code).run() == Halt()
    assert stored(memory) == 6


def test_pvalidate_shared_page(boot: Boot, memory: GuestMemory) -> None:
    """AMD 24594, PVALIDATE: a page that is not this guest's is a nested page fault; mended, it completes."""
    memory.make_shared(0xC000)
    memory.validated.discard(0xC000)
    code = CALL.format(address=word(0xC000), size=word(0), input=word(1), instruction=PVALIDATE)
    processor = boot(code)
    assert processor.run() == NestedPageFault(0xC000, private=True, write=True)
    memory.make_private(0xC000)
    assert processor.run() == Halt()
    assert stored(memory) == 0
    assert 0xC000 in memory.validated


def test_pvalidate_unmapped(boot: Boot) -> None:
    """A linear address without a translation is reported with the place."""
    code = CALL.format(address=word(0x90000000), size=word(0), input=word(1), instruction=PVALIDATE)
    error = boot(code).run()
    assert isinstance(error, ProcessorError)
    assert "PVALIDATE of 0x90000000: not mapped" in error.reason


@pytest.mark.parametrize(("vmpl", "code"), [(1, 0), (0, 2)])
def test_rmpadjust(boot: Boot, memory: GuestMemory, vmpl: int, code: int) -> None:
    """AMD 24594, RMPADJUST: RDX[7:0] VMPL, [15:8] permissions, [16] VMSA; EAX is the code."""
    text = CALL.format(address=word(0xC000), size=word(0), input=word(0x10F00 | vmpl), instruction=RMPADJUST)
    assert boot(text).run() == Halt()
    assert stored(memory) == code
    assert memory.adjusted == [(0xC000, vmpl, 0x0F, True)]
