"""Every code of the GHCB protocol: which are served, refused or unknown, and termination told to people."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import (
    EVENT_INPUTS,
    TERMINATION_REASONS,
    ApJumpTable,
    ExitCode,
    MsrCode,
    describe_termination,
)
from swsnp.abi.kvm import ExitReason, VmType

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

ALL = ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]

# What KVM_RUN returns, the exit reason if that is 0, and the reply in the page, for events with all inputs.
# -EINTR: the guest went on and halted, or is held.
GOES_ON = -errno.EINTR
EVENTS: dict[int, tuple[int, int | None, tuple[int, int]]] = {
    ExitCode.READ_DR7: (GOES_ON, None, (0, 0)),
    ExitCode.WRITE_DR7: (GOES_ON, None, (0, 0)),
    ExitCode.RDTSC: (0, ExitReason.INTERNAL_ERROR, (0, 0)),
    ExitCode.RDPMC: (GOES_ON, None, (0, 0)),
    ExitCode.CPUID: (GOES_ON, None, (0, 0)),
    ExitCode.INVD: (GOES_ON, None, (0, 0)),
    ExitCode.IOIO: (0, ExitReason.IO, (0, 0)),
    ExitCode.MSR: (GOES_ON, None, (1, 0x8000030D)),
    ExitCode.VMMCALL: (GOES_ON, None, (0, 0)),
    ExitCode.RDTSCP: (0, ExitReason.SHUTDOWN, (0, 0)),
    ExitCode.WBINVD: (GOES_ON, None, (0, 0)),
    ExitCode.MONITOR: (GOES_ON, None, (0, 0)),
    ExitCode.MWAIT: (GOES_ON, None, (0, 0)),
    ExitCode.MMIO_READ: (0, ExitReason.MMIO, (0, 0)),
    ExitCode.MMIO_WRITE: (0, ExitReason.MMIO, (0, 0)),
    ExitCode.NMI_COMPLETE: (GOES_ON, None, (0, 0)),
    ExitCode.AP_HLT_LOOP: (GOES_ON, None, (0, 0)),
    ExitCode.AP_JUMP_TABLE: (GOES_ON, None, (2, 5)),
    ExitCode.PSC: (GOES_ON, None, (0, 0x100000002)),
    ExitCode.GUEST_REQUEST: (GOES_ON, None, (2, 5)),
    ExitCode.EXT_GUEST_REQUEST: (GOES_ON, None, (2, 5)),
    ExitCode.AP_CREATION: (GOES_ON, None, (2, 5)),
    ExitCode.HV_FEATURES: (GOES_ON, None, (0, 3)),
    ExitCode.TERM_REQUEST: (0, ExitReason.SYSTEM_EVENT, (0, 0)),
    ExitCode.UNSUPPORTED_EVENT: (-errno.EINVAL, None, (0, 0)),
}
OTHERS = {
    0x78: "HLT",
    0x400: "NPF",
    0x80000014: "HV doorbell page",
    0x80000015: "HV IPI",
    0x80000016: "HV timer",
    0x80000017: "GET_APIC_IDS",
    0x80000018: "SNP_RUN_VMPL",
    0x8000001A: "Secure AVIC",
    0x8000001B: "configure interrupt injection",
    0x8000001C: "disable alternate injection",
    0x8000001D: "specific EOI",
    0x80000020: "SEV-TIO guest request",
    0x80000021: "SEV-TIO operation",
}


def test_no_event_is_forgotten() -> None:
    """Every exit code that KVM checks the inputs of has a row below."""
    assert set(EVENTS) == set(EVENT_INPUTS) == {int(each) for each in ExitCode}


@pytest.mark.parametrize("code", EVENTS)
def test_event(world: MakeWorld, code: int) -> None:
    """One event of each kind with exit info 1 and 2 of 8 and 1, as Linux 7.2 ends it."""
    result, exit_reason, reply = EVENTS[code]
    vm = world()
    info1 = 0x10 if code == ExitCode.IOIO else 8
    vm.put(0x808, 0x1FF << 12 | 1 << 56 | 2 << 52)  # a page state change entry that is not aligned
    vm.ask(code, info1, 1, rax=2, rbx=0, rcx=0, rdx=0, cpl=0, xcr0=1, scratch=vm.GHCB + 0x800)
    assert vm.run() == result
    assert vm.reply == reply
    if exit_reason is not None:
        assert vm.exit_reason == exit_reason


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("code", OTHERS)
def test_events_that_kvm_does_not_have(world: MakeWorld, profile: str, code: int) -> None:
    """Codes of the specification, of drafts and of other hypervisors: info1=2, info2=6."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(code, rax=0, rbx=0, rcx=0, rdx=0, scratch=vm.GHCB + 0x800))
    assert vm.reply == (2, 6)


# AP jump table


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("vm_type", [VmType.SNP, VmType.SEV_ES])
def test_ap_jump_table(world: MakeWorld, profile: str, vm_type: int) -> None:
    """AP_JUMP_TABLE: 0 sets the VM's address, 1 gets it, from any vCPU; 0 before it was set."""
    vm = world(profile, vm_type=vm_type)
    assert vm.resumed(vm.ask_run(ExitCode.AP_JUMP_TABLE, ApJumpTable.GET, 99))
    assert vm.reply == (0, 0)
    assert vm.resumed(vm.ask_run(ExitCode.AP_JUMP_TABLE, ApJumpTable.SET, 0x12345001))
    assert vm.reply == (0, 0)
    vm.vcpu = vm.add_vcpu(1)
    vm.vcpu.mp_state, vm.vcpu.registered_ghcb = 0, vm.GHCB
    assert vm.resumed(vm.ask_run(ExitCode.AP_JUMP_TABLE, ApJumpTable.GET, 0))
    assert vm.reply == (0, 0x12345001)


@pytest.mark.parametrize("request_", [2, 3, 1 << 32, (1 << 64) - 1])
def test_ap_jump_table_request(world: MakeWorld, request_: int) -> None:
    """AP_JUMP_TABLE with another request: info1=2, info2=5."""
    vm = world()
    assert vm.resumed(vm.ask_run(ExitCode.AP_JUMP_TABLE, request_, 0x1000))
    assert vm.reply == (2, 5)
    assert vm.sev.ap_jump_table == 0


# The MSR

MSR_REPLIES: dict[int, tuple[int, int, int | None]] = {
    # code: KVM_RUN, the MSR afterwards, the exit
    0x001: (GOES_ON, 0x001, None),
    MsrCode.SEV_INFO_REQ: (GOES_ON, 0x0002000133000001, None),
    0x003: (GOES_ON, 0x003, None),
    MsrCode.CPUID_REQ: (GOES_ON, 0x005, None),
    0x005: (GOES_ON, 0x005, None),
    MsrCode.AP_RESET_HOLD_REQ: (GOES_ON, 0x007, None),
    0x007: (GOES_ON, 0x007, None),
    MsrCode.PREFERRED_GPA_REQ: (GOES_ON, 0xFFFFFFFFFFFFF011, None),
    0x011: (GOES_ON, 0x011, None),
    MsrCode.REGISTER_GPA_REQ: (GOES_ON, 0x013, None),
    0x013: (GOES_ON, 0x013, None),
    MsrCode.PSC_REQ: (GOES_ON, 0x8000000000000015, None),
    0x015: (GOES_ON, 0x015, None),
    0x016: (GOES_ON, 0x016, None),
    0x017: (GOES_ON, 0x017, None),
    MsrCode.HV_FEATURES_REQ: (GOES_ON, 0x3081, None),
    0x081: (GOES_ON, 0x081, None),
    MsrCode.TERM_REQ: (0, 0x100, ExitReason.SYSTEM_EVENT),
    0xF00: (GOES_ON, 0xF00, None),
    0xF01: (GOES_ON, 0xF01, None),
    0xF02: (GOES_ON, 0xF02, None),
    0xF03: (GOES_ON, 0xF03, None),
}


def test_no_msr_code_is_forgotten() -> None:
    """Every code of the MSR protocol that is named has a row above."""
    assert {int(each) for each in MsrCode} <= set(MSR_REPLIES)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("code", MSR_REPLIES)
def test_msr_request(world: MakeWorld, profile: str, code: int) -> None:
    """Each code without data: the reply, or the value as it was. No profile differs."""
    result, value, exit_reason = MSR_REPLIES[code]
    vm = world(profile)
    assert vm.ask_msr(code) == result
    assert vm.processor.ghcb_msr == value
    if exit_reason is not None:
        assert vm.exit_reason == exit_reason


@pytest.mark.parametrize("code", MSR_REPLIES)
def test_msr_request_of_another_guest(world: MakeWorld, code: int) -> None:
    """A guest without SNP: its requests for SNP end it, the others are served alike."""
    vm = world(vm_type=VmType.SEV_ES)
    result = vm.ask_msr(code)
    if code in (0x010, 0x012, 0x014, 0x100):
        assert (result, vm.exit_reason, vm.u64(40)) == (0, ExitReason.SYSTEM_EVENT, code)
    else:
        assert vm.processor.ghcb_msr == MSR_REPLIES[code][1]


# Termination for people


@pytest.mark.parametrize(
    ("reason_set", "code", "text"),
    [
        (0, 0, "set 0 (GHCB specification), code 0: general request"),
        (0, 1, "set 0 (GHCB specification), code 1: no common GHCB protocol version"),
        (0, 3, "set 0 (GHCB specification), code 3: unknown"),
        (1, 2, "set 1 (Linux), code 2: PVALIDATE failed"),
        (1, 6, "set 1 (Linux), code 6: secrets page not valid"),
        (1, 255, "set 1 (Linux), code 255: unknown"),
        (15, 1, "set 15 (unknown), code 1: unknown"),
    ],
)
def test_describe_termination(reason_set: int, code: int, text: str) -> None:
    """Both forms say the same: the MSR with set [15:12] and code [23:16], info 1 with [3:0] and [11:4]."""
    assert describe_termination(code << 16 | reason_set << 12 | 0x100) == text
    assert describe_termination(0x1000, code << 4 | reason_set) == text


def test_describe_termination_without_a_reason() -> None:
    """A GHCB address names no reason; another MSR request is one that only SNP guests have."""
    assert "KVM's log only" in describe_termination(0x7F400000)
    assert "0x012 is for SNP guests only" in describe_termination(0x5012)


def test_every_reason_is_described() -> None:
    """Set 0 has 3 codes, set 1 (Linux) 13."""
    assert {number: list(codes) for number, (_, codes) in TERMINATION_REASONS.items()} == {
        0: list(range(3)),
        1: list(range(13)),
    }


def terminated(vm: World) -> tuple[int, int, int]:
    return vm.u32(32), vm.u32(36), vm.u64(40)


@pytest.mark.parametrize("profile", ALL)
def test_where_the_reason_is(world: MakeWorld, profile: str, caplog: pytest.LogCaptureFixture) -> None:
    """By MSR: in the datum. By event: in KVM's log only; the page's exit info 1 is 0 by then."""
    caplog.set_level("INFO")
    vm = world(profile)
    assert vm.ask_msr(6 << 16 | 1 << 12 | 0x100) == 0
    assert terminated(vm) == (6, 1, 0x61100)
    assert caplog.text.count("code 6: secrets page not valid") == 1
    assert vm.ask_run(ExitCode.TERM_REQUEST, 6 << 4 | 1, 77) == 0
    assert terminated(vm) == (6, 1, vm.GHCB)
    assert vm.reply == (0, 0)
    assert caplog.text.count("code 6: secrets page not valid") == 2
