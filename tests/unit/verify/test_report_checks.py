"""Checks on the report itself: P1 to P10, R1 to R11, Y1 to Y4. Source: AMD 56860, ATTESTATION_REPORT."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.verify.judging import check, failed

from swsnp.abi.snp_report import (
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    Product,
    SignerInfo,
    TcbVersion,
)
from swsnp.certs.classify import report_from_hcl, report_from_response
from swsnp.crypto.derive import P384_ORDER
from swsnp.errors import LayoutError, UsageError, VerificationError
from swsnp.verify.result import CHECKS, MAY_SKIP, Finding, Findings, Outcome, Verification, mask
from swsnp.verify.verifier import verify_strict

if TYPE_CHECKING:
    from tests.unit.verify.conftest import Bench


LATER = [name for name in CHECKS if name.startswith("Y") and name not in ("Y1", "Y2")]


def tcb(**levels: int) -> TcbVersion:
    return TcbVersion.encode(Product.MILAN, **{"boot_loader": 4, "snp": 0x18, "microcode": 0xDB, **levels})


def test_a_good_report_passes_every_check(milan: Bench) -> None:
    """All checks are made; only those without anything to check against are skipped."""
    result = check(milan, milan.report())
    assert result.authenticated
    assert [each.check for each in result.findings] == list(CHECKS)
    assert {each.check: each.outcome for each in result.findings} == {
        name: Outcome.SKIP if name in ("P10", "C10", *LATER) else Outcome.OK for name in CHECKS
    }
    assert result.product is Product.MILAN
    assert result.leaf is not None
    assert result.leaf.der == milan.vcek
    assert result.report == AttestationReport.parse(milan.report())


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_turin_and_versions(turin: Bench, version: int) -> None:
    """Turin: another TCB layout and an 8-byte HWID. In version 2 only the issuer names the product."""
    changes = {"cpuid_fam_id": 0, "cpuid_mod_id": 0} if version == 2 else {}
    result = check(turin, turin.report(version=version, **changes))
    assert failed(result) == []
    assert result.product is Product.TURIN


@pytest.mark.parametrize("size", [0, 1183, 1185, 2600])
def test_p1_size(milan: Bench, size: int) -> None:
    """P1. Any other size is no report; nothing else is looked at, and nothing is authenticated."""
    result = check(milan, milan.report().ljust(size, b"\x00")[:size])
    assert failed(result) == ["P1"]
    assert result.report is None
    assert {each.check for each in result.findings if each.outcome is Outcome.SKIP} == CHECKS.keys() - {
        "P1",
        "C0",
    }


REPORT_CASES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("version 1, with a family", ["P2", "P3"], {"version": 1}),
    ("version 6", ["P2"], {"version": 6}),
    ("family in version 2", ["P3"], {"version": 2}),
    ("mitigation vector in version 3", ["P3"], {"launch_mit_vector": 1}),
    ("mitigation vector in version 4", ["P3"], {"version": 4, "current_mit_vector": 1 << 63}),
    ("bytes 4C", ["P3"], {"reserved_4c": b"\0\0\0\1"}),
    ("bytes 18B", ["P3"], {"reserved_18b": b"\1" + bytes(20)}),
    ("byte 1EB", ["P3"], {"reserved_1eb": 1}),
    ("byte 1EF", ["P3"], {"reserved_1ef": 1}),
    ("bytes 208", ["P3"], {"version": 5, "reserved_208": bytes(151) + b"\1"}),
    ("bit 5 of 48h", ["P3"], {"signer_info": SignerInfo(1 << 5)}),
    ("bit 31 of 48h", ["P3"], {"signer_info": SignerInfo(1 << 31)}),
    ("policy without bit 17", ["P4"], {"policy": GuestPolicy(0x10000)}),
    ("policy bit 26", ["P4"], {"policy": GuestPolicy(0x4030000)}),
    ("no algorithm", ["P5"], {"signature_algo": 0}),
    ("algorithm 2", ["P5"], {"signature_algo": 2}),
    ("model of no product", ["P9", "C2", "C5"], {"cpuid_fam_id": 0x1A, "cpuid_mod_id": 0x90}),
    ("no family", ["P9", "C2", "C5"], {"cpuid_fam_id": 0, "cpuid_mod_id": 0}),
    ("another product", ["C2", "C5"], {"cpuid_mod_id": 0x11}),
    ("reported below the leaf", ["R2"], {"reported_tcb": tcb(microcode=0xDA)}),
    ("reserved byte of reported", ["R2", "R4"], {"reported_tcb": TcbVersion(int(tcb()) | 1 << 16)}),
    ("another chip", ["R3"], {"chip_id": b"\xaa" * 64}),
    ("reported above committed", ["R4"], {"committed_tcb": tcb(snp=0x17, microcode=0xFF)}),
    ("committed above current", ["R4"], {"committed_tcb": tcb(tee=1)}),
    ("reserved byte of current", ["R4"], {"current_tcb": TcbVersion(int(tcb()) | 1 << 40)}),
    ("launch above current", ["R5"], {"launch_tcb": tcb(microcode=0xDC)}),
    ("committed build above current", ["R6"], {"committed_build": 6}),
    ("committed minor above current", ["R6"], {"committed_minor": 1, "committed_build": 0}),
    ("masked chip key", ["R7"], {"signer_info": SignerInfo.of(mask_chip_key=1)}),
    ("VMPL 4", ["R8"], {"vmpl": 4}),
    ("the host asked", ["R8"], {"vmpl": 0xFFFFFFFF}),
    ("author key without digest", ["R9"], {"signer_info": SignerInfo.of(author_key_en=1)}),
    ("author digest without key", ["R9"], {"author_key_digest": b"\1" * 48}),
    ("SMT against the policy", ["R10"], {"policy": GuestPolicy(0x20000)}),
    ("RAPL against the policy", ["R10"], {"policy": GuestPolicy(0x830000)}),
    ("no ciphertext hiding", ["R10"], {"policy": GuestPolicy(0x1030000)}),
    ("migration agent without policy", ["R11"], {"report_id_ma": bytes(32)}),
    ("debug", ["Y1"], {"policy": GuestPolicy.of(reserved_one=1, smt=1, debug=1)}),
    ("migrate_ma", ["Y2"], {"policy": GuestPolicy.of(reserved_one=1, smt=1, migrate_ma=1)}),
]


@pytest.mark.parametrize(
    ("checks", "changes"), [each[1:] for each in REPORT_CASES], ids=[c[0] for c in REPORT_CASES]
)
def test_reports_are_refused(milan: Bench, checks: list[str], changes: dict[str, Any]) -> None:
    """One field at a time, signed anew: the check that names it fails, and no other."""
    assert failed(check(milan, milan.report(**changes))) == checks


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"policy": GuestPolicy(0xB0000)}, {"allow_debug": True}),
        ({"policy": GuestPolicy(0x70000)}, {"allow_migrate_ma": True}),
        ({"vmpl": 0xFFFFFFFF}, {"accept_host_report": True}),
        ({"cpuid_fam_id": 0}, {"product": Product.MILAN}),
        ({"platform_info": PlatformInfo(0x165)}, {}),
        ({"chip_id": bytes(64)}, {}),
        (
            {"policy": GuestPolicy(0x70000), "report_id_ma": bytes(32), "launch_tcb": tcb(snp=0xFF)},
            {"allow_migrate_ma": True},
        ),
    ],
)
def test_what_is_waived_is_told(milan: Bench, changes: dict[str, Any], options: dict[str, Any]) -> None:
    """What the caller allows, or what is legal but notable, passes with a warning."""
    result = check(milan, milan.report(**changes), **options)
    assert failed(result) == []
    assert result.warnings


@pytest.mark.parametrize(
    "changes",
    [
        {"committed_tcb": tcb(), "current_tcb": tcb(microcode=0xFF), "current_build": 9},
        {"launch_tcb": tcb(snp=0)},
        {"policy": GuestPolicy(0x1830000), "platform_info": PlatformInfo(0x3D)},
        {"policy": GuestPolicy(0x2030000)},
        {"vmpl": 3},
        {"signer_info": SignerInfo.of(author_key_en=1), "author_key_digest": b"\1" * 48},
        {"version": 5, "launch_mit_vector": 0x3F, "current_mit_vector": 0x3F},
        {"cpuid_mod_id": 0, "cpuid_step": 9},
    ],
)
def test_legal_reports_pass(milan: Bench, changes: dict[str, Any]) -> None:
    """What honest machines send: provisional firmware, a guest launched before a commit, all VMPLs."""
    result = check(milan, milan.report(**changes))
    assert failed(result) == []
    assert result.warnings == ()


def test_options_that_demand_more(milan: Bench) -> None:
    """R3, R4, C10: refused only where the caller asks for it."""
    provisional = milan.report(current_tcb=tcb(microcode=0xFF))
    assert failed(check(milan, provisional, require_committed_current=True)) == ["R4"]
    assert failed(check(milan, milan.report(chip_id=bytes(64)), require_chip_id=True)) == ["R3"]
    assert failed(check(milan, milan.report(), require_crl=True)) == ["C10"]


def test_expected_values(milan: Bench) -> None:
    """Y3, Y4: exact bytes; a nonce of another size is the caller's mistake."""
    good = {"report_data": b"\x11" * 64, "measurement": b"\x22" * 48}
    assert failed(check(milan, milan.report(), **good)) == []
    assert failed(check(milan, milan.report(report_data=bytes(64)), **good)) == ["Y3"]
    assert failed(check(milan, milan.report(measurement=bytes(48)), **good)) == ["Y4"]
    with pytest.raises(UsageError, match="report_data: got 32 bytes, wanted 64"):
        check(milan, milan.report(), report_data=bytes(32))
    with pytest.raises(UsageError, match="measurement: got 0 bytes"):
        check(milan, milan.report(), measurement=b"")


def test_usage_errors(milan: Bench) -> None:
    """A time without a zone, or one certificate where several are wanted, is no evidence to judge."""
    with pytest.raises(UsageError, match="time zone"):
        check(milan, milan.report(), at=milan.at.replace(tzinfo=None))
    for name in ("certificates", "crls"):
        with pytest.raises(UsageError, match=f"{name}: got one"):
            check(milan, milan.report(), **{name: b"one"})


@pytest.mark.parametrize("key", [2, 3, 4, 5, 6, 7])
def test_p6_signing_key(milan: Bench, key: int) -> None:
    """P6. 2 to 6 are reserved; 7 is an unsigned report, which is never accepted."""
    report = milan.report(signer_info=SignerInfo.of(signing_key=key))
    assert failed(check(milan, report)) == ["P6", "C1", "R1"]


def _spoiled(report: bytes, offset: int, data: bytes) -> bytes:
    return report[:offset] + data + report[offset + len(data) :]


@pytest.mark.parametrize(
    ("offset", "data", "checks"),
    [
        (0x2A0 + 48, b"\1", ["P7", "R1"]),
        (0x2A0 + 71, b"\1", ["P7", "R1"]),
        (0x2E8 + 48, b"\1", ["P7", "R1"]),
        (0x2A0, bytes(72), ["P7", "R1"]),
        (0x2E8, bytes(72), ["P7", "R1"]),
        (0x2E8, P384_ORDER.to_bytes(72, "little"), ["P7", "R1"]),
        (0x330, b"\1", ["P8"]),
        (0x49F, b"\1", ["P8"]),
        (0x2A0, b"\1\2\3", ["R1"]),
        (0x090, b"\x23", ["R1"]),
        (0x000, b"\4", ["R1"]),
    ],
)
def test_signatures_are_refused(milan: Bench, offset: int, data: bytes, checks: list[str]) -> None:
    """P7, P8, R1: every byte of the signature field counts, and every signed byte."""
    assert failed(check(milan, _spoiled(milan.report(), offset, data))) == checks


@settings(derandomize=True, max_examples=40, deadline=None)
@given(at=st.integers(0, 0x49F), bit=st.integers(0, 7))
def test_no_changed_bit_is_authenticated(milan: Bench, at: int, bit: int) -> None:
    """Whatever bit differs from what was signed, the report is refused."""
    report = bytearray(milan.report())
    report[at] ^= 1 << bit
    assert not check(milan, bytes(report)).authenticated


def test_malleability(milan: Bench) -> None:
    """ECDSA: (R, n-S) verifies as well, so signature bytes identify nothing."""
    report = milan.report()
    s = int.from_bytes(report[0x2E8 : 0x2E8 + 72], "little")
    twin = _spoiled(report, 0x2E8, (P384_ORDER - s).to_bytes(72, "little"))
    assert twin != report
    assert check(milan, twin).authenticated


def test_p9_the_caller_is_contradicted(milan: Bench) -> None:
    """P9. The caller's product decides only where the report names none."""
    assert failed(check(milan, milan.report(), product=Product.GENOA)) == ["P9"]
    assert failed(check(milan, milan.report(), product=Product.MILAN)) == []


def test_p10_version_2(milan: Bench, turin: Bench) -> None:
    """P10. The caller, else the issuer, else CHIP_ID: 8 bytes and zeros are Turin's."""
    old = milan.report(version=2, cpuid_fam_id=0, cpuid_mod_id=0)
    assert check(milan, old).authenticated
    assert failed(check(milan, old, product=Product.GENOA)) == ["C2", "C5"]
    none: dict[str, Any] = {"certificates": []}
    assert failed(check(milan, old, **none)) == ["P10", "C1", "R1"]
    eight = turin.report(version=2, cpuid_fam_id=0, cpuid_mod_id=0)
    result = check(turin, eight, **none)
    assert result.product is Product.TURIN
    assert failed(result) == ["C1", "R1"]
    masked = turin.report(version=2, cpuid_fam_id=0, cpuid_mod_id=0, chip_id=bytes(64))
    assert failed(check(turin, masked, **none)) == ["P10", "C1", "R1"]


def test_r3_turin_chip_id_is_8_bytes(turin: Bench) -> None:
    """R3. Behind Turin's 8 bytes there is nothing."""
    assert failed(check(turin, turin.report(chip_id=turin.chip_id[:8] + b"\1" * 56))) == ["R3"]


def test_strict_form(milan: Bench) -> None:
    """The strict call returns the report, or raises with the first failure and all findings."""
    good: dict[str, Any] = {
        "certificates": milan.certificates,
        "roots": milan.roots,
        "at": milan.at,
        "report_data": b"\x11" * 64,
        "measurement": b"\x22" * 48,
    }
    assert verify_strict(milan.report(), **good) == AttestationReport.parse(milan.report())
    with pytest.raises(VerificationError, match="P2 fail: VERSION: got 1, wanted 2 to 5") as caught:
        verify_strict(milan.report(version=1), **good)
    assert len(caught.value.findings) >= len(CHECKS)
    late = {**good, "at": milan.at + timedelta(days=8 * 366)}
    with pytest.raises(VerificationError, match="C8"):
        verify_strict(milan.report(), **late)


def verdict(bench: Bench, *, without: str = "", noted: tuple[Finding, ...] = ()) -> Verification:
    """A result in which every check was made but one."""
    return Verification(
        raw=bench.report(),
        noted=noted,
        made=mask(*(name for name in CHECKS if name != without)),
        missing=(),
        not_checked=(),
    )


@pytest.mark.parametrize("missing", sorted(CHECKS.keys() - MAY_SKIP))
def test_nothing_is_authenticated_without_every_required_check(milan: Bench, missing: str) -> None:
    """A check that was not made, or skipped, is as good as failed."""
    assert verdict(milan).accepted
    for outcome in (Outcome.SKIP, Outcome.FAIL):
        finding = Finding(check=missing, outcome=outcome, text="")
        for without in ("", missing):
            result = verdict(milan, without=without, noted=(finding,))
            assert not result.authenticated
            assert not result.accepted
            with pytest.raises(VerificationError):
                result.require(authentic_only=True)
    assert not verdict(milan, without=missing).authenticated
    with pytest.raises(VerificationError, match="a required check was not made"):
        verdict(milan, without=missing).require()


def test_nothing_is_authenticated_without_findings(milan: Bench) -> None:
    """No finding, no report, no product: no verdict but a refusal."""
    report, every = milan.report(), mask(*CHECKS)
    quiet: dict[str, Any] = {"noted": (), "missing": (), "not_checked": ()}
    assert Verification(raw=report, made=every, **quiet).authenticated
    assert not Verification(raw=report, made=0, **quiet).authenticated
    assert not Verification(raw=None, made=every, **quiet).authenticated
    assert not Verification(raw=report, made=every & ~mask("P9", "P10"), **quiet).authenticated


def test_findings_carry_rule_and_source() -> None:
    """A finding says field, offset, got, wanted and the document."""
    findings = Findings()
    findings.fail("R8", "VMPL", 4, "0 to 3", offset=0x30)
    assert findings.noted == [
        Finding(
            check="R8",
            outcome=Outcome.FAIL,
            text="VMPL: got 4, wanted 0 to 3",
            field="VMPL",
            offset=0x30,
            got="4",
            wanted="0 to 3",
            source="AMD 56860, ATTESTATION_REPORT",
        )
    ]
    assert str(findings.noted[0]) == "R8 fail: VMPL: got 4, wanted 0 to 3"


def test_envelopes(milan: Bench) -> None:
    """MSG_REPORT_RSP: 20h bytes before the report. HCL: "HCLA", report at 20h. Only when asked for."""
    report = milan.report()
    payload = bytes(4) + (1184).to_bytes(4, "little") + bytes(24) + report
    assert report_from_response(payload + bytes(2784)) == report
    assert report_from_hcl(b"HCLA" + bytes(28) + report + b"runtime data") == report
    for broken, text in (
        (b"\x16" + payload[1:], "status 0x16"),
        (payload[:4] + bytes(4) + payload[8:], "report_size 0"),
        (payload[:-1], "1183 bytes after its header"),
        (payload[:31], "got 31 bytes"),
    ):
        with pytest.raises(LayoutError, match=text):
            report_from_response(broken)
    with pytest.raises(LayoutError, match="begins with"):
        report_from_hcl(payload)
    with pytest.raises(LayoutError, match="HCL envelope: 0 bytes"):
        report_from_hcl(b"HCLA")


def test_go_sev_guest_wants_what_is_committed(milan: Bench) -> None:
    """R4, R6. go-sev-guest by default: COMMITTED is CURRENT, TCB and version; here only when asked for."""
    for changes, check_id in (
        ({"current_tcb": TcbVersion(milan.tcb + 1)}, "R4"),
        ({"current_build": 6}, "R6"),
    ):
        report = milan.report(**changes)
        assert failed(check(milan, report)) == []
        assert failed(check(milan, report, like="go-sev-guest")) == [check_id]
