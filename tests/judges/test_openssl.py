"""openssl verifies our chains and our report signatures, for every product line and both kinds of leaf."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import SIGNED_SIZE, AttestationReport, Product
from swsnp.certs.x509_reader import to_pem
from swsnp.machine import Machine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip

PROVIDER = "CN=provider.example"


@pytest.fixture(scope="module", params=list(Product), ids=lambda product: product.value)
def machine(request: pytest.FixtureRequest) -> Machine:
    """One of each product line."""
    return Machine(product=request.param)


@pytest.fixture(autouse=True)
def _needs_openssl(cannot_run: Skip) -> None:
    if shutil.which("openssl") is None:
        cannot_run("openssl is missing", "install openssl")


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The program's verdict."""
    command = ["openssl", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def report_of(machine: Machine) -> bytes:
    with machine.create_vm() as vm:
        vm.boot()
        return vm.extended_report(bytes(64)).report


def write_signature(report: bytes, folder: Path) -> None:
    """R and S as DER, by openssl itself."""
    parsed = AttestationReport.parse(report)
    r, s = (int.from_bytes(value, "little") for value in (parsed.signature_r, parsed.signature_s))
    (folder / "der.cnf").write_text(f"asn1=SEQUENCE:sig\n[sig]\nr=INTEGER:0x{r:x}\ns=INTEGER:0x{s:x}\n")
    made = openssl("asn1parse", "-genconf", folder / "der.cnf", "-noout", "-out", folder / "signature.der")
    assert made.returncode == 0, made.stderr


def judge(report: bytes, chain: tuple[bytes, ...], folder: Path) -> tuple[bool, bool]:
    """Whether the chain verifies, and whether the leaf's key signed the report."""
    for name, der in zip(("leaf", "ca", "root"), chain, strict=True):
        (folder / f"{name}.pem").write_bytes(to_pem(der))
    verified = openssl(
        "verify", "-CAfile", folder / "root.pem", "-untrusted", folder / "ca.pem", folder / "leaf.pem"
    )
    key = openssl("x509", "-in", folder / "leaf.pem", "-noout", "-pubkey")
    (folder / "key.pem").write_text(key.stdout)
    (folder / "signed.bin").write_bytes(report[:SIGNED_SIZE])
    write_signature(report, folder)
    signature = folder / "signature.der"
    signed = openssl(
        "dgst", "-sha384", "-verify", folder / "key.pem", "-signature", signature, folder / "signed.bin"
    )
    return verified.returncode == 0, signed.stdout == "Verified OK\n"


def test_chain_and_signature(machine: Machine, tmp_path: Path) -> None:
    """VCEK under ASK and ARK, then a provider's VLEK under ASVK and ARK; not a report with a bit changed."""
    for kind in ("vcek", "vlek"):
        if kind == "vlek":
            vlek = machine.vlek(PROVIDER)
            machine.load_vlek(vlek)
            chain = (vlek.certificate, machine.hierarchy.asvk, machine.hierarchy.ark)
        else:
            chain = (machine.vcek_certificate(), machine.hierarchy.ask, machine.hierarchy.ark)
        report = report_of(machine)
        assert AttestationReport.parse(report).signer_info.signing_key == (kind == "vlek")
        assert judge(report, chain, tmp_path) == (True, True), kind
        changed = report[:0x90] + bytes([report[0x90] ^ 1]) + report[0x91:]
        assert judge(changed, chain, tmp_path) == (True, False), kind


def test_leaf_of_another_hierarchy(machine: Machine, tmp_path: Path) -> None:
    """The same names under another key: the chain does not verify."""
    stranger = Machine(product=machine.product, seed=b"another").vcek_certificate()
    chain = (stranger, machine.hierarchy.ask, machine.hierarchy.ark)
    assert judge(report_of(machine), chain, tmp_path) == (False, False)
