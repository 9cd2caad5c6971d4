"""Trace events as people and programs read them: who acted, and what the hop carried."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from swsnp import trace
from swsnp.abi.ghcb import ExitCode, MsrCode
from swsnp.abi.kvm import ExitReason, SevCommand
from swsnp.abi.sev_guest import SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT, SNP_GET_REPORT
from swsnp.abi.snp_command import Command, FirmwareStatus
from swsnp.abi.snp_message import MessageType
from swsnp.abi.snp_report import SigningKey

if TYPE_CHECKING:
    from enum import IntEnum

__all__ = ["Hop", "as_dict", "describe"]

_IOCTLS = {
    SNP_GET_REPORT: "SNP_GET_REPORT",
    SNP_GET_DERIVED_KEY: "SNP_GET_DERIVED_KEY",
    SNP_GET_EXT_REPORT: "SNP_GET_EXT_REPORT",
}


class Hop(NamedTuple):
    """One line of the walk."""

    party: str
    text: str


def _name(kind: type[IntEnum], value: int) -> str:
    try:
        return kind(value).name
    except ValueError:
        return f"{value:#x}"


def _words(info2: int) -> str:
    return f"vmm_error {info2 >> 32:#x}, fw_error {info2 & 0xFFFFFFFF:#x}" if info2 else "no error"


def as_dict(event: trace.TraceEvent) -> dict[str, Any]:
    """The event for programs: its name, who acted, and its fields."""
    values = {each.name: getattr(event, each.name) for each in fields(event)}
    return {"hop": type(event).__name__, "party": describe(event).party, **values}


def describe(event: trace.TraceEvent) -> Hop:
    """The event for people."""
    match event:
        case trace.IoctlCalled():
            name = _IOCTLS.get(event.command, f"ioctl {event.command:#x}")
            return Hop("program", f"{name} on /dev/sev-guest, msg_version {event.msg_version}")
        case trace.IoctlReturned():
            said = "success" if event.result == 0 else f"result {event.result}, {_words(event.exitinfo2)}"
            return Hop("guest driver", f"answers the program: {said}")
        case trace.MessageSealed() | trace.MessageOpened():
            done = "seals" if isinstance(event, trace.MessageSealed) else "opens"
            party = "guest driver" if event.by == "guest" else "firmware"
            kind = _name(MessageType, event.msg_type)
            under = f"VMPCK{event.vmpck}, sequence number {event.seqno}"
            return Hop(party, f"{done} MSG_{kind}: {event.payload_size} bytes under {under}")
        case trace.Vmgexit():
            text = (
                f"VMGEXIT {_name(ExitCode, event.exit_code)}: info1 {event.info1:#x}, info2 {event.info2:#x}"
            )
            if event.exit_code == ExitCode.EXT_GUEST_REQUEST:
                text += f", certificates wanted at {event.rax:#x}, room for {event.rbx} pages"
            return Hop("guest", text)
        case trace.MsrProtocol():
            kind = _name(MsrCode, event.request & 0xFFF)
            return Hop("guest", f"GHCB MSR {kind} {event.request:#018x}, answered {event.reply:#018x}")
        case trace.CertsWanted():
            field = "gfn" if event.exit_reason == ExitReason.COCO else "gpa"
            kind = _name(ExitReason, event.exit_reason)
            where = f"{field} {event.address:#x}, npages {event.npages}"
            return Hop("KVM", f"leaves to userspace: KVM_EXIT_{kind} ({event.exit_reason}), {where}")
        case trace.CertsRead():
            return Hop("VMM", f"{event.source}: {event.size} bytes for {event.npages} pages; ret {event.ret}")
        case trace.CompletionTaken():
            kind = _name(ExitReason, event.exit_reason)
            return Hop("KVM", f"completes KVM_EXIT_{kind} with ret {event.ret}")
        case trace.PageStateChange():
            state = "private" if event.private else "shared"
            return Hop("VMM", f"makes {event.npages} page(s) at {event.gpa:#x} {state}")
        case trace.FirmwareCommand():
            status = _name(FirmwareStatus, event.status)
            return Hop("firmware", f"ends {_name(Command, event.command)}: {status}")
        case trace.ReportSigned():
            key = _name(SigningKey, event.signing_key)
            tcb = event.tcb.to_bytes(8, "little").hex()
            return Hop(
                "firmware",
                f"signs a version {event.version} report with the {key} of TCB {tcb}, VMPL {event.vmpl}",
            )
        case trace.LaunchStep():
            said = "ok" if event.result >= 0 else f"errno {-event.result}, firmware {event.error:#x}"
            return Hop("KVM", f"KVM_SEV_{_name(SevCommand, event.command).removeprefix('SEV_')}: {said}")
        case trace.ApStarted():
            return Hop("KVM", f"makes vCPU {event.vcpu} runnable from the VMSA at {event.vmsa_gpa:#x}")
        case trace.GuestReplied():
            return Hop(
                "KVM",
                f"replies in the GHCB: info1 {event.info1:#x}, {_words(event.info2)}, RBX {event.rbx:#x}",
            )
        case trace.GuestLeft():
            return Hop("processor", f"vCPU {event.vcpu} leaves its guest at {event.rip:#x}: {event.exit}")
        case trace.RunEnded():
            if event.result == 0:
                return Hop("KVM", f"KVM_RUN returns 0, exit_reason {event.exit_reason}")
            return Hop("KVM", f"KVM_RUN returns -{_errno(-event.result)}")


def _errno(number: int) -> str:
    import errno

    return errno.errorcode.get(number, str(number))
