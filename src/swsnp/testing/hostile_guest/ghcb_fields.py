"""GHCB fields that are wrong, missing or unknown; a GHCB that is not registered or not there.

Source: Linux, arch/x86/kvm/svm/sev.c, sev_handle_vmgexit and sev_es_validate_vmgexit; AMD 56421 (GHCB 2.0).
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.ghcb import PAGE, ExitCode, GhcbError, GhcbField, MsrCode, Reply
from swsnp.abi.snp_message import MessageType
from swsnp.machine.built_in import built_in_layout
from swsnp.testing.guest_case import Case, Program, by_profile, everywhere
from swsnp.testing.raw_guest import OUTSIDE, RawGuest
from swsnp.testing.seen import Answer, Held, Replied, RunError, Running, Seen, Stopped, Unanswered
from swsnp.vmm.stop import Terminated

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from swsnp.testing.guest_case import ProgramFactory

__all__ = ["CASES", "refused"]

_GHCB: Final = built_in_layout(1)[0].ghcb_pages[0]
_GENERIC_V1: Final = 0x8000_0000 << 32
_ORDER: Final = "GHCB checks in KVM's order (sev_handle_vmgexit)"
_INPUTS: Final = "inputs marked valid (AMD 56421, valid bitmap; sev_es_validate_vmgexit)"
_UNCHECKED: Final = "KVM does not look at this"
_EXIT_FIELDS: Final = (GhcbField.SW_EXIT_CODE, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2)
_SERVED: Final = everywhere(Replied(info1=0, info2=0, answer=Answer.OPENED))


def refused(error: GhcbError) -> Replied:
    """The reply to malformed input."""
    return Replied(info1=Reply.MALFORMED_INPUT, info2=error)


_NOT_REGISTERED: Final = by_profile(
    v1=RunError(errno.EINVAL),
    v1r=RunError(errno.EINVAL),
    l612=RunError(errno.EINVAL),
    l72=refused(GhcbError.NOT_REGISTERED),
)
_CERT_BUFFER: Final = by_profile(
    v1=Replied(info1=0, info2=_GENERIC_V1),
    v1r=Replied(info1=0, info2=_GENERIC_V1),
    l612=refused(GhcbError.INVALID_INPUT),
    l72=refused(GhcbError.INVALID_INPUT),
)


def _request(guest: RawGuest, *, code: int = ExitCode.GUEST_REQUEST, **fields: int) -> Program:
    return (yield from guest.send(guest.message(), code, **fields))


def _unmarked(guest: RawGuest, *, fields: tuple[GhcbField, ...], code: int) -> Program:
    guest.poke(guest.request, bytes(guest.message()))
    guest.poke(guest.response, b"\xee" * PAGE)
    guest.ask(
        code, info1=guest.request, info2=guest.response, unmarked=fields, rax=guest.data, rbx=4, rcx=0, rdx=0
    )
    yield
    return guest.seen()


def _event(guest: RawGuest, code: int, **fields: Any) -> Program:
    guest.poke(guest.response, b"\xee" * PAGE)
    guest.ask(code, **fields)
    yield
    return guest.seen()


def _everything_set(guest: RawGuest) -> Program:
    """Every byte that no input lies in is FFh, every bit of the bitmap set."""
    guest.poke(guest.ghcb, b"\xff" * (PAGE - 4))
    guest.poke(guest.request, bytes(guest.message()))
    guest.poke(guest.response, b"\xee" * PAGE)
    guest.ask(ExitCode.GUEST_REQUEST, info1=guest.request, info2=guest.response, version=0xFFFF)
    guest.poke(guest.ghcb + GhcbField.VALID_BITMAP, b"\xff" * 16)
    yield
    return guest.seen()


def _no_bits(guest: RawGuest) -> Program:
    guest.poke(guest.response, b"\xee" * PAGE)
    guest.ask(ExitCode.GUEST_REQUEST, info1=guest.request, info2=guest.response, unmarked=_EXIT_FIELDS)
    yield
    return guest.seen()


def _key_request_without_buffer(guest: RawGuest) -> Program:
    guest.poke(guest.request, bytes(guest.message(MessageType.KEY_REQ, bytes(32))))
    guest.poke(guest.response, b"\xee" * PAGE)
    guest.ask(ExitCode.EXT_GUEST_REQUEST, info1=guest.request, info2=guest.response)
    yield
    return guest.seen()


def _other_ghcb(guest: RawGuest, *, register: bool) -> Program:
    """Use a second shared page as GHCB, after registering it or without."""
    other = guest.spare
    yield from guest.share(other)
    if register:
        yield from guest.msr(other | MsrCode.REGISTER_GPA_REQ)
    guest.poke(guest.request, bytes(guest.message()))
    guest.poke(guest.response, b"\xee" * PAGE)
    guest.ask(ExitCode.GUEST_REQUEST, info1=guest.request, info2=guest.response, at=other)
    yield
    return guest.seen(other)


def _old_ghcb(guest: RawGuest) -> Program:
    """Register another page, go on with the one before."""
    yield from guest.msr(guest.spare | MsrCode.REGISTER_GPA_REQ)
    return (yield from guest.send(guest.message()))


def _nowhere(guest: RawGuest, gpa: int) -> Program:
    """Point the MSR at no memory: no page to reply in, and the MSR is no request."""
    left = yield from guest.msr(gpa)
    return Unanswered() if left == gpa else Replied(info1=0, info2=0)


def _registered_nowhere(guest: RawGuest) -> Program:
    yield from guest.msr(OUTSIDE | MsrCode.REGISTER_GPA_REQ)
    return (yield from _nowhere(guest, OUTSIDE))


def _terminates(guest: RawGuest) -> Program:
    guest.ask(ExitCode.TERM_REQUEST, info1=0x21)
    yield
    return Unanswered()


def _endless(guest: RawGuest, code: int) -> Program:
    while True:
        guest.ask(code)
        yield


def _case(name: str, rule: str, program: ProgramFactory, expected: Mapping[str, Seen]) -> Case:
    return Case(name=f"ghcb-{name}", rule=rule, program=program, expected=expected)


_UNKNOWN: Final = (0, 1, 0x80000014, 0x80000015, 0x80000018, 0x8000001A, 0x80000020, 0x12345, 2**64 - 1)
_MISSING: Final = (
    ("info-1", ExitCode.GUEST_REQUEST, GhcbField.SW_EXIT_INFO_1),
    ("info-2", ExitCode.GUEST_REQUEST, GhcbField.SW_EXIT_INFO_2),
    ("code", ExitCode.GUEST_REQUEST, GhcbField.SW_EXIT_CODE),
    ("dr7-rax", ExitCode.WRITE_DR7, GhcbField.RAX),
    ("rdpmc-rcx", ExitCode.RDPMC, GhcbField.RCX),
    ("cpuid-rcx", ExitCode.CPUID, GhcbField.RCX),
    ("msr-rcx", ExitCode.MSR, GhcbField.RCX),
    ("msr-write-rdx", ExitCode.MSR, GhcbField.RDX),
    ("vmmcall-cpl", ExitCode.VMMCALL, GhcbField.CPL),
    ("monitor-rdx", ExitCode.MONITOR, GhcbField.RDX),
    ("mwait-rcx", ExitCode.MWAIT, GhcbField.RCX),
    ("ioio-rax", ExitCode.IOIO, GhcbField.RAX),
    ("mmio-scratch", ExitCode.MMIO_READ, GhcbField.SW_SCRATCH),
    ("psc-scratch", ExitCode.PSC, GhcbField.SW_SCRATCH),
    ("ap-creation-rax", ExitCode.AP_CREATION, GhcbField.RAX),
)
_AP: Final = (
    ("unknown-apic-id", 9 << 32 | 1, 0x80_1000, 1),
    ("unknown-operation", 1 << 32 | 3, 0x80_1000, 1),
    ("features-with-injection-mode", 1 << 32 | 1, 0x80_1000, 1 | 1 << 3),
    ("misaligned-vmsa", 1 << 32 | 1, 0x80_1008, 1),
    ("vmsa-beyond-the-address-width", 1 << 32 | 1, 1 << 60, 1),
    ("vmsa-2-mib-aligned", 1 << 32 | 1, 0x80_0000, 1),
)


def _table() -> Iterator[Case]:
    for usage in (1, 2, 0xFFFF_FFFF):
        program = partial(_request, usage=usage)
        yield _case(f"usage-{usage:x}", _ORDER, program, everywhere(refused(GhcbError.INVALID_USAGE)))
    for name, code, field in _MISSING:
        program = partial(_unmarked, fields=(field,), code=code)
        yield _case(f"missing-{name}", _INPUTS, program, everywhere(refused(GhcbError.MISSING_INPUT)))
    yield _case("no-valid-bits", _INPUTS, _no_bits, everywhere(refused(GhcbError.MISSING_INPUT)))
    for unknown in _UNKNOWN:
        program = partial(_event, code=unknown)
        yield _case(
            f"unknown-event-{unknown:x}", _ORDER, program, everywhere(refused(GhcbError.INVALID_EVENT))
        )
    for name, info1, info2, rax in _AP:
        program = partial(_event, code=ExitCode.AP_CREATION, info1=info1, info2=info2, rax=rax)
        yield Case(
            name=f"ap-{name}",
            rule="AP creation (AMD 56421; sev_snp_ap_creation)",
            program=program,
            expected=everywhere(refused(GhcbError.INVALID_INPUT)),
            vcpus=2,  # the vCPU that asks is never the one named: some kernels stop that one all the same
        )
    for name, field in (("rax", GhcbField.RAX), ("rbx", GhcbField.RBX)):
        program = partial(_unmarked, fields=(field,), code=ExitCode.EXT_GUEST_REQUEST)
        yield _case(
            f"missing-ext-{name}", "snp_handle_ext_guest_req, before certificates", program, _CERT_BUFFER
        )


CASES: Final[tuple[Case, ...]] = (
    *_table(),
    _case("any-protocol-version", _UNCHECKED, partial(_request, version=0xFFFF), _SERVED),
    _case("everything-set", _UNCHECKED, _everything_set, _SERVED),
    _case(
        "key-request-without-buffer",
        "RAX and RBX count for reports only",
        _key_request_without_buffer,
        _SERVED,
    ),
    _case(
        "unsupported-event",
        _ORDER,
        partial(_event, code=ExitCode.UNSUPPORTED_EVENT),
        everywhere(RunError(errno.EINVAL)),
    ),
    _case(
        "terminates",
        "TERM_REQUEST leaves with SEV_TERM",
        _terminates,
        everywhere(Stopped(Terminated(None, None, _GHCB))),
    ),
    _case(
        "halts-in-a-loop",
        "AP_HLT_LOOP holds the vCPU",
        partial(_event, code=ExitCode.AP_HLT_LOOP),
        everywhere(Held()),
    ),
    _case("not-registered", _ORDER, partial(_other_ghcb, register=False), _NOT_REGISTERED),
    _case(
        "another-one-registered",
        "registration is not validated",
        partial(_other_ghcb, register=True),
        _SERVED,
    ),
    _case("registration-moved-away", _ORDER, _old_ghcb, _NOT_REGISTERED),
    _case("at-zero", _ORDER, partial(_nowhere, gpa=0), everywhere(Unanswered())),
    _case("outside-memory", _ORDER, partial(_nowhere, gpa=OUTSIDE), everywhere(Unanswered())),
    _case("registered-outside-memory", _ORDER, _registered_nowhere, everywhere(Unanswered())),
    _case(
        "endless-events",
        "KVM throttles nothing",
        partial(_endless, code=ExitCode.HV_FEATURES),
        everywhere(Running()),
    ),
    _case(
        "endless-refusals", "KVM throttles nothing", partial(_endless, code=0x12345), everywhere(Running())
    ),
)
