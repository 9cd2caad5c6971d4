"""The catalogue of hostile hosts, against the built-in guest's boot code and sev-guest driver.

The expectations are those of Linux's driver, generation `K_C`, over KVMs from Linux 6.12 on.
Source: Linux, drivers/virt/coco/sev-guest, arch/x86/coco/sev, arch/x86/boot; AMD 56421 (GHCB 2.0).
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from swsnp.abi.ghcb import PAGE, MsrCode
from swsnp.abi.sev_guest import NO_FW_CALL
from swsnp.machine.answers import GuestStopped
from swsnp.testing.hostile_host import attacks as do
from swsnp.testing.hostile_host.interposer import Attack, HostileHost
from swsnp.testing.program_saw import ProgramSaw, ask_report, served
from swsnp.testing.seen import Running, StillRunning, Stopped
from swsnp.vmm.stop import Terminated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.machine.machine import Machine
    from swsnp.machine.virtual_machine import VirtualMachine

__all__ = ["HOSTILE_HOST", "HostCase", "HostOutcome", "play_host"]

HostOutcome: TypeAlias = ProgramSaw | Stopped | Running | None
"""What a program got, how the guest ended, or None: the guest booted."""
_MakeAttack: TypeAlias = "Callable[[bytes, bytes], Attack]"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCase:
    """One way in which a host cheats.

    Attributes:
        name: for test ids.
        rule: what decides the result.
        attack: makes the attack from request and response page of an earlier exchange of the same guest.
        expected: what a program's request gets under attack, and its next one from an honest host; or how a
            boot ends.
        certs_size: bytes of certificate buffer; None: a plain report is asked for.
        at_boot: the guest boots under attack, and that is all.
    """

    name: str
    rule: str
    attack: Callable[[bytes, bytes], Attack] = field(repr=False)
    expected: tuple[HostOutcome, ...]
    certs_size: int | None = None
    at_boot: bool = False

    def __str__(self) -> str:
        return self.name


def play_host(case: HostCase, machine: Machine, *, budget: int = 200) -> tuple[HostOutcome, ...]:
    """Boot a VM of its own on the machine and attack its guest.

    Args:
        case: from `HOSTILE_HOST`, or a user's own.
        machine: made with `clock=FakeClock()`, or cases in which the guest waits take a minute.
        budget: how often one guest program may leave the guest.

    Returns:
        As `HostCase.expected`.
    """
    seen = do.Record()
    host = HostileHost(case.attack(b"", b"") if case.at_boot else seen, budget=budget)
    with machine.create_vm(certs=None) as vm, host.between(vm):
        if case.at_boot:
            return (_boot(vm),)
        vm.boot()
        ask_report(vm)
        host.attack = case.attack(seen.requests[0], seen.responses[0])
        first = _ask(vm, case.certs_size)
        host.attack = Attack()
        return first, _ask(vm, case.certs_size)


def _boot(vm: VirtualMachine) -> HostOutcome:
    try:
        vm.boot()
    except GuestStopped as stopped:
        return Stopped(stopped.reason)
    except StillRunning as still:
        return Running(still.exits)
    return None


def _ask(vm: VirtualMachine, certs_size: int | None) -> HostOutcome:
    try:
        return ask_report(vm, certs_size=certs_size)
    except GuestStopped as stopped:
        return Stopped(stopped.reason)
    except StillRunning as still:
        return Running(still.exits)


# What a program gets

_WIPED: Final = ProgramSaw(result=-errno.ENOTTY, key_kept=False)
_BAD: Final = (ProgramSaw(result=-errno.EBADMSG, key_kept=False), _WIPED)
_OUT_OF_STEP: Final = ProgramSaw(result=-errno.EIO, exitinfo2=0x1D, key_kept=False)
_OK: Final = (served(), served())


def _lost(result: int, exitinfo2: int) -> tuple[ProgramSaw, ProgramSaw]:
    """An exchange that failed: the key is wiped."""
    return ProgramSaw(result=result, exitinfo2=exitinfo2, key_kept=False), _WIPED


def _too_small(npages: int, then: ProgramSaw, **fields: int | bool) -> tuple[ProgramSaw, ProgramSaw]:
    certs_len = npages << 12 & 0xFFFF_FFFF
    first = ProgramSaw(result=-errno.EIO, exitinfo2=do.INVALID_LEN, certs_len=certs_len)
    return first if not fields else ProgramSaw(certs_len=certs_len, **fields), then  # type: ignore[arg-type]


def _flip(offset: int, page: bytes) -> bytes:
    return page[:offset] + bytes([page[offset] ^ 0x40]) + page[offset + 1 :]


def _put(offset: int, data: bytes, page: bytes) -> bytes:
    return page[:offset] + data + page[offset + len(data) :]


def _same(attack: Callable[[], Attack]) -> Callable[[bytes, bytes], Attack]:
    """An attack that needs nothing of the earlier exchange."""
    return lambda _request, _response: attack()


def _response(change: Callable[[bytes], bytes]) -> Callable[[bytes, bytes], Attack]:
    return _same(partial(do.ChangeResponse, change))


def _foreign(page: bytes) -> bytes:
    """The same header, sealed under another guest's key: here, other bytes in tag and ciphertext."""
    return (
        bytes(each ^ 0xFF for each in page[:16]) + page[16:0x60] + bytes(each ^ 0xFF for each in page[0x60:])
    )


_AUTHENTICATED: Final = (0x00, 0x0F, 0x20, 0x27, *range(0x30, 0x40), 0x5F, 0x60, 0x100, 0x51F)
_FREE: Final = (0x10, 0x1F, 0x28, 0x2F, 0x520, 0xFFF)


def _responses() -> Iterator[HostCase]:
    order = "sequence number, type, version, size, tag; else EBADMSG, and the key is wiped"
    for offset in _AUTHENTICATED:
        name = f"response-byte-{offset:03x}"
        yield HostCase(name=name, rule=order, attack=_response(partial(_flip, offset)), expected=_BAD)
    for offset in _FREE:
        name, rule = f"response-free-byte-{offset:03x}", "nobody authenticates these bytes"
        yield HostCase(name=name, rule=rule, attack=_response(partial(_flip, offset)), expected=_OK)
    changes: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
        ("zeros", lambda _: bytes(PAGE)),
        ("ones", lambda _: b"\xff" * PAGE),
        ("of-another-guest", _foreign),
        ("cut-after-the-header", lambda page: page[:0x60]),
        ("cut-in-the-report", lambda page: page[:0x300]),
        ("cut-by-one-byte", lambda page: page[:0x51F]),
        ("type-of-a-key", partial(_put, 0x34, b"\x04")),
        ("type-of-the-request", partial(_put, 0x34, b"\x05")),
        ("version-0", partial(_put, 0x35, b"\x00")),
        ("version-2", partial(_put, 0x35, b"\x02")),
        ("size-0", partial(_put, 0x36, b"\x00\x00")),
        ("size-4000", partial(_put, 0x36, b"\xa0\x0f")),
        ("size-4001", partial(_put, 0x36, b"\xa1\x0f")),
        ("size-ffff", partial(_put, 0x36, b"\xff\xff")),
        ("number-of-the-request", partial(_put, 0x20, b"\x03")),
    )
    for name, change in changes:
        yield HostCase(name=f"response-{name}", rule=order, attack=_response(change), expected=_BAD)
    replay: Callable[[bytes, bytes], Attack] = lambda _, response: do.ReplayResponse(response)  # noqa: E731
    yield HostCase(name="response-replayed", rule=order, attack=replay, expected=_BAD)
    yield HostCase(
        name="response-is-the-request",
        rule=order,
        attack=lambda request, _: do.ChangeResponse(lambda _: request),
        expected=_BAD,
    )
    once = "the guest copies a response once, then looks"
    yield HostCase(name="response-flickers", rule=once, attack=_same(do.Flicker), expected=_OK)


def _requests() -> Iterator[HostCase]:
    tag, number, header = _lost(-errno.EIO, 0x0B), _lost(-errno.EIO, 0x1D), _lost(-errno.EIO, 0x16)
    status = "a firmware status: EIO, the word as it is, and the key is wiped"
    for name, change, expected in (
        ("changed", partial(_flip, 0x60), tag),
        ("renumbered", partial(_flip, 0x20), tag),
        ("of-zeros", lambda _: bytes(PAGE), header),
        ("for-no-key", partial(_put, 0x3C, b"\x04"), header),
    ):
        attack = _same(partial(do.ChangeRequest, change))
        yield HostCase(name=f"request-{name}", rule=status, attack=attack, expected=expected)
    earlier: Callable[[bytes, bytes], Attack] = lambda request, _: do.ReplayRequest(request)  # noqa: E731
    yield HostCase(name="request-replayed", rule=status, attack=earlier, expected=number)
    twice = "the second time is refused by the firmware, the first answer stands"
    yield HostCase(name="request-delivered-twice", rule=twice, attack=_same(do.DeliverTwice), expected=_OK)
    dropped = _same(partial(do.Reply, 0, 0))
    yield HostCase(name="request-dropped", rule="no answer is no answer", attack=dropped, expected=_BAD)


_GP, _UD = 0x8000_030D, 0x8000_0306
_WORDS: Final = (
    ("malformed", 2, 5, (2, NO_FW_CALL)),
    ("malformed-0", 2, 0, (2, NO_FW_CALL)),
    ("action-3", 3, 0, (2, NO_FW_CALL)),
    ("action-all-ones", 0xFFFF_FFFF, 0, (2, NO_FW_CALL)),
    ("exception-gp", 1, _GP, (4, NO_FW_CALL)),
    ("exception-ud", 1, _UD, (4, NO_FW_CALL)),
    ("exception-page-fault", 1, 0x8000_030E, (2, NO_FW_CALL)),
    ("exception-not-valid", 1, 0x0000_030D, (2, NO_FW_CALL)),
    ("exception-interrupt", 1, 0x8000_000D, (2, NO_FW_CALL)),
    ("firmware-16", 0, 0x16, (-errno.EIO, 0x16)),
    ("firmware-ffffffff", 0, 0xFFFF_FFFF, (-errno.EIO, 0xFFFF_FFFF)),
    ("generic", 0, 0xFFFF_FFFF << 32, (-errno.EIO, 0xFFFF_FFFF << 32)),
    ("generic-of-the-series", 0, 1 << 63, (-errno.EIO, 1 << 63)),
    ("unknown", 0, 3 << 32, (-errno.EIO, 3 << 32)),
    ("too-small-and-firmware", 0, 1 << 32 | 0x16, (-errno.EIO, 1 << 32 | 0x16)),
    ("busy-and-firmware", 0, 2 << 32 | 1, (-errno.EIO, 2 << 32 | 1)),
    ("all-ones", 0, 2**64 - 1, (-errno.EIO, 2**64 - 1)),
)
"""Name, exit info 1 and 2, and what the program gets."""


def _replies() -> Iterator[HostCase]:
    rule = "low half of info 1, then info 2; everything but success, BUSY and INVALID_LEN wipes the key"
    for name, info1, info2, got in _WORDS:
        for delivered in (False, True):
            attack = _same(partial(do.Reply, info1, info2, delivered=delivered))
            suffix = "-after-delivery" if delivered else ""
            yield HostCase(name=f"reply-{name}{suffix}", rule=rule, attack=attack, expected=_lost(*got))
    high = _same(partial(do.Reply, 1 << 32, 0, delivered=True))
    yield HostCase(name="reply-high-half", rule="high half of info 1 is ignored", attack=high, expected=_OK)
    lie = _same(partial(do.Reply, 0, 0, rbx=2**64 - 1, delivered=True))
    name, rule = "reply-with-rbx", "RBX counts with INVALID_LEN only"
    yield HostCase(name=name, rule=rule, attack=lie, expected=_OK)
    plain = ProgramSaw(result=-errno.EIO, exitinfo2=do.INVALID_LEN)
    rule = "INVALID_LEN for a plain request: EIO, and the key is kept"
    for name, delivered, then in (("", False, _OUT_OF_STEP), ("-after-delivery", True, served())):
        attack = _same(partial(do.Reply, 0, do.INVALID_LEN, rbx=9, delivered=delivered))
        yield HostCase(name=f"plain-too-small{name}", rule=rule, attack=attack, expected=(plain, then))


def _waiting() -> Iterator[HostCase]:
    yield HostCase(
        name="busy-for-ever",
        rule="BUSY more than 60 s after the first send: ETIMEDOUT, and the key is wiped",
        attack=_same(do.Busy),
        expected=_lost(-errno.ETIMEDOUT, do.BUSY),
    )
    rule = "BUSY: 2 s later the same bytes are sent again"
    for times in (1, 31):
        attack = _same(partial(do.Busy, times))
        yield HostCase(name=f"busy-{times}-times", rule=rule, attack=attack, expected=_OK)
    yield HostCase(
        name="busy-32-times",
        rule="BUSY more than 60 s after the first send: ETIMEDOUT, and the key is wiped",
        attack=_same(partial(do.Busy, 32)),
        expected=_lost(-errno.ETIMEDOUT, do.BUSY),
    )
    yield HostCase(
        name="busy-after-delivery",
        rule="the repeated message is refused by its number",
        attack=_same(do.BusyAfterDelivery),
        expected=(_OUT_OF_STEP, _WIPED),
    )


def _sizes() -> Iterator[HostCase]:
    rule = "INVALID_LEN: certs_len is RBX pages in 32 bits, the message is used up as a plain request"
    fine = served(b"", size=2 * PAGE)
    for npages in (0, 1, 5, 0x1_0000, 0xF_FFFF, 1 << 20, 1 << 52, 2**64 - 1):
        yield HostCase(
            name=f"too-small-rbx-{npages:x}",
            rule=rule,
            attack=_same(partial(do.TooSmall, npages)),
            expected=_too_small(npages, fine),
            certs_size=2 * PAGE,
        )
    masked = "an error of the plain repetition is masked, and the key is kept"
    out_of_step = ProgramSaw(result=-errno.EIO, exitinfo2=0x1D, key_kept=False)
    for name, reply in (
        ("dropped", partial(do.Reply, 0, 0)),
        ("firmware-error", partial(do.Reply, 0, 0x16)),
        ("too-small-again", partial(do.Reply, 0, do.INVALID_LEN)),
    ):
        yield HostCase(
            name=f"too-small-then-{name}",
            rule=masked,
            attack=_same(lambda reply=reply: do.TooSmall(5, reply())),  # type: ignore[misc]
            expected=_too_small(5, out_of_step),
            certs_size=2 * PAGE,
        )
    lost = "only EIO keeps the key"
    for name, result, fallback in (
        ("busy-for-ever", -errno.ETIMEDOUT, do.Busy),
        ("malformed", 2, partial(do.Reply, 2, 5)),
        ("exception", 4, partial(do.Reply, 1, _GP)),
    ):
        yield HostCase(
            name=f"too-small-then-{name}",
            rule=lost,
            attack=_same(lambda fallback=fallback: do.TooSmall(5, fallback())),  # type: ignore[misc]
            expected=_too_small(5, _WIPED, result=result, exitinfo2=do.INVALID_LEN, key_kept=False),
            certs_size=2 * PAGE,
        )
    yield HostCase(
        name="certificates-replaced",
        rule="the driver copies the buffer as it is; certificates are for verifiers to judge",
        attack=_same(partial(do.Certificates, b"\xff" * (2 * PAGE))),
        expected=(served(b"\xff" * (2 * PAGE), size=2 * PAGE), fine),
        certs_size=2 * PAGE,
    )


# The boot


def _ended(reason_set: int, reason_code: int) -> tuple[HostOutcome]:
    msr = reason_code << 16 | reason_set << 12 | MsrCode.TERM_REQ
    return (Stopped(Terminated(reason_set, reason_code, msr)),)


def _info(highest: int, lowest: int, code: int = MsrCode.SEV_INFO_RESP) -> int:
    return highest << 48 | lowest << 32 | 51 << 24 | code


_GHCB: Final = 0x11_0000
_MSR: Final = (
    ("versions-3-to-4", MsrCode.SEV_INFO_REQ, _info(4, 3), _ended(0, 0)),
    ("version-0", MsrCode.SEV_INFO_REQ, _info(0, 0), _ended(0, 0)),
    ("info-with-another-code", MsrCode.SEV_INFO_REQ, _info(2, 1, MsrCode.CPUID_RESP), _ended(0, 0)),
    ("info-unanswered", MsrCode.SEV_INFO_REQ, MsrCode.SEV_INFO_REQ, _ended(0, 0)),
    ("info-zero", MsrCode.SEV_INFO_REQ, 0, _ended(0, 0)),
    ("version-1-only", MsrCode.SEV_INFO_REQ, _info(1, 1), _ended(0, 2)),
    ("versions-0-to-65535", MsrCode.SEV_INFO_REQ, _info(0xFFFF, 0), (None,)),
    ("no-features", MsrCode.HV_FEATURES_REQ, MsrCode.HV_FEATURES_RESP, _ended(0, 2)),
    ("features-without-snp", MsrCode.HV_FEATURES_REQ, 0xFFE << 12 | MsrCode.HV_FEATURES_RESP, _ended(0, 2)),
    ("features-unanswered", MsrCode.HV_FEATURES_REQ, MsrCode.HV_FEATURES_REQ, _ended(0, 2)),
    ("every-feature", MsrCode.HV_FEATURES_REQ, 2**64 - 4096 | MsrCode.HV_FEATURES_RESP, (None,)),
    (
        "registers-another-page",
        MsrCode.REGISTER_GPA_REQ,
        _GHCB + PAGE | MsrCode.REGISTER_GPA_RESP,
        _ended(1, 0),
    ),
    ("registers-nothing", MsrCode.REGISTER_GPA_REQ, 2**64 - 4096 | MsrCode.REGISTER_GPA_RESP, _ended(1, 0)),
    ("registration-unanswered", MsrCode.REGISTER_GPA_REQ, _GHCB | MsrCode.REGISTER_GPA_REQ, _ended(1, 0)),
    ("page-state-error", MsrCode.PSC_REQ, 1 << 63 | MsrCode.PSC_RESP, _ended(1, 1)),
    ("page-state-error-1", MsrCode.PSC_REQ, 1 << 32 | MsrCode.PSC_RESP, _ended(1, 1)),
    ("page-state-unanswered", MsrCode.PSC_REQ, MsrCode.PSC_REQ, _ended(1, 1)),
)
_LISTS: Final = (
    ("error", partial(do.PageStateHeader, (0, 5, 0), info2=1 << 40), _ended(1, 1)),
    ("malformed", partial(do.PageStateHeader, (6, 5, 0), info1=2, info2=3), _ended(1, 1)),
    ("reserved-set", partial(do.PageStateHeader, (6, 5, 1)), _ended(1, 1)),
    ("end-moved", partial(do.PageStateHeader, (3, 252, 0)), _ended(1, 1)),
    ("backwards", partial(do.PageStateHeader, (3, 5, 0), (2, 5, 0)), _ended(1, 1)),
    ("stuck-half-way", partial(do.PageStateHeader, (3, 5, 0)), (Running(),)),
    ("never-begun", do.Stall, (Running(),)),
)


def _boots() -> Iterator[HostCase]:
    for name, request, reply, expected in _MSR:
        yield HostCase(
            name=f"boot-{name}",
            rule="MSR protocol: what is no proper answer ends the guest, with set and code",
            attack=_same(partial(do.LyingMsr, request, int(reply))),
            expected=expected,
            at_boot=True,
        )
    for name, attack, expected in _LISTS:
        yield HostCase(
            name=f"boot-page-states-{name}",
            rule="neither backwards nor beyond the end; without progress Linux asks for ever",
            attack=_same(attack),
            expected=expected,
            at_boot=True,
        )


HOSTILE_HOST: Final[tuple[HostCase, ...]] = (
    *_responses(),
    *_requests(),
    *_replies(),
    *_waiting(),
    *_sizes(),
    *_boots(),
)
"""Every way in which a host cheats that is known, by name."""
