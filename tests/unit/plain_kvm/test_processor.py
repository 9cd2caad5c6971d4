"""Why the guest was left, from what the host's KVM reports."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest
from tests.unit.plain_kvm.conftest import ScriptedKvm

from swsnp.abi.kvm import ExitIo, ExitMmio, ExitReason, Ioctl
from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
from swsnp.abi.vmsa_registers import vmsa_of
from swsnp.cpu.plain_kvm.ioctls import (
    SYNC_GENERAL_REGS,
    HostIoctl,
    KvmExitInternalError,
    KvmExitMsr,
    OptionalCapability,
)
from swsnp.cpu.plain_kvm.rewrite import Site
from swsnp.hardware.exits import (
    GuestAccessFault,
    GuestExit,
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
    from collections.abc import Callable

    from tests.unit.plain_kvm.conftest import MakeProcessor, ScriptedMemory

    from swsnp.abi.record import Record
    from swsnp.cpu.plain_kvm import PlainKvmProcessor

    Exit = Callable[[memoryview], None]

PRIVATE = 1 << 47
ALL_FLAGS = 0x8D5


def leave(reason: int, payload: Record | None = None) -> Exit:
    """What KVM writes into kvm_run."""

    def write(run: memoryview) -> None:
        run[8:12] = int(reason).to_bytes(4, "little")
        if payload is not None:
            run[32 : 32 + payload.SIZE] = bytes(payload)

    return write


def out(port: int, *, size: int = 1, direction: int = 1, count: int = 1) -> Exit:
    io = ExitIo(direction=direction, size=size, port=port, count=count, data_offset=4096)
    return leave(ExitReason.IO, io)


def mmio(address: int, size: int, data: bytes | None = None) -> Exit:
    content = (data or b"").ljust(8, b"\0")
    payload = ExitMmio(phys_addr=address, len=size, data=content, is_write=data is not None)
    return leave(ExitReason.MMIO, payload)


def fault(gpa: int, *, private: bool, write: bool) -> GuestAccessFault:
    return GuestAccessFault(NestedPageFault(gpa, private, write))


HLT = leave(ExitReason.HLT)


@pytest.fixture(params=[0, SYNC_GENERAL_REGS], ids=["ioctls", "shared"])
def kvm(request: pytest.FixtureRequest) -> ScriptedKvm:
    """Both ways to the general registers: KVM_GET_REGS and KVM_SET_REGS, or `kvm_run` (KVM_CAP_SYNC_REGS)."""
    kvm = ScriptedKvm()
    kvm.capabilities[OptionalCapability.SYNC_REGS] = request.param
    return kvm


def run(processor: PlainKvmProcessor, kvm: ScriptedKvm, *exits: Exit) -> GuestExit:
    """Run through these exits; the guest's OUT to a port of Site is at a place that was rewritten."""

    def at_a_site(exit_: Exit) -> Exit:
        def write(run: memoryview) -> None:
            exit_(run)
            if (port := ExitIo.parse_at(run, 32).port) in set(Site):
                processor._vm.rewrites.sites[kvm.regs.rip] = Site(port)

        return write

    return run_as_is(processor, kvm, *map(at_a_site, exits))


def run_as_is(processor: PlainKvmProcessor, kvm: ScriptedKvm, *exits: Exit) -> GuestExit:
    kvm.exits.extend(exits)
    result = processor.run()
    assert not kvm.exits, "left before KVM was done"
    return result


@pytest.mark.parametrize(
    ("exit_", "wanted"),
    [
        (out(0xE8), Vmgexit()),
        (HLT, Halt()),
        (leave(ExitReason.SHUTDOWN), Shutdown("triple fault")),
    ],
)
def test_plain_exits(kvm: ScriptedKvm, processor: MakeProcessor, exit_: Exit, wanted: GuestExit) -> None:
    """Each of KVM's exits that is the guest's own is reported by its name in `hardware.exits`."""
    assert run(processor(), kvm, exit_) == wanted


@pytest.mark.parametrize(
    ("exit_", "suberror", "text"),
    [
        (leave(ExitReason.INTERNAL_ERROR, KvmExitInternalError(suberror=1)), 1, "KVM_EXIT_INTERNAL_ERROR"),
        (leave(ExitReason.FAIL_ENTRY), 4, "exit reason 9"),
        (leave(77), 4, "exit reason 77"),
    ],
)
def test_errors_name_place(
    kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory, exit_: Exit, suberror: int, text: str
) -> None:
    """What KVM cannot go on with is reported with RIP and the bytes there, never passed over."""
    one = processor()
    memory.private[0x8004:0x8008] = bytes.fromhex("f3 0f b8 c0")
    kvm.regs = KvmRegs(rip=0x8004)
    error = run(one, kvm, exit_)
    assert isinstance(error, ProcessorError)
    assert error.suberror == suberror
    assert text in error.reason
    assert "RIP 0x8004: f3 0f b8 c0 00" in error.reason


def test_error_shows_original_code(
    kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory
) -> None:
    """The bytes in an error are those of the guest's code, not those that replaced them."""
    memory.private[0x8000:0x8004] = bytes.fromhex("f3 0f 01 d9")
    one = processor(range(0x8000, 0x9000))
    kvm.regs = KvmRegs(rip=0x8000)
    error = run(one, kvm, leave(ExitReason.INTERNAL_ERROR, KvmExitInternalError(suberror=1)))
    assert isinstance(error, ProcessorError)
    assert "RIP 0x8000: f3 0f 01 d9 00" in error.reason


@pytest.mark.parametrize(("rip", "text"), [(0x7000, "not mapped"), (0x40000, "no memory there")])
def test_error_without_code(kvm: ScriptedKvm, processor: MakeProcessor, rip: int, text: str) -> None:
    """An error at an address without code says so."""
    one = processor()
    kvm.regs, kvm.not_mapped = KvmRegs(rip=rip), {0x7000}
    error = run(one, kvm, leave(77))
    assert isinstance(error, ProcessorError)
    assert error.reason.endswith(f"RIP {rip:#x}: {text}")


def test_kvm_run_fails(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """An errno of KVM_RUN is a ProcessorError that names it."""

    def refuse(run: memoryview) -> None:
        raise OSError(errno.EFAULT, "Bad address")

    error = run(processor(), kvm, refuse)
    assert isinstance(error, ProcessorError)
    assert error.reason.startswith("KVM_RUN: Bad address")


@pytest.mark.parametrize(
    ("exit_", "wanted"),
    [
        (out(0x3F8), PortAccess(read=False, size=1, port=0x3F8, data=b"A")),
        (out(0xE8, size=2), PortAccess(read=False, size=2, port=0xE8, data=b"AB")),
        (out(0xE8, direction=0), PortAccess(read=True, size=1, port=0xE8)),
        (out(0x3F8, count=3), PortAccess(read=False, size=1, port=0x3F8, count=3, data=b"ABC")),
        (mmio(0xFEB0_0008, 4, b"\1\2\3\4"), MmioAccess(0xFEB0_0008, 4, b"\1\2\3\4")),
        (mmio(0xFEB0_0008, 2), MmioAccess(0xFEB0_0008, 2)),
    ],
)
def test_device_accesses(kvm: ScriptedKvm, processor: MakeProcessor, exit_: Exit, wanted: GuestExit) -> None:
    """Linux, KVM_EXIT_IO and KVM_EXIT_MMIO: ports, and shared addresses without memory, are devices'."""
    kvm.run_page[4096:4100] = b"ABCD"
    assert run(processor(), kvm, exit_) == wanted


@pytest.mark.parametrize(
    ("exit_", "offset"), [(out(0x3FD, size=2, direction=0), 4096), (mmio(0xFEB0_0000, 2), 40)]
)
def test_device_answers(kvm: ScriptedKvm, processor: MakeProcessor, exit_: Exit, offset: int) -> None:
    """What a device answered lies where KVM looks for it when the guest is entered again, and only once."""
    one = processor()
    run(one, kvm, exit_)
    one.complete(b"xy")
    assert bytes(kvm.run_page[offset : offset + 2]) == b"xy"
    one.complete(b"")
    assert bytes(kvm.run_page[offset : offset + 2]) == b"xy"


def interrupted(run: memoryview) -> None:
    """KVM_RUN ends by a signal, or at once because of immediate_exit."""
    raise InterruptedError(errno.EINTR, "Interrupted system call")


def test_interrupt_before_run(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """Linux, KVM_CAP_IMMEDIATE_EXIT: the next run ends at once, and only that one."""
    one = processor()
    one.interrupt()
    assert kvm.run_page[1] == 1
    assert run(one, kvm, interrupted) == Interrupted()
    assert kvm.run_page[1] == 0
    assert run(one, kvm, interrupted, HLT) == Halt()
    assert kvm.interrupted == []


def test_interrupt_while_running(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """The thread in KVM_RUN gets a signal."""
    one = processor()

    def from_elsewhere(run: memoryview) -> None:
        one.interrupt()
        interrupted(run)

    assert run(one, kvm, from_elsewhere) == Interrupted()
    assert kvm.interrupted == [threading.get_ident()]


def test_load(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """AMD 24593: a guest goes on from its VMSA; EFER.SVME is the VMSA's own, the local APIC KVM's."""
    one = processor()
    state = vmsa_of(KvmRegs(rip=0x1234, rsi=5, rflags=2), KvmSregs(cr0=0x10, efer=0x500), features=1)
    one.load(bytes(state))
    assert (kvm.regs.rip, kvm.regs.rsi) == (0x1234, 5)
    assert (kvm.sregs.cr0, kvm.sregs.efer, kvm.sregs.apic_base) == (0x10, 0x500, 0xFEE00900)


@pytest.mark.parametrize("site", list(Site))
@pytest.mark.parametrize("rewritten", [{}, {0x8010: "other"}, {0x8004: "same"}])
def test_port_of_the_guests_own(
    kvm: ScriptedKvm, processor: MakeProcessor, site: Site, rewritten: dict[int, str]
) -> None:
    """An OUT that nobody put there is the guest's, also where another instruction was rewritten."""
    one = processor()
    other = next(each for each in Site if each is not site)
    one._vm.rewrites.sites.update({at: site if kind == "same" else other for at, kind in rewritten.items()})
    kvm.regs = KvmRegs(rip=0x8010)
    assert run_as_is(one, kvm, out(site)) == PortAccess(read=False, size=1, port=site, data=b"\0")


@pytest.mark.parametrize("rip", [0x8010, 0x8012])
def test_rip_at_a_site(kvm: ScriptedKvm, processor: MakeProcessor, rip: int) -> None:
    """KVM leaves RIP at the OUT, or behind it where the instruction was emulated."""
    one = processor()
    one._vm.rewrites.sites[0x8010] = Site.VMGEXIT
    kvm.regs = KvmRegs(rip=rip)
    assert run_as_is(one, kvm, out(Site.VMGEXIT)) == Vmgexit()


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize(
    ("rip", "rflags", "lookups"),
    [(0xFFFF_FFFF_8100_0010, 0x202, 1), (0x8010, 0x2, 1), (0x8010, 0x202, 3)],
    ids=["kernel's half", "low without interrupts", "low with interrupts"],
)
def test_kernel_address_is_looked_up_once(
    kvm: ScriptedKvm, processor: MakeProcessor, *, shares: bool, rip: int, rflags: int, lookups: int
) -> None:
    """It means the same in every address space; a program's may not, which runs with interrupts on."""
    kvm.capabilities[OptionalCapability.SYNC_REGS] = int(shares)
    one = processor()
    kvm.asked.clear()
    one._vm.rewrites.sites[rip & ~PRIVATE] = Site.VMGEXIT  # as the scripted KVM translates
    kvm.regs = KvmRegs(rip=rip, rflags=rflags)
    for _ in range(3):
        assert run_as_is(one, kvm, out(Site.VMGEXIT)) == Vmgexit()
    assert len(kvm.arguments(HostIoctl.KVM_TRANSLATE)) == lookups


def test_what_a_kernel_found_is_not_a_programs(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """The same low address with interrupts on: looked up again, and another page lies there."""
    one = processor()
    one._vm.rewrites.sites[0x8010] = Site.VMGEXIT
    kvm.regs = KvmRegs(rip=0x8010, rflags=0x2)
    assert run_as_is(one, kvm, out(Site.VMGEXIT)) == Vmgexit()
    kvm.regs, kvm.not_mapped = KvmRegs(rip=0x8010, rflags=0x202), {0x8000}
    assert run_as_is(one, kvm, out(Site.VMGEXIT)) == PortAccess(
        read=False, size=1, port=Site.VMGEXIT, data=b"\0"
    )


def test_signal(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """Linux, KVM_RUN: -EINTR leaves exit_reason stale; the guest is entered again."""
    assert run(processor(), kvm, interrupted, interrupted, out(0xE8)) == Vmgexit()


# MSRs


@pytest.mark.parametrize(
    ("index", "value"),
    [(0xC0010130, 0x2_0001_2F00_0001), (0xC0010131, 7), (0xC0010010, 1 << 23)],
)
def test_rdmsr(kvm: ScriptedKvm, processor: MakeProcessor, index: int, value: int) -> None:
    """GHCB MSR as the hypervisor left it; SEV_STATUS 7 (SEV, SEV-ES, SNP); SYSCFG bit 23."""
    one = processor()
    one.ghcb_msr = 0x2_0001_2F00_0001
    msr = KvmExitMsr(index=index, reason=4, error=1, data=0x55)
    assert run(one, kvm, leave(ExitReason.X86_RDMSR, msr), HLT) == Halt()
    answer = KvmExitMsr.parse_at(kvm.run_page, 32)
    assert (answer.error, answer.data) == (0, value)


def test_wrmsr(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """A write to MSR 0xC0010130 is what the hypervisor finds in `ghcb_msr`."""
    one = processor()
    msr = KvmExitMsr(index=0xC0010130, reason=4, error=1, data=0x20_0000_B014)
    assert run(one, kvm, leave(ExitReason.X86_WRMSR, msr), HLT) == Halt()
    assert one.ghcb_msr == 0x20_0000_B014
    assert KvmExitMsr.parse_at(kvm.run_page, 32).error == 0


@pytest.mark.parametrize(
    ("reason", "index"),
    [
        (ExitReason.X86_WRMSR, 0xC0010131),
        (ExitReason.X86_WRMSR, 0xC0010010),
        (ExitReason.X86_RDMSR, 0xC0010132),
    ],
)
def test_msr_refused(kvm: ScriptedKvm, processor: MakeProcessor, reason: int, index: int) -> None:
    """AMD 24593: SEV_STATUS is read-only; any other access that leaves is answered with #GP (error 1)."""
    one = processor()
    assert run(one, kvm, leave(reason, KvmExitMsr(index=index, reason=4, data=9)), HLT) == Halt()
    assert KvmExitMsr.parse_at(kvm.run_page, 32).error == 1
    assert one.ghcb_msr == 0


# accesses without a slot


@pytest.mark.parametrize(("gpa", "private"), [(0x20008, True), (0x9008, True), (0x9008, False)])
def test_read_fault(
    kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory, gpa: int, *, private: bool
) -> None:
    """A private access without memory, or one with the wrong C-bit, is the fault that the check says."""
    one = processor()
    memory.answers.append(fault(gpa, private=private, write=False))
    exit_ = mmio(gpa | (PRIVATE if private else 0), 4)
    assert run(one, kvm, exit_) == NestedPageFault(gpa, private, write=False)
    assert memory.asked == [("read", gpa, 4, private)]


def test_write_fault(kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory) -> None:
    """A write carries its bytes to the check, and no more than the access had."""
    one = processor()
    memory.answers.append(fault(0x9008, private=False, write=True))
    assert run(one, kvm, mmio(0x9008, 2, b"\x11\x22")) == NestedPageFault(0x9008, private=False, write=True)
    assert memory.asked == [("write", 0x9008, b"\x11\x22", False)]


def test_faulting_access_is_tried_again(
    kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory
) -> None:
    """AMD 24593: a nested page fault is a fault: the access happens once its cause is mended."""
    one = processor()
    wanted = fault(0x20008, private=True, write=False)
    memory.answers.extend([wanted, wanted, b"\x01\x02\x03\x04"])
    assert run(one, kvm, mmio(0x20008 | PRIVATE, 4)) == wanted.reason
    assert run(one, kvm) == wanted.reason, "not mended: KVM is not entered"
    assert run(one, kvm, HLT) == Halt()
    assert ExitMmio.parse_at(kvm.run_page, 32).data == b"\x01\x02\x03\x04\0\0\0\0"


# the instructions of SNP


@pytest.mark.parametrize(
    ("answer", "flags"),
    [
        ((0, False), 0x44),
        ((0, True), 0x45),
        ((1, False), 0x00),
        ((2, False), 0x00),
        ((6, False), 0x04),
    ],
)
@pytest.mark.parametrize("validate", [True, False])
def test_pvalidate(
    kvm: ScriptedKvm,
    processor: MakeProcessor,
    memory: ScriptedMemory,
    answer: tuple[int, bool],
    flags: int,
    *,
    validate: bool,
) -> None:
    """AMD 24594, PVALIDATE: EAX is the code, ZF PF SF AF OF follow from it, CF: already in that state."""
    one = processor()
    memory.answers.append(answer)
    kvm.regs = KvmRegs(rax=0xB123, rcx=0, rdx=int(validate), rbx=5, rip=0x8077, rflags=0x202 | ALL_FLAGS)
    assert run(one, kvm, out(0xE9), HLT) == Halt()
    assert memory.asked == [("pvalidate", 0xB000, validate)]
    assert kvm.regs == KvmRegs(
        rax=answer[0], rcx=0, rdx=int(validate), rbx=5, rip=0x8077, rflags=0x202 | flags
    )


def test_shared_registers_cost_no_ioctl(
    kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory
) -> None:
    """KVM_CAP_SYNC_REGS: what lies in `kvm_run` is neither asked for nor set by requests of their own."""
    one = processor()
    set_up = len(kvm.asked)
    memory.answers.append((0, False))
    assert run(one, kvm, out(0xE9), HLT) == Halt()
    asked = {request for request, _ in kvm.asked[set_up:]} & {Ioctl.KVM_GET_REGS, Ioctl.KVM_SET_REGS}
    assert bool(asked) == (not kvm.capabilities[OptionalCapability.SYNC_REGS])


@pytest.mark.parametrize("port", [0xE9, 0xEA])
@pytest.mark.parametrize("size", [2, 0xFFFFFFFF])
def test_unknown_page_size(
    kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory, port: int, size: int
) -> None:
    """AMD 24594: a size other than 4 KiB and 2 MiB is FAIL_INPUT."""
    one = processor()
    kvm.regs = KvmRegs(rax=0x200000, rcx=size | 5 << 32, rdx=1)
    assert run(one, kvm, out(port), HLT) == Halt()
    assert kvm.regs.rax == 1
    assert not memory.asked


def test_large_page(kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory) -> None:
    """AMD 24594: ECX 1 is 2 MiB; FAIL_SIZEMISMATCH (6) is the RMP's to say."""
    one = processor()
    memory.answers.extend([(6, False), (0, False)])
    kvm.regs = KvmRegs(rax=0x200000, rcx=1 | 5 << 32, rdx=1)
    assert run(one, kvm, out(0xE9), HLT) == Halt()
    assert kvm.regs.rax == 6
    assert memory.asked == [("pvalidate", 0x200000, True, 1)]


def test_rmpadjust(kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory) -> None:
    """AMD 24594, RMPADJUST: RDX[7:0] VMPL, RDX[15:8] permissions, RDX[16] VMSA; EAX is the code."""
    one = processor()
    memory.answers.append(2)
    kvm.regs = KvmRegs(rax=0xC000, rdx=0x1_0F02, rflags=3)
    assert run(one, kvm, out(0xEA), HLT) == Halt()
    assert memory.asked == [("rmpadjust", 0xC000, 2, 0x0F, True)]
    assert (kvm.regs.rax, kvm.regs.rflags) == (2, 2)
    memory.answers.append(6)
    kvm.regs = KvmRegs(rax=0xC000, rcx=1, rdx=1)
    assert run(one, kvm, out(0xEA), HLT) == Halt()
    assert kvm.regs.rax == 6


@pytest.mark.parametrize("port", [0xE9, 0xEA])
def test_instruction_faults_and_is_tried_again(
    kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory, port: int
) -> None:
    """AMD 24594: a page that is not this guest's is a nested page fault; registers stay till then."""
    one = processor()
    wanted = fault(0xC000, private=True, write=True)
    memory.answers.extend([wanted, (0, False) if port == 0xE9 else 0])
    before = kvm.regs = KvmRegs(rax=0xC000, rdx=1)
    assert run(one, kvm, out(port)) == wanted.reason
    assert kvm.regs == before
    assert run(one, kvm, HLT) == Halt()
    assert kvm.regs.rax == 0
    assert len(memory.asked) == 2


def test_instruction_on_unmapped_address(
    kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory
) -> None:
    """Hardware raises #PF there; this processor cannot inject it yet, and says so rather than go on."""
    one = processor()
    kvm.regs, kvm.not_mapped = KvmRegs(rax=0x7000_0000, rip=0x8000), {0x7000_0000}
    error = run(one, kvm, out(0xE9))
    assert isinstance(error, ProcessorError)
    assert "PVALIDATE of 0x70000000: not mapped" in error.reason
    assert not memory.asked


def test_code_that_appears_later(kvm: ScriptedKvm, processor: MakeProcessor, memory: ScriptedMemory) -> None:
    """Code that is loaded after the first run is rewritten when it is named."""
    one = processor()
    assert run(one, kvm, HLT) == Halt()
    memory.private[0xC000:0xC004] = bytes.fromhex("f3 0f 01 d9")
    assert one.rewrite(range(0xC000, 0xD000)) == 1
    assert {gpa: site.name for gpa, site in one.sites.items()} == {0xC000: "VMGEXIT"}


def test_start(kvm: ScriptedKvm, processor: MakeProcessor) -> None:
    """A new processor has the start's registers, an empty GHCB MSR, and no code rewritten."""
    one = processor()
    assert (kvm.regs.rip, kvm.regs.rsp, kvm.sregs.cr3) == (0x8000, 0xA000, 0x1000 | PRIVATE)
    assert (one.ghcb_msr, one.sites) == (0, {})
    one.close()
    assert not kvm.open_fds
