"""Verifiers by others over the same evidence: they agree with ours, or docs/foreign-judges.md says why not.

They live in an environment of their own (`make judges`): what they require does not bind this project.
"""

from __future__ import annotations

import json
import os
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from swsnp.abi.snp_report import Product
from swsnp.certs import table
from swsnp.certs.x509_reader import read_der, to_der
from swsnp.machine import Machine
from swsnp.verify import Roots, Verifier

if TYPE_CHECKING:
    from tests.conftest import Skip

ROOT: Final = Path(__file__).resolve().parents[2]
PYTHON: Final = ROOT / "build" / "judges" / "bin" / "python"
DRIVER: Final = Path(__file__).parent / "drive.py"
PAGE: Final = ROOT / "docs" / "foreign-judges.md"
JUDGES: Final = ("cvm-attest", "omne-attest", "secretvm-verify", "sev-attest-tool")

OTHERWISE: Final[dict[tuple[str, str], tuple[bool, str]]] = {
    **{
        ("sev-attest-tool", name): (False, "Signer certificate does not sign")
        for name in (
            "milan-v2-authorkey",
            "milan-v2-azure-hcl",
            "milan-v2-hostdata",
            "milan-v2-idkey",
            "milan-v2-plain",
            "milan-v3",
            "milan-v3-vlek",
            "turin-v5",
        )
    },
    ("omne-attest", "milan-v3-vlek"): (False, "missing_extension"),
    ("omne-attest", "turin-v5"): (False, "chip_id_mismatch"),
    ("secretvm-verify", "milan-v3-vlek"): (False, "do not match report"),
    ("secretvm-verify", "turin-v5"): (False, "do not match report"),
    ("cvm-attest", "milan-v2-debug"): (True, "DEBUG"),
}
"""Judge and evidence to its verdict and a word of its reason, where that is not our verdict."""


class Evidence(NamedTuple):
    """A report with the certificates above it."""

    report: bytes
    leaf: bytes
    intermediate: bytes
    root: bytes
    product: Product
    crl: bytes = b""


def ask(cases: list[tuple[str, Evidence]], home: Path, cannot_run: Skip) -> list[dict[str, Any]]:
    """The verdicts of the judges named; they see the evidence and nothing of this machine's."""
    if not PYTHON.exists():
        cannot_run("the foreign verifiers are not installed", "make judges")
    told = [
        {
            "judge": judge,
            "product": each.product.value,
            **{name: getattr(each, name).hex() for name in ("report", "leaf", "intermediate", "root", "crl")},
        }
        for judge, each in cases
    ]
    done = subprocess.run(
        [PYTHON, "-I", "-W", "ignore", DRIVER],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"HOME": str(home), "PATH": os.environ["PATH"], "RUST_BACKTRACE": "0"},
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def genuine(vectors: Path) -> dict[str, Evidence]:
    """Every genuine report that comes with its leaf."""
    found = {}
    for name, facts in json.loads((vectors / "index.json").read_text()).items():
        if not isinstance(facts, dict) or not facts.get("leaf"):
            continue
        issuer = facts["leaf"][0]["issuer"].removeprefix("SEV-")
        product = Product(issuer.removeprefix("VLEK-"))
        kind = "vlek" if issuer.startswith("VLEK-") else "vcek"
        chain = vectors / "ca" / f"{product.value.lower()}_{kind}_cert_chain.pem"
        crl = vectors / "crl" / f"{product.value.lower()}_vcek_2022.crl.der"
        intermediate, root = to_der(chain.read_bytes())
        found[name] = Evidence(
            report=(vectors / facts["report"]).read_bytes(),
            leaf=to_der((vectors / facts["leaf"][0]["file"]).read_bytes())[0],
            intermediate=intermediate,
            root=root,
            product=product,
            crl=crl.read_bytes() if crl.exists() else b"",
        )
    return found


def emulated(machine: Machine) -> Evidence:
    """What a guest of the machine gets, and its key service's CRL."""
    with machine.create_vm() as vm:
        vm.boot()
        answer = vm.extended_report(bytes(64))
    leaf, intermediate, root = (each.data for each in table.parse(answer.certs))
    return Evidence(answer.report, leaf, intermediate, root, machine.product, machine.hierarchy.crl())


def ours(evidence: Evidence, roots: Roots) -> bool:
    """Our verdict with the default policy, a day after the leaf was issued."""
    return (
        Verifier(roots=roots)
        .verify(
            evidence.report,
            certificates=(evidence.leaf, evidence.intermediate, evidence.root),
            at=read_der(evidence.leaf).not_before + timedelta(days=1),
        )
        .passed
    )


def forged(evidence: Evidence) -> Evidence:
    """One bit of the measurement changed."""
    report = bytearray(evidence.report)
    report[0x90] ^= 1
    return evidence._replace(report=bytes(report))


def test_genuine_evidence(vectors: Path, tmp_path: Path, cannot_run: Skip) -> None:
    """Genuine AMD evidence: each judge decides as we do, but for the disagreements that the page explains."""
    cases = [(judge, name, each) for name, each in genuine(vectors).items() for judge in JUDGES]
    verdicts = ask([(judge, each) for judge, _, each in cases], tmp_path, cannot_run)
    for (judge, name, evidence), verdict in zip(cases, verdicts, strict=True):
        our = ours(evidence, Roots.amd())
        expected, reason = OTHERWISE.get((judge, name), (our, ""))
        assert verdict["good"] is expected, (judge, name, verdict)
        assert reason in verdict["why"], (judge, name, verdict)
        assert (expected is not our) is ((judge, name) in OTHERWISE), (judge, name)


def test_forged_evidence(vectors: Path, tmp_path: Path, cannot_run: Skip) -> None:
    """A changed report is refused by every judge, as by us."""
    changed = [forged(each) for each in genuine(vectors).values()]
    cases = [(judge, each) for each in changed for judge in JUDGES]
    assert not any(ours(each, Roots.amd()) for each in changed)
    assert not any(each["good"] for each in ask(cases, tmp_path, cannot_run))


@pytest.fixture(scope="module")
def machines(seeded_machine: Machine) -> dict[Product, Machine]:
    """One of each product line, with certificates that are valid now."""
    return {product: Machine(product=product) for product in Product}


def test_emulated_evidence(machines: dict[Product, Machine], tmp_path: Path, cannot_run: Skip) -> None:
    """Judges that take a root agree with us under ours; those with AMD's built in refuse, as we do then.

    omne-attest does not know Turin's short HWID. cvm-attest takes whatever root the service gives.
    """
    everything = {product: emulated(machine) for product, machine in machines.items()}
    cases = [(judge, each) for each in everything.values() for judge in JUDGES]
    verdicts = ask(cases, tmp_path, cannot_run)
    for (judge, evidence), verdict in zip(cases, verdicts, strict=True):
        assert ours(evidence, Roots.of(evidence.root))
        assert not ours(evidence, Roots.amd())
        pinned = judge in {"sev-attest-tool", "secretvm-verify"}
        turin = judge == "omne-attest" and evidence.product is Product.TURIN
        assert verdict["good"] is not (pinned or turin), (judge, evidence.product, verdict)


def test_forged_emulated_evidence(machines: dict[Product, Machine], tmp_path: Path, cannot_run: Skip) -> None:
    """A changed report of ours is refused by those that accepted it."""
    cases = [(judge, forged(emulated(each))) for each in machines.values() for judge in JUDGES]
    assert not any(each["good"] for each in ask(cases, tmp_path, cannot_run))


def test_page_names_every_disagreement() -> None:
    """docs/foreign-judges.md: each judge and each vector of the table above stands there."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    for judge, name in OTHERWISE:
        assert any(judge in row and name in row for row in rows), (judge, name)
    pins = (ROOT / "requirements-judges.txt").read_text()
    assert all(f"{judge}==" in pins for judge in JUDGES)
