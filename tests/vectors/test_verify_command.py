"""`swsnp verify` over genuine AMD material: the verdicts that are known for it, by exit code."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.certs.x509_reader import read_all
from swsnp.cli import main

if TYPE_CHECKING:
    from pathlib import Path

VERDICTS = {
    "milan-v2-debug": "refused",
    "milan-v2-plain": "authentic",
    "milan-v2-authorkey": "authentic",
    "milan-v2-idkey": "authentic",
    "milan-v2-azure-hcl": "authentic",
    "milan-v2-hostdata": "authentic",
    "milan-v3": "authentic",
    "milan-v3-vlek": "authentic",
    "genoa-line-v5": "authentic",
    "turin-v5": "authentic",
}
"""With the default policy, at a time at which the certificates are valid."""


def arguments_for(vectors: Path, name: str) -> tuple[list[str], dict[str, Any]]:
    """Report, leaf and the key service's chain, as files; and what the index knows of the report."""
    facts = json.loads((vectors / "index.json").read_text())[name]
    leaf = vectors / facts["leaf"][0]["file"]
    issuer = facts["leaf"][0]["issuer"].removeprefix("SEV-")
    kind = "vlek" if issuer.startswith("VLEK-") else "vcek"
    chain = vectors / "ca" / f"{issuer.removeprefix('VLEK-').lower()}_{kind}_cert_chain.pem"
    at = read_all(leaf.read_bytes())[0].not_before + timedelta(days=1)
    report = str(vectors / facts["report"])
    return [report, f"--{kind}", str(leaf), "--chain", str(chain), "--at", at.isoformat()], facts


@pytest.mark.parametrize("name", VERDICTS)
def test_genuine_reports(vectors: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Authentic by AMD's pinned roots; accepted once report data and measurement are given."""
    arguments, facts = arguments_for(vectors, name)
    assert main(["verify", *arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["authenticated"]) == (VERDICTS[name], True)
    assert found["roots"]["chosen_by"] == "swsnp: AMD's"
    refused = VERDICTS[name] == "refused"
    assert main(["verify", *arguments, "--authentic-only"]) == int(refused)
    wanted = ("--report-data", facts["report_data"], "--measurement", facts["measurement"])
    assert main(["verify", *arguments, *wanted]) == int(refused)
    assert main(["verify", *arguments, *wanted[:3], "00" * 48]) == 1


def test_hcl_envelope(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Azure's envelope and its PEM of leaf and chain, as a guest there gets them."""
    folder = vectors / "milan-v2-azure-hcl"
    report, certs = folder / "hcl-report.bin", folder / "vcek_and_chain.pem"
    code = main(["verify", str(report), "--certs", str(certs), "--at", "2026-01-01", "--authentic-only"])
    assert code == 0, capsys.readouterr().out


def test_expired_leaf(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The VLEK was good for a year: refused after that, unless a policy takes evidence that was stored."""
    arguments, _ = arguments_for(vectors, "milan-v3-vlek")
    late = [*arguments[:-1], "2026-06-01", "--authentic-only"]
    assert main(["verify", *late]) == 1
    assert "C8" in capsys.readouterr().out


def test_bad_leaves(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Leaves whose signature is wrong are refused."""
    arguments, _ = arguments_for(vectors, "milan-v2-idkey")
    for name in ("vcek_bad_signature_legacy.der", "vcek_bad_signature_octetstring.der"):
        bad = [*arguments]
        bad[2] = str(vectors / "bad-vcek" / name)
        assert main(["verify", *bad, "--authentic-only", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["authenticated"] is False


def test_synthetic_evidence_under_amds_roots(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Certificates with AMD's names under another key: C5, whatever the report says."""
    folder = vectors / "synthetic"
    chain = ("--vcek", str(folder / "vcek.der"), "--chain", str(folder / "ask.der"))
    for report in sorted((folder / "reports").iterdir()):
        arguments = (str(report), *chain, "--chain", str(folder / "ark.der"), "--authentic-only", "--json")
        assert main(["verify", *arguments]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["authenticated"] is False, report.name


def test_only_what_is_missing_is_named(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the chain, its URL; without leaf and chain, both, the leaf's with the report's chip and TCB."""
    arguments, facts = arguments_for(vectors, "turin-v5")
    main(["verify", *arguments[:3], "--json"])
    (chain,) = json.loads(capsys.readouterr().out)["fetch"]
    assert chain["url"].endswith("/vcek/v1/Turin/cert_chain")
    main(["verify", arguments[0], "--json"])
    leaf, _ = json.loads(capsys.readouterr().out)["fetch"]
    query = "fmcSPL=1&blSPL=1&teeSPL=1&snpSPL=4&ucodeSPL=81"
    assert leaf["url"].endswith(f"/vcek/v1/Turin/{facts['chip_id'][:16]}?{query}")
