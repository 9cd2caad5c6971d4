"""Garbage in the GHCB MSR. Source: AMD 56421, MSR protocol; sev_handle_vmgexit_msr_protocol of Linux."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import MsrCode
from swsnp.testing.guest_case import Case, Program, ProgramFactory, everywhere
from swsnp.testing.raw_guest import OUTSIDE
from swsnp.testing.seen import Held, MsrReplied, Running, Stopped, Unanswered
from swsnp.vmm.stop import Terminated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.testing.raw_guest import RawGuest
    from swsnp.testing.seen import Seen

__all__ = ["CASES"]

_ALL: Final = 2**64 - 1
_LOW: Final = 0xFFFF_FFFF
_PSC_ERROR: Final = 0x8000_0000_0000_0015
_UNKNOWN: Final = (
    0x001, 0x003, 0x005, 0x007, 0x008, 0x00F, 0x011, 0x013, 0x015, 0x016, 0x017,
    0x018, 0x07F, 0x081, 0x101, 0x7FF, 0xF00, 0xF03, 0xFFF,
)  # fmt: skip
"""Responses, numbers that KVM does not know, and codes of other hypervisors."""
_JUNK: Final = 0xDEAD_BEEF_CAFE_0000


def _ask(guest: RawGuest, *, msr: int, look_at: int = _ALL) -> Program:
    reply = yield from guest.msr(msr)
    return MsrReplied(reply & look_at)


def _unanswered(guest: RawGuest, *, msr: int) -> Program:
    reply = yield from guest.msr(msr)
    return Unanswered() if reply == msr else MsrReplied(reply)


def _endless(guest: RawGuest, *, msr: int) -> Program:
    while True:
        yield from guest.msr(msr)


def _psc(operation: int, gpa: int) -> int:
    return operation << 52 | gpa | MsrCode.PSC_REQ


def _table() -> Iterator[tuple[str, str, ProgramFactory, Seen]]:
    for code in _UNKNOWN:
        rule = "an unknown request leaves the MSR as it was"
        yield f"unknown-{code:03x}", rule, partial(_unanswered, msr=_JUNK | code), Unanswered()
    for operation in (0, 3, 4, 15):
        rule = "page state change: only private and shared"
        program = partial(_ask, msr=_psc(operation, 0x80_0000))
        yield f"psc-operation-{operation}", rule, program, MsrReplied(_PSC_ERROR)
    outside = "no memory: to shared is accepted, to private is not (QEMU)"
    yield "psc-private-outside", outside, partial(_ask, msr=_psc(1, OUTSIDE)), MsrReplied(_PSC_ERROR)
    yield "psc-shared-outside", outside, partial(_ask, msr=_psc(2, OUTSIDE)), MsrReplied(MsrCode.PSC_RESP)
    high = _psc(1, 0x000F_FFFF_FFFF_F000)
    yield "psc-private-highest-frame", outside, partial(_ask, msr=high), MsrReplied(_PSC_ERROR)
    for name, frame in (("outside", OUTSIDE), ("highest", 0xFFFF_FFFF_FFFF_F000), ("zero", 0)):
        rule = "registration is stored without validation"
        program = partial(_ask, msr=frame | MsrCode.REGISTER_GPA_REQ)
        yield f"register-{name}", rule, program, MsrReplied(frame | MsrCode.REGISTER_GPA_RESP)
    preferred = MsrReplied(0xFFFF_FFFF_FFFF_F000 | MsrCode.PREFERRED_GPA_RESP)
    yield (
        "preferred-with-junk",
        "no preference",
        partial(_ask, msr=_JUNK | MsrCode.PREFERRED_GPA_REQ),
        preferred,
    )
    info = MsrReplied(0x0002_0001_3300_0001)
    yield "info-with-junk", "versions 1 to 2, C-bit 51", partial(_ask, msr=_JUNK | MsrCode.SEV_INFO_REQ), info
    features = MsrReplied(0x3081)
    yield "features-with-junk", "features 3", partial(_ask, msr=_JUNK | MsrCode.HV_FEATURES_REQ), features
    for register in range(4):
        request = 0xFFFF_FFFF << 32 | register << 30 | 0x2ABC_D000 | MsrCode.CPUID_REQ
        kept = MsrReplied(register << 30 | 0x2ABC_D000 | MsrCode.CPUID_RESP)
        rule = "CPUID: bits 31:12 come back as they were"
        yield f"cpuid-register-{register}", rule, partial(_ask, msr=request, look_at=_LOW), kept
    for number, code in ((0, 0), (1, 1), (15, 255)):
        msr = code << 16 | number << 12 | MsrCode.TERM_REQ
        ended = Stopped(Terminated(number, code, msr))
        yield f"terminate-{number}-{code}", "SEV_TERM with the MSR", partial(_unanswered, msr=msr), ended
    held = partial(_unanswered, msr=int(MsrCode.AP_RESET_HOLD_REQ))
    yield "reset-hold", "held until a start-up interrupt, which nobody sends", held, Held()
    yield "endless", "KVM throttles nothing", partial(_endless, msr=int(MsrCode.HV_FEATURES_REQ)), Running()
    flip = partial(_endless, msr=_psc(2, 0x80_0000))
    yield "endless-page-state-changes", "KVM throttles nothing", flip, Running()


CASES: Final[tuple[Case, ...]] = tuple(
    Case(name=f"msr-{name}", rule=rule, program=program, expected=everywhere(seen))
    for name, rule, program, seen in _table()
)
