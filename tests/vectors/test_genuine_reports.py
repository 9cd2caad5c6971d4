"""Verdicts on genuine reports, and on a synthetic set that spoils one field each.

Reports and certificates of real processors, collected from public repositories; see the vectors' README.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import pytest
from tests.unit.verify.judging import failed
from tests.unit.verify.judging import judge as verify

from swsnp.abi.snp_report import Product
from swsnp.certs.classify import report_from_hcl, report_from_response
from swsnp.certs.crl import read_crl
from swsnp.certs.signature import rsa_signed
from swsnp.certs.x509_reader import read, read_all
from swsnp.verify.chain import Chain, Signatures, check_revocation
from swsnp.verify.policy import Policy
from swsnp.verify.result import Findings
from swsnp.verify.roots import AMD_CA_SHA256, Roots

if TYPE_CHECKING:
    from pathlib import Path

DAY = timedelta(days=1)
ENGINES: tuple[Literal["cryptography", "awscrt"], ...] = ("cryptography", "awscrt")
GENUINE: list[tuple[str, str, Product, list[str], list[str]]] = [
    ("milan-v2-debug", "vcek.der", Product.MILAN, ["Y1"], []),
    ("milan-v2-plain", "vcek.der", Product.MILAN, [], []),
    ("milan-v2-authorkey", "vcek.der", Product.MILAN, [], []),
    ("milan-v2-idkey", "vcek.der", Product.MILAN, [], []),
    ("milan-v2-azure-hcl", "vcek_and_chain.pem", Product.MILAN, [], []),
    ("milan-v2-hostdata", "vcek_and_chain.pem", Product.MILAN, [], []),
    ("milan-v3", "vcek.pem", Product.MILAN, [], []),
    ("milan-v3", "vcek_reissue_2025-12-29.pem", Product.MILAN, [], []),
    ("milan-v3-vlek", "vlek.der", Product.MILAN, [], ["R3", "R3"]),
    ("genoa-line-v5", "vcek.der", Product.GENOA, [], []),
    ("turin-v5", "vcek.pem", Product.TURIN, [], ["P3"]),
]
IDS = [f"{folder}-{file}" for folder, file, *_ in GENUINE]


@pytest.fixture(scope="module")
def authorities(vectors: Path) -> list[bytes]:
    """All of AMD's CA certificates; which of them apply is the verifier's to find out."""
    return [file.read_bytes() for file in sorted((vectors / "ca").glob("*_a*k.der"))]


def evidence(vectors: Path, folder: str, file: str, authorities: list[bytes]) -> tuple[bytes, dict[str, Any]]:
    leaf = (vectors / folder / file).read_bytes()
    options = {
        "certificates": [*authorities, leaf],
        "roots": Roots.amd(),
        "at": read_all(leaf)[0].not_before + DAY,
    }
    return (vectors / folder / "report.bin").read_bytes(), options


@pytest.mark.parametrize(("folder", "file", "product", "checks", "warnings"), GENUINE, ids=IDS)
def test_genuine_reports(
    vectors: Path,
    authorities: list[bytes],
    folder: str,
    file: str,
    product: Product,
    checks: list[str],
    warnings: list[str],
) -> None:
    """Real processors against AMD's pinned roots: accepted, but for the guest with DEBUG."""
    report, options = evidence(vectors, folder, file, authorities)
    result = verify(report, **options)
    assert failed(result) == checks
    assert [each.check for each in result.warnings] == warnings
    assert result.product is product


@pytest.mark.parametrize(("folder", "file"), [each[:2] for each in GENUINE], ids=IDS)
def test_genuine_reports_with_one_bit_changed(
    vectors: Path, authorities: list[bytes], folder: str, file: str
) -> None:
    """R1. MEASUREMENT and REPORT_DATA are what an attacker would want to change."""
    report, options = evidence(vectors, folder, file, authorities)
    for offset in (0x50, 0x90):
        changed = report[:offset] + bytes((report[offset] ^ 1,)) + report[offset + 1 :]
        assert "R1" in failed(verify(changed, **options))


def test_debug_by_permission(vectors: Path, authorities: list[bytes]) -> None:
    """The DEBUG report is genuine otherwise."""
    report, options = evidence(vectors, "milan-v2-debug", "vcek.der", authorities)
    assert failed(verify(report, **options, allow_debug=True)) == []


def test_another_chips_certificate(vectors: Path, authorities: list[bytes]) -> None:
    """A genuine VCEK of another chip: signature, TCB and chip id all differ."""
    report, _ = evidence(vectors, "milan-v2-plain", "vcek.der", authorities)
    _, options = evidence(vectors, "milan-v2-debug", "vcek.der", authorities)
    assert failed(verify(report, **options)) == ["R1", "R2", "R3"]


def test_the_vlek_expires(vectors: Path, authorities: list[bytes]) -> None:
    """C8. This VLEK was valid until 2025-12-10; its provider is the one that the certificate names."""
    report, options = evidence(vectors, "milan-v3-vlek", "vlek.der", authorities)
    late = {**options, "at": datetime(2025, 12, 11, tzinfo=UTC)}
    assert failed(verify(report, **late)) == ["C8"]
    assert failed(verify(report, **late, allow_expired_leaf=True)) == []
    assert failed(verify(report, **options, csp_ids=["CN=cc-us-east-2.amazonaws.com"])) == []
    assert failed(verify(report, **options, csp_ids=["CN=cc-eu-west-1.amazonaws.com"])) == ["R3"]


def test_provisional_firmware(vectors: Path, authorities: list[bytes]) -> None:
    """R4. COMMITTED below CURRENT is common on real hosts, and refused only on demand."""
    report, options = evidence(vectors, "milan-v2-idkey", "vcek.der", authorities)
    assert failed(verify(report, **options, require_committed_current=True)) == ["R4"]


def test_hcl_envelope(vectors: Path, authorities: list[bytes]) -> None:
    """Azure's envelope holds the report at 20h; unasked, the envelope is no report."""
    report, options = evidence(vectors, "milan-v2-azure-hcl", "vcek_and_chain.pem", authorities)
    blob = (vectors / "milan-v2-azure-hcl/hcl-report.bin").read_bytes()
    assert report_from_hcl(blob) == report
    assert failed(verify(blob, **options)) == ["P1"]


def test_report_response(vectors: Path) -> None:
    """MSG_REPORT_RSP: the report follows a header of 20h bytes in the driver's buffer."""
    buffer = (vectors / "messages/report_msg_rsp.bin").read_bytes()
    assert len(buffer) == 4000
    report = report_from_response(buffer)
    assert (len(report), report[:4]) == (1184, buffer[32:36])


@pytest.mark.parametrize("file", ["vcek_bad_signature_legacy.der", "vcek_bad_signature_octetstring.der"])
def test_bad_vceks(vectors: Path, authorities: list[bytes], file: str) -> None:
    """C6. Two VCEKs with wrong signatures, HWID raw and wrapped: both are read, neither is believed."""
    report, _ = evidence(vectors, "milan-v2-plain", "vcek.der", authorities)
    leaf = (vectors / "bad-vcek" / file).read_bytes()
    at = read(leaf).not_before + DAY
    result = verify(report, certificates=[*authorities, leaf], roots=Roots.amd(), at=at)
    assert failed(result)[0] == "C6"
    assert "C9" not in failed(result)


def test_genuine_crls(vectors: Path, authorities: list[bytes]) -> None:
    """C10. Milan's CRL of 2022 names nobody; it is signed by the root and ends in 2023."""
    report, options = evidence(vectors, "milan-v2-plain", "vcek.der", authorities)
    crls = [file.read_bytes() for file in sorted((vectors / "crl").glob("*.der"))]
    inside = datetime(2023, 5, 1, tzinfo=UTC)
    assert failed(verify(report, **{**options, "at": inside}, crls=crls, require_crl=True)) == []
    assert failed(verify(report, **{**options, "at": inside.replace(year=2024)}, crls=crls)) == ["C10"]


def test_the_revoked_ask_of_genoa(vectors: Path) -> None:
    """C10. Serial 20001 chains to the genuine root and is on Genoa's CRL."""
    ark = read((vectors / "ca/genoa_ark.der").read_bytes())
    leaf = read((vectors / "genoa-line-v5/vcek.der").read_bytes())
    crl = read_crl((vectors / "crl/genoa_vcek_2022.crl.der").read_bytes())
    for file, wanted in (("genoa_ask_revoked_20001", ["fail"]), ("genoa_ask", [])):
        ask = read((vectors / f"ca/{file}.der").read_bytes())
        assert rsa_signed(ask, ark)
        findings = Findings()
        chain = Chain(leaf=leaf, intermediate=ask, root=ark)
        check_revocation(chain, [crl], findings, policy=Policy(), signatures=Signatures(8))
        assert [each.outcome for each in findings.noted] == wanted


def test_of_genoas_two_asks_the_signer_is_taken(vectors: Path, authorities: list[bytes]) -> None:
    """C6. The revoked ASK has the same name; the VCEK was signed by its successor."""
    report, options = evidence(vectors, "genoa-line-v5", "vcek.der", authorities)
    revoked = (vectors / "ca/genoa_ask_revoked_20001.der").read_bytes()
    options["certificates"] = [revoked, *options["certificates"]]
    assert failed(verify(report, **options)) == []


def _synthetic(vectors: Path) -> tuple[list[dict[str, str]], list[bytes]]:
    with (vectors / "synthetic/expected.tsv").open() as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    return rows, [(vectors / "synthetic" / f"{name}.der").read_bytes() for name in ("ark", "ask", "vcek")]


REJECTED_BY = {
    "sigtail_nonzero": ["P8"],
    "R_high_bytes": ["P7", "R1"],
    "S_zero": ["P7", "R1"],
    "policy_bit17_clear": ["P4"],
    "policy_bit26": ["P4"],
    "policy_bit63": ["P4"],
    "signingkey_2": ["P6", "C1", "R1"],
    "signingkey_7": ["P6", "C1", "R1"],
    "flags_bit5": ["P3"],
    "mask_chip_key": ["R7"],
    "author_key_en": ["R9"],
    "rsvd_4c": ["P3"],
    "rsvd_18b": ["P3"],
    "rsvd_1eb": ["P3"],
    "rsvd_1ef": ["P3"],
    "rsvd_208": ["P3"],
    "rsvd_29f": ["P3"],
    "mit_in_v3": ["P3"],
    "version_0": ["P2", "P3"],
    "version_1": ["P2", "P3"],
    "version_2": ["P3"],
    "version_6": ["P2"],
    "sigalgo_0": ["P5"],
    "sigalgo_2": ["P5"],
    "vmpl_4": ["R8"],
    "vmpl_ffffffff": ["R8"],
    "chipid_wrong": ["R3"],
    "fms_genoa": ["C2", "C5"],
    "fms_zero": ["P9", "C2", "C5"],
    "reported_gt_current": ["R2", "R4"],
    "reported_snp_lower": ["R2"],
    "launch_gt_committed": ["R5"],
    "committed_gt_current": ["R4"],
    "committed_lt_current": ["R4"],
    "tcb_rsvd": ["R2", "R4"],
    "build_committed_gt": ["R6"],
}
WARNED = {"plat_bit6": ["P3"], "plat_bit8": ["P3"], "chipid_zero": ["R3"]}


def test_synthetic_reports(vectors: Path) -> None:
    """Forty-nine reports, one field each: the recommended verdict, by the check that names the field."""
    rows, certificates = _synthetic(vectors)
    at = read(certificates[2]).not_before + DAY
    for row in rows:
        name, recommended = row["name"], row["recommended"]
        report = (vectors / f"synthetic/reports/{name}.bin").read_bytes()
        result = verify(report, certificates=certificates, roots=Roots.of(certificates[0]), at=at)
        assert failed(result) == REJECTED_BY.get(name, []), name
        assert [each.check for each in result.warnings] == WARNED.get(name, []), name
        # "strict: reject unknown platform bits when a platform policy is given; else accept with warning"
        accepted = recommended.startswith("accept") or "else accept with warning" in recommended
        assert result.authenticated is accepted, name
        strict = verify(
            report,
            certificates=certificates,
            roots=Roots.of(certificates[0]),
            at=at,
            refuse_unknown_platform_info=True,
        )
        assert ("Y17" in failed(strict)) is name.startswith(("plat_bit6", "plat_bit8")), name
    assert len(rows) == 49


def test_synthetic_reports_as_go_sev_guest_judges_them(vectors: Path) -> None:
    """The compatibility mode gives the column of verdicts that go-sev-guest gave when it was run.

    That library was given the made-up root as a trusted one. What it lets pass and we refuse is told: every
    report that it accepts and the recommended verdict refuses comes with a warning of the check.
    """
    rows, certificates = _synthetic(vectors)
    at = read(certificates[2]).not_before + DAY
    roots = Roots.of(certificates[0])
    for row in rows:
        name = row["name"]
        report = (vectors / f"synthetic/reports/{name}.bin").read_bytes()
        go = row["go_sev_guest_verify"] == row["go_sev_guest_validate"] == "ok"
        result = verify(report, certificates=certificates, roots=roots, at=at, like="go-sev-guest")
        assert result.passed is go, (name, failed(result))
        if go and name in REJECTED_BY:
            assert {each.check for each in result.warnings} >= set(REJECTED_BY[name]) - {"C2", "C5"}, name


GO = {
    "milan-v2-debug": ["Y1"],
    "milan-v2-idkey": ["R4"],
    "milan-v2-azure-hcl": ["R4"],
    "milan-v3-vlek": ["R4"],
    "genoa-line-v5": ["P9"],
    "turin-v5": ["C9"],
}


@pytest.mark.parametrize(("folder", "file"), [each[:2] for each in GENUINE], ids=IDS)
def test_genuine_reports_as_go_sev_guest_judges_them(
    vectors: Path, authorities: list[bytes], folder: str, file: str
) -> None:
    """COMMITTED other than CURRENT, models that it does not list and Turin's certificates are refused."""
    report, options = evidence(vectors, folder, file, authorities)
    assert failed(verify(report, **options, like="go-sev-guest")) == GO.get(folder, [])


def test_like_go_sev_guest_pins_roots(vectors: Path) -> None:
    """C5. That library takes roots from the evidence when it is given none; this is never reproduced."""
    _, certificates = _synthetic(vectors)
    report = (vectors / "synthetic/reports/base3.bin").read_bytes()
    at = read(certificates[2]).not_before + DAY
    for roots in (None, Roots.amd()):
        result = verify(report, certificates=certificates, roots=roots, at=at, like="go-sev-guest")
        assert failed(result) == ["C5"]


def test_amds_certificates_are_known(vectors: Path) -> None:
    """C6. Each listed CA certificate is the genuine one, and its signature by the pinned root is good."""
    folder = vectors / "ca"
    for name, digest in AMD_CA_SHA256.items():
        product = name.rpartition("-")[2].lower()
        kind = {"ARK": "ark", "SEV": "ask"}.get(name.rpartition("-")[0], "asvk")
        each = read((folder / f"{product}_{kind}.der").read_bytes())
        assert each.subject_cn == name
        assert hashlib.sha256(each.der).hexdigest() == digest
        assert rsa_signed(each, read((folder / f"{product}_ark.der").read_bytes()))
        assert Roots.amd().knows(each)
    revoked = read((folder / "genoa_ask_revoked_20001.der").read_bytes())
    assert not Roots.amd().knows(revoked)


def test_an_unknown_intermediate_of_a_pinned_root_is_as_good(vectors: Path, authorities: list[bytes]) -> None:
    """C5, C6. The pin is on the root's key: who knows no intermediate by heart verifies its signature."""
    report, options = evidence(vectors, "genoa-line-v5", "vcek.der", authorities)
    options["roots"] = replace(Roots.amd(), known=frozenset())
    assert failed(verify(report, **options)) == []


def test_both_engines_give_the_same_verdicts(vectors: Path, authorities: list[bytes]) -> None:
    """Genuine and synthetic: check by check, finding by finding."""
    pytest.importorskip("awscrt", reason="awscrt is not installed; remedy: pip install 'swsnp[fast]'")
    for folder, file, *_ in GENUINE:
        report, options = evidence(vectors, folder, file, authorities)
        for spoiled in (report, report[:0x2A0] + b"\1" + report[0x2A1:]):
            one, other = (verify(spoiled, **options, engine=engine) for engine in ENGINES)
            assert one.findings == other.findings
    rows, certificates = _synthetic(vectors)
    at, roots = read(certificates[2]).not_before + DAY, Roots.of(certificates[0])
    for row in rows:
        report = (vectors / f"synthetic/reports/{row['name']}.bin").read_bytes()
        one, other = (
            verify(report, certificates=certificates, roots=roots, at=at, engine=engine) for engine in ENGINES
        )
        assert one.findings == other.findings


def test_synthetic_reports_under_amds_roots(vectors: Path) -> None:
    """C5. AMD's names over other keys: every one is refused, whatever else is right."""
    rows, certificates = _synthetic(vectors)
    at = read(certificates[2]).not_before + DAY
    for row in rows:
        report = (vectors / f"synthetic/reports/{row['name']}.bin").read_bytes()
        checks = failed(verify(report, certificates=certificates, roots=Roots.amd(), at=at))
        assert "C5" in checks or "C1" in checks, row["name"]
        if row["name"] not in REJECTED_BY:
            assert checks == ["C5"], row["name"]
