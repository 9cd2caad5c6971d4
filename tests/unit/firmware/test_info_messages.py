"""MSG_CPUID_REQ, MSG_TSC_INFO_REQ, MSG_KEY_REQ version 2."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_launch import CpuidFunction
from swsnp.abi.snp_message import (
    GuestFieldSelectV2,
    MessageType,
    MsgCpuidHeader,
    MsgKeyReq,
    MsgKeyReqV2,
    MsgKeyRsp,
    MsgTscInfoRsp,
    RootKeySelect,
)
from swsnp.firmware.chip import preset
from swsnp.firmware.messages import REQUESTS

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig, RigGuest

UNKNOWN_LEAF = CpuidFunction(eax_in=0x3)
BAD_LEAF = UNKNOWN_LEAF.but(ecx=5)
NO_VERSION = CpuidFunction(eax_in=0x4000_0000, ebx=77)


# --- CPUID ----------------------------------------------------------------------------------------


def _cpuid(rig: Rig, *entries: CpuidFunction, size: int = 0, **header: Any) -> tuple[MsgCpuidHeader, bytes]:
    head = MsgCpuidHeader(count_or_status=len(entries)).but(**header)
    payload = bytes(head) + b"".join(map(bytes, entries))
    payload = payload.ljust(size or len(payload), b"\0")
    answer = rig.request(rig.running(), payload, MessageType.CPUID_REQ)
    assert (answer.status, answer.header.msg_type) == (S.SUCCESS, 2)
    assert answer.header.msg_size == len(payload)
    return MsgCpuidHeader.parse(answer.payload[:16]), answer.payload[16:]


def test_entries_in_order(rig: Rig) -> None:
    """AMD 56860: the response is as long as the request and repeats what is in order."""
    header, rest = _cpuid(rig, UNKNOWN_LEAF, NO_VERSION, size=4000 - 4000 % 16)
    assert header == MsgCpuidHeader(count_or_status=S.SUCCESS, count=2)
    assert rest == (bytes(UNKNOWN_LEAF) + bytes(NO_VERSION)).ljust(len(rest), b"\0")


def test_entries_that_are_corrected(rig: Rig) -> None:
    """AMD 56860: INVALID_PARAM with the entire corrected list."""
    header, rest = _cpuid(rig, NO_VERSION, BAD_LEAF, UNKNOWN_LEAF)
    assert header == MsgCpuidHeader(count_or_status=S.INVALID_PARAM, count=3)
    assert rest == bytes(NO_VERSION) + bytes(UNKNOWN_LEAF) * 2


@pytest.mark.parametrize(
    "header", [{"count_or_status": 65}, {"count": 1}, {"reserved_08": b"\1" + bytes(7)}], ids=str
)
def test_requests_that_are_not_walked(rig: Rig, header: dict[str, Any]) -> None:
    """AMD 56860: COUNT above 64 or reserved bits: INVALID_PARAM, COUNT 0, nothing corrected."""
    answer, rest = _cpuid(rig, BAD_LEAF, **header)
    assert answer == MsgCpuidHeader(count_or_status=S.INVALID_PARAM)
    assert rest == bytes(BAD_LEAF)


# --- TSC_INFO -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("khz", "scale"), [(2_000_000, 0x14_0A42_B182), (2_400_000, 0x18_0C50_0836), (0, 0)])
def test_tsc_info(make_rig: MakeRig, khz: int, scale: int) -> None:
    """AMD 56860: GUEST_TSC_SCALE of the wanted frequency, the offset, TSC_FACTOR; known answers."""
    rig = make_rig()
    guest = rig.running()
    rig.context(guest).desired_tsc_khz = khz
    rig.context(guest).psp_tsc_offset = 9
    answer = rig.request(guest, bytes(0x80), MessageType.TSC_INFO_REQ)
    assert answer.payload == bytes(
        MsgTscInfoRsp(guest_tsc_scale=scale, guest_tsc_offset=9, tsc_factor=200)
    )  # fmt: skip


@pytest.mark.parametrize("at", [0, 127])
def test_tsc_info_wants_zeros(rig: Rig, at: int) -> None:
    """AMD 56860: any byte of the request that is not zero: INVALID_PARAM."""
    request = bytearray(0x80)
    request[at] = 1
    answer = rig.request(rig.running(), bytes(request), MessageType.TSC_INFO_REQ)
    assert answer.payload == bytes(MsgTscInfoRsp(status=S.INVALID_PARAM))


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("msg_type", "request_"), REQUESTS.items(), ids=str)
def test_sizes_of_responses(rig: Rig, msg_type: int, request_: Any) -> None:
    """AMD 56860: MSG_SIZE by type; CPUID as the request."""
    sizes = {1: 0x320, 3: 0x40, 5: 0x4C0, 7: 0xFA0, 9: 16, 11: 16, 13: 16, 15: 16, 17: 0x80}
    answer = rig.request(rig.running(), bytes(0x320), msg_type)
    assert (answer.header.msg_type, answer.header.msg_size) == (msg_type + 1, sizes[msg_type])
    assert request_.response_size in (0, sizes[msg_type])


@pytest.mark.parametrize(("msg_type", "request_"), REQUESTS.items(), ids=str)
def test_strict_sizes_of_requests(make_rig: MakeRig, msg_type: int, request_: Any) -> None:
    """AMD 56860: MSG_SIZE suffices for the type; a strict part refuses a shorter one."""
    rig = make_rig(strict_msg_size=True)
    guest = rig.running()
    if request_.size > 16:
        short = bytes(request_.size - 16)
        assert rig.request(guest, short, msg_type).status == S.INVALID_PARAM
    assert rig.request(guest, bytes(request_.size), msg_type).status == S.SUCCESS


# --- KEY_REQ version 2 ----------------------------------------------------------------------------


@pytest.fixture
def newer(make_rig: MakeRig) -> Rig:
    """A part whose firmware knows version 2 and mitigation vectors."""
    return make_rig(key_req_version=2, mit_vector=0b1011)


def _key(
    rig: Rig, guest: RigGuest, vector: int, select: int = 0x40, *, version: int = 2, **fields: Any
) -> MsgKeyRsp:
    first = MsgKeyReq(flags=RootKeySelect(1), guest_field_select=GuestFieldSelectV2(select))
    request = MsgKeyReqV2(version_1=first, launch_mit_vector=vector).but(**fields)
    answer = rig.request(guest, bytes(request), MessageType.KEY_REQ, msg_version=version)
    assert (answer.status, answer.header.msg_version) == (S.SUCCESS, version)
    return MsgKeyRsp.parse(answer.payload)


def test_keys_bound_to_a_mitigation_vector(newer: Rig) -> None:
    """AMD 56860 1.58: GUEST_FIELD_SELECT bit 6 mixes LAUNCH_MIT_VECTOR in; without it it is ignored."""
    guest = newer.running()
    keys = {vector: _key(newer, guest, vector).derived_key for vector in (0, 1, 2, 0b1011)}
    assert len(set(keys.values())) == 4
    unbound = {_key(newer, guest, vector, 0).derived_key for vector in (0, 1, 4)}
    assert unbound == {_key(newer, guest, 0, 0, version=1).derived_key}
    assert not unbound & set(keys.values())


@pytest.mark.parametrize(
    ("vector", "select", "fields", "status"),
    [
        (0b0100, 0x40, {}, S.INVALID_PARAM),
        (1 << 63, 0x40, {}, S.INVALID_PARAM),
        (0, 0x80, {}, S.INVALID_PARAM),
        (0, 0x40, {"reserved_28": b"\1" + bytes(7)}, S.INVALID_PARAM),
        (0b0100, 0x40, {"version_1": MsgKeyReq(flags=RootKeySelect.of(key_sel=3))}, S.INVALID_KEY),
    ],
)
def test_refused_version_2_requests(
    newer: Rig, vector: int, select: int, fields: dict[str, Any], status: S
) -> None:
    """A vector that the guest was not launched under, unknown bits; the checks of version 1 come first."""
    assert _key(newer, newer.running(), vector, select, **fields) == MsgKeyRsp(status=status)


def test_version_1_does_not_know_the_vector(newer: Rig) -> None:
    """AMD 56860: bit 6 of GUEST_FIELD_SELECT is reserved in version 1."""
    assert _key(newer, newer.running(), 0, version=1) == MsgKeyRsp(status=S.INVALID_PARAM)


@pytest.mark.parametrize(("msg_type", "version"), [(MessageType.KEY_REQ, 3), (MessageType.REPORT_REQ, 2)])
def test_no_other_version(newer: Rig, msg_type: int, version: int) -> None:
    """AMD 56860, check 14: version 2 is KEY_REQ's alone, and there is no 3."""
    guest = newer.running()
    assert newer.request(guest, bytes(0x60), msg_type, msg_version=version).status == S.INVALID_PARAM


def test_version_2_is_a_setting(rig: Rig) -> None:
    """Firmware 1.55 refuses version 2 at check 14."""
    assert preset(rig.chip.product).key_req_version == 1
    answer = rig.request(rig.running(), bytes(0x30), MessageType.KEY_REQ, msg_version=2)
    assert answer.status == S.INVALID_PARAM


def test_a_setting_that_does_not_exist(make_rig: MakeRig) -> None:
    """A part cannot be set to a version that nobody knows."""
    rig = make_rig(settings=replace(preset(make_rig().chip.product), key_req_version=3))
    answer = rig.request(rig.running(), bytes(0x30), MessageType.KEY_REQ, msg_version=3)
    assert answer.status == S.INVALID_PARAM
