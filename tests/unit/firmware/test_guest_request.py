"""SNP_GUEST_REQUEST: the numbered checks, their order, counters, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.snp_command import Command, GuestRequest, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_message import MessageHeader, MsgReportReq
from swsnp.firmware.context import GuestState
from swsnp.firmware.guest_request import COUNTER_MAX
from swsnp.hardware.rmp import RmpEntry
from swsnp.trace import FirmwareCommand, MessageOpened, MessageSealed, ReportSigned, TraceEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.firmware.conftest import MakeRig, Rig, RigGuest

REQUEST = bytes(MsgReportReq(report_data=b"\x5a" * 64))
NOWHERE = 0x7777_7777_7000
WITNESS = b"\xee" * 4096


@dataclass
class Case:
    """One request before it is sent; faults change it."""

    rig: Rig
    guest: RigGuest
    request: int
    response: int
    gctx: int
    header: dict[str, Any] = field(
        default_factory=lambda: {
            "msg_seqno": 1,
            "algo": 1,
            "hdr_version": 1,
            "hdr_size": 0x60,
            "msg_type": 5,
            "msg_version": 1,
            "msg_size": 0x60,
            "msg_vmpck": 0,
        }
    )
    payload: bytes = REQUEST
    break_tag: bool = False
    request_offset: int = 0
    response_offset: int = 0

    def send(self) -> int:
        message = bytearray(self.guest.keys[0].seal(MessageHeader(**self.header), self.payload))
        message[0] ^= self.break_tag
        at = self.request_offset
        self.rig.memory.write(self.request + at, bytes(message[: 4096 - at]))
        buffer = GuestRequest(
            gctx_paddr=self.gctx,
            request_paddr=self.request_page + at,
            response_paddr=self.response_page + self.response_offset,
        )
        return self.rig.command(Command.SNP_GUEST_REQUEST, buffer)

    request_page: int = 0
    response_page: int = 0


def _case(rig: Rig) -> Case:
    guest = rig.running()
    request, response = rig.page(RmpEntry()), rig.page(data=WITNESS)
    case = Case(rig, guest, request, response, guest.gctx)
    case.request_page, case.response_page = request, response
    return case


def _set(**values: Any) -> Callable[[Case], None]:
    return lambda case: case.__dict__.update(values)


def _header(**values: Any) -> Callable[[Case], None]:
    return lambda case: case.header.update(values)


def _uninit(case: Case) -> None:
    case.rig.platform.state = PlatformState.UNINIT


def _no_context(case: Case) -> None:
    case.rig.rmp[case.guest.gctx] = replace(case.rig.rmp[case.guest.gctx], vmsa=False)


def _response_not_firmware(case: Case) -> None:
    case.rig.rmp[case.response] = replace(case.rig.rmp[case.response], assigned=False, immutable=False)


def _large_request(case: Case) -> None:
    case.rig.rmp[case.request] = replace(case.rig.rmp[case.request], page_size=1)


def _not_running(case: Case) -> None:
    case.rig.context(case.guest).state = GuestState.LAUNCH


def _low_gctx_bits(case: Case) -> None:
    case.gctx |= 0x10


FAULTS: list[tuple[str, S, Callable[[Case], None]]] = [
    ("1 low bits of gctx", S.INVALID_PARAM, _low_gctx_bits),
    ("2 SNP not INIT", S.INVALID_PLATFORM_STATE, _uninit),
    ("3 request page is no memory", S.INVALID_ADDRESS, _set(request_page=NOWHERE)),
    ("4 not a context", S.INVALID_GUEST, _no_context),
    ("5 response not Firmware", S.INVALID_PAGE_STATE, _response_not_firmware),
    ("6 request in a 2 MiB entry", S.INVALID_PAGE_SIZE, _large_request),
    ("7 guest not RUNNING", S.INVALID_GUEST_STATE, _not_running),
    ("8 header crosses the page", S.INVALID_PARAM, _set(request_offset=0xFB0)),
    ("9 HDR_VERSION", S.INVALID_PARAM, _header(hdr_version=2)),
    ("10 payload crosses the page", S.INVALID_PARAM, _header(msg_size=0xFB0)),
    ("11 VMPCK", S.INVALID_PARAM, _header(msg_vmpck=4)),
    ("12 tag", S.BAD_MEASUREMENT, _set(break_tag=True)),
    ("13 sequence number", S.AEAD_OFLOW, _header(msg_seqno=3)),
    ("14 MSG_VERSION", S.INVALID_PARAM, _header(msg_version=2)),
    ("15 MSG_TYPE", S.INVALID_PARAM, _header(msg_type=6)),
    ("17 response does not fit", S.INVALID_PARAM, _set(response_offset=0xB00)),
]


@pytest.mark.parametrize(("status", "fault"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_each_check(rig: Rig, status: S, fault: Callable[[Case], None]) -> None:
    """AMD 56860, SNP_GUEST_REQUEST: each check has its status; a failure counts and writes nothing."""
    case = _case(rig)
    fault(case)
    context = rig.context(case.guest)
    assert case.send() == status
    assert context.message_counts == [0, 0, 0, 0]
    assert rig.memory.read(case.response, 4096) == WITNESS


PAIRS = list(combinations(FAULTS, 2))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a[0]} + {b[0]}" for a, b in PAIRS])
def test_the_lower_check_decides(make_rig: MakeRig, first: Any, second: Any) -> None:
    """AMD 56860 and firmware 1.55 as observed: with two faults the one that is checked first is reported."""
    case = _case(make_rig())
    first[2](case)
    second[2](case)
    assert case.send() == first[1]


@pytest.mark.parametrize(
    "change",
    [
        {"hdr_version": 0},
        {"hdr_size": 0x5F},
        {"hdr_size": 0x61},
        {"algo": 0},
        {"algo": 2},
        {"msg_size": 0},
        {"msg_size": 0x58},
        {"msg_size": 0x61},
        {"msg_vmpck": 255},
        {"msg_version": 0},
        {"msg_type": 0},
        {"msg_type": 2},
        {"msg_type": 19},
        {"msg_type": 255},
    ],
    ids=str,
)
def test_header_forms_that_are_refused(rig: Rig, change: dict[str, int]) -> None:
    """AMD 56860, checks 9, 11, 14, 15 of SNP_GUEST_REQUEST: INVALID_PARAM."""
    case = _case(rig)
    case.header.update(change)
    assert case.send() == S.INVALID_PARAM
    assert rig.context(case.guest).message_counts[0] == 0


@pytest.mark.parametrize("msg_type", [0, 2, 6, 8, 10, 18, 19, 255])
def test_requests_that_are_not_built_in(rig: Rig, msg_type: int) -> None:
    """AMD 56860, check 15: responses and unknown types are no requests."""
    guest = rig.running()
    assert rig.request(guest, bytes(128), msg_type).status == S.INVALID_PARAM
    assert rig.context(guest).message_counts[0] == 0


@pytest.mark.parametrize("page", ["gctx", "request_page", "response_page"])
def test_pages_that_are_no_memory(rig: Rig, page: str) -> None:
    """AMD 56860, check 3: a page that no memory answers for is INVALID_ADDRESS."""
    case = _case(rig)
    setattr(case, page, NOWHERE)
    assert case.send() == S.INVALID_ADDRESS


def test_the_response_may_not_lie_in_a_large_entry(rig: Rig) -> None:
    """AMD 56860, check 6: the response page too."""
    case = _case(rig)
    rig.rmp[case.response] = replace(rig.rmp[case.response], page_size=1)
    assert case.send() == S.INVALID_PAGE_SIZE


def test_the_state_of_the_request_page_is_not_checked(rig: Rig) -> None:
    """Firmware 1.55: the request may lie in a page of any state."""
    case = _case(rig)
    rig.rmp[case.request] = RmpEntry(assigned=True, asid=7, gpa=0x5000, validated=True)
    assert case.send() == S.SUCCESS


def test_messages_need_not_start_a_page(rig: Rig) -> None:
    """AMD 56860, checks 8, 10, 17: header and payload may start anywhere as long as they end in the page."""
    case = _case(rig)
    case.request_offset = 0x1000 - 0x60 - 0x60
    case.response_offset = 0x1000 - 0x60 - 0x4C0
    assert case.send() == S.SUCCESS
    page = rig.memory.read(case.response, 4096)
    assert page[: case.response_offset] == WITNESS[: case.response_offset]
    answer = page[case.response_offset :]
    assert MessageHeader.parse(answer[:0x60]).msg_seqno == 2
    case.guest.keys[0].open(answer, 0x4C0)


def test_the_response_header(rig: Rig) -> None:
    """AMD 56860: seqno + 1, type + 1, ALGO, HDR_VERSION, MSG_VERSION 1, same VMPCK, rest zero."""
    guest = rig.running()
    answer = rig.request(guest, bytes(MsgReportReq(vmpl=2)), vmpck=2)
    assert answer.status == S.SUCCESS
    assert answer.header == MessageHeader(
        authtag=answer.header.authtag[:16] + bytes(16),
        msg_seqno=2,
        algo=1,
        hdr_version=1,
        hdr_size=0x60,
        msg_type=6,
        msg_version=1,
        msg_size=0x4C0,
        msg_vmpck=2,
    )


def test_only_header_and_payload_are_written(rig: Rig) -> None:
    """AMD 56860: the rest of the response page stays as it was."""
    case = _case(rig)
    assert case.send() == S.SUCCESS
    page = rig.memory.read(case.response, 4096)
    assert page[0x60 + 0x4C0 :] == WITNESS[0x60 + 0x4C0 :]
    assert page[:0x60] != WITNESS[:0x60]


def test_counters_are_per_vmpck_and_count_by_two(rig: Rig) -> None:
    """AMD 56860: a counter per VMPCK; every success adds 2, also with a status in the response."""
    guest = rig.running()
    for vmpck, wanted in ((0, 2), (0, 4), (3, 2), (0, 6), (1, 2)):
        answer = rig.request(guest, bytes(MsgReportReq(vmpl=3)), vmpck=vmpck)
        assert (answer.status, answer.header.msg_seqno) == (S.SUCCESS, wanted)
    refused = rig.request(guest, bytes(MsgReportReq(vmpl=0)), vmpck=1)
    assert (refused.status, refused.payload[0]) == (S.SUCCESS, S.INVALID_PARAM)
    assert rig.context(guest).message_counts == [6, 4, 0, 2]


def test_a_replayed_message_is_out_of_sequence(rig: Rig) -> None:
    """AMD 56860: an old message still decrypts (its IV is its number) and fails at the counter."""
    case = _case(rig)
    assert case.send() == S.SUCCESS
    assert case.send() == S.AEAD_OFLOW


def test_an_edited_sequence_number_fails_at_the_tag(rig: Rig) -> None:
    """AMD 56860: the number is the IV, so an edited one does not decrypt."""
    case = _case(rig)
    sealed = bytearray(case.guest.keys[0].seal(MessageHeader(**case.header), REQUEST))
    sealed[0x20] = 3
    rig.memory.write(case.request, bytes(sealed))
    buffer = GuestRequest(gctx_paddr=case.gctx, request_paddr=case.request, response_paddr=case.response)
    assert rig.command(Command.SNP_GUEST_REQUEST, buffer) == S.BAD_MEASUREMENT


def test_another_vmpck_fails_at_the_tag(rig: Rig) -> None:
    """AMD 56860: MSG_VMPCK names the key."""
    guest = rig.running()
    assert rig.request(guest, REQUEST, vmpck=0, msg_vmpck=1).status == S.BAD_MEASUREMENT


def test_the_identical_message_may_be_sent_again_after_a_failure(rig: Rig) -> None:
    """AMD 56860: no failure of checks 1 to 17 uses up the number."""
    case = _case(rig)
    case.response_offset = 0xFF0
    assert case.send() == S.INVALID_PARAM
    case.response_offset = 0
    assert case.send() == S.SUCCESS


def test_a_used_up_counter_answers_no_more(rig: Rig) -> None:
    """AMD 56860, check 13: at 2^64-2 every message is AEAD_OFLOW, the last pair before is answered."""
    guest = rig.running()
    rig.context(guest).message_counts[0] = COUNTER_MAX - 2
    guest.seqno[0] = COUNTER_MAX - 1
    answer = rig.request(guest, REQUEST)
    assert (answer.status, answer.header.msg_seqno) == (S.SUCCESS, COUNTER_MAX)
    assert rig.request(guest, REQUEST, msg_seqno=COUNTER_MAX + 1).status == S.AEAD_OFLOW


def test_a_short_payload_reads_zeros_unless_strict(make_rig: MakeRig) -> None:
    """Firmware 1.55 does not enforce that MSG_SIZE holds the message; AMD 56860 asks for it: a switch."""
    lenient = make_rig()
    answer = lenient.request(lenient.running(), b"\x5a" * 32)
    assert answer.status == S.SUCCESS
    assert answer.payload[0x20 + 0x50 : 0x20 + 0x90] == b"\x5a" * 32 + bytes(32)
    strict = make_rig(strict_msg_size=True)
    guest = strict.running()
    assert strict.request(guest, b"\x5a" * 32).status == S.INVALID_PARAM
    assert strict.request(guest, REQUEST).status == S.SUCCESS


def test_bytes_after_the_message_are_ignored(rig: Rig) -> None:
    """AMD 56860: a payload longer than its type is read up to the type's size."""
    assert rig.request(rig.running(), REQUEST + b"\xff" * 16).status == S.SUCCESS


def test_trace(rig: Rig) -> None:
    """A request tells: opened, signed, sealed, command; a refused one only the command."""
    guest = rig.running()
    heard: list[TraceEvent] = []
    with rig.trace.listen(heard.append):
        rig.request(guest, REQUEST)
        rig.request(guest, REQUEST, msg_seqno=9)
    assert heard == [
        MessageOpened(by="firmware", vmpck=0, seqno=1, msg_type=5, payload_size=0x60),
        ReportSigned(version=2, signing_key=0, tcb=rig.chip.reported_tcb, vmpl=0),
        MessageSealed(by="firmware", vmpck=0, seqno=2, msg_type=6, payload_size=0x4C0),
        FirmwareCommand(command=0x94, status=0),
        FirmwareCommand(command=0x94, status=0x1D),
    ]


def test_random_bytes_never_raise_and_never_count(make_rig: MakeRig) -> None:
    """Whatever a guest writes into its request page, the mailbox answers with a status."""
    rig = make_rig()
    case = _case(rig)
    context = rig.context(case.guest)

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        head=st.binary(min_size=0x60, max_size=0x200),
        fixed=st.booleans(),
        offset=st.integers(0, 0xFFF),
    )
    def body(head: bytes, fixed: bool, offset: int) -> None:
        if fixed:  # a header that gets further
            head = head[:0x30] + bytes.fromhex("0101600005016000 00000000 00") + head[0x3D:]
        rig.memory.write(case.request + offset, head[: 4096 - offset])
        buffer = GuestRequest(
            gctx_paddr=case.gctx, request_paddr=case.request + offset, response_paddr=case.response
        )
        status = rig.command(Command.SNP_GUEST_REQUEST, buffer)
        assert status in (S.INVALID_PARAM, S.BAD_MEASUREMENT)
        assert context.message_counts == [0, 0, 0, 0]

    body()


def test_sealed_random_messages_count_only_with_success(make_rig: MakeRig) -> None:
    """Properly sealed messages of any type, version and content: the counter moves with SUCCESS only."""
    rig = make_rig()
    guest = rig.running()
    context = rig.context(guest)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        payload=st.binary(min_size=1, max_size=200),
        msg_type=st.sampled_from([0, 1, 3, 5, 5, 5, 6, 17, 200]),
        version=st.integers(0, 2),
        vmpck=st.integers(0, 3),
    )
    def body(payload: bytes, msg_type: int, version: int, vmpck: int) -> None:
        before = context.message_counts[vmpck]
        answer = rig.request(guest, payload, msg_type, vmpck=vmpck, msg_version=version)
        assert context.message_counts[vmpck] == before + 2 * (answer.status == S.SUCCESS)

    body()
