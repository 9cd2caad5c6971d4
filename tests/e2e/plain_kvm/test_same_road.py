"""Guest code stands behind one interface: machine code and Python take the same road.

The tiny guest is launched by our VMM over our hypervisor and firmware, once on the host's /dev/kvm and once
as a Python program of the same steps; whoever looks from outside cannot tell which it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from swsnp import trace
from swsnp.abi.ghcb import ExitCode, GhcbField, valid_mask
from swsnp.abi.kvm import ExitReason, MpState
from swsnp.abi.kvm_registers import KvmSregs
from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_report import Product
from swsnp.cpu.builtin import BuiltinProcessor
from swsnp.cpu.plain_kvm import HostVm, LinuxKvm, PlainKvmProcessor
from swsnp.cpu.plain_kvm.tiny_guest import (
    EXECUTABLE,
    GHCB_GPA,
    MARK,
    MEMORY_SIZE,
    RESULT_GPA,
    SHARED_MARK_GPA,
    START,
    TinyGuestResult,
    tiny_guest_image,
)
from swsnp.firmware.chip import Chip
from swsnp.firmware.mailbox import Mailbox
from swsnp.hardware import Rmp, SystemMemory
from swsnp.hypervisor import profiles
from swsnp.hypervisor.kvm_api import HostKernelModel
from swsnp.vmm.config import LaunchPage, VmConfig
from swsnp.vmm.launch import launch
from swsnp.vmm.stop import Idle, StopReason, Terminated

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from swsnp.hypervisor.memory import NestedPaging
    from swsnp.hypervisor.neighbours import Processor
    from swsnp.trace import TraceEvent

    Maker = Callable[[NestedPaging], Processor]


@dataclass(frozen=True)
class Seen:
    """What can be seen of a run from outside, and the guest's own record."""

    stop: StopReason
    result: TinyGuestResult
    shared_mark: int
    events: tuple[TraceEvent, ...]


def run_vm(make: Maker, c_bit: int, pages: tuple[LaunchPage, ...]) -> Seen:
    """A host with one VM, launched with these pages and run until it stops."""
    system, rmp, listener = SystemMemory(), Rmp(), trace.Trace()
    memories: list[NestedPaging] = []

    def processor(memory: NestedPaging, _name: str, _vcpu: int) -> Processor:
        memories.append(memory)
        return make(memory)

    chip = Chip(product=Product.MILAN, secret=bytes(32))
    mailbox = Mailbox(chip, memory=system, rmp=rmp, trace=listener)
    kernel = HostKernelModel(
        profile=profiles.profile(profiles.DEFAULT),
        mailbox=mailbox,
        memory=system,
        rmp=rmp,
        trace=listener,
        processors=processor,
        cbit=c_bit,
    )
    events: list[TraceEvent] = []
    start = START.regs(), START.sregs(KvmSregs(apic_base=0xFEE00900), c_bit)
    config = VmConfig(name="tiny", memory_size=MEMORY_SIZE, start=start)
    with launch(kernel.task("tiny"), config, pages, trace=listener) as vm, listener.listen(events.append):
        stop = vm.run()
        result = TinyGuestResult.parse(memories[0].read(RESULT_GPA, TinyGuestResult.SIZE, private=True))
        mark = int.from_bytes(vm.read(SHARED_MARK_GPA, 4), "little")
        return Seen(stop, result, mark, tuple(events))


def image(c_bit: int, *, leave_out: int = -1) -> tuple[LaunchPage, ...]:
    return tuple(
        LaunchPage(PageType.NORMAL, gpa, content)
        for gpa, content, _ in tiny_guest_image(c_bit)
        if gpa != leave_out
    )


def steps(cpu: BuiltinProcessor) -> Generator[None, None, None]:
    """The tiny guest's steps as a Python program."""
    memory, word = cpu.memory, GhcbField.SW_EXIT_CODE
    replies = []
    for request in (0x002, 0x080):
        cpu.ghcb_msr = request
        yield
        replies.append(cpu.ghcb_msr)
    code, carry = memory.pvalidate(GHCB_GPA, validate=False)
    for request in (2 << 52 | GHCB_GPA | 0x014, GHCB_GPA | 0x012):
        cpu.ghcb_msr = request
        yield
        replies.append(cpu.ghcb_msr)
    exit_fields = (word, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2)
    memory.write(GHCB_GPA + word, int(ExitCode.HV_FEATURES).to_bytes(8, "little") + bytes(16), private=False)
    memory.write(GHCB_GPA + GhcbField.PROTOCOL_VERSION, b"\2\0\0\0\0\0", private=False)
    bitmap = valid_mask(*exit_fields).to_bytes(16, "little")
    memory.write(GHCB_GPA + GhcbField.VALID_BITMAP, bitmap, private=False)
    cpu.ghcb_msr = GHCB_GPA
    yield
    info_2 = int.from_bytes(memory.read(GHCB_GPA + GhcbField.SW_EXIT_INFO_2, 8, private=False), "little")
    memory.write(SHARED_MARK_GPA, MARK.to_bytes(4, "little"), private=False)
    result = TinyGuestResult(
        sev_info=replies[0],
        hv_features=replies[1],
        pvalidate_code=code,
        pvalidate_carry=0xFFFFFFFF if carry else 0,
        page_state_change=replies[2],
        registration=replies[3],
        ghcb_info_2=info_2,
        sev_status=7,
        mark=MARK,
    )
    memory.write(RESULT_GPA, bytes(result), private=True)


def machine_code(memory: NestedPaging) -> Processor:
    return PlainKvmProcessor(HostVm(LinuxKvm(), memory, EXECUTABLE), memory)


def python(memory: NestedPaging) -> Processor:
    cpu = BuiltinProcessor(memory)
    cpu.start(steps(cpu))
    return cpu


@pytest.mark.parametrize("make", [machine_code, python])
def test_guest_sees(c_bit: int, make: Maker) -> None:
    """GHCB 2.0, KVM: the answers to negotiation, features, page state change, registration, GHCB event."""
    seen = run_vm(make, c_bit, image(c_bit))
    assert seen.stop == Idle(MpState.HALTED)
    assert seen.result == TinyGuestResult(
        sev_info=2 << 48 | 1 << 32 | c_bit << 24 | 1,
        hv_features=0x3081,
        page_state_change=0x15,
        registration=GHCB_GPA | 0x13,
        ghcb_info_2=3,
        sev_status=7,
        mark=MARK,
    )
    assert seen.shared_mark == MARK


def test_same_road(c_bit: int) -> None:
    """All that hypervisor, VMM and firmware tell of a run is the same for both kinds of processor."""
    real, modelled = (run_vm(make, c_bit, image(c_bit)) for make in (machine_code, python))
    seen_of_real = tuple(each for each in real.events if not isinstance(each, trace.GuestLeft))
    assert replace(real, events=seen_of_real) == modelled
    requests = [each.request & 0xFFF for each in real.events if isinstance(each, trace.MsrProtocol)]
    assert requests == [0x002, 0x080, 0x014, 0x012]
    assert [each for each in real.events if isinstance(each, trace.PageStateChange)] == [
        trace.PageStateChange(vm="tiny", gpa=GHCB_GPA, npages=1, private=False)
    ]
    assert [each.exit_code for each in real.events if isinstance(each, trace.Vmgexit)] == [
        ExitCode.HV_FEATURES
    ]
    exits = [each for each in real.events if isinstance(each, trace.RunEnded) and not each.result]
    assert [each.exit_reason for each in exits] == [ExitReason.HYPERCALL]


def test_ghcb_page_never_validated(c_bit: int) -> None:
    """Linux: a GHCB page that was not the guest's own before is a failed PVALIDATE, set 1 code 2."""
    seen = run_vm(machine_code, c_bit, image(c_bit, leave_out=GHCB_GPA))
    assert seen.stop == Terminated(1, 2, 0x21100)
    assert (seen.result.pvalidate_code, seen.result.pvalidate_carry) == (0, 0xFFFFFFFF)
    assert seen.shared_mark == 0
