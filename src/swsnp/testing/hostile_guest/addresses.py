"""Request, response and certificate pages: misaligned, equal, outside memory, overlapping, in the GHCB.

Source: Linux, arch/x86/kvm/svm/sev.c, snp_handle_guest_req and snp_handle_ext_guest_req; the series.
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import PAGE, ExitCode, GhcbError
from swsnp.abi.snp_message import MessageType
from swsnp.testing.guest_case import Case, Program, by_profile, everywhere, firmware_status, with_exit
from swsnp.testing.hostile_guest.ghcb_fields import refused
from swsnp.testing.raw_guest import OUTSIDE, RawGuest
from swsnp.testing.seen import Answer, Replied, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CASES"]

_GENERIC_V1: Final = 0x8000_0000 << 32
_GENERIC: Final = 0xFFFF_FFFF << 32
_INVALID_LEN: Final = 1 << 32
_INVALID_PARAM: Final = 0x16
_BAD_MEASUREMENT: Final = 0x0B
_BLOB: Final = b"\xaa" * 100
_SERVED: Final = Replied(info1=0, info2=0, answer=Answer.OPENED)
_UNCHECKED: Final = "KVM does not look at this"
_TOP: Final = 2**64 - PAGE

_MISALIGNED: Final = by_profile(
    v1=RunError(errno.EINVAL),
    v1r=RunError(errno.EINVAL),
    l612=refused(GhcbError.MISSING_INPUT),
    l72=refused(GhcbError.INVALID_INPUT),
)
_EQUAL: Final = by_profile(
    v1=_SERVED, v1r=_SERVED, l612=refused(GhcbError.MISSING_INPUT), l72=refused(GhcbError.INVALID_INPUT)
)
_DATA_MISALIGNED: Final = by_profile(
    v1=Replied(info1=0, info2=_GENERIC_V1),
    v1r=Replied(info1=0, info2=_GENERIC_V1),
    l612=refused(GhcbError.INVALID_INPUT),
    l72=refused(GhcbError.INVALID_INPUT),
)
_NO_REQUEST: Final = by_profile(
    v1=RunError(errno.EINVAL), v1r=RunError(errno.EINVAL), l612=RunError(errno.EIO), l72=RunError(errno.EIO)
)
_NO_RESPONSE: Final = by_profile(  # the series says success without having asked: a positive EINVAL
    v1=Replied(info1=0, info2=0),
    v1r=Replied(info1=0, info2=0),
    l612=RunError(errno.EIO),
    l72=RunError(errno.EIO),
)
_NO_DATA: Final = by_profile(
    v1=Replied(info1=0, info2=_GENERIC_V1),
    v1r=Replied(info1=0, info2=_GENERIC_V1),
    l612=RunError(errno.EIO),
    l72=RunError(errno.EIO),
)
_NO_DATA_AT_THE_EXIT: Final = with_exit(
    v1=Replied(info1=0, info2=_GENERIC_V1), l72=Replied(info1=0, info2=_GENERIC)
)


def _plain(guest: RawGuest, **fields: int) -> Program:
    return (yield from guest.send(guest.message(), **fields))


def _plain_at(guest: RawGuest, *, request: int = 0, response: int = 0) -> Program:
    """Request and response so many bytes behind where they belong."""
    where = {"info1": guest.request + request, "info2": guest.response + response}
    return (yield from guest.send(guest.message(), **where))


def _equal(guest: RawGuest) -> Program:
    guest.poke(guest.response, bytes(guest.message()))
    guest.ask(ExitCode.GUEST_REQUEST, info1=guest.response, info2=guest.response)
    yield
    info1, info2 = guest.reply()
    opened = guest.answer() is Answer.OPENED  # until then the page holds the request
    return Replied(info1=info1, info2=info2, answer=Answer.OPENED if opened else Answer.NONE)


def _extended(guest: RawGuest, **fields: int) -> Program:
    return (yield from guest.send(guest.message(), ExitCode.EXT_GUEST_REQUEST, **fields))


def _extended_at(guest: RawGuest, *, offset: int, rbx: int = 4) -> Program:
    """Certificates wanted so many bytes behind the data pages."""
    page = guest.message()
    return (yield from guest.send(page, ExitCode.EXT_GUEST_REQUEST, rax=guest.data + offset, rbx=rbx))


def _pages_offered(guest: RawGuest, *, npages: int) -> Program:
    """As `_extended`, and what RBX says afterwards."""
    seen = yield from guest.send(guest.message(), ExitCode.EXT_GUEST_REQUEST, rbx=npages)
    return Replied(info1=seen.info1, info2=seen.info2, answer=seen.answer, rbx=guest.rbx())


def _key_request(guest: RawGuest) -> Program:
    """Not a report: the certificate buffer is not looked at, wherever it is."""
    page = guest.message(MessageType.KEY_REQ, bytes(32))
    return (yield from guest.send(page, ExitCode.EXT_GUEST_REQUEST, rax=OUTSIDE | 1, rbx=2**64 - 1))


def _data_afterwards(guest: RawGuest, *, msg_type: int, size: int, npages: int) -> Program:
    """`data` of the reply is how the certificate buffer begins, of which nothing was zero."""
    guest.poke(guest.data, b"\xee" * PAGE)
    page = guest.message(msg_type, bytes(size))
    seen = yield from guest.send(page, ExitCode.EXT_GUEST_REQUEST, rbx=npages)
    data = guest.peek(guest.data, 26)
    return Replied(info1=seen.info1, info2=seen.info2, answer=seen.answer, data=data)


def _request_in_ghcb(guest: RawGuest) -> Program:
    """The GHCB's first 203 bytes are reserved: room for a sealed report request of 192."""
    guest.poke(guest.response, b"\xee" * PAGE)
    guest.poke(guest.ghcb, bytes(guest.message()[:192]))
    guest.ask(ExitCode.GUEST_REQUEST, info1=guest.ghcb, info2=guest.response)
    yield
    return guest.seen()


def _ghcb_as_request(guest: RawGuest) -> Program:
    guest.poke(guest.ghcb, bytes(PAGE))
    return (yield from guest.send(guest.message(), info1=guest.ghcb))


def _response_in_ghcb(guest: RawGuest, *, msg_type: int, size: int) -> Program:
    """KVM copies the response over the GHCB, then puts its reply into it."""
    guest.poke(guest.request, bytes(guest.message(msg_type, bytes(size))))
    guest.ask(ExitCode.GUEST_REQUEST, info1=guest.request, info2=guest.ghcb)
    yield
    info1, info2 = guest.reply()
    return Replied(info1=info1, info2=info2, answer=guest.answer(guest.ghcb))


def _data_over(guest: RawGuest, page: str) -> Program:
    """The certificate buffer begins at the guest's own request page, response page or GHCB."""
    return (yield from guest.send(guest.message(), ExitCode.EXT_GUEST_REQUEST, rax=getattr(guest, page)))


def _table() -> Iterator[Case]:
    aligned = "request and response addresses: aligned and different"
    data = "certificate buffer: RAX aligned, even if RBX is 0"
    memory = "request and response are copied through the memslot, or it fails"
    for name, at_request, at_response in (
        ("request-misaligned", 8, 0),
        ("response-misaligned", 0, 0x10),
        ("both-misaligned", 1, 1),
    ):
        program = partial(_plain_at, request=at_request, response=at_response)
        yield Case(name=name, rule=aligned, program=program, expected=_MISALIGNED)
    yield Case(name="request-equals-response", rule=aligned, program=_equal, expected=_EQUAL)
    for name, offset, rbx in (("data-misaligned", 8, 4), ("data-misaligned-no-pages", 0xFFF, 0)):
        program = partial(_extended_at, offset=offset, rbx=rbx)
        yield Case(name=name, rule=data, program=program, expected=_DATA_MISALIGNED)
    for place, gpa in (("outside-memory", OUTSIDE), ("at-the-top", _TOP)):
        for kind, send in (("plain", _plain), ("extended", _extended)):
            no_request = _NO_REQUEST if kind == "plain" else _NO_DATA
            request, response = partial(send, info1=gpa), partial(send, info2=gpa)
            yield Case(name=f"{kind}-request-{place}", rule=memory, program=request, expected=no_request)
            yield Case(name=f"{kind}-response-{place}", rule=memory, program=response, expected=_NO_RESPONSE)
        program = partial(_extended, rax=gpa)
        yield Case(
            name=f"data-{place}", rule="the empty table is written", program=program, expected=_NO_DATA
        )
        yield Case(
            name=f"data-{place}-with-certificates",
            rule="the VMM cannot deliver: EIO",
            program=program,
            expected=_NO_DATA_AT_THE_EXIT,
            certs=_BLOB,
        )
    yield Case(
        name="data-outside-memory-no-pages",
        rule="RBX 0: nothing is written",
        program=partial(_extended, rax=OUTSIDE, rbx=0),
        expected=everywhere(_SERVED),
    )
    yield Case(
        name="data-ignored-for-key-request",
        rule="RAX and RBX count for reports only; no exit",
        program=_key_request,
        expected=everywhere(_SERVED),
        certs=_BLOB,
    )


def _sizes() -> Iterator[Case]:
    rule = "RBX has no upper bound; the series' exit has 32 bits for it"
    for npages in (1 << 32, (1 << 32) + 1, 1 << 52, 2**64 - 1):
        served = Replied(info1=0, info2=0, answer=Answer.OPENED, rbx=npages)
        program = partial(_pages_offered, npages=npages)
        name = f"rbx-{npages:x}"
        yield Case(name=name, rule=rule, program=program, expected=everywhere(served))
        too_small = Replied(info1=0, info2=_INVALID_LEN, rbx=1)
        expected = with_exit(v1=served if npages & 0xFFFF_FFFF else too_small, l72=served)
        yield Case(
            name=f"{name}-with-certificates", rule=rule, program=program, expected=expected, certs=_BLOB
        )
    for npages, size in ((0, 1), (1, PAGE + 1), (3, 4 * PAGE), (4, 5 * PAGE)):
        needed = Replied(info1=0, info2=_INVALID_LEN, rbx=-(-size // PAGE))
        yield Case(
            name=f"rbx-{npages}-for-{size}-bytes",
            rule="too small: RBX says how many pages, the firmware is not asked",
            program=partial(_pages_offered, npages=npages),
            expected=with_exit(v1=needed, l72=needed),
            certs=b"\xaa" * size,
        )
    beyond = Replied(info1=0, info2=_GENERIC_V1), Replied(info1=0, info2=_GENERIC)
    yield Case(
        name="data-reaches-beyond-memory",
        rule="the VMM cannot deliver: EIO",
        program=partial(_extended, rax=(256 << 20) - PAGE),
        expected=with_exit(v1=beyond[0], l72=beyond[1]),
        certs=b"\xaa" * (2 * PAGE),
    )


def _tables() -> Iterator[Case]:
    rule = "without certificate exit: an empty table of 24 zero bytes, for reports and if RBX is not 0"
    key, report = int(MessageType.KEY_REQ), int(MessageType.REPORT_REQ)
    for name, msg_type, size, npages, data in (
        ("empty-table", report, 96, 4, bytes(24) + b"\xee\xee"),
        ("no-table-without-pages", report, 96, 0, b"\xee" * 26),
        ("no-table-for-a-key", key, 32, 4, b"\xee" * 26),
    ):
        yield Case(
            name=f"data-{name}",
            rule=rule,
            program=partial(_data_afterwards, msg_type=msg_type, size=size, npages=npages),
            expected=everywhere(Replied(info1=0, info2=0, answer=Answer.OPENED, data=data)),
        )


def _overlaps() -> Iterator[Case]:
    rule = "overlaps are not checked; what is written last stays"
    ruined = Replied(info1=0, info2=_BAD_MEASUREMENT, answer=Answer.GARBAGE)
    yield Case(
        name="data-over-request",
        rule=f"{rule}: the empty table ends the request's tag",
        program=partial(_data_over, page="request"),
        expected=firmware_status(_BAD_MEASUREMENT, ruined),
    )
    no_message = Replied(info1=0, info2=_INVALID_PARAM, answer=Answer.GARBAGE)
    yield Case(
        name="certificates-over-request",
        rule=f"{rule}: the request is copied after the certificates came",
        program=partial(_data_over, page="request"),
        expected={
            name: seen
            for name, seen in firmware_status(_INVALID_PARAM, no_message).items()
            if name != "linux-6.12"
        },
        certs=b"\xff" * 200,
    )
    for name, page, certs in (
        ("data-over-response", "response", None),
        ("data-over-ghcb", "ghcb", None),
        ("certificates-over-response", "response", b"\xff" * PAGE),
        ("certificates-over-ghcb", "ghcb", b"\xff" * PAGE),
    ):
        program = partial(_data_over, page=page)
        expected = everywhere(_SERVED) if certs is None else with_exit(v1=_SERVED, l72=_SERVED)
        yield Case(name=name, rule=rule, program=program, expected=expected, certs=certs)
    yield Case(
        name="request-inside-ghcb", rule=_UNCHECKED, program=_request_in_ghcb, expected=everywhere(_SERVED)
    )
    yield Case(
        name="ghcb-as-request",
        rule="the firmware finds no header",
        program=_ghcb_as_request,
        expected=firmware_status(_INVALID_PARAM, no_message),
    )
    key, report = MessageType.KEY_REQ, MessageType.REPORT_REQ
    yield Case(
        name="short-response-inside-ghcb",
        rule=f"{rule}: 160 bytes end before the first field",
        program=partial(_response_in_ghcb, msg_type=key, size=32),
        expected=everywhere(_SERVED),
    )
    yield Case(
        name="long-response-inside-ghcb",
        rule=f"{rule}: KVM's reply lies in the message",
        program=partial(_response_in_ghcb, msg_type=report, size=96),
        expected=everywhere(Replied(info1=0, info2=0, answer=Answer.GARBAGE)),
    )


CASES: Final[tuple[Case, ...]] = (*_table(), *_sizes(), *_tables(), *_overlaps())
