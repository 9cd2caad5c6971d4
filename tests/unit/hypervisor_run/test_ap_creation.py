"""SNP AP creation. Source: GHCB 2.0; Linux, sev_snp_ap_creation and sev_snp_init_protected_guest_state."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode
from swsnp.abi.kvm import ExitReason, Ioctl, MpState
from swsnp.hardware import Vmgexit

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

    from swsnp.hypervisor.vcpu import Vcpu

ALL = ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]
SERIES = ALL[:2]
ON_INIT, CREATE, DESTROY = 0, 1, 2
FEATURES = 0x21
VMSA = 0x6000


def with_ap(world: MakeWorld, profile: str = "linux-7.2") -> tuple[World, Vcpu]:
    """A VM with features 21h and a second vCPU, APIC id 5."""
    vm = world(profile)
    vm.sev.vmsa_features = FEATURES
    return vm, vm.add_vcpu(5)


def ask(vm: World, request: int, *, apic_id: int = 5, vmsa: int = VMSA, features: int = FEATURES) -> int:
    return vm.ask_run(ExitCode.AP_CREATION, apic_id << 32 | request, vmsa, rax=features)


def run(vcpu: Vcpu) -> int:
    return vcpu.ioctl(Ioctl.KVM_RUN, 0)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    "bad",
    [
        {"apic_id": 1},
        {"apic_id": 0xFFFFFFFF},
        {"vmsa": VMSA + 8},
        {"vmsa": 1 << 48},
        {"vmsa": (1 << 64) - 4096},
        {"vmsa": 0x200000},
        {"vmsa": 0},
        {"features": FEATURES ^ 1 << 3},
        {"features": FEATURES ^ 1 << 4},
        {"request": 3},
        {"request": 0x00010001},
    ],
)
def test_refused(world: MakeWorld, profile: str, bad: dict[str, int]) -> None:
    """Unknown APIC id or request, other features, a VMSA address misaligned, too high or 2 MiB aligned.

    The target stays as it is, but for the series' kernels: there a refusal stops it (fixed in 6.15 and stable
    kernels by "KVM: SVM: Don't change target vCPU state on AP Creation VMGEXIT error").
    """
    vm, ap = with_ap(world, profile)
    given = {"request": CREATE} | bad
    assert vm.resumed(ask(vm, **given))
    assert vm.reply == (2, 5)
    stopped = profile in SERIES and "apic_id" not in bad
    assert run(ap) == (-errno.EAGAIN if stopped else -errno.EINTR)
    assert ap.mp_state == (MpState.HALTED if stopped else MpState.UNINITIALIZED)


@pytest.mark.parametrize("profile", SERIES)
@pytest.mark.parametrize(
    ("bad", "at_once"), [({"vmsa": VMSA + 8}, False), ({"features": FEATURES ^ 1 << 3}, True)]
)
def test_refused_on_init(world: MakeWorld, profile: str, bad: dict[str, int], at_once: bool) -> None:
    """The series' kernels: a refused create-on-INIT stops the target at INIT; with other features at once."""
    vm, ap = with_ap(world, profile)
    ask(vm, CREATE)
    assert run(ap) == -errno.EAGAIN
    given = {"request": ON_INIT} | bad
    assert vm.resumed(ask(vm, **given))
    assert vm.reply == (2, 5)
    run(ap)
    assert (ap.vmsa_page is None) is at_once
    ap.startup.signal_init()
    ap.startup.signal_sipi()
    run(ap)
    assert ap.vmsa_page is None


@pytest.mark.parametrize("profile", ALL)
def test_vmpl_is_not_taken(world: MakeWorld, profile: str) -> None:
    """KVM has no VMPLs: bits [19:16] of the request other than 0 make it an unknown one."""
    vm, _ = with_ap(world, profile)
    for vmpl in (1, 2, 3):
        assert vm.resumed(ask(vm, vmpl << 16 | CREATE))
        assert vm.reply == (2, 5)


@pytest.mark.parametrize("request_", [ON_INIT, CREATE])
@pytest.mark.parametrize("features", [FEATURES ^ 1 << 5, 0, 1 << 63])
def test_other_features(world: MakeWorld, request_: int, features: int) -> None:
    """Features must equal the VM's in 7.2; before, only the injection modes (bits 3 and 4) are compared."""
    for profile in ALL:
        vm, _ = with_ap(world, profile)
        assert vm.resumed(ask(vm, request_, features=features))
        assert vm.reply == ((2, 5) if profile == "linux-7.2" else (0, 0))


@pytest.mark.parametrize("profile", ALL)
def test_create(world: MakeWorld, profile: str) -> None:
    """Create: the target wakes (-EAGAIN), then runs from its page of the guest_memfd."""
    vm, ap = with_ap(world, profile)
    assert vm.resumed(ask(vm, CREATE))
    assert vm.reply == (0, 0)
    assert run(ap) == -errno.EAGAIN
    assert ap.mp_state == MpState.RUNNABLE
    assert ap.vmsa_page == vm.memory.private + VMSA
    vm.vcpu = ap
    assert vm.resumed(run(ap))
    assert vm.processor.entries == 1


def test_create_waits_with_immediate_exit(world: MakeWorld) -> None:
    """immediate_exit on an AP before its start: -EINTR, the start still lies ahead."""
    vm, ap = with_ap(world)
    ask(vm, CREATE)
    ap.run_area[1] = 1
    assert run(ap) == -errno.EINTR
    ap.run_area[1] = 0
    assert run(ap) == -errno.EAGAIN


def test_create_without_private_page(world: MakeWorld) -> None:
    """A VMSA address without a guest_memfd page: the request is accepted, the vCPU stays halted."""
    vm, ap = with_ap(world)
    assert vm.resumed(ask(vm, CREATE, vmsa=0x1000_1000))
    assert vm.reply == (0, 0)
    assert run(ap) == -errno.EAGAIN
    assert ap.mp_state == MpState.HALTED
    assert ap.vmsa_page is None


def test_create_on_init(world: MakeWorld) -> None:
    """Create-on-INIT takes effect at an INIT signal, which the model does not have."""
    vm, ap = with_ap(world)
    assert vm.resumed(ask(vm, ON_INIT))
    assert vm.reply == (0, 0)
    assert run(ap) == -errno.EINTR
    assert ap.mp_state == MpState.UNINITIALIZED
    ask(vm, CREATE, vmsa=VMSA + 4096)
    assert run(ap) == -errno.EAGAIN
    assert ap.vmsa_page == vm.memory.private + VMSA + 4096


def test_destroy_needs_no_rax(world: MakeWorld) -> None:
    """Destroy needs no RAX and looks at neither features nor address."""
    vm, ap = with_ap(world)
    assert vm.resumed(vm.ask_run(ExitCode.AP_CREATION, 5 << 32 | DESTROY, 0xFFF))
    assert vm.reply == (0, 0)
    assert run(ap) == -errno.EAGAIN
    assert ap.mp_state == MpState.HALTED


@pytest.mark.parametrize(("profile", "reason"), [("linux-6.12", 0xFFFFFFFF), ("linux-7.2", (1 << 64) - 1)])
def test_destroyed_vcpu(world: MakeWorld, profile: str, reason: int) -> None:
    """A destroyed vCPU is halted and not entered; made runnable by force it fails at entry, result 0."""
    vm, ap = with_ap(world, profile)
    ask(vm, CREATE)
    run(ap)
    ask(vm, DESTROY)
    assert run(ap) == -errno.EINTR
    assert ap.mp_state == MpState.HALTED
    assert run(ap) == -errno.EINTR, "a later KVM_RUN does not enter it either"
    ap.mp_state = MpState.RUNNABLE
    assert run(ap) == 0
    vm.vcpu = ap
    assert vm.exit_reason == ExitReason.FAIL_ENTRY
    assert vm.u64(32) == reason
    assert vm.processor.entries == 0


def test_create_again(world: MakeWorld) -> None:
    """A destroyed vCPU can be created again."""
    vm, ap = with_ap(world)
    ask(vm, DESTROY)
    run(ap)
    ask(vm, CREATE)
    assert run(ap) == -errno.EINTR
    assert ap.vmsa_page == vm.memory.private + VMSA
    vm.vcpu = ap
    assert vm.processor.entries == 1


def test_destroy_itself(world: MakeWorld) -> None:
    """A vCPU that destroys itself does not come back to its guest."""
    vm, _ = with_ap(world)
    vm.ask(ExitCode.AP_CREATION, DESTROY, 0)
    vm.processor.exits.append(Vmgexit())
    assert vm.run() == -errno.EINTR
    assert vm.processor.entries == 1
    assert vm.mp_state == MpState.HALTED
