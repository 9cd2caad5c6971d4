"""`swsnp certs pack`, `unpack` and `check`: exit codes, what is written, what is told."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.certs.conftest import NOW

from swsnp.abi.snp_report import SIGNED_SIZE, AttestationReport
from swsnp.certs.lint import RULES
from swsnp.certs.ofd_lock import exclusive_lock
from swsnp.certs.table import parse
from swsnp.certs.x509_reader import to_pem
from swsnp.cli import main
from swsnp.cli.certs import check as check_verb
from swsnp.cli.certs import pack as pack_verb

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.certs.conftest import Authority

AT = ["--at", "2024-06-01"]


@pytest.fixture
def folder(tmp_path: Path, milan: Authority) -> Path:
    """The files of a chain, and a report of its chip."""
    report = bytes(
        AttestationReport(
            version=3,
            cpuid_fam_id=0x19,
            cpuid_mod_id=1,
            reported_tcb=milan.tcb,
            chip_id=milan.hwid,
        )
    )[:SIGNED_SIZE]
    for name, data in {
        "vcek.der": milan.vcek,
        "cert_chain": milan.hierarchy.chain_pem(),
        "ark.der": milan.hierarchy.ark,
        "crl.pem": to_pem(milan.crl, label="X509 CRL"),
        "report.bin": report + milan.key.sign(report).ljust(0x200, b"\0"),
        "extra": b"opaque",
    }.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    """`swsnp certs`, with names of files in the folder."""
    full = [str(folder / each) if (folder / each).exists() or each == "blob" else each for each in arguments]
    return main(["certs", *full])


def pack(folder: Path, *more: str) -> int:
    return run(folder, "pack", "vcek.der", "cert_chain", "--out", "blob", *AT, *more)


def test_pack(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files in any order become one clean table; the command says where, how large, how many pages."""
    assert pack(folder, "crl.pem") == 0
    size = (folder / "blob").stat().st_size
    assert capsys.readouterr().out == f"{folder / 'blob'}: {size} bytes, 2 page(s)\n"
    assert len(parse((folder / "blob").read_bytes())) == 4
    assert pack(folder, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["written"], shown["npages"], shown["clean"]) == (True, 2, True)
    assert len(parse((folder / "blob").read_bytes())) == 3


def test_an_entry_of_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--entry, as AMD's tool has -g: taken as it is; a note is no reason to refuse."""
    guid = "00000000-0000-0000-0000-000000000007"
    assert pack(folder, "--entry", f"{guid}={folder / 'extra'}") == 0
    assert "T13 note" in capsys.readouterr().err
    assert parse((folder / "blob").read_bytes())[-1].data == b"opaque"
    for wrong in (guid, "x=y", f"{guid}="):
        with pytest.raises(SystemExit) as caught:
            pack(folder, "--entry", wrong)
        assert caught.value.code == 2
        assert "wanted a GUID, = and a file" in capsys.readouterr().err


def test_a_table_with_errors_is_not_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the old blob stays; --force writes it all the same."""
    (folder / "blob").write_bytes(b"old")
    assert run(folder, "pack", "vcek.der", "--out", "blob", *AT) == 1
    told = capsys.readouterr().err
    assert "K2 error" in told
    assert "blob: not written, because of the errors above" in told
    assert (folder / "blob").read_bytes() == b"old"
    assert pack(folder, "--at", "2040-01-01", "--json") == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["written"], [each["rule"] for each in shown["findings"]]) == (False, ["K5"])
    assert run(folder, "pack", "vcek.der", "--out", "blob", "--force", *AT) == 0
    assert len(parse((folder / "blob").read_bytes())) == 1


def test_the_present_is_the_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --at the clock decides."""
    arguments = [str(folder / "vcek.der"), str(folder / "cert_chain"), "--out", str(folder / "blob")]
    assert pack_verb.run(arguments, now=lambda: NOW) == 0
    late = datetime(2032, 1, 1, tzinfo=UTC)
    assert pack_verb.run(arguments, now=lambda: late) == 1
    ark = ["--roots", str(folder / "ark.der")]
    assert check_verb.run([str(folder / "blob"), *ark], now=lambda: NOW + timedelta(days=1)) == 0
    assert check_verb.run([str(folder / "blob"), *ark], now=lambda: late) == 1
    assert "K5 error" in capsys.readouterr().out


def test_pack_to_stdout(folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """--out - writes the table and nothing else; it does not go with --json."""
    assert run(folder, "pack", "vcek.der", "cert_chain", "--out", "-", "--json", *AT) == 2
    assert b"leave out --json" in capsysbinary.readouterr().err
    assert run(folder, "pack", "vcek.der", "cert_chain", "--out", "-", *AT) == 0
    assert len(parse(capsysbinary.readouterr().out)) == 3


def test_pack_waits_for_the_lock(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another updater holds the file: exit code 4 after --lock-timeout, and nothing has changed."""
    assert pack(folder) == 0
    before = (folder / "blob").read_bytes()
    with exclusive_lock(folder / "blob"):
        assert pack(folder, "crl.pem", "--lock-timeout", "0.01") == 4
    assert "locked by others for 0.01 s" in capsys.readouterr().err
    assert (folder / "blob").read_bytes() == before
    for wrong in ("-1", "nan", "x", "1e9"):
        with pytest.raises(SystemExit):
            pack(folder, "--lock-timeout", wrong)


@pytest.mark.parametrize("form", ["as-is", "der", "pem"])
def test_unpack_and_pack_again(form: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte from the manifest, even where the table has errors; tidy from the files alone."""
    assert (
        pack(folder, "crl.pem", "--entry", f"{'0' * 7}1-0000-0000-0000-000000000000={folder / 'extra'}") == 0
    )
    blob = (folder / "blob").read_bytes() + b"\1tail"
    blob = blob.replace(b"opaque", b"OPAQUE")
    (folder / "blob").write_bytes(blob)
    out = folder / "made" / "here"
    assert run(folder, "unpack", "blob", "--out-dir", str(out), "--form", form) == 0
    capsys.readouterr()
    assert main(["certs", "pack", str(out / "manifest.json"), "--out", str(folder / "again")]) == 0
    assert (folder / "again").read_bytes() == blob
    assert "T8 warning" in capsys.readouterr().err
    tidy = sorted(str(each) for each in out.iterdir() if each.suffix in (".der", ".pem"))
    assert main(["certs", "pack", *tidy, "--out", str(folder / "tidy"), *AT]) == 0
    assert len(parse((folder / "tidy").read_bytes())) == 4


def test_unpack_does_not_overwrite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that are there stay, unless --force says otherwise."""
    assert pack(folder) == 0
    out = folder / "out"
    assert run(folder, "unpack", "blob", "--out-dir", str(out), "--json") == 0
    capsys.readouterr()
    assert run(folder, "unpack", "blob", "--out-dir", str(out)) == 2
    assert "0-vcek.der: is there already; --force overwrites it" in capsys.readouterr().err
    assert run(folder, "unpack", "blob", "--out-dir", str(out), "--force", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["files"]) == [
        "0-vcek.der",
        "1-ask.der",
        "2-ark.der",
        "manifest.json",
    ]
    assert run(folder, "unpack", "blob", "--out-dir", str(folder / "vcek.der")) == 2
    assert "cannot be made: File exists" in capsys.readouterr().err


def test_unpack_of_a_broken_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 with the file, what is wrong, and which command says more; nothing is written."""
    assert pack(folder) == 0
    blob = folder / "blob"
    blob.write_bytes(blob.read_bytes()[:1000])
    assert run(folder, "unpack", "blob", "--out-dir", str(folder / "out")) == 3
    told = capsys.readouterr().err
    assert str(blob) in told
    assert "`swsnp certs check` says all that is wrong" in told
    assert not (folder / "out").exists()


def test_a_manifest_stands_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside other files it would not describe the result; a changed file is told with its name."""
    assert pack(folder) == 0
    out = folder / "out"
    assert run(folder, "unpack", "blob", "--out-dir", str(out)) == 0
    manifest = str(out / "manifest.json")
    assert main(["certs", "pack", manifest, str(folder / "crl.pem"), "--out", str(folder / "x")]) == 2
    assert "a manifest describes a whole table" in capsys.readouterr().err
    (out / "0-vcek.der").write_bytes(b"other")
    assert main(["certs", "pack", manifest, "--out", str(folder / "x")]) == 3
    assert f"{manifest}: 0-vcek.der: got 5 bytes" in capsys.readouterr().err
    (out / "0-vcek.der").unlink()
    assert main(["certs", "pack", manifest, "--out", str(folder / "x")]) == 3
    assert "No such file" in capsys.readouterr().err
    assert not (folder / "x").exists()


def test_check(folder: Path, milan: Authority, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 for a clean table that fits the machine; AMD's roots count unless others are named."""
    assert pack(folder, "crl.pem") == 0
    capsys.readouterr()
    roots = ["--roots", "ark.der"]
    assert run(folder, "check", "blob", *roots, "--report", "report.bin", *AT) == 0
    assert capsys.readouterr().out == f"{folder / 'blob'}: clean\n"
    levels = "bl=4,tee=0,snp=24,ucode=219"
    fits = ["--product", "Milan", "--chip-id", milan.hwid.hex(), "--tcb", levels]
    assert run(folder, "check", "blob", *roots, *fits, *AT, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["clean"], shown["not_checked"]) == (
        True,
        {"M4": "no report was given", "M5": "no report was given"},
    )
    assert run(folder, "check", "blob", *AT) == 1
    told = capsys.readouterr().out
    assert told.startswith("K6 error: entry 2, got ARK-Milan with a key")
    assert "blob: not clean: 1 error(s)" in told
    assert "not looked at: M1: no chip id was given" in told
    other = ["--product", "milan", "--chip-id", "ff" * 64, "--tcb", "bl=4,tee=0,snp=25,ucode=219"]
    assert run(folder, "check", "blob", *roots, *other, *AT, "--json") == 1
    rules = [each["rule"] for each in json.loads(capsys.readouterr().out)["findings"]]
    assert rules == ["M1", "M2"]


def test_check_of_other_things(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A certificate is no table (3); unknown bytes are looked at as the table they should be."""
    assert run(folder, "check", "vcek.der") == 3
    assert (
        "DER certificate, wanted a certificate table; `swsnp certs pack` makes one" in capsys.readouterr().err
    )
    assert run(folder, "check", "extra") == 1
    assert "T1 error" in capsys.readouterr().out
    assert run(folder, "check", "--json") == 2
    assert "wanted a BLOB, or --rules" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert run(folder, "check", "extra", "--chip-id", "aa") == 2
    assert "wanted --product too" in capsys.readouterr().err
    for name in ("vcek.der", "extra"):
        assert run(folder, "check", "extra", "--roots", name) == 3
        assert str(folder / name) in capsys.readouterr().err
    assert run(folder, "check", "extra", "--report", "vcek.der") == 3


def test_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its severity, text and source."""
    assert main(["certs", "check", "--rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RULES)
    assert main(["certs", "check", "--rules", "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert shown["T1"]["severity"] == "error"


def test_unreadable_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing files, folders and broken tables: one line, exit code 3, no file."""
    for arguments in (
        ["pack", "none", "--out", "blob"],
        ["pack", "extra", "--out", "blob"],
        ["unpack", "extra", "--out-dir", "made"],
        ["unpack", "none", "--out-dir", "made"],
        ["check", "none"],
        ["show", "extra"],
    ):
        assert run(folder, *arguments) == 3, arguments
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (folder / "blob").exists()
    assert not (folder / "made").exists()
    assert run(folder, "pack", "vcek.der", "cert_chain", *AT, "--out", str(folder / "none" / "blob")) == 2
    assert run(folder, "pack", "vcek.der", "cert_chain", *AT, "--out", str(folder)) == 3
