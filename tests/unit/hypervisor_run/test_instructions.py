"""Instructions that the guest relays. Source: GHCB 2.0; Linux, arch/x86/kvm/svm/svm.c and x86.c."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode, GhcbField
from swsnp.abi.kvm import ExitReason
from swsnp.hypervisor.instructions import PMU_COUNTERS

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

ALL = ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]
GP = (1, 0x8000030D)
X2APIC = {1: (0x11, 0x12, 1 << 21, 0x14)}
APIC_BASE, ICR = 0x1B, 0x830
ENOSYS, EPERM, EINVAL = ((1 << 64) - 1000, (1 << 64) - errno.EPERM, (1 << 64) - errno.EINVAL)
MAP_GPA_RANGE = 12


def registers(vm: World) -> tuple[int, int, int, int]:
    """RAX, RBX, RCX, RDX as the guest finds them."""
    fields = (GhcbField.RAX, GhcbField.RBX, GhcbField.RCX, GhcbField.RDX)
    rax, rbx, rcx, rdx = (vm.get(each) for each in fields)
    return rax, rbx, rcx, rdx


# Refused as KVM refuses them


@pytest.mark.parametrize("profile", ALL)
def test_rdtsc(world: MakeWorld, profile: str) -> None:
    """RDTSC: KVM never intercepts it and has no handler: INTERNAL_ERROR 4 with the exit code and the CPU."""
    vm = world(profile)
    vm.area[32:72] = b"\x5a" * 40
    assert vm.ask_run(ExitCode.RDTSC) == 0
    assert vm.exit_reason == ExitReason.INTERNAL_ERROR
    assert (vm.u32(32), vm.u32(36), vm.u64(40), vm.u64(48)) == (4, 2, 0x6E, 0)
    assert vm.area[56:72] == b"\x5a" * 16
    assert vm.resumed(vm.run()), "nothing is pending"


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    ("code", "rcx"), [(ExitCode.RDTSCP, 0), (ExitCode.RDPMC, PMU_COUNTERS), (ExitCode.RDPMC, 0x40000000)]
)
def test_injected_exceptions(world: MakeWorld, profile: str, code: int, rcx: int) -> None:
    """RDTSCP is #UD, a counter that is not there #GP: injected, not replied; no processor here takes one."""
    vm = world(profile)
    assert vm.ask_run(code, rcx=rcx) == 0
    assert vm.exit_reason == ExitReason.SHUTDOWN
    assert vm.reply == (0, 0)
    assert vm.processor.entries == 1


# Nothing to do


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    "code",
    [
        ExitCode.READ_DR7,
        ExitCode.WRITE_DR7,
        ExitCode.INVD,
        ExitCode.WBINVD,
        ExitCode.MONITOR,
        ExitCode.MWAIT,
    ],
)
def test_no_operation(world: MakeWorld, profile: str, code: int) -> None:
    """DR7 accesses, INVD, WBINVD, MONITOR, MWAIT: resumed with 0 and 0, registers as sent."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(code, 7, 8, rax=1, rbx=2, rcx=3, rdx=4))
    assert vm.reply == (0, 0)
    assert registers(vm) == (1, 2, 3, 4)
    assert vm.processor.entries == 2


# CPUID


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    ("rax", "rcx", "wanted"),
    [
        (0x8000001F, 0, (1, 2, 3, 4)),
        (0xFFFFFFFF_8000001F, 0xFFFFFFFF_00000000, (1, 2, 3, 4)),
        (0x8000001F, 99, (1, 2, 3, 4)),  # without sub-leaves ECX does not matter
        (0xB, 0, (5, 6, 7, 8)),
        (0xB, 1, (0, 0, 0, 0)),
        (0x12345678, 0, (0, 0, 0, 0)),
        (0xD, 0, (9, 10, 11, 12)),
    ],
)
def test_cpuid(world: MakeWorld, profile: str, rax: int, rcx: int, wanted: tuple[int, int, int, int]) -> None:
    """CPUID: EAX and ECX choose, four registers answer; an entry that is not there is zeros."""
    vm = world(profile)
    vm.cpuid = {0x8000001F: (1, 2, 3, 4), 0xB: (5, 6, 7, 8), 0xD: (9, 10, 11, 12)}
    assert vm.resumed(vm.ask_run(ExitCode.CPUID, rax=rax, rcx=rcx, rdx=77, xcr0=7))
    assert vm.reply == (0, 0)
    assert registers(vm) == wanted


@pytest.mark.parametrize("counter", range(PMU_COUNTERS))
def test_rdpmc(world: MakeWorld, counter: int) -> None:
    """RDPMC: a counter that exists stands at 0."""
    vm = world()
    assert vm.resumed(vm.ask_run(ExitCode.RDPMC, rax=5, rcx=0xFFFFFFFF_00000000 | counter, rdx=6))
    assert registers(vm)[0] == registers(vm)[3] == 0


# MSR


def rdmsr(vm: World, index: int) -> int | None:
    """The value that RDMSR gives; None after #GP."""
    assert vm.resumed(vm.ask_run(ExitCode.MSR, 0, rax=0xAAAA, rcx=0xFFFFFFFF_00000000 | index, rdx=0xDDDD))
    rax, _, _, rdx = registers(vm)
    if vm.reply == GP:
        assert (rax, rdx) == (0xAAAA, 0xDDDD)
        return None
    assert vm.reply == (0, 0)
    return rdx << 32 | rax


def wrmsr(vm: World, index: int, value: int) -> bool:
    """Whether WRMSR is accepted; #GP otherwise. High halves of the registers do not count."""
    high = 0x5A5A5A5A << 32
    vm.ask_run(ExitCode.MSR, 1, rax=high | value & 0xFFFFFFFF, rcx=index, rdx=high | value >> 32)
    assert vm.reply in {(0, 0), GP}
    return vm.reply == (0, 0)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("index", [0, 0x10, 0x277, 0xC0010130, 0xC0010131, 0x802, ICR, 0xFFFFFFFF])
def test_unknown_msr(world: MakeWorld, profile: str, index: int) -> None:
    """An MSR that KVM does not have: info1=1, info2=8000030Dh, registers as sent; no exit to userspace."""
    vm = world(profile)
    assert rdmsr(vm, index) is None
    assert not wrmsr(vm, index, 0)


@pytest.mark.parametrize(
    ("index", "value"),
    [(APIC_BASE, 0xFEE00900), (0x8B, 0x01000065), (0xFE, 0x508), (0xC0010010, 0), (0x2FF, 0), (0x20F, 0)],
)
def test_msr_at_reset(world: MakeWorld, index: int, value: int) -> None:
    """APIC_BASE (boot processor), patch level, MTRRcap, SYSCFG and MTRRs as KVM has them."""
    assert rdmsr(world(), index) == value


def test_msr_writes(world: MakeWorld) -> None:
    """MTRRs keep 64 bits; patch level and SYSCFG ignore writes; MTRRcap cannot be written."""
    vm = world()
    for index in (0x200, 0x20F, 0x2FF):
        assert wrmsr(vm, index, 0x000F_0000_0000_0C06)
        assert rdmsr(vm, index) == 0x000F_0000_0000_0C06
    for index, value in ((0x8B, 0x01000065), (0xC0010010, 0)):
        assert wrmsr(vm, index, 99)
        assert rdmsr(vm, index) == value
    assert not wrmsr(vm, 0xFE, 0x508)
    assert not wrmsr(vm, 0x210, 0)


APIC_MODES = [
    # has x2APIC, values in turn, the last one accepted
    (True, [0xFEE00D00], True),
    (False, [0xFEE00D00], False),
    (True, [0xFEE00500], False),  # x2APIC without enable
    (True, [0xFEE00901], False),  # reserved bit
    (True, [0xFEE00B00], False),
    (True, [1 << 48 | 0xFEE00900], False),  # beyond the address width
    (True, [0xFEE00D00, 0xFEE00900], False),  # x2APIC back to xAPIC
    (True, [0xFEE00100, 0xFEE00D00], False),  # disabled to x2APIC
    (True, [0xFEE00D00, 0xFEE00100, 0xFEE00900, 0xFEE00D00], True),
]


@pytest.mark.parametrize(("x2apic", "values", "accepted"), APIC_MODES)
def test_apic_base(world: MakeWorld, x2apic: bool, values: list[int], accepted: bool) -> None:
    """APIC_BASE: mode changes that KVM refuses are #GP and change nothing."""
    vm = world()
    if x2apic:
        vm.cpuid = X2APIC
    *before, last = values
    for value in before:
        assert wrmsr(vm, APIC_BASE, value)
    old = rdmsr(vm, APIC_BASE)
    assert wrmsr(vm, APIC_BASE, last) is accepted
    assert rdmsr(vm, APIC_BASE) == (last if accepted else old)


def test_x2apic_registers(world: MakeWorld) -> None:
    """In x2APIC mode the id is the vCPU's, not writable, and the command register holds what was written."""
    vm = world()
    vm.cpuid = X2APIC
    wrmsr(vm, APIC_BASE, 0xFEE00D00)
    assert rdmsr(vm, 0x802) == 0
    assert not wrmsr(vm, 0x802, 1)
    assert rdmsr(vm, ICR) == 0
    assert wrmsr(vm, ICR, 5 << 32 | 0x4031)  # a fixed interrupt: goes nowhere
    assert rdmsr(vm, ICR) == 5 << 32 | 0x4031


# VMMCALL


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    ("nr", "cpl", "result"),
    [
        (1, 0, 0),  # KVM_HC_VAPIC_POLL_IRQ
        (1, 3, EPERM),
        (MAP_GPA_RANGE, 3, EPERM),
        (0, 0, ENOSYS),
        (5, 0, ENOSYS),
        (9, 0, ENOSYS),
        (11, 0, ENOSYS),
        (1 << 32 | 1, 0, ENOSYS),
    ],
)
def test_vmmcall(world: MakeWorld, profile: str, nr: int, cpl: int, result: int) -> None:
    """VMMCALL: result in RAX: -EPERM beyond ring 0, 0 for the poll, -KVM_ENOSYS for calls not offered."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(ExitCode.VMMCALL, rax=nr, rbx=0x1000, rcx=1, rdx=0, cpl=cpl))
    assert vm.reply == (0, 0)
    assert registers(vm)[0] == result


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    ("gpa", "npages"),
    [(1, 1), (0x1800, 1), (0x1000, 0), (0x1000, (1 << 64) - 1), ((1 << 64) - 4096, (1 << 64) - 1)],
)
def test_map_gpa_range_refused(world: MakeWorld, profile: str, gpa: int, npages: int) -> None:
    """KVM_HC_MAP_GPA_RANGE: misaligned, empty or wrapping ranges are -KVM_EINVAL."""
    vm = world(profile)
    vm.ask_run(ExitCode.VMMCALL, rax=MAP_GPA_RANGE, rbx=gpa, rcx=npages, rdx=0, cpl=0)
    assert registers(vm)[0] == EINVAL


def test_map_gpa_range_up_to_the_last_page_number(world: MakeWorld) -> None:
    """KVM_HC_MAP_GPA_RANGE: page number and count may add up to the largest number there is."""
    gpa = (1 << 64) - 4096
    npages = (1 << 64) - 1 - gpa // 4096
    vm = world()
    assert vm.ask_run(ExitCode.VMMCALL, rax=MAP_GPA_RANGE, rbx=gpa, rcx=npages, rdx=0, cpl=0) == 0
    assert vm.exit_reason == ExitReason.HYPERCALL
    assert (vm.u64(40), vm.u64(48)) == (gpa, npages)


def test_map_gpa_range_not_enabled(world: MakeWorld) -> None:
    """KVM_HC_MAP_GPA_RANGE without KVM_CAP_EXIT_HYPERCALL: -KVM_ENOSYS, before the range is looked at."""
    vm = world()
    vm.vm.exit_hypercall_mask = 0
    vm.ask_run(ExitCode.VMMCALL, rax=MAP_GPA_RANGE, rbx=1, rcx=0, rdx=0, cpl=0)
    assert registers(vm)[0] == ENOSYS


@pytest.mark.parametrize(
    ("profile", "preset"), [(each, 0x5A5A5A5A5A5A5A5A) for each in ALL[:3]] + [("linux-7.2", 0)]
)
def test_map_gpa_range_exit(world: MakeWorld, profile: str, preset: int) -> None:
    """KVM_HC_MAP_GPA_RANGE leaves with the guest's own arguments and flags 1 (long mode)."""
    vm = world(profile)
    vm.area[32:288] = b"\x5a" * 256
    vm.ask(ExitCode.VMMCALL, rax=MAP_GPA_RANGE, rbx=0x7000, rcx=3, rdx=0xFEDC, cpl=0)
    assert vm.run() == 0
    assert vm.exit_reason == ExitReason.HYPERCALL
    assert [vm.u64(offset) for offset in (32, 40, 48, 56)] == [12, 0x7000, 3, 0xFEDC]
    assert vm.area[64:88] == b"\x5a" * 24
    assert (vm.u64(88), vm.u64(96)) == (preset, 1)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("ret", [0, errno.EINVAL, 1234, EINVAL])
def test_map_gpa_range_completion(world: MakeWorld, profile: str, ret: int) -> None:
    """Whatever userspace answers goes to RAX: a guest's own hypercall has no list of allowed results."""
    vm = world(profile)
    vm.ask(ExitCode.VMMCALL, rax=MAP_GPA_RANGE, rbx=0x7000, rcx=3, rdx=0, cpl=0)
    vm.run()
    vm.poke(88, ret, 64)
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)
    assert registers(vm)[0] == ret
