"""VMGEXIT: snapshot, checks in order, dispatch. Source: GHCB 2.0; Linux, sev_handle_vmgexit."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode, GhcbField
from swsnp.abi.kvm import ExitReason, MpState, VmType
from swsnp.hypervisor.vmgexit import GhcbEvent

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

ALL = ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]
BEFORE_7_2 = ALL[:3]
SNP_ONLY = [ExitCode.PSC, ExitCode.GUEST_REQUEST, ExitCode.EXT_GUEST_REQUEST, ExitCode.AP_CREATION]
EXIT_FIELDS = [GhcbField.SW_EXIT_CODE, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2]


def full_page() -> bytearray:
    """A GHCB whose every quadword holds its own offset, all marked valid."""
    page = bytearray(b"".join(offset.to_bytes(8, "little") for offset in range(0, 4096, 8)))
    page[0x3F0:0x400] = b"\xff" * 16
    return page


# The snapshot


def test_snapshot_offsets() -> None:
    """KVM takes RAX, RCX, RDX, RBX, exit code, info 1, info 2 and scratch from the GHCB's offsets."""
    event = GhcbEvent(memoryview(full_page()), 0x1000)
    assert (event.rax, event.rcx, event.rdx, event.rbx) == (0x1F8, 0x308, 0x310, 0x318)
    assert (event.code, event.info1, event.info2, event.scratch) == (0x390, 0x398, 0x3A0, 0x3A8)
    assert event.valid == (1 << 128) - 1


@pytest.mark.parametrize(
    ("bit", "field"),
    [
        (63, "rax"),
        (97, "rcx"),
        (98, "rdx"),
        (99, "rbx"),
        (114, "code"),
        (115, "info1"),
        (116, "info2"),
        (117, "scratch"),
    ],
)
def test_unmarked_field_is_zero(bit: int, field: str) -> None:
    """A field without its valid bit (number = offset / 8) counts as zero; the others are taken."""
    page = full_page()
    page[0x3F0 + bit // 8] &= ~(1 << bit % 8)
    event, whole = GhcbEvent(memoryview(page), 0), GhcbEvent(memoryview(full_page()), 0)
    names = ("rax", "rcx", "rdx", "rbx", "code", "info1", "info2", "scratch")
    for name in names:
        assert getattr(event, name) == (0 if name == field else getattr(whole, name)), name


def test_bitmap_is_cleared() -> None:
    """The page's valid bitmap is cleared after the snapshot; nothing else changes."""
    page = full_page()
    GhcbEvent(memoryview(page), 0)
    wanted = full_page()
    wanted[0x3F0:0x400] = bytes(16)
    assert page == wanted


def test_answer_bytes() -> None:
    """Exit info 1 and 2 are stored with bits 115 and 116; registers with 63, 97, 98, 99."""
    page = bytearray(4096)
    event = GhcbEvent(memoryview(page), 0)
    event.answer(0x1122, 2)
    assert page[0x398:0x3A8].hex() == "02000000000000002211000000000000"
    assert page[0x3F0:0x400].hex() == "00000000000000000000000000001800"
    event.rax, event.rcx, event.rdx, event.rbx = 1, 2, 3, 4
    event.write_back()
    assert page[0x1F8] == 1
    assert (page[0x308], page[0x310], page[0x318]) == (2, 3, 4)
    assert page[0x3F0:0x400].hex() == "0000000000000080000000000e001800"


# Where the page is


def test_no_ghcb(world: MakeWorld) -> None:
    """GHCB address 0: the guest is resumed without a reply."""
    vm = world()
    vm.ask(ExitCode.HV_FEATURES)
    vm.processor.ghcb_msr = 0
    assert vm.resumed(vm.run())
    assert vm.processor.entries == 2
    assert vm.valid == sum(1 << bit for bit in (114, 115, 116)), "as the guest left it"


@pytest.mark.parametrize("where", ["no memslot", "read-only memslot"])
def test_ghcb_cannot_be_mapped(world: MakeWorld, where: str) -> None:
    """A GHCB that cannot be mapped for writing: the guest is resumed without a reply."""
    vm = world()
    vm.ask(ExitCode.HV_FEATURES)
    if where == "no memslot":
        vm.processor.ghcb_msr = vm.UNMAPPED
    else:
        vm.memory.read_only.add(vm.GHCB // 4096)
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)
    assert vm.get(0x1F8) == 0
    assert vm.vcpu.event is None


@pytest.mark.parametrize("registered", [None, 0x2000])
@pytest.mark.parametrize("profile", BEFORE_7_2)
def test_unregistered_before_7_2(world: MakeWorld, profile: str, registered: int | None) -> None:
    """KVM before 7.2: an SNP guest's GHCB that is not registered ends KVM_RUN with -EINVAL."""
    vm = world(profile)
    vm.vcpu.registered_ghcb = registered
    assert vm.ask_run(ExitCode.HV_FEATURES) == -errno.EINVAL
    assert vm.processor.entries == 1


@pytest.mark.parametrize("registered", [None, 0x2000])
def test_unregistered_7_2(world: MakeWorld, registered: int | None) -> None:
    """KVM 7.2: a GHCB that is not registered is answered with info1=2, info2=1, before any other check."""
    vm = world()
    vm.vcpu.registered_ghcb = registered
    assert vm.resumed(vm.ask_run(0xDEAD, usage=1, unmarked=(GhcbField.SW_EXIT_CODE,)))
    assert vm.reply == (2, 1)


def test_registration_is_for_snp(world: MakeWorld) -> None:
    """Other guests need not register."""
    vm = world(vm_type=VmType.SEV_ES)
    vm.vcpu.registered_ghcb = None
    assert vm.resumed(vm.ask_run(ExitCode.HV_FEATURES))
    assert vm.reply == (0, 3)


# The checks


@pytest.mark.parametrize("profile", ALL)
def test_usage(world: MakeWorld, profile: str) -> None:
    """ghcb_usage other than 0: info1=2, info2=2, also when inputs are missing."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(ExitCode.HV_FEATURES, usage=1, unmarked=(GhcbField.SW_EXIT_INFO_1,)))
    assert vm.reply == (2, 2)


@pytest.mark.parametrize(("profile", "reason"), [(each, 4) for each in BEFORE_7_2] + [("linux-7.2", 6)])
@pytest.mark.parametrize("code", SNP_ONLY)
def test_snp_only_event(world: MakeWorld, profile: str, reason: int, code: int) -> None:
    """An SNP event of another guest: info2=6 (7.2), 4 (before)."""
    vm = world(profile, vm_type=VmType.SEV_ES)
    assert vm.resumed(vm.ask_run(code, vm.REQUEST, vm.RESPONSE, scratch=vm.GHCB + 0x800, rax=1))
    assert vm.reply == (2, reason)
    assert vm.driver.issued == []


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("field", EXIT_FIELDS)
@pytest.mark.parametrize("code", [ExitCode.HV_FEATURES, ExitCode.GUEST_REQUEST, 0xDEAD])
def test_exit_fields_are_needed(world: MakeWorld, profile: str, field: GhcbField, code: int) -> None:
    """Exit code, info 1 and info 2 must be marked valid for every event: info1=2, info2=4."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(code, vm.REQUEST, vm.RESPONSE, unmarked=(field,)))
    assert vm.reply == (2, 4)


REQUIRED: list[tuple[int, int, dict[str, int], list[str]]] = [
    # code, info 1, registers that suffice, those of them whose bit is needed
    (0x37, 0, {"rax": 0}, ["rax"]),
    (0x6F, 0, {"rcx": 0}, ["rcx"]),
    (0x72, 0, {"rax": 1, "rcx": 0}, ["rax", "rcx"]),
    (0x72, 0, {"rax": 0xD, "rcx": 0, "xcr0": 7}, ["rax", "rcx", "xcr0"]),
    (0x7B, 0b100, {"scratch": 0x1800}, ["scratch"]),
    (0x7B, 0b101, {"scratch": 0x1800}, ["scratch"]),
    (0x7B, 0b000, {"rax": 0}, ["rax"]),
    (0x7C, 0, {"rcx": 0}, ["rcx"]),
    (0x7C, 1, {"rcx": 0, "rax": 0, "rdx": 0}, ["rcx", "rax", "rdx"]),
    (0x8A, 0, {"rax": 0, "rcx": 0, "rdx": 0}, ["rax", "rcx", "rdx"]),
    (0x8B, 0, {"rax": 0, "rcx": 0}, ["rax", "rcx"]),
    (0x80000001, 0, {"scratch": 0x1800}, ["scratch"]),
    (0x80000002, 0, {"scratch": 0x1800}, ["scratch"]),
    (0x80000010, 0, {"scratch": 0x1800}, ["scratch"]),
    (0x80000013, 1, {"rax": 1}, ["rax"]),
    (0x80000013, 0, {"rax": 1}, ["rax"]),
]


@pytest.mark.parametrize(("code", "info1", "registers", "needed"), REQUIRED)
def test_required_fields(
    world: MakeWorld, code: int, info1: int, registers: dict[str, int], needed: list[str]
) -> None:
    """Each event's inputs must be marked valid; one that is missing: info1=2, info2=4."""
    offsets = {"rax": 0x1F8, "rcx": 0x308, "rdx": 0x310, "scratch": 0x3A8, "xcr0": 0x3E8}
    for name in needed:
        vm = world()
        vm.ask_run(code, info1, 0, usage=0, unmarked=(offsets[name],), **registers)
        if (code, name) == (0x72, "rax") and "xcr0" in registers:
            continue  # without RAX it is no longer function 0xD; the row before covers it
        assert vm.reply == (2, 4), name
    vm = world()
    vm.ask_run(code, info1, 0, usage=0, unmarked=(), **registers)
    assert vm.reply != (2, 4)


def test_vmmcall_needs_cpl(world: MakeWorld) -> None:
    """VMMCALL needs RAX and CPL (valid bit 25)."""
    vm = world()
    assert vm.resumed(vm.ask_run(ExitCode.VMMCALL, rax=0))
    assert vm.reply == (2, 4)
    vm.ask(ExitCode.VMMCALL, rax=0)
    vm.page[0x3F0 + 25 // 8] |= 1 << 25 % 8
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)


@pytest.mark.parametrize(
    ("code", "info1"),
    [(0x27, 0), (0x6E, 0), (0x76, 0), (0x87, 0), (0x89, 0), (0x7B, 1), (0x80000005, 0)],
)
def test_events_without_inputs(world: MakeWorld, code: int, info1: int) -> None:
    """Events that need nothing beside the exit fields pass the checks (IOIO: a read that is no string)."""
    vm = world()
    vm.ask_run(code, info1)
    assert vm.reply == (0, 0)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    "code", [0, 0x80000018, 0x8000001A, 0x80000014, 0x80000017, 0x80000006, 0x180000012, (1 << 64) - 1]
)
def test_unknown_event(world: MakeWorld, profile: str, code: int) -> None:
    """A code that KVM does not handle, also one that headers define: info1=2, info2=6."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(code))
    assert vm.reply == (2, 6)


# Small events


@pytest.mark.parametrize("profile", ALL)
def test_hv_features(world: MakeWorld, profile: str) -> None:
    """HV_FEATURES: info2 = 3 (SNP, AP creation)."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(ExitCode.HV_FEATURES, 99, 99))
    assert vm.reply == (0, 3)


def test_nmi_complete(world: MakeWorld) -> None:
    """NMI_COMPLETE: resumed with 0 and 0."""
    vm = world()
    assert vm.resumed(vm.ask_run(ExitCode.NMI_COMPLETE, 1, 1))
    assert vm.reply == (0, 0)
    assert vm.processor.entries == 2


def test_ap_hlt_loop(world: MakeWorld) -> None:
    """AP_HLT_LOOP holds the vCPU: KVM_RUN ends as if a signal had come, MP state 9; no SIPI, info2 = 0."""
    vm = world()
    assert vm.ask_run(ExitCode.AP_HLT_LOOP) == -errno.EINTR
    assert vm.mp_state == MpState.AP_RESET_HOLD
    assert vm.processor.entries == 1
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0), "info 2 stays 0: not woken"


@pytest.mark.parametrize("profile", ALL)
def test_unsupported_event(world: MakeWorld, profile: str) -> None:
    """UNSUPPORTED_EVENT: KVM_RUN -EINVAL."""
    assert world(profile).ask_run(ExitCode.UNSUPPORTED_EVENT, 0x72, 5) == -errno.EINVAL


def terminated(vm: World) -> tuple[int, int, int, int]:
    """Exit reason, type, ndata and data[0] of the last exit."""
    return vm.exit_reason, vm.u32(32), vm.u32(36), vm.u64(40)


def test_termination_by_page(world: MakeWorld, caplog: pytest.LogCaptureFixture) -> None:
    """TERM_REQUEST: SYSTEM_EVENT type 6 whose datum is only the GHCB's address.

    The exit info fields of the page were set to 0 before the handler, so the reason is KVM's log's alone.
    """
    vm = world()
    with caplog.at_level(logging.INFO):
        assert vm.ask_run(ExitCode.TERM_REQUEST, 0x4321) == 0
    assert terminated(vm) == (ExitReason.SYSTEM_EVENT, 6, 1, vm.GHCB)
    assert vm.reply == (0, 0)
    assert "0x4321" in caplog.text


def test_termination_by_msr(world: MakeWorld) -> None:
    """Termination through the MSR: the datum is the request, with reason set [15:12] and code [23:16]."""
    vm = world()
    assert vm.ask_msr(0x0002_1100) == 0
    assert terminated(vm) == (ExitReason.SYSTEM_EVENT, 6, 1, 0x0002_1100)
