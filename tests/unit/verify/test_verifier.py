"""What a verifier remembers changes no verdict; what it costs; what it says in JSON; who may use it how."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import pytest
from tests.unit.verify.judging import check, failed

from swsnp.abi.snp_report import Product, SignerInfo
from swsnp.certs.signature import pss_signed
from swsnp.crypto import ecdsa
from swsnp.crypto.ecdsa import SigningKey
from swsnp.errors import HostError, UsageError, VerificationError
from swsnp.verify.policy import Policy
from swsnp.verify.result import CHECKS, SCHEMA
from swsnp.verify.roots import Roots
from swsnp.verify.verifier import Verifier

if TYPE_CHECKING:
    from tests.unit.verify.conftest import Bench

GIVEN: dict[str, Any] = {"report_data": b"\x11" * 64, "measurement": b"\x22" * 48}
YEAR = timedelta(days=366)


def spoiled(report: bytes) -> bytes:
    """The same with one bit of MEASUREMENT changed."""
    return report[:0x90] + bytes((report[0x90] ^ 1,)) + report[0x91:]


def test_memory_changes_no_verdict(milan: Bench) -> None:
    """Good, spoiled, expired, revoked, another policy's: each as if it were the first."""
    verifier = Verifier(roots=milan.roots)
    table = milan.hierarchy.table(vcek=milan.vcek)
    good = milan.report()
    for _ in range(2):
        for report, options, checks in (
            (good, {}, []),
            (spoiled(good), {}, ["R1", "Y4"]),
            (good, {"at": milan.at + 8 * YEAR}, ["C8"]),
            (good, {"at": milan.at - 8 * YEAR}, ["C8"]),
            (good, {"crls": [milan.hierarchy.crl([0x10001])]}, ["C10"]),
            (good, {"crls": [milan.hierarchy.crl()], "at": milan.at + YEAR}, ["C10"]),
            (milan.report(chip_id=b"\xaa" * 64), {}, ["R3"]),
            (milan.report(cpuid_mod_id=0x11), {}, ["C2", "C5"]),
            (good, {"table": table[:-1]}, ["C0", "C1", "R1"]),
            (milan.report(signer_info=SignerInfo.of(signing_key=1)), {}, ["C1", "R1"]),
        ):
            wanted: dict[str, Any] = {"table": table, "at": milan.at, **GIVEN, **options}
            assert failed(verifier.verify(report, **wanted)) == checks


def test_a_warm_verification_is_one_signature(milan: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold: three RSA signatures and the report's. Then the report's alone, whatever the time."""
    calls: list[str] = []
    rsa, p384 = pss_signed, ecdsa.VerifyingKey.verify

    def count_rsa(*parts: bytes) -> bool:
        calls.append("RSA")
        return rsa(*parts)

    def count_p384(self: ecdsa.VerifyingKey, data: bytes, signature: bytes) -> bool:
        calls.append("P-384")
        return p384(self, data, signature)

    monkeypatch.setattr("swsnp.verify.chain.pss_signed", count_rsa)
    monkeypatch.setattr(ecdsa.VerifyingKey, "verify", count_p384)
    verifier = Verifier(roots=milan.roots)
    evidence: dict[str, Any] = {"certificates": milan.certificates, **GIVEN}
    assert verifier.verify(milan.report(), at=milan.at, **evidence).accepted
    assert sorted(calls) == ["P-384", "RSA", "RSA", "RSA"]
    calls.clear()
    for hours in range(3):
        at = milan.at + timedelta(hours=hours)
        assert verifier.verify(milan.report(guest_svn=hours), at=at, **evidence).accepted
    assert calls == ["P-384"] * 3
    calls.clear()
    # another chip of the line: its certificate and its report, the line's own certificates are known
    key = SigningKey.from_scalar(77)
    other = milan.hierarchy.vcek(*key.public_point, milan.chip_id, milan.tcb)
    result = verifier.verify(
        milan.report(), at=milan.at, certificates=[other, *milan.certificates[1:]], **GIVEN
    )
    assert failed(result) == ["R1"]
    assert calls == ["P-384", "RSA"]


def test_memory_is_bounded(milan: Bench) -> None:
    """The last pieces are kept, no more; evidence beyond 64 KiB is judged and forgotten."""
    verifier = Verifier(roots=milan.roots, cache_size=2)
    for number in range(5):
        certificates = [*milan.certificates, *[milan.vcek] * number]
        assert verifier.verify(milan.report(), at=milan.at, certificates=certificates, **GIVEN).accepted
    assert len(verifier._reader._known) == 2
    large = [*milan.certificates, b" " * 65536 + milan.hierarchy.chain_pem("vcek")]
    for _ in range(2):
        assert verifier.verify(milan.report(), at=milan.at, certificates=large, **GIVEN).accepted
    assert len(verifier._reader._known) == 2


def test_threads(milan: Bench) -> None:
    """Reports of several chips and spoiled ones, at once: everyone gets his own verdict."""
    verifier = Verifier(roots=milan.roots, cache_size=4)
    good = milan.report()
    jobs = [(good, milan.certificates, []), (spoiled(good), milan.certificates, ["R1", "Y4"])]
    for scalar in (77, 78, 79):
        key = SigningKey.from_scalar(scalar)
        other = milan.hierarchy.vcek(*key.public_point, milan.chip_id, milan.tcb)
        jobs.append((good, [other, *milan.certificates[1:]], ["R1"]))

    def run(number: int) -> bool:
        report, certificates, checks = jobs[number % len(jobs)]
        result = verifier.verify(report, at=milan.at, certificates=certificates, **GIVEN)
        return [each.check for each in result.failures] == checks and result.accepted is not bool(checks)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(200)))


@pytest.mark.parametrize("engine", ["cryptography", "awscrt"])
def test_engines(milan: Bench, engine: Literal["cryptography", "awscrt"]) -> None:
    """One setting, the same verdicts; also of a key that is no point of the curve."""
    pytest.importorskip("awscrt", reason="awscrt is not installed; remedy: pip install 'swsnp[fast]'")
    good = milan.report()
    assert check(milan, good, engine=engine, **GIVEN).accepted
    assert failed(check(milan, spoiled(good), engine=engine)) == ["R1"]
    x, _ = milan.key.public_point
    off_curve = milan.hierarchy.vcek(x, x, milan.chip_id, milan.tcb)
    certificates = [off_curve, *milan.certificates[1:]]
    assert failed(check(milan, good, engine=engine, certificates=certificates)) == ["R1"]


def test_what_cannot_be_asked_for(milan: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine or a likeness that does not exist is a mistake; one that is not installed has a remedy."""
    unknown: Any = "openssl"
    with pytest.raises(UsageError, match="verifying engine: got 'openssl', wanted 'cryptography' or"):
        Verifier(roots=milan.roots, engine=unknown)
    with pytest.raises(UsageError, match="like: got 'openssl', wanted 'go-sev-guest' or None"):
        Verifier(roots=milan.roots, like=unknown)
    monkeypatch.setitem(sys.modules, "awscrt", None)
    monkeypatch.setitem(sys.modules, "awscrt.crypto", None)
    with pytest.raises(HostError, match="not installed: pip install"):
        Verifier(roots=milan.roots, engine="awscrt")


def test_require(milan: Bench) -> None:
    """The strict form wants both values; `authentic_only` is content without them."""
    result = check(milan)
    assert result.require(authentic_only=True) is result.report
    with pytest.raises(VerificationError, match="nothing to compare with was given: report_data, measurem"):
        result.require()
    with pytest.raises(VerificationError, match="Y10 fail: VMPL: got 0x0, wanted 1"):
        check(milan, vmpl=1).require(authentic_only=True)
    assert check(milan, **GIVEN).require().measurement == GIVEN["measurement"]


def test_as_json(milan: Bench) -> None:
    """Stable names, every check, and numbers that no reader of JSON rounds."""
    result = check(milan, milan.report(guest_svn=7), vmpl=1)
    shown = json.loads(json.dumps(result.as_dict()))
    assert shown["schema"] == SCHEMA == "swsnp.verification/1"
    assert list(shown) == [
        "schema",
        "authenticated",
        "passed",
        "accepted",
        "missing",
        "not_checked",
        "product",
        "signing_key",
        "report",
        "findings",
    ]
    assert (shown["authenticated"], shown["passed"], shown["accepted"]) == (True, False, False)
    assert shown["missing"] == ["report_data", "measurement"]
    assert shown["not_checked"] == list(Policy(vmpl=1).unset())
    assert (shown["product"], shown["signing_key"]) == ("Milan", "VCEK")
    assert [each["check"] for each in shown["findings"]] == list(CHECKS)
    assert [each for each in shown["findings"] if each["outcome"] == "fail"] == [
        {
            "check": "Y10",
            "outcome": "fail",
            "text": "VMPL: got 0x0, wanted 1",
            "field": "VMPL",
            "offset": 0x30,
            "got": "0x0",
            "wanted": "1",
            "source": "AMD 56860, ATTESTATION_REPORT",
        }
    ]
    report = shown["report"]
    assert (report["guest_svn"], report["reported_tcb"]) == (7, "0xdb18000000000004")
    assert report["measurement"] == "22" * 48
    assert all(isinstance(value, str) or value < 1 << 32 for value in report.values())


def test_as_json_of_no_report(milan: Bench) -> None:
    """What is no report has no fields, and a key that is not named keeps its number."""
    shown = check(milan, b"").as_dict()
    assert (shown["report"], shown["product"], shown["signing_key"]) == (None, None, None)
    odd = check(milan, milan.report(signer_info=SignerInfo.of(signing_key=5))).as_dict()
    assert odd["signing_key"] == "5"


def test_roots_are_needed(milan: Bench) -> None:
    """C5. None, and AMD's for what is not AMD's, refuse; the caller's product does not help."""
    for roots in (None, Roots.amd()):
        verifier = Verifier(roots=roots, product=Product.MILAN)
        result = verifier.verify(milan.report(), certificates=milan.certificates, at=milan.at, **GIVEN)
        assert failed(result) == ["C5"]
