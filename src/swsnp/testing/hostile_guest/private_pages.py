"""Pages that the guest has made private before it offers them, the GHCB itself among them.

KVM and VMM reach guest memory through the VMM's mapping whatever a page's state is: they see and change the
shared side, the guest goes on with its private side. Nothing fails and nothing leaks.
Source: Linux, arch/x86/kvm/svm/sev.c (kvm_read_guest, kvm_write_guest, kvm_vcpu_map).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import PAGE, ExitCode, GhcbField, PscEntry, PscOp
from swsnp.testing.guest_case import Case, Program, everywhere, firmware_status, with_exit
from swsnp.testing.seen import Answer, Replied, Unanswered

if TYPE_CHECKING:
    from swsnp.testing.raw_guest import RawGuest

__all__ = ["CASES"]

_INVALID_PARAM: Final = 0x16
_MINE: Final = b"\x5a" * PAGE
_RULE: Final = "whether pages are shared is not checked; the shared side is used"


def _request(guest: RawGuest, *, code: int) -> Program:
    """The shared side of a page that was converted reads as zeros."""
    page = guest.message()
    yield from guest.hide(guest.request)
    guest.poke(guest.request, bytes(page), private=True)
    guest.poke(guest.response, b"\xee" * PAGE)
    guest.ask(code, info1=guest.request, info2=guest.response, rax=guest.data, rbx=4)
    yield
    return guest.seen()


def _response(guest: RawGuest) -> Program:
    guest.poke(guest.request, bytes(guest.message()))
    yield from guest.hide(guest.response)
    guest.poke(guest.response, b"\xee" * PAGE, private=True)
    guest.ask(ExitCode.GUEST_REQUEST, info1=guest.request, info2=guest.response)
    yield
    info1, info2 = guest.reply()
    return Replied(info1=info1, info2=info2, answer=guest.answer(private=True))


def _data(guest: RawGuest) -> Program:
    """`data` of the reply is what the guest has on its own side."""
    yield from guest.hide(guest.data)
    guest.poke(guest.data, _MINE, private=True)
    seen = yield from guest.send(guest.message(), ExitCode.EXT_GUEST_REQUEST)
    mine = guest.peek(guest.data, 4, private=True)
    return Replied(info1=seen.info1, info2=seen.info2, answer=seen.answer, data=mine)


def _ghcb(guest: RawGuest) -> Program:
    """KVM finds an empty GHCB and says so, where the guest does not look."""
    yield from guest.hide(guest.ghcb)
    return (yield from _leave_with_private_ghcb(guest))


def _ghcb_by_itself(guest: RawGuest) -> Program:
    """The GHCB carries the request to make itself private."""
    entry = PscEntry.of(gfn=guest.ghcb // PAGE, operation=PscOp.PRIVATE)
    guest.poke(guest.ghcb + GhcbField.SHARED_BUFFER, bytes(8))
    guest.poke_u64(guest.ghcb + GhcbField.SHARED_BUFFER + 8, entry)
    guest.ask(ExitCode.PSC, scratch=guest.ghcb + GhcbField.SHARED_BUFFER)
    yield
    guest.cpu.memory.pvalidate(guest.ghcb, validate=True)
    return (yield from _leave_with_private_ghcb(guest))


def _leave_with_private_ghcb(guest: RawGuest) -> Program:
    guest.poke(guest.ghcb, _MINE, private=True)
    guest.cpu.ghcb_msr = guest.ghcb
    yield
    if guest.peek(guest.ghcb, PAGE, private=True) == _MINE:
        return Unanswered()
    return Replied(info1=0, info2=0)


_GARBAGE: Final = Replied(info1=0, info2=_INVALID_PARAM, answer=Answer.GARBAGE)
_KEPT: Final = Replied(info1=0, info2=0, answer=Answer.OPENED, data=_MINE[:4])
CASES: Final[tuple[Case, ...]] = (
    Case(
        name="private-request",
        rule=_RULE,
        program=partial(_request, code=ExitCode.GUEST_REQUEST),
        expected=firmware_status(_INVALID_PARAM, _GARBAGE),
    ),
    Case(
        name="private-extended-request",
        rule=_RULE,
        program=partial(_request, code=ExitCode.EXT_GUEST_REQUEST),
        expected=firmware_status(_INVALID_PARAM, _GARBAGE),
        certs=b"never asked for",
    ),
    Case(
        name="private-response",
        rule=_RULE,
        program=_response,
        expected=everywhere(Replied(info1=0, info2=0, answer=Answer.NONE)),
    ),
    Case(name="private-data", rule=_RULE, program=_data, expected=everywhere(_KEPT)),
    Case(
        name="private-data-with-certificates",
        rule=_RULE,
        program=_data,
        expected=with_exit(v1=_KEPT, l72=_KEPT),
        certs=b"\xaa" * 100,
    ),
    Case(name="private-ghcb", rule=_RULE, program=_ghcb, expected=everywhere(Unanswered())),
    Case(
        name="private-ghcb-by-itself", rule=_RULE, program=_ghcb_by_itself, expected=everywhere(Unanswered())
    ),
)
