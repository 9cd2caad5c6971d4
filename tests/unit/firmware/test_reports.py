"""MSG_REPORT_REQ and the attestation report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_message import KeySelWord, MsgReportReq, MsgReportRspHeader
from swsnp.abi.snp_report import (
    SIGNATURE_OFFSET,
    SIGNED_SIZE,
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    Product,
    SignerInfo,
    TcbVersion,
)
from swsnp.crypto.ecdsa import SigningKey, verify
from swsnp.firmware.chip import ApiVersion, preset
from swsnp.firmware.keys import vlek_key

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.firmware.conftest import Answer, MakeRig, Rig, RigGuest

VCEK_DIS = 4


def _vlek(rig: Rig, tcb: TcbVersion | None = None) -> SigningKey:
    key = vlek_key(b"p" * 32, rig.chip.product, "csp", tcb or rig.chip.reported_tcb)
    rig.chip.load_vlek(key)
    return SigningKey.from_scalar(key.scalar)


def _ask(rig: Rig, guest: RigGuest, key_sel: int = 0, vmpl: int = 0, **more: Any) -> Answer:
    vmpck = more.pop("vmpck", 0)
    request = MsgReportReq(report_data=b"d" * 64, vmpl=vmpl, flags=KeySelWord(key_sel)).but(**more)
    answer = rig.request(guest, bytes(request), vmpck=vmpck)
    assert answer.status == S.SUCCESS
    assert len(answer.payload) == 0x4C0
    return answer


def _report(answer: Answer) -> AttestationReport:
    head = MsgReportRspHeader.parse(answer.payload[:0x20])
    assert head == MsgReportRspHeader(status=0, report_size=0x4A0)
    return AttestationReport.parse(answer.payload[0x20:])


def _signed_by(report: AttestationReport, point: tuple[bytes, bytes]) -> bool:
    raw = bytes(report)
    return verify(raw[:SIGNED_SIZE], raw[SIGNATURE_OFFSET:], x=point[0], y=point[1])


# --- refusals -----------------------------------------------------------------

RESERVED = {"reserved_48": b"\x01" + bytes(23)}


@pytest.mark.parametrize(
    ("flags", "vlek", "key_sel", "vmpl", "vmpck", "more", "status"),
    [
        (0, False, 4, 0, 0, {}, S.INVALID_PARAM),
        (0, False, 1 << 31, 0, 0, {}, S.INVALID_PARAM),
        (0, False, 0, 0, 0, RESERVED, S.INVALID_PARAM),
        (0, False, 3, 0, 0, {}, S.INVALID_KEY),
        (0, True, 3, 0, 0, {}, S.INVALID_KEY),
        (0, False, 2, 0, 0, {}, S.INVALID_KEY),
        (VCEK_DIS, True, 1, 0, 0, {}, S.INVALID_KEY),
        (VCEK_DIS, False, 0, 0, 0, {}, S.INVALID_KEY),
        (0, False, 0, 0, 1, {}, S.INVALID_PARAM),
        (0, False, 0, 2, 3, {}, S.INVALID_PARAM),
        (0, False, 0, 4, 0, {}, S.INVALID_PARAM),
        (0, False, 0, 0xFFFF_FFFF, 0, {}, S.INVALID_PARAM),
        # two faults: reserved bits before the key, the key before the VMPL
        (0, False, 7, 0, 1, {}, S.INVALID_PARAM),
        (0, False, 3, 0, 0, RESERVED, S.INVALID_PARAM),
        (0, False, 3, 0, 1, {}, S.INVALID_KEY),
    ],
)
def test_refusals(
    rig: Rig, flags: int, vlek: bool, key_sel: int, vmpl: int, vmpck: int, more: dict[str, Any], status: S
) -> None:
    """AMD 56860, MSG_REPORT_REQ: checks and their order; on error the report is zero, its size is given."""
    guest = rig.running(flags=flags)
    if vlek:
        _vlek(rig)
    answer = _ask(rig, guest, key_sel, vmpl, vmpck=vmpck, **more)
    wanted = MsgReportRspHeader(status=status, report_size=0x4A0)
    assert answer.payload == bytes(wanted) + bytes(0x4A0)


@pytest.mark.parametrize(("vmpl", "vmpck"), [(0, 0), (3, 0), (1, 1), (3, 3), (2, 1)])
def test_vmpl_of_the_request_goes_into_the_report(rig: Rig, vmpl: int, vmpck: int) -> None:
    """AMD 56860: VMPL comes from the request, not from the key; it is at least the key's."""
    assert _report(_ask(rig, rig.running(), vmpl=vmpl, vmpck=vmpck)).vmpl == vmpl


def test_vmpl_above_3_when_not_strict(make_rig: MakeRig) -> None:
    """Firmware 1.55 does not test VMPL <= 3: a switch."""
    rig = make_rig(strict_vmpl=False)
    assert _report(_ask(rig, rig.running(), vmpl=0x1234_5678)).vmpl == 0x1234_5678


# --- keys ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key_sel", "vlek", "masked", "signer"),
    [
        (0, False, False, "vcek"),
        (0, True, False, "vlek"),
        (0, True, True, "vlek"),
        (0, False, True, "none"),
        (1, False, False, "vcek"),
        (1, True, False, "vcek"),
        (1, True, True, "none"),
        (2, True, False, "vlek"),
        (2, True, True, "vlek"),
    ],
)
def test_choice_of_the_key(rig: Rig, key_sel: int, vlek: bool, masked: bool, signer: str) -> None:
    """AMD 56860: KEY_SEL, VLEK, MASK_CHIP_KEY; without a usable key the report is unsigned, with success."""
    guest = rig.running()
    rig.chip.configure(mask_chip_key=masked)
    points = {"vcek": rig.chip.vcek_public_point(rig.chip.reported_tcb)}
    if vlek:
        points["vlek"] = _vlek(rig).public_point
    report = _report(_ask(rig, guest, key_sel))
    number = {"vcek": 0, "vlek": 1, "none": 7}[signer]
    assert report.signer_info == SignerInfo.of(signing_key=number, mask_chip_key=masked)
    assert {name for name, point in points.items() if _signed_by(report, point)} == {signer} & points.keys()
    if signer == "none":
        assert bytes(report)[SIGNATURE_OFFSET:] == bytes(512)


def test_vcek_dis_with_a_vlek(rig: Rig) -> None:
    """AMD 56860: with VCEK_DIS a loaded VLEK still signs KEY_SEL 0 and 2."""
    guest = rig.running(flags=VCEK_DIS)
    point = _vlek(rig).public_point
    for key_sel in (0, 2):
        assert _signed_by(_report(_ask(rig, guest, key_sel)), point)


# --- fields -------------------------------------------------------------------


@pytest.mark.parametrize("product", list(Product))
def test_every_field(make_rig: MakeRig, product: Product) -> None:
    """AMD 56860, ATTESTATION_REPORT: where every field comes from, by product and version."""
    rig = make_rig(product=product)
    policy = GuestPolicy(0xB0000)
    guest = rig.running(policy=policy, host_data=b"h" * 32)
    context, settings = rig.context(guest), preset(product)
    report = _report(_ask(rig, guest, vmpl=1))
    named, mitigations = settings.report_version >= 3, settings.report_version >= 5
    tcb = settings.committed_tcb
    info = {Product.MILAN: 0x25, Product.GENOA: 0x01, Product.TURIN: 0x25}[product]
    builds = {Product.MILAN: 29, Product.GENOA: 25, Product.TURIN: 65}
    wanted = AttestationReport(
        version={Product.MILAN: 3, Product.GENOA: 2, Product.TURIN: 5}[product],
        policy=policy,
        vmpl=1,
        signature_algo=1,
        current_tcb=tcb,
        platform_info=PlatformInfo(info),
        report_data=b"d" * 64,
        measurement=context.ld,
        host_data=b"h" * 32,
        report_id=context.report_id,
        report_id_ma=b"\xff" * 32,
        reported_tcb=tcb,
        cpuid_fam_id=settings.family if named else 0,
        cpuid_mod_id=settings.model if named else 0,
        cpuid_step=settings.stepping if named else 0,
        chip_id=rig.chip.chip_id,
        committed_tcb=tcb,
        current_build=builds[product],
        current_minor=55,
        current_major=1,
        committed_build=builds[product],
        committed_minor=55,
        committed_major=1,
        launch_tcb=tcb,
        launch_mit_vector=0x3F if mitigations else 0,
        current_mit_vector=0x3F if mitigations else 0,
        signature_r=report.signature_r,
        signature_s=report.signature_s,
    )
    assert report == wanted
    assert _signed_by(report, rig.chip.vcek_public_point(tcb))
    assert report.chip_id[:4] == b"SWSN"
    assert any(report.chip_id[8:]) == (product is not Product.TURIN)


@pytest.mark.parametrize(
    ("name", "product"),
    [("milan-v3", Product.MILAN), ("turin-v5", Product.TURIN), ("milan-v2-plain", Product.MILAN)],
)
def test_like_a_genuine_report(make_rig: MakeRig, vectors: Path, name: str, product: Product) -> None:
    """Genuine AMD reports: with equal settings all fields agree that are not the chip's or the guest's."""
    genuine = AttestationReport.parse((vectors / name / "report.bin").read_bytes())
    settings = replace(
        preset(product),
        report_version=genuine.version,
        current_tcb=genuine.current_tcb,
        committed_tcb=genuine.committed_tcb,
        current_version=ApiVersion(
            major=genuine.current_major, minor=genuine.current_minor, build=genuine.current_build
        ),
        committed_version=ApiVersion(
            major=genuine.committed_major, minor=genuine.committed_minor, build=genuine.committed_build
        ),
        platform_info_more=genuine.platform_info & ~0x3F,
        ecc_en=bool(genuine.platform_info.ecc_en),
        alias_check_complete=bool(genuine.platform_info.alias_check_complete),
    )
    rig = make_rig(product=product, settings=settings)
    report = _report(_ask(rig, rig.running(policy=genuine.policy), vmpl=genuine.vmpl))
    own = {
        "guest_svn": genuine.guest_svn,
        "family_id": genuine.family_id,
        "image_id": genuine.image_id,
        "report_data": genuine.report_data,
        "measurement": genuine.measurement,
        "host_data": genuine.host_data,
        "id_key_digest": genuine.id_key_digest,
        "author_key_digest": genuine.author_key_digest,
        "report_id": genuine.report_id,
        "chip_id": genuine.chip_id,
        "signature_r": genuine.signature_r,
        "signature_s": genuine.signature_s,
    }
    assert report.but(**own) == genuine


def test_id_block_fields(rig: Rig) -> None:
    """AMD 56860: GUEST_SVN, FAMILY_ID, IMAGE_ID and digests are the ID block's; AUTHOR_KEY_EN is the flag."""
    guest = rig.running()
    context = rig.context(guest)
    context.id_block = context.id_block.but(family_id=b"f" * 16, image_id=b"i" * 16, guest_svn=9)
    context.id_key_digest, context.author_key_digest = b"k" * 48, b"a" * 48
    context.author_key_en = True
    report = _report(_ask(rig, guest))
    assert (report.guest_svn, report.family_id, report.image_id) == (9, b"f" * 16, b"i" * 16)
    assert (report.id_key_digest, report.author_key_digest) == (b"k" * 48, b"a" * 48)
    assert report.signer_info == SignerInfo.of(author_key_en=1)


def test_a_change_of_the_platform_shows_in_the_next_report(rig: Rig) -> None:
    """AMD 56860: SNP_CONFIG, SNP_COMMIT and updates show at once; LAUNCH_TCB stays what it was."""
    guest = rig.running()
    old = rig.chip.variables.committed_tcb
    assert _report(_ask(rig, guest)).chip_id == rig.chip.chip_id
    lower = TcbVersion.encode(Product.GENOA, boot_loader=9, snp=0x16, microcode=0x53)
    rig.chip.configure(reported_tcb=lower, mask_chip_id=True)
    report = _report(_ask(rig, guest))
    assert (report.chip_id, report.reported_tcb, report.committed_tcb) == (bytes(64), lower, old)
    assert _signed_by(report, rig.chip.vcek_public_point(lower))
    newer = TcbVersion.encode(Product.GENOA, boot_loader=0x0B, snp=0x18, microcode=0x55)
    rig.chip.update(current_tcb=newer, current_version=ApiVersion(major=1, minor=56, build=2))
    report = _report(_ask(rig, guest))
    assert (report.current_tcb, report.committed_tcb, report.current_minor) == (newer, old, 56)
    assert report.committed_minor == 55
    rig.chip.commit()
    report = _report(_ask(rig, guest))
    assert (report.committed_tcb, report.reported_tcb, report.launch_tcb) == (newer, newer, old)
    assert report.committed_build == 2
    assert _signed_by(report, rig.chip.vcek_public_point(newer))


def test_launch_tcb_is_taken_when_the_context_is_created(rig: Rig) -> None:
    """Firmware 1.55: LAUNCH_TCB is the committed TCB at GCTX_CREATE, not at LAUNCH_START."""
    gctx = rig.create()
    old = rig.chip.variables.committed_tcb
    newer = TcbVersion.encode(Product.GENOA, boot_loader=0x0B, snp=0x18, microcode=0x55)
    rig.chip.update(current_tcb=newer, current_version=rig.chip.variables.current_version)
    rig.chip.commit()
    assert rig.start(gctx) == 0
    assert rig.context(gctx).launch_tcb == old


def test_a_later_change_of_the_tcb_keeps_the_vlek(rig: Rig) -> None:
    """A loaded VLEK goes on signing after SNP_CONFIG; REPORTED_TCB then is not its certificate's."""
    guest = rig.running()
    point = _vlek(rig).public_point
    lower = TcbVersion.encode(Product.GENOA, boot_loader=9)
    rig.chip.configure(reported_tcb=lower)
    report = _report(_ask(rig, guest))
    assert report.reported_tcb == lower
    assert _signed_by(report, point)
