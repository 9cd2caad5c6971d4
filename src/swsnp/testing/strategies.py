"""Strategies for Hypothesis: reports, GHCB pages, certificate tables, sealed messages.

The only module of swsnp that needs Hypothesis (extra `test`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

from hypothesis import strategies as st

from swsnp.abi.ghcb import CertTableGuid, ExitCode, Ghcb
from swsnp.abi.snp_message import (
    AUTHTAG_SIZE,
    MESSAGE_PAGE,
    PAYLOAD_MAX,
    MessageHeader,
    MessageType,
    message_header,
)
from swsnp.abi.snp_report import AttestationReport, GuestPolicy, PlatformInfo, SignerInfo, TcbVersion
from swsnp.certs.table import TableEntry, pack
from swsnp.crypto.seal import KEY_SIZE, MessageKey

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "SealedMessage",
    "certificate_tables",
    "damaged",
    "ghcb_pages",
    "messages",
    "reports",
    "table_entries",
]

_U16, _U32, _U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
_U8: Final = st.integers(0, 0xFF)
_POINT: Final = 72
_CODES: Final = st.one_of(st.sampled_from([int(each) for each in ExitCode]), _U64)
_GUIDS: Final = st.one_of(
    st.sampled_from(
        [CertTableGuid.VCEK, CertTableGuid.VLEK, CertTableGuid.ASK, CertTableGuid.ARK, CertTableGuid.CRL]
    ),
    st.uuids().filter(lambda guid: guid != UUID(int=0)),
)


def _bytes(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


@st.composite
def reports(draw: st.DrawFn, *, versions: Sequence[int] = (2, 3, 5)) -> AttestationReport:
    """Attestation reports of the right form: any contents, reserved ranges zero, no valid signature.

    Fields that a version does not have are zero. `bytes(report)` are its 1,184 bytes.
    """
    version = draw(st.sampled_from(list(versions)))
    tcbs = [TcbVersion(draw(_U64)) for _ in range(4)]
    sizes: dict[str, int] = {
        "family_id": 16, "image_id": 16, "report_data": 64, "measurement": 48, "host_data": 32,
        "id_key_digest": 48, "author_key_digest": 48, "report_id": 32, "report_id_ma": 32, "chip_id": 64,
    }  # fmt: skip
    report = AttestationReport(
        version=version,
        guest_svn=draw(_U32),
        policy=GuestPolicy(draw(_U64)),
        vmpl=draw(st.integers(0, 3)),
        signature_algo=1,
        platform_info=PlatformInfo(draw(_U64)),
        signer_info=SignerInfo(draw(st.integers(0, 0x1F))),
        current_tcb=tcbs[0],
        reported_tcb=tcbs[1],
        committed_tcb=tcbs[2],
        launch_tcb=tcbs[3],
        current_build=draw(_U8),
        current_minor=draw(_U8),
        current_major=draw(_U8),
        committed_build=draw(_U8),
        committed_minor=draw(_U8),
        committed_major=draw(_U8),
        signature_r=draw(_bytes(48)).ljust(_POINT, b"\0"),
        signature_s=draw(_bytes(48)).ljust(_POINT, b"\0"),
    )
    report = report.but(**{name: draw(_bytes(size)) for name, size in sizes.items()})
    if version >= 3:
        report = report.but(cpuid_fam_id=draw(_U8), cpuid_mod_id=draw(_U8), cpuid_step=draw(_U8))
    if version >= 5:
        report = report.but(launch_mit_vector=draw(_U64), current_mit_vector=draw(_U64))
    return report


@st.composite
def ghcb_pages(draw: st.DrawFn) -> bytes:
    """GHCB pages: known and unknown events, any registers, any valid bits; 4,096 bytes."""
    buffer = draw(st.binary(max_size=64))
    return bytes(
        Ghcb(
            cpl=draw(_U8),
            rax=draw(_U64),
            rcx=draw(_U64),
            rdx=draw(_U64),
            rbx=draw(_U64),
            sw_exit_code=draw(_CODES),
            sw_exit_info_1=draw(_U64),
            sw_exit_info_2=draw(_U64),
            sw_scratch=draw(_U64),
            xcr0=draw(_U64),
            valid_bitmap=draw(st.one_of(st.just(b"\xff" * 16), _bytes(16))),
            shared_buffer=buffer.ljust(2032, b"\0"),
            protocol_version=draw(_U16),
            ghcb_usage=draw(st.one_of(st.just(0), _U32)),
        )
    )


def table_entries() -> st.SearchStrategy[list[TableEntry]]:
    """What a certificate table may say: known and unknown GUIDs, each once, any data."""
    entry = st.builds(
        lambda guid, data: TableEntry(guid=guid, data=data), guid=_GUIDS, data=st.binary(max_size=200)
    )
    return st.lists(entry, max_size=6, unique_by=lambda each: each.guid)


def certificate_tables() -> st.SearchStrategy[bytes]:
    """Certificate tables in canonical form, the empty one among them."""
    return table_entries().map(pack)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that nearly are what `whole` gives: a few overwritten, some cut off, some added.

    Now and then nothing is left of the damage; a parser has to accept or refuse them, and nothing else.
    """
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    cut = draw(st.integers(0, len(data)))
    return bytes(data[: len(data) - cut if draw(st.booleans()) else len(data)]) + draw(st.binary(max_size=32))


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedMessage:
    """A guest message and what is inside.

    Attributes:
        key: 32 bytes, the VMPCK.
        header: its plaintext header, authtag included.
        payload: the plaintext.
        page: 4,096 bytes as they lie in shared memory.
    """

    key: bytes = field(repr=False)
    header: MessageHeader
    payload: bytes
    page: bytes = field(repr=False)


@st.composite
def messages(draw: st.DrawFn) -> SealedMessage:
    """Sealed guest messages in order: any type, number, key and payload that fits, in blocks of 16 bytes."""
    key = draw(_bytes(KEY_SIZE))
    blocks = st.integers(1, (PAYLOAD_MAX - AUTHTAG_SIZE) // 16)
    payload = draw(st.binary(max_size=64)).ljust(16 * draw(blocks), b"\0")
    header = message_header(
        msg_seqno=draw(st.integers(1, 2**64 - 1)),
        msg_type=draw(st.sampled_from([int(each) for each in MessageType])),
        msg_version=draw(st.integers(1, 255)),
        msg_size=len(payload),
        msg_vmpck=draw(st.integers(0, 3)),
    )
    page = MessageKey(key).seal(header, payload).ljust(MESSAGE_PAGE, b"\0")
    return SealedMessage(key=key, header=MessageHeader.parse(page[: len(header)]), payload=payload, page=page)
