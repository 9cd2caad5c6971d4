"""The GHCB MSR protocol. Source: GHCB 2.0; Linux, sev_handle_vmgexit_msr_protocol."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import ExitReason, MpState, VmType
from swsnp.hypervisor.vcpu import Vcpu

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld

ALL = ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]
PSC_ERROR = 0x8000000000000015


def test_value_at_reset(world: MakeWorld) -> None:
    """A new vCPU's GHCB MSR holds the SEV information."""
    vm = world()
    assert vm.processor.ghcb_msr == 0x0002000133000001
    vm.vm.sev = None
    vm.vcpu = vm.add_vcpu(1)
    assert vm.processor.ghcb_msr == 0, "a VM without SEV has no such MSR"


@pytest.mark.parametrize(
    ("version", "cbit", "value"), [(2, 51, 0x0002000133000001), (1, 47, 0x000100012F000001)]
)
def test_sev_info(world: MakeWorld, version: int, cbit: int, value: int) -> None:
    """SEV information: [63:48] the VM's version, [47:32] 1, [31:24] the C-bit; no exit."""
    vm = world()
    assert vm.sev is not None
    vm.sev.ghcb_version = version
    vm.vcpu._cbit = cbit
    assert vm.resumed(vm.ask_msr(0x002))
    assert vm.processor.ghcb_msr == value


@pytest.mark.parametrize("register", range(4))
def test_cpuid(world: MakeWorld, register: int) -> None:
    """CPUID: [63:32] the value, [31:12] as asked, so that the register's number comes back."""
    vm = world()
    asked: list[int] = []

    def leaf(function: int) -> tuple[int, int, int, int]:
        asked.append(function)
        return (0x10, 0x11, 0x12, 0x13)

    vm.vcpu = Vcpu(vm.vm, 0, vm.processor, cbit=51, cpuid=leaf)
    vm.vcpu.measured = True
    assert vm.resumed(vm.ask_msr(0x8000001F << 32 | register << 30 | 0x2AAAA << 12 | 0x004))
    assert asked == [0x8000001F]
    assert vm.processor.ghcb_msr == (0x10 + register) << 32 | register << 30 | 0x2AAAA << 12 | 0x005


def test_cpuid_unknown(world: MakeWorld) -> None:
    """Without a CPUID function every value is zero."""
    vm = world()
    vm.ask_msr(0x1 << 32 | 1 << 30 | 0x004)
    assert vm.processor.ghcb_msr == 1 << 30 | 0x005


def test_ap_reset_hold(world: MakeWorld) -> None:
    """AP reset hold: reply 0x007 with value 0, and the vCPU is held, MP state 9."""
    vm = world()
    assert vm.ask_msr(0x006) == -errno.EINTR
    assert vm.processor.ghcb_msr == 0x007
    assert vm.processor.entries == 1
    assert vm.mp_state == MpState.AP_RESET_HOLD


@pytest.mark.parametrize("profile", ALL)
def test_features(world: MakeWorld, profile: str) -> None:
    """Hypervisor features: 0x3081."""
    vm = world(profile)
    assert vm.resumed(vm.ask_msr(0x080))
    assert vm.processor.ghcb_msr == 0x3081


def test_preferred_gpa(world: MakeWorld) -> None:
    """Preferred GHCB address: none."""
    vm = world()
    assert vm.resumed(vm.ask_msr(0x010))
    assert vm.processor.ghcb_msr == 0xFFFFFFFFFFFFF011


@pytest.mark.parametrize("gpa", [0x1000, 0x7F400000, 0xFFFFFFFFFFFFF000])
def test_register(world: MakeWorld, gpa: int) -> None:
    """Registration echoes the frame and is not checked in any way."""
    vm = world()
    assert vm.resumed(vm.ask_msr(gpa | 0x012))
    assert vm.processor.ghcb_msr == gpa | 0x013
    assert vm.vcpu.registered_ghcb == gpa


@pytest.mark.parametrize("request_", [0x010, 0x1012, 0x0020000000001014])
def test_snp_requests_of_others(world: MakeWorld, request_: int) -> None:
    """SNP requests in the MSR of another guest terminate it: SYSTEM_EVENT with the MSR as datum."""
    vm = world(vm_type=VmType.SEV_ES)
    assert vm.ask_msr(request_) == 0
    assert (vm.exit_reason, vm.u32(32), vm.u32(36), vm.u64(40)) == (ExitReason.SYSTEM_EVENT, 6, 1, request_)
    assert vm.processor.ghcb_msr == request_


@pytest.mark.parametrize("request_", [0x016, 0x001, 0x003, 0x0FFF, 0x123456789ABCDF00])
def test_unknown_request(world: MakeWorld, request_: int) -> None:
    """Any other request leaves the MSR as it is and resumes the guest."""
    vm = world()
    assert vm.resumed(vm.ask_msr(request_))
    assert vm.processor.ghcb_msr == request_


# Page state change through the MSR


def psc(operation: int, gfn: int) -> int:
    return operation << 52 | gfn << 12 | 0x014


@pytest.mark.parametrize("operation", [0, 3, 4, 15])
def test_psc_unknown_operation(world: MakeWorld, operation: int) -> None:
    """An operation other than private and shared: the error reply, no exit."""
    vm = world()
    assert vm.resumed(vm.ask_msr(psc(operation, 5)))
    assert vm.processor.ghcb_msr == PSC_ERROR


def test_psc_not_enabled(world: MakeWorld) -> None:
    """Without KVM_CAP_EXIT_HYPERCALL for MAP_GPA_RANGE: the error reply."""
    vm = world()
    vm.vm.exit_hypercall_mask = 0
    assert vm.resumed(vm.ask_msr(psc(2, 5)))
    assert vm.processor.ghcb_msr == PSC_ERROR


@pytest.mark.parametrize(("operation", "attributes"), [(1, 0x10), (2, 0x00)])
@pytest.mark.parametrize(
    ("profile", "ret"), [(each, 0x5A5A5A5A5A5A5A5A) for each in ALL[:3]] + [("linux-7.2", 0)]
)
def test_psc_exit(world: MakeWorld, operation: int, attributes: int, profile: str, ret: int) -> None:
    """KVM_EXIT_HYPERCALL 12: address, one page, attributes; `ret` is preset by 7.2 only, args[3..5] never."""
    vm = world(profile)
    vm.area[32:288] = b"\x5a" * 256
    assert vm.ask_msr(psc(operation, 0x12345)) == 0
    assert vm.exit_reason == ExitReason.HYPERCALL
    assert [vm.u64(offset) for offset in (32, 40, 48, 56)] == [12, 0x12345000, 1, attributes]
    assert vm.area[64:88] == b"\x5a" * 24
    assert vm.u64(88) == ret
    assert vm.area[96:288] == b"\x5a" * 192


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(("ret", "reply"), [(0, 0x15), (errno.EINVAL, PSC_ERROR), (errno.EAGAIN, PSC_ERROR)])
def test_psc_completion(world: MakeWorld, profile: str, ret: int, reply: int) -> None:
    """Userspace's result: 0 is success, EINVAL and EAGAIN the error reply."""
    vm = world(profile)
    vm.ask_msr(psc(2, 5))
    vm.poke(88, ret, 64)
    assert vm.resumed(vm.run())
    assert vm.processor.ghcb_msr == reply


@pytest.mark.parametrize("ret", [1, 5, (1 << 64) - errno.EINVAL])
def test_psc_other_result(world: MakeWorld, ret: int) -> None:
    """Another result: KVM_RUN -EINVAL in 7.2, the error reply before."""
    for profile in ALL:
        vm = world(profile)
        vm.ask_msr(psc(1, 5))
        vm.poke(88, ret, 64)
        result = vm.run()
        if profile == "linux-7.2":
            assert result == -errno.EINVAL
            assert vm.processor.ghcb_msr == psc(1, 5)
            assert vm.resumed(vm.run())
        else:
            assert vm.resumed(result)
            assert vm.processor.ghcb_msr == PSC_ERROR
