"""What some bytes are, by content. Sources: AMD 56860, AMD 56421, RFC 7468, X.690."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import REPORT_SIZE, AttestationReport
from swsnp.amd_ca.assemble import _bits, _sequence
from swsnp.certs.classify import LOOKED_FOR, Form, classify, form_of
from swsnp.certs.table import TableEntry, pack, parse
from swsnp.certs.x509_reader import to_pem
from swsnp.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.certs.conftest import Authority

REPORT = bytes(AttestationReport(version=3, report_data=bytes(range(64))))
RESPONSE = bytes(MsgReportRspHeader(report_size=REPORT_SIZE)) + REPORT
HCL = b"HCLA".ljust(0x20, b"\1") + REPORT + b'{"runtime": "data"}'
TABLE = pack([TableEntry(guid=CertTableGuid.VCEK, data=b"leaf")])
SIGNED = _sequence(_sequence(), _sequence(), _sequence())
"""The beginning of what is signed in a certificate without version and serial number."""
PEM_MARK = b"-----BEGIN CERTIFICATE-----"
OTHER = UUID("9f4116cd-c503-4f5a-8f6f-fb68882f4ce2")


@pytest.mark.parametrize(
    ("form", "data"),
    [
        (Form.REPORT, REPORT),
        (Form.RESPONSE, RESPONSE),
        (Form.RESPONSE, RESPONSE.ljust(4000, b"\0")),
        (Form.HCL, HCL),
        (Form.REPORT_TEXT, REPORT.hex().encode()),
        (Form.REPORT_TEXT, REPORT.hex(" ", 16).upper().encode() + b"\r\n"),
        (Form.REPORT_TEXT, RESPONSE.hex().encode()),
        (Form.REPORT_TEXT, HCL.hex().encode()),
    ],
)
def test_four_forms_hold_a_report(form: Form, data: bytes) -> None:
    """AMD 56860: alone, after the header of MSG_REPORT_RSP, in Azure's envelope; each also as text."""
    found = classify(data)
    assert (found.form, found.report) == (form, REPORT)
    assert (found.certificates, found.crls, found.table) == ((), (), None)


@pytest.mark.parametrize("version", [0, 6, 0x100])
def test_a_report_of_no_known_version_is_still_a_report(version: int) -> None:
    """Its size says what it is meant to be; the verifier refuses its version (P2)."""
    odd = version.to_bytes(4, "little") + REPORT[4:]
    assert form_of(odd) is Form.REPORT
    assert form_of(bytes(REPORT_SIZE)) is Form.REPORT


def test_certificates_and_crls(milan: Authority) -> None:
    """RFC 5280: a time after the issuer's name makes the CRL; a file name would not tell."""
    crl = milan.crl
    found = classify(milan.hierarchy.ark)
    assert (found.form, found.certificates, found.crls) == (Form.CERTIFICATE, (milan.hierarchy.ark,), ())
    found = classify(crl)
    assert (found.form, found.certificates, found.crls) == (Form.CRL, (), (crl,))


def test_the_last_structure_ends_the_object() -> None:
    """X.690: a certificate is three values, and no fourth."""
    assert form_of(_sequence(SIGNED, SIGNED, _bits(b"x"))) is Form.CERTIFICATE


def test_a_certificate_of_a_reports_size() -> None:
    """1,184 bytes of DER are no report, since VERSION would be a large number."""
    body = _sequence(SIGNED, SIGNED, _bits(bytes(REPORT_SIZE)))
    padding = REPORT_SIZE - (len(body) - REPORT_SIZE)
    data = _sequence(SIGNED, SIGNED, _bits(bytes(padding)))
    assert (len(data), form_of(data)) == (REPORT_SIZE, Form.CERTIFICATE)


def test_pem_with_text_around_and_both_kinds(milan: Authority) -> None:
    """RFC 7468: text before, between and after the blocks; certificates keep their order."""
    crl = milan.crl
    text = b"\n".join(
        (
            b"subject: SEV-Milan",
            to_pem(milan.hierarchy.ask),
            b"between",
            to_pem(crl, label="X509 CRL"),
            to_pem(milan.hierarchy.ark),
            b"after",
        )
    )
    found = classify(text)
    assert found.form is Form.PEM
    assert found.certificates == (milan.hierarchy.ask, milan.hierarchy.ark)
    assert found.crls == (crl,)
    assert classify(to_pem(crl, label="X509 CRL")).certificates == ()


@pytest.mark.parametrize(
    "table",
    [
        TABLE,
        TABLE.ljust(4096, b"\0"),
        pack([TableEntry(guid=UUID(bytes=CertTableGuid.VLEK.bytes_le), data=b"x")]),
        pack([TableEntry(guid=OTHER, data=b"x")]),
        bytes(24),
        bytes(4000),
        bytes(4096),
        TABLE[:30],
    ],
)
def test_tables(table: bytes) -> None:
    """AMD 56421: by a known GUID in front, even when it is cut off; otherwise by its whole shape."""
    found = classify(table)
    assert (found.form, found.table) == (Form.TABLE, table)


def test_a_table_with_pem_inside_is_a_table(milan: Authority) -> None:
    """Tools put PEM into tables; the mark of PEM counts in texts only."""
    table = pack([TableEntry(guid=CertTableGuid.ARK, data=to_pem(milan.hierarchy.ark))])
    assert form_of(table) is Form.TABLE


def test_what_a_guest_chooses_does_not_change_the_form() -> None:
    """FAMILY_ID, IMAGE_ID and REPORT_DATA could make a report look like a table or like PEM."""
    family = (48).to_bytes(4, "little") + (100).to_bytes(4, "little") + bytes(8)
    report = AttestationReport(
        version=2, family_id=family, report_data=b"-----BEGIN CERTIFICATE-----".ljust(64)
    )
    assert len(parse(bytes(report))) == 1
    assert form_of(bytes(report)) is Form.REPORT
    guids = CertTableGuid.VCEK.bytes * 4
    assert form_of(bytes(AttestationReport(version=2, report_data=guids))) is Form.REPORT


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "got 0 bytes, wanted one of: "),
        (b"hello", "got 5 bytes that begin with 68656c6c6f, wanted one of: "),
        (REPORT[:-1], "got 1183 bytes that begin with 03000000"),
        (REPORT + b"\0", "got 1185 bytes"),
        (REPORT.hex().encode()[:-1], "got 2367 bytes"),
        (REPORT.hex().encode()[:-2], "got 2366 bytes"),
        (REPORT.hex().encode()[:100] + b"\f" + REPORT.hex().encode()[100:], "got 2369 bytes"),
        (b"ab" * 40, "got 80 bytes"),
        (bytes(23), "got 23 bytes"),
        (bytes(32) + b"\1" * 32, "got 64 bytes"),
        (bytes.fromhex("3003020105"), "but are neither a certificate nor a CRL"),
        (bytes.fromhex("3003020105ff"), "that begin like DER, but DER: 1 bytes follow"),
        (bytes.fromhex("308201"), "that begin like DER, but DER"),
        (bytes(MsgReportRspHeader(status=0x16)).ljust(4000, b"\0"), "status 0x16, report_size 0"),
        (bytes(MsgReportRspHeader(status=0x16, report_size=REPORT_SIZE)) + REPORT, "status 0x16"),
        (RESPONSE[:-1], "MSG_REPORT_RSP: 1183 bytes after its header, wanted 1184"),
        (HCL[:0x30], "HCL envelope: 16 bytes after its header, wanted 1184"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n", "1 blocks begin, 0 are whole"),
        (to_pem(b"x", label="EC PRIVATE KEY"), "got EC PRIVATE KEY, wanted CERTIFICATE"),
        (to_pem(b"x").replace(b"eA==", b"e!=="), "not base64"),
        (CertTableGuid.VCEK.bytes[:15], "got 15 bytes"),
        (RESPONSE[:REPORT_SIZE], "MSG_REPORT_RSP: 1152 bytes after its header, wanted 1184"),
        (b"\xff" + RESPONSE[1:REPORT_SIZE], "both attestation report and MSG_REPORT_RSP by content"),
        (RESPONSE[:32], "MSG_REPORT_RSP: 0 bytes after its header, wanted 1184"),
        (b"\1" * 4000, "got 4000 bytes that begin with 0101"),
        (_sequence(SIGNED, SIGNED, _bits(b"x"), SIGNED), "but are neither a certificate nor a CRL"),
    ],
)
def test_refusals_name_the_file_and_what_was_looked_for(data: bytes, text: str) -> None:
    """What is none of the forms, or holds nothing, is an InputError that says so."""
    with pytest.raises(InputError, match="^evidence.bin: ") as caught:
        classify(data, "evidence.bin")
    assert text in str(caught.value)
    if "wanted one of" in str(caught.value):
        assert str(caught.value).endswith(LOOKED_FOR)


def test_two_forms_at_once_are_refused() -> None:
    """A certificate table that is also a MSG_REPORT_RSP would be read differently by two programs."""
    header = bytes(MsgReportRspHeader(report_size=REPORT_SIZE))
    both = b"HCLA" + header[4:] + REPORT
    with pytest.raises(InputError, match="both MSG_REPORT_RSP and HCL envelope by content"):
        classify(both)


def test_genuine_material(vectors: Path) -> None:
    """Every genuine file is told by its content, whatever it is called."""
    wanted = {
        Form.REPORT: ["*/report.bin"],
        Form.REPORT_TEXT: ["milan-v2-plain/report.hex"],
        Form.RESPONSE: ["messages/report_msg_rsp.bin"],
        Form.HCL: ["milan-v2-azure-hcl/hcl-report.bin"],
        Form.CERTIFICATE: ["ca/*.der", "*/v?ek*.der"],
        Form.CRL: ["crl/*.der"],
        Form.PEM: ["ca/*.pem", "*/*.pem"],
    }
    seen = 0
    for form, patterns in wanted.items():
        for path in (path for pattern in patterns for path in vectors.glob(pattern)):
            assert form_of(path.read_bytes(), path.name) is form, path
            classify(path.read_bytes())
            seen += 1
    assert seen > 40
    plain = vectors / "milan-v2-plain"
    assert classify((plain / "report.hex").read_bytes()).report == (plain / "report.bin").read_bytes()
    assert json.loads((vectors / "index.json").read_text())
    for name in ("messages/derived_key_msg_rsp.bin", "measure/ovmf_AmdSev_suffix.bin", "README.md"):
        with pytest.raises(InputError, match="wanted one of"):
            classify((vectors / name).read_bytes())


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=120),
        st.binary(min_size=REPORT_SIZE, max_size=REPORT_SIZE),
        st.builds(
            lambda start, cut: (start + bytes(1300))[:cut], st.binary(max_size=40), st.integers(0, 1300)
        ),
    )
)
def test_any_bytes_are_told_or_refused(data: bytes) -> None:
    """One form, or InputError; what is taken out was inside."""
    try:
        found = classify(data)
    except InputError:
        return
    assert found.report is None or found.report in data or found.form is Form.REPORT_TEXT
    assert found.table in (None, data)
