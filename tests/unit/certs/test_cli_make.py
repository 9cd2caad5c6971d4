"""`swsnp certs make`: emulated certificates that fit a machine, or any chip that the user names."""

from __future__ import annotations

import json
import stat
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from swsnp.abi.snp_report import Product
from swsnp.amd_ca import manufacture
from swsnp.certs.kds_extensions import leaf_profile
from swsnp.certs.lint import Expected, lint_table
from swsnp.certs.table import parse
from swsnp.certs.x509_reader import EcKey, read, read_all
from swsnp.cli import main
from swsnp.machine.machine import SEEDED_NOW
from swsnp.verify.roots import Roots

if TYPE_CHECKING:
    from swsnp.machine import Machine

CHIP, LEVELS = "0011223344556677", "fmc=1,bl=2,tee=3,snp=4,ucode=200"


def make(*arguments: str) -> int:
    return main(["certs", "make", *arguments])


def test_the_seeds_machine(
    seeded_machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Table, chain and parts of the machine that the same seed emulates: reports verify with them."""
    assert make("--seed", "e2e", "--crl", "--out-dir", str(tmp_path / "made"), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    files = {name: (tmp_path / "made" / name).read_bytes() for name in map(_name, shown["files"])}
    assert sorted(files) == ["ark.der", "ask.der", "cert_chain", "certs.blob", "crl.der", "vcek.der"]
    assert [each.data for each in parse(files["certs.blob"])] == [
        files[f"{name}.der"] for name in ("vcek", "ask", "ark", "crl")
    ]
    assert [each.der for each in read_all(files["cert_chain"])] == [files["ask.der"], files["ark.der"]]
    with seeded_machine.create_vm(certs=None) as vm:
        vm.boot()
        report = vm.report(bytes(64)).report
    expected = Expected(roots=Roots.of(files["ark.der"]).pins, report=report)
    result = lint_table(files["certs.blob"], at=SEEDED_NOW + timedelta(days=1), expected=expected)
    assert (result.findings, result.not_checked) == ((), {})
    assert "not AMD" in str(read(files["ark.der"]).subject)


def _name(path: str) -> str:
    return Path(path).name


def test_a_chip_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chip id and TCB as named; the key that is kept is the leaf's, and nobody else may read it."""
    blob, key = tmp_path / "blob", tmp_path / "key.pem"
    chip = ["--product", "turin", "--chip-id", CHIP, "--tcb", LEVELS]
    assert make(*chip, "--out", str(blob), "--key", str(key)) == 0
    assert capsys.readouterr().out.split() == [str(blob), str(key)]
    leaf = read(parse(blob.read_bytes())[0].data)
    profile = leaf_profile(leaf, Product.TURIN)
    assert profile.hwid == bytes.fromhex(CHIP)
    assert profile.tcb == {"fmc": 1, "boot_loader": 2, "tee": 3, "snp": 4, "microcode": 200}
    private = load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(leaf.key, EcKey)
    assert private.public_key().public_numbers().x == int.from_bytes(leaf.key.x, "big")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(blob.stat().st_mode) == 0o644


def test_a_vlek(tmp_path: Path) -> None:
    """A provider's leaf with its ASVK; the machine's own, or for a TCB that is named."""
    tcb = "bl=9,tee=0,snp=1,ucode=2"
    for more in ([], ["--tcb", tcb]):
        blob = tmp_path / f"blob{len(more)}"
        assert make("--vlek", "CN=a.example", "--out", str(blob), "--amd-names", *more) == 0
        vlek, asvk, _ = (read(each.data) for each in parse(blob.read_bytes()))
        profile = leaf_profile(vlek, Product.MILAN)
        assert (profile.csp_id, asvk.subject_cn) == ("CN=a.example", "SEV-VLEK-Milan")
        assert (profile.tcb["boot_loader"] == 9) is bool(more)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "wanted --out, --out-dir or both"),
        (["--out", "x", "--chip-id", CHIP], "--chip-id and --tcb go together"),
        (["--out", "x", "--tcb", LEVELS], "--chip-id and --tcb go together"),
        (["--out", "x", "--vlek", "CN=a", "--chip-id", CHIP], "a VLEK names no chip"),
        (["--out", "x", "--key", "k"], "the emulated machine's key stays in it"),
        (
            ["--out", "x", "--chip-id", CHIP, "--tcb", "bl=1,tee=0,snp=2,ucode=3"],
            "chip id: got 8 bytes, wanted 64 for Milan",
        ),
        (["--out", "x", "--chip-id", "00" * 64, "--tcb", "bl=1"], "TCB: got 'bl=1', wanted each of"),
        (["--out-dir", "/dev/null/x"], "cannot be made: Not a directory"),
    ],
)
def test_usage(
    arguments: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What does not go together is told (exit code 2), and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert make(*arguments) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_seed_repeats_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal seeds, equal blobs, byte for byte; the key depends on the chip. CAs with short keys will do."""
    monkeypatch.setattr(manufacture, "RSA_BITS", 1024)
    chip = ["--product", "turin", "--tcb", LEVELS, "--seed", "s"]
    keys = []
    for name, chip_id in (("a", CHIP), ("b", CHIP), ("c", CHIP[::-1])):
        assert (
            make(*chip, "--chip-id", chip_id, "--out", str(tmp_path / name), "--key", str(tmp_path / "k"))
            == 0
        )
        keys.append((tmp_path / "k").read_bytes())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert keys[0] == keys[1] != keys[2]
