"""What a second vCPU changes while the first is in its certificate exit.

At completion KVM uses the event's fields as it saved them, and copies the request page afresh.
Source: Linux, arch/x86/kvm/svm/sev.c, snp_complete_req_certs; the series, snp_complete_ext_guest_req.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.ghcb import PAGE, ExitCode, GhcbField
from swsnp.abi.snp_message import MSG_TYPE_OFFSET, MessageType
from swsnp.testing.guest_case import Case, Program, firmware_status, with_exit
from swsnp.testing.raw_guest import OUTSIDE, RawGuest
from swsnp.testing.seen import Answer, Replied, RunError, Unanswered

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from swsnp.testing.seen import Seen

__all__ = ["CASES"]

_CERTS: Final = b"\xaa" * 100
_BAD_MEASUREMENT: Final = 0x0B
_INVALID_PARAM: Final = 0x16
_AEAD_OFLOW: Final = 0x1D
_GENERIC_V1: Final = 0x8000_0000 << 32
_REPORT, _KEY = bytes([MessageType.REPORT_REQ]), bytes([MessageType.KEY_REQ])
_OTHER_DATA: Final = b"another nonce".ljust(64, b"\0")
_REPORT_DATA_AT: Final = 0x20 + 0x50
_EXT: Final = int(ExitCode.EXT_GUEST_REQUEST)


def _nothing() -> Generator[None, None, None]:
    """The end of a second vCPU's work that needed no exit of its own."""
    yield from ()


def _first_ghcb(guest: RawGuest) -> int:
    return guest.booted.layout.ghcb_pages[0]


def _report(guest: RawGuest) -> Program:
    return (yield from guest.send(guest.message(), _EXT))


def _report_and_data(guest: RawGuest) -> Program:
    """As `_report`, with RBX and the certificates that came."""
    guest.poke(guest.data, bytes(PAGE))
    seen = yield from guest.send(guest.message(), _EXT)
    certs = guest.peek(guest.data, 4)
    return Replied(info1=seen.info1, info2=seen.info2, answer=seen.answer, rbx=guest.rbx(), data=certs)


def _flip_type(guest: RawGuest) -> Generator[None, None, Any]:
    guest.poke(guest.request + MSG_TYPE_OFFSET, _KEY)
    return _nothing()


def _key_disguised(guest: RawGuest) -> Program:
    """A sealed KEY_REQ whose type byte says REPORT_REQ until KVM has looked at it."""
    page = guest.message(MessageType.KEY_REQ, bytes(32))
    page[MSG_TYPE_OFFSET] = MessageType.REPORT_REQ
    return (yield from guest.send(page, _EXT))


def _change_buffer(guest: RawGuest) -> Generator[None, None, Any]:
    guest.poke_u64(_first_ghcb(guest) + GhcbField.RAX, OUTSIDE)
    guest.poke_u64(_first_ghcb(guest) + GhcbField.RBX, 0)
    return _nothing()


def _change_addresses(guest: RawGuest) -> Generator[None, None, Any]:
    guest.poke_u64(_first_ghcb(guest) + GhcbField.SW_EXIT_INFO_1, OUTSIDE)
    guest.poke_u64(_first_ghcb(guest) + GhcbField.SW_EXIT_INFO_2, guest.data)
    guest.poke(_first_ghcb(guest) + GhcbField.GHCB_USAGE, b"\x01")
    return _nothing()


def _ruin_request(guest: RawGuest) -> Generator[None, None, Any]:
    guest.poke(guest.request, b"\xff" * PAGE)
    return _nothing()


def _replace_request(guest: RawGuest) -> Generator[None, None, Any]:
    guest.poke(guest.request, bytes(guest.message(payload=_OTHER_DATA + bytes(32))))
    return _nothing()


def _report_data(guest: RawGuest) -> Program:
    """`data` of the reply is the beginning of the report's REPORT_DATA."""
    seen = yield from guest.send(guest.message(), _EXT)
    data = guest.payload()[_REPORT_DATA_AT : _REPORT_DATA_AT + 7]
    return Replied(info1=seen.info1, info2=seen.info2, answer=seen.answer, data=data)


def _hide_response(guest: RawGuest) -> Generator[None, None, Any]:
    return guest.hide(guest.response)


def _hidden_response(guest: RawGuest) -> Program:
    guest.poke(guest.request, bytes(guest.message()))
    guest.ask(_EXT, info1=guest.request, info2=guest.response, rax=guest.data, rbx=4)
    yield
    info1, info2 = guest.reply()
    zeros = guest.peek(guest.response, PAGE, private=True) == bytes(PAGE)
    return Replied(info1=info1, info2=info2, answer=Answer.NONE if zeros else Answer.GARBAGE)


def _hide_data(guest: RawGuest) -> Generator[None, None, Any]:
    return guest.hide(guest.data)


def _hidden_data(guest: RawGuest) -> Program:
    seen = yield from guest.send(guest.message(), _EXT)
    data = guest.peek(guest.data, 4, private=True)
    return Replied(info1=seen.info1, info2=seen.info2, answer=seen.answer, data=data)


def _hide_ghcb(guest: RawGuest) -> Generator[None, None, Any]:
    return guest.hide(_first_ghcb(guest))


def _hidden_ghcb(guest: RawGuest) -> Program:
    guest.poke(guest.request, bytes(guest.message()))
    guest.ask(_EXT, info1=guest.request, info2=guest.response, rax=guest.data, rbx=4)
    yield
    untouched = guest.peek(guest.ghcb, PAGE, private=True) == bytes(PAGE)
    return Unanswered() if untouched else Replied(info1=0, info2=0)


def _send_it_first(guest: RawGuest) -> Generator[None, None, Any]:
    """The second vCPU sends the same message, with an answer page of its own."""
    guest.ask(int(ExitCode.GUEST_REQUEST), info1=guest.request, info2=guest.data + PAGE)
    yield


def _case(name: str, program: Any, meanwhile: Any, expected: Mapping[str, Seen]) -> Case:
    return Case(
        name=f"meanwhile-{name}",
        rule="saved event fields, request read at completion",
        program=program,
        meanwhile=meanwhile,
        expected=expected,
        certs=_CERTS,
    )


def _refused(status: int, answer: Answer = Answer.GARBAGE) -> Mapping[str, Seen]:
    seen = firmware_status(status, Replied(info1=0, info2=status, answer=answer))
    return {name: each for name, each in seen.items() if name != "linux-6.12"}


_OK: Final = Replied(info1=0, info2=0, answer=Answer.OPENED)
_SAVED: Final = Replied(info1=0, info2=0, answer=Answer.OPENED, rbx=4, data=_CERTS[:4])
_UNSEEN: Final = Replied(info1=0, info2=0, answer=Answer.NONE)
_EMPTY: Final = Replied(info1=0, info2=0, answer=Answer.OPENED, data=bytes(4))
_OTHER: Final = Replied(info1=0, info2=0, answer=Answer.OPENED, data=_OTHER_DATA[:7])
CASES: Final[tuple[Case, ...]] = (
    _case("type-flipped", _report, _flip_type, _refused(_BAD_MEASUREMENT)),
    _case("disguise-dropped", _key_disguised, _flip_type, with_exit(v1=_OK, l72=_OK)),
    _case("buffer-moved", _report_and_data, _change_buffer, with_exit(v1=_SAVED, l72=_SAVED)),
    _case("addresses-moved", _report, _change_addresses, with_exit(v1=_OK, l72=_OK)),
    _case("request-ruined", _report, _ruin_request, _refused(_INVALID_PARAM)),
    _case("request-replaced", _report_data, _replace_request, with_exit(v1=_OTHER, l72=_OTHER)),
    _case("response-hidden", _hidden_response, _hide_response, with_exit(v1=_UNSEEN, l72=_UNSEEN)),
    _case("data-hidden", _hidden_data, _hide_data, with_exit(v1=_EMPTY, l72=_EMPTY)),
    _case("ghcb-hidden", _hidden_ghcb, _hide_ghcb, with_exit(v1=Unanswered(), l72=Unanswered())),
    _case(
        "same-message-twice",
        _report,
        _send_it_first,
        with_exit(  # Linux copies its bounce page whatever the status: the first answer of this message
            v1=RunError(5),
            v1r=Replied(info1=0, info2=_GENERIC_V1 | _AEAD_OFLOW),
            l72=Replied(info1=0, info2=_AEAD_OFLOW, answer=Answer.OPENED),
        ),
    ),
)
