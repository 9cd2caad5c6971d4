"""The forms in which a report may come, and what is said about its values."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import (
    CHIP_ID_MARKER,
    REPORT_SIZE,
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    Product,
    SignerInfo,
    TcbVersion,
)
from swsnp.cli import main
from swsnp.cli.describe import as_dict, as_lines, remarks
from swsnp.cli.inputs import report_in
from swsnp.cli.report_diff import difference, difference_lines
from swsnp.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

REPORT = AttestationReport(
    version=5,
    policy=GuestPolicy(0x3001F),
    cpuid_fam_id=0x1A,
    cpuid_mod_id=2,
    chip_id=b"12345678" + bytes(56),
    current_tcb=TcbVersion.encode(Product.TURIN, fmc=1, snp=4, microcode=0x51),
    reported_tcb=TcbVersion.encode(Product.TURIN, fmc=1, snp=3, microcode=0x51),
    current_major=1,
    current_minor=55,
    current_build=65,
    launch_mit_vector=0x21,
)
RESPONSE = bytes(MsgReportRspHeader(report_size=REPORT_SIZE)) + bytes(REPORT)
ANY_REPORT = st.binary(min_size=REPORT_SIZE, max_size=REPORT_SIZE).map(AttestationReport.parse)


def said(report: AttestationReport, field: str, product: Product | None = Product.TURIN) -> str:
    return "; ".join(remarks(report, field, product))


@pytest.mark.parametrize(
    "content",
    [
        bytes(REPORT),
        RESPONSE,
        RESPONSE.ljust(4000, b"\0"),
        b"HCLA".ljust(32, b"\0") + bytes(REPORT) + b"{}",
        bytes(REPORT).hex().encode(),
        bytes(REPORT).hex(" ", 16).upper().encode() + b"\n",
        RESPONSE.hex("\n", 32).encode(),
    ],
    ids=["report", "response", "driver's buffer", "hcl", "hex", "spaced hex", "hex of a response"],
)
def test_forms(content: bytes) -> None:
    """AMD 56860, MSG_REPORT_RSP; Azure's HCL envelope; text: the report in it comes out unchanged."""
    assert report_in(content, "x") == bytes(REPORT)


@given(st.binary(max_size=5000))
def test_any_bytes_are_a_report_or_refused(content: bytes) -> None:
    """Whatever is given: 1,184 bytes or an InputError that names the file."""
    refusal = "the file"
    try:
        assert len(report_in(content, "the file")) == REPORT_SIZE
    except InputError as error:
        refusal = str(error)
    assert refusal.startswith("the file")


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`-` is standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(RESPONSE)))
    assert main(["report", "show", "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 5


def test_name_with_a_zero_byte(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that no file can have is unreadable input, not a traceback."""
    assert main(["report", "show", "a\0b"]) == 3
    assert "null byte" in capsys.readouterr().err


@given(ANY_REPORT, st.sampled_from([None, *Product]))
def test_any_report_can_be_shown(report: AttestationReport, product: Product | None) -> None:
    """No value of any field keeps a report from being shown, and every field is."""
    shown = json.loads(json.dumps(as_dict(report, product)))
    named = {name for name, _, _ in AttestationReport.layout() if not name.startswith("reserved_")}
    assert named <= shown.keys()
    text = "\n".join(as_lines(report, product))
    assert all(name in text for name in named)


@given(ANY_REPORT, ANY_REPORT)
def test_difference_of_any_two(first: AttestationReport, second: AttestationReport) -> None:
    """Exactly the fields that differ are named, in the order of the layout, and both texts can be made."""
    differing = [
        name for name, _, _ in AttestationReport.layout() if getattr(first, name) != getattr(second, name)
    ]
    assert [row["field"] for row in difference(first, second)] == differing
    text = "\n".join(difference_lines(first, second))
    assert all(name in text for name in differing)
    assert difference(first, first) == []


@pytest.mark.parametrize("field", [name for name, _, _ in AttestationReport.layout()])
def test_each_field_makes_a_difference(field: str) -> None:
    """A change in one field is named alone, with both values."""
    value = getattr(REPORT, field)
    other = b"\xa5" * len(value) if isinstance(value, bytes) else type(value)(value ^ 0x11)
    (row,) = difference(REPORT, REPORT.but(**{field: other}))
    assert row["field"] == field
    assert row["offset"] == AttestationReport.offset_of(field)
    assert row["first"] != row["second"]


def test_difference_names_the_parts() -> None:
    """Of a TCB, the components; of a word, the named bits."""
    other = REPORT.but(
        policy=REPORT.policy.but(debug=1),
        reported_tcb=TcbVersion.encode(Product.TURIN, fmc=1, snp=4, microcode=0x50),
    )
    policy, tcb = difference(REPORT, other)
    assert (policy["parts"], tcb["parts"]) == (["debug"], ["snp", "microcode"])
    lines = list(difference_lines(REPORT, other))
    assert "008h policy  (debug)" in lines
    assert "       DEBUG: the host may read and change the guest's memory" in lines


def test_difference_of_products() -> None:
    """Reports of two product lines are each decoded in their own layout, and the lines are named."""
    other = REPORT.but(cpuid_fam_id=0x19, cpuid_mod_id=1)
    lines = list(difference_lines(REPORT, other))
    assert lines[0].split() == ["product", "Turin", "|", "Milan"]
    assert lines[1].startswith("188h cpuid_fam_id")


def test_exit_codes_of_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 same, 1 different, 3 unreadable; in JSON too."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(bytes(REPORT))
    two.write_bytes(bytes(REPORT.but(guest_svn=7)))
    assert main(["report", "diff", str(one), str(one)]) == 0
    assert capsys.readouterr().out == "same: no field differs\n"
    assert main(["report", "diff", str(one), str(two), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "same": False,
        "fields": [{"field": "guest_svn", "offset": 4, "size": 4, "first": 0, "second": 7}],
    }
    assert main(["report", "diff", str(one), str(tmp_path / "none")]) == 3


def test_versions_and_vectors() -> None:
    """Firmware versions as major.minor.build; mitigation vectors by bit, from version 5 on."""
    assert as_dict(REPORT)["current_version"] == "1.55.65"
    assert "running firmware 1.55.65" in said(REPORT, "current_build")
    assert "committed firmware 0.0.0" in said(REPORT, "committed_build")
    assert as_dict(REPORT)["launch_mit_vector"] == {"raw": "0x21", "bits": [0, 5]}
    assert said(REPORT, "launch_mit_vector") == "mitigations in effect when the guest was launched: bits 0, 5"
    assert said(REPORT.but(current_mit_vector=1), "current_mit_vector") == "mitigations in effect now: bits 0"
    assert said(REPORT, "current_mit_vector") == ""
    assert "from version 5" in said(REPORT.but(version=3, launch_mit_vector=0), "launch_mit_vector")


def test_tcb_against_the_current() -> None:
    """A TCB that is not the current one says in which component, and on which side."""
    assert said(REPORT, "reported_tcb").endswith("snp 3 is below the current 4")
    assert said(REPORT.but(launch_tcb=TcbVersion.encode(Product.TURIN, tee=1)), "launch_tcb").count(";") == 4
    assert "tee 1 is above the current 0" in said(
        REPORT.but(launch_tcb=TcbVersion.encode(Product.TURIN, tee=1)), "launch_tcb"
    )
    assert said(REPORT, "reported_tcb", None).count(";") == 0
    assert as_dict(REPORT.but(current_tcb=TcbVersion(0xFF << 40)))["current_tcb"]["reserved"] == "00ff00"


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"version": 6}, "version", "known are 2 to 5"),
        ({"version": 5}, "version", ""),
        ({"vmpl": 0xFFFFFFFF}, "vmpl", "the host asked"),
        ({"vmpl": 1}, "vmpl", "the guest asked"),
        ({"signature_algo": 1}, "signature_algo", "ECDSA P-384"),
        ({"signature_algo": 2}, "signature_algo", "not a known"),
        ({"report_id_ma": b"\xff" * 32}, "report_id_ma", "no migration agent"),
        ({"report_id_ma": b"\1" * 32}, "report_id_ma", "agent's report id"),
        ({"version": 2}, "cpuid_fam_id", "from version 3"),
        ({"chip_id": bytes(64)}, "chip_id", "masked"),
        ({"chip_id": CHIP_ID_MARKER.ljust(64, b"\0")}, "chip_id", "emulated"),
        ({}, "chip_id", ""),
        ({}, "id_key_digest", "launched without one"),
        ({"author_key_digest": b"\1" * 48}, "author_key_digest", ""),
        ({"reserved_4c": b"\1" * 4}, "reserved_4c", "not zero"),
        ({"signer_info": SignerInfo.of(signing_key=1)}, "signer_info", "VLEK"),
        ({"signer_info": SignerInfo.of(signing_key=7)}, "signer_info", "not signed"),
        ({"signer_info": SignerInfo.of(signing_key=3)}, "signer_info", "reserved value"),
        ({"signer_info": SignerInfo.of(author_key_en=1)}, "signer_info", "author key"),
        ({"signer_info": SignerInfo.of(mask_chip_key=1)}, "signer_info", "MASK_CHIP_KEY"),
        ({"signer_info": SignerInfo(1 << 9)}, "signer_info", "0x200"),
        ({"platform_info": PlatformInfo(0x40)}, "platform_info", "without a name here: 0x40"),
        ({"platform_info": PlatformInfo(1)}, "platform_info", "SMT is enabled"),
        ({"policy": GuestPolicy(1 << 18)}, "policy", "migration agent is allowed"),
        ({"policy": GuestPolicy(1 << 30)}, "policy", "0x40000000"),
    ],
)
def test_remarks(changes: dict[str, object], field: str, text: str) -> None:
    """AMD 56860, ATTESTATION_REPORT: a value that means something is explained."""
    found = said(REPORT.but(**changes), field)
    assert text in found
    assert bool(text) is bool(found)
