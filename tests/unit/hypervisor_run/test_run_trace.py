"""The trace events that running a guest owns, in order."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from swsnp import trace
from swsnp.abi.ghcb import ExitCode
from swsnp.abi.kvm import ExitReason, Ioctl

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld


def test_certificate_request(world: MakeWorld) -> None:
    """An extended request through userspace: event, exit, completion, reply; each KVM_RUN tells its end."""
    vm = world("coco-v1", enable=True)
    vm.message(5)
    events: list[trace.TraceEvent] = []
    with vm.vm.trace.listen(events.append):
        vm.ask_run(ExitCode.EXT_GUEST_REQUEST, vm.REQUEST, vm.RESPONSE, rax=vm.DATA, rbx=2)
        vm.answer_certs(1, 9)
        vm.run()
    assert events == [
        trace.Vmgexit(
            vm="vm", vcpu=0, exit_code=0x80000012, info1=vm.REQUEST, info2=vm.RESPONSE, rax=vm.DATA, rbx=2
        ),
        trace.CertsWanted(vm="vm", vcpu=0, exit_reason=40, address=vm.DATA >> 12, npages=2),
        trace.RunEnded(vm="vm", vcpu=0, result=0, exit_reason=40),
        trace.CompletionTaken(vm="vm", vcpu=0, exit_reason=40, ret=1),
        trace.GuestReplied(vm="vm", vcpu=0, info1=0, info2=1 << 32, rbx=9),
        trace.RunEnded(vm="vm", vcpu=0, result=-errno.EINTR, exit_reason=ExitReason.INTR),
    ]


def test_msr_protocol(world: MakeWorld) -> None:
    """An MSR request that leaves to userspace is told when it is answered."""
    vm = world()
    events: list[trace.TraceEvent] = []
    with vm.vm.trace.listen(events.append):
        vm.ask_msr(0x080)
        vm.ask_msr(0x0020_0000_0000_5014)
        vm.run()
    told = [each for each in events if not isinstance(each, trace.RunEnded)]
    assert told == [
        trace.MsrProtocol(vm="vm", vcpu=0, request=0x080, reply=0x3081),
        trace.CompletionTaken(vm="vm", vcpu=0, exit_reason=3, ret=0),
        trace.MsrProtocol(vm="vm", vcpu=0, request=0x0020_0000_0000_5014, reply=0x15),
    ]


def test_ap_started(world: MakeWorld) -> None:
    """AP creation is told when the vCPU becomes runnable."""
    vm = world()
    ap = vm.add_vcpu(1)
    events: list[trace.TraceEvent] = []
    vm.ask_run(ExitCode.AP_CREATION, 1 << 32 | 1, 0x6000, rax=1)
    with vm.vm.trace.listen(events.append):
        ap.ioctl(Ioctl.KVM_RUN, 0)
    assert events[0] == trace.ApStarted(vm="vm", vcpu=1, vmsa_gpa=0x6000)
