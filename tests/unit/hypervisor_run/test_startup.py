"""INIT, SIPI, AP reset hold, KVM_SET_MP_STATE. Source: GHCB 2.0; Linux, sev.c, lapic.c and x86.c."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode
from swsnp.abi.kvm import ExitReason, Ioctl, MpState
from swsnp.hypervisor.ap_creation import NewVmsa

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, ScriptedProcessor, World

    from swsnp.hypervisor.vcpu import Vcpu

VMSA = 0x6000
X2APIC = {1: (0, 0, 1 << 21, 0)}
INIT, SIPI = 0x4500, 0x4600


def run(vcpu: Vcpu) -> int:
    return vcpu.ioctl(Ioctl.KVM_RUN, 0)


def held(world: MakeWorld, *, by_msr: bool) -> World:
    """The boot processor after its first SIPI, held by the page or by the MSR."""
    vm = world()
    vm.vcpu.startup.signal_init()
    vm.vcpu.startup.signal_sipi()
    assert vm.run() == -errno.EINTR
    vm.vcpu.mp_state = MpState.RUNNABLE
    wait = vm.ask_msr(0x006) if by_msr else vm.ask_run(ExitCode.AP_HLT_LOOP)
    assert wait == -errno.EINTR
    assert vm.mp_state == MpState.AP_RESET_HOLD
    return vm


def start(vm: World) -> World:
    """As the local APIC does: INIT, then SIPI, to a vCPU that is no boot processor."""
    ap = vm.add_vcpu(5)
    ap.processor.ghcb_msr = vm.GHCB
    ap.registered_ghcb = vm.GHCB
    ap.startup.signal_init()
    assert run(ap) == -errno.EAGAIN
    assert ap.mp_state == MpState.INIT_RECEIVED
    ap.startup.signal_sipi()
    vm.vcpu = ap
    return vm


def test_init_and_sipi(world: MakeWorld) -> None:
    """An AP waits for INIT, then for SIPI; KVM_RUN ends with -EAGAIN, -EINTR, and then enters the guest."""
    vm = world()
    ap = vm.add_vcpu(5)
    assert run(ap) == -errno.EINTR
    ap.startup.signal_init()
    assert run(ap) == -errno.EAGAIN
    assert ap.mp_state == MpState.INIT_RECEIVED
    assert run(ap) == -errno.EINTR
    assert ap.mp_state == MpState.INIT_RECEIVED, "no SIPI yet"
    vm.vcpu = ap
    assert vm.exit_reason == ExitReason.INTR
    assert vm.processor.entries == 0
    ap.startup.signal_sipi()
    assert vm.resumed(vm.run())
    assert vm.processor.entries == 1


def test_sipi_alone(world: MakeWorld) -> None:
    """A SIPI without INIT is dropped."""
    vm = world()
    ap = vm.add_vcpu(5)
    ap.startup.signal_sipi()
    assert run(ap) == -errno.EINTR
    assert ap.mp_state == MpState.UNINITIALIZED


def test_init_and_sipi_at_once(world: MakeWorld) -> None:
    """Both pending: both are taken."""
    ap = world().add_vcpu(5)
    ap.startup.signal_init()
    ap.startup.signal_sipi()
    assert run(ap) == -errno.EAGAIN
    assert ap.mp_state == MpState.RUNNABLE


@pytest.mark.parametrize("by_msr", [False, True])
def test_hold_ends_by_sipi(world: MakeWorld, by_msr: bool) -> None:
    """A held AP that gets INIT and a second SIPI finds 1: in info 2, or in [63:12] of the MSR."""
    vm = start(world())
    vm.vcpu.mp_state = MpState.INIT_RECEIVED
    assert vm.resumed(vm.run()), "the first SIPI starts it as the VMM set it up"
    assert (vm.ask_msr(0x006) if by_msr else vm.ask_run(ExitCode.AP_HLT_LOOP)) == -errno.EINTR
    vm.vcpu.startup.signal_init()
    assert vm.run() == -errno.EINTR
    assert vm.mp_state == MpState.INIT_RECEIVED
    vm.vcpu.startup.signal_sipi()
    assert vm.resumed(vm.run())
    if by_msr:
        assert vm.processor.ghcb_msr == 1 << 12 | 0x007
    else:
        assert vm.reply == (0, 1)


@pytest.mark.parametrize("by_msr", [False, True])
def test_hold_ends_otherwise(world: MakeWorld, by_msr: bool) -> None:
    """Entered without a SIPI (another event, or userspace tries again): 0."""
    vm = held(world, by_msr=by_msr)
    assert vm.resumed(vm.run())
    if by_msr:
        assert vm.processor.ghcb_msr == 0x007
    else:
        assert vm.reply == (0, 0)


def test_sipi_after_the_hold_is_over(world: MakeWorld) -> None:
    """Entering the guest ends the hold: a later SIPI changes no reply."""
    vm = start(world())
    assert vm.resumed(vm.run())
    vm.ask_run(ExitCode.AP_HLT_LOOP)
    assert vm.resumed(vm.run())
    vm.vcpu.startup.signal_init()
    vm.vcpu.startup.signal_sipi()
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)


def test_created_on_init(world: MakeWorld) -> None:
    """Create-on-INIT: the VMSA is taken at INIT, and runs after SIPI."""
    vm = world()
    ap = vm.add_vcpu(5)
    assert vm.resumed(vm.ask_run(ExitCode.AP_CREATION, 5 << 32, VMSA, rax=1))
    assert run(ap) == -errno.EINTR
    assert ap.vmsa_page is None
    ap.startup.signal_init()
    assert run(ap) == -errno.EAGAIN
    assert ap.vmsa_page == vm.memory.private + VMSA
    ap.startup.signal_sipi()
    vm.vcpu = ap
    assert vm.resumed(vm.run())


# Interrupt commands of the guest


def send(vm: World, value: int) -> None:
    assert vm.resumed(
        vm.ask_run(ExitCode.MSR, 1, rcx=0x830, rax=value & 0xFFFFFFFF, rdx=value >> 32),
    )
    assert vm.reply == (0, 0)


@pytest.mark.parametrize(
    ("command", "who"),
    [
        (5 << 32 | INIT, {5}),
        (7 << 32 | INIT, {7}),
        (9 << 32 | INIT, set()),
        (0xFFFFFFFF << 32 | INIT, set()),
        (1 << 18 | INIT, {0}),
        (2 << 18 | INIT, {0, 5, 7}),
        (3 << 18 | INIT, {5, 7}),
        (5 << 32 | 1 << 11 | INIT, set()),  # logical destinations
        (5 << 32 | 0x8500, set()),  # the level de-asserted
        (5 << 32 | 0xC500, {5}),
        (5 << 32 | 0x4400, set()),  # NMI
    ],
)
def test_init_by_command(world: MakeWorld, command: int, who: set[int]) -> None:
    """INIT through the x2APIC command register reaches destination or shorthand."""
    vm = world()
    vm.cpuid = X2APIC
    vcpus = {0: vm.vcpu, 5: vm.add_vcpu(5), 7: vm.add_vcpu(7)}
    vm.ask_run(ExitCode.MSR, 1, rcx=0x1B, rax=0xFEE00D00, rdx=0)
    for vcpu in vcpus.values():
        vcpu.startup.ask_new_vmsa(NewVmsa(VMSA, on_init=True))
    send(vm, command)
    for vcpu in vcpus.values():
        vcpu.startup.wake()
    assert {number for number, vcpu in vcpus.items() if vcpu.vmsa_page is not None} == who


def test_ap_started_by_commands(world: MakeWorld) -> None:
    """A guest starts an AP as on real hardware: INIT, SIPI."""
    vm = world()
    vm.cpuid = X2APIC
    ap = vm.add_vcpu(5)
    vm.ask_run(ExitCode.MSR, 1, rcx=0x1B, rax=0xFEE00D00, rdx=0)
    send(vm, 5 << 32 | INIT)
    send(vm, 5 << 32 | SIPI | 0x9A)
    assert run(ap) == -errno.EAGAIN
    assert ap.mp_state == MpState.RUNNABLE
    vm.vcpu = ap
    assert vm.resumed(vm.run())
    processor: ScriptedProcessor = vm.processor
    assert processor.entries == 1


def test_only_a_sipi_starts_an_ap(world: MakeWorld) -> None:
    """An NMI or a fixed interrupt sent to a vCPU that waits for its SIPI leaves it waiting."""
    vm = world()
    vm.cpuid = X2APIC
    ap = vm.add_vcpu(5)
    vm.ask_run(ExitCode.MSR, 1, rcx=0x1B, rax=0xFEE00D00, rdx=0)
    send(vm, 5 << 32 | INIT)
    assert run(ap) == -errno.EAGAIN
    for other in (0x4400, 0x4031):
        send(vm, 5 << 32 | other)
        assert run(ap) == -errno.EINTR
        assert ap.mp_state == MpState.INIT_RECEIVED


# KVM_SET_MP_STATE


@pytest.mark.parametrize("state", [5, 6, 7, 8, 10, 99, 0xFFFFFFFF])
def test_unknown_mp_state(world: MakeWorld, state: int) -> None:
    """KVM_SET_MP_STATE: a state of other architectures or of none is -EINVAL."""
    vm = world()
    assert vm.set_mp_state(state) == -errno.EINVAL
    assert vm.mp_state == MpState.RUNNABLE


@pytest.mark.parametrize("arg", [0, 4096, bytearray(3), bytearray(5)])
def test_mp_state_unreadable(world: MakeWorld, arg: int | bytearray) -> None:
    """KVM_SET_MP_STATE from memory that is not the structure: -EFAULT."""
    assert world().vcpu.ioctl(Ioctl.KVM_SET_MP_STATE, arg) == -errno.EFAULT


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (MpState.RUNNABLE, MpState.RUNNABLE),
        (MpState.UNINITIALIZED, MpState.UNINITIALIZED),
        (MpState.INIT_RECEIVED, MpState.INIT_RECEIVED),
        (MpState.HALTED, MpState.HALTED),
        (MpState.SIPI_RECEIVED, MpState.INIT_RECEIVED),
        (MpState.AP_RESET_HOLD, MpState.AP_RESET_HOLD),
    ],
)
def test_set_mp_state(world: MakeWorld, state: int, shown: int) -> None:
    """KVM_SET_MP_STATE: SIPI_RECEIVED is INIT_RECEIVED with a SIPI pending; the others are kept."""
    vm = world()
    assert vm.set_mp_state(state) == 0
    assert vm.mp_state == shown
    result = vm.run()
    waits = state in (MpState.UNINITIALIZED, MpState.INIT_RECEIVED)
    assert vm.resumed(result) is not waits
    assert vm.processor.entries == (not waits)


@pytest.mark.parametrize(("profile", "reason"), [("linux-6.12", 0xFFFFFFFF), ("linux-7.2", (1 << 64) - 1)])
def test_destroyed_and_forced(world: MakeWorld, profile: str, reason: int) -> None:
    """A destroyed vCPU that userspace makes RUNNABLE: FAIL_ENTRY, result 0; halted, it is not entered."""
    vm = world(profile)
    vm.vcpu = vm.add_vcpu(5)
    ap = vm.vcpu
    vm.vcpu = vm.vm.vcpus[0]
    vm.ask_run(ExitCode.AP_CREATION, 5 << 32 | 2, 0)
    vm.vcpu = ap
    assert vm.run() == -errno.EAGAIN
    assert vm.set_mp_state(MpState.RUNNABLE) == 0
    for _ in range(2):
        assert vm.run() == 0
        assert vm.exit_reason == ExitReason.FAIL_ENTRY
        assert vm.u64(32) == reason
    assert vm.set_mp_state(MpState.HALTED) == 0
    assert vm.run() == -errno.EINTR
    assert vm.processor.entries == 0
