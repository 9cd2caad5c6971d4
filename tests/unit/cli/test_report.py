"""`swsnp report show` and the command line's exit codes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import AttestationReport, GuestPolicy, Product, SignerInfo, TcbVersion
from swsnp.cli import main
from swsnp.cli.describe import as_dict, as_lines, product_of_report

if TYPE_CHECKING:
    from pathlib import Path

MILAN = AttestationReport(
    version=3,
    policy=GuestPolicy(0x30133),
    cpuid_fam_id=0x19,
    cpuid_mod_id=1,
    chip_id=bytes(range(64)),
    reported_tcb=TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDB),
    signer_info=SignerInfo.of(signing_key=1, author_key_en=1),
)


def test_no_verb_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a verb the list of verbs is shown and the exit code is 2; --help asks for it and is good."""
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "report" in capsys.readouterr().out
    assert main(["nothing"]) == 2
    assert "no verb 'nothing'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints the package's version."""
    import swsnp

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"swsnp {swsnp.__version__}\n"


def test_show_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fields, flags by name and TCB components in the product's layout."""
    file = tmp_path / "report.bin"
    file.write_bytes(bytes(MILAN))
    assert main(["report", "show", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["product"] == "Milan"
    assert shown["reported_tcb"] == {
        "raw": "04000000000018db",
        "boot_loader": 4,
        "tee": 0,
        "snp": 0x18,
        "microcode": 0xDB,
    }
    assert shown["policy"]["raw"] == "0x30133"
    assert shown["policy"]["abi_minor"] == 0x33
    assert shown["signing_key"] == "VLEK"


def test_show_takes_the_drivers_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MSG_REPORT_RSP of 4000 bytes holds the report after its header."""
    file = tmp_path / "answer.bin"
    header = bytes(MsgReportRspHeader(report_size=1184))
    file.write_bytes((header + bytes(MILAN)).ljust(4000, b"\0"))
    assert main(["report", "show", str(file)]) == 0
    assert "boot_loader=4 tee=0 snp=24 microcode=219" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 1183, "got 1183 bytes that begin with 78"),
        (b"", "got 0 bytes"),
        (b"HCLA" + bytes(1000), "HCL envelope: 972 bytes after its header, wanted 1184"),
        (b"zz" * 1184, "got 2368 bytes that begin with 7a"),
        (b"00" * 1185, "got 2370 bytes that begin like DER"),
        (bytes(MsgReportRspHeader(status=0x16, report_size=1184)).ljust(4000, b"\0"), "status 0x16"),
        (bytes(4000), "got certificate table, wanted a report"),
        (bytes((1 << 20) + 1), "more than 1048576 bytes"),
    ],
)
def test_unreadable_input(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not a report is named with its size and ends with exit code 3, in JSON too."""
    file = tmp_path / "input.bin"
    file.write_bytes(content)
    assert main(["report", "show", str(file)]) == 3
    assert message in capsys.readouterr().err
    assert main(["report", "show", str(file), "--json"]) == 3
    assert message in json.loads(capsys.readouterr().out)["error"]["message"]


def test_missing_file_and_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there and a directory are unreadable input, by name."""
    assert main(["report", "show", str(tmp_path / "none")]) == 3
    assert "No such file" in capsys.readouterr().err
    assert main(["report", "show", str(tmp_path)]) == 3
    assert "Is a directory" in capsys.readouterr().err


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """Missing or unknown arguments end with exit code 2."""
    for arguments in (
        ["report"],
        ["report", "show"],
        ["report", "diff", "x"],
        ["report", "show", "x", "--pro", "milan"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage: swsnp report" in capsys.readouterr().err


def test_product_is_never_guessed() -> None:
    """A version 2 report of a Milan or Genoa chip does not say which; a short chip id is Turin's."""
    assert product_of_report(MILAN) is Product.MILAN
    assert product_of_report(MILAN.but(version=2)) is None
    assert product_of_report(MILAN.but(version=2, chip_id=bytes(64))) is None
    assert product_of_report(MILAN.but(version=2, chip_id=b"12345678" + bytes(56))) is Product.TURIN
    assert product_of_report(MILAN.but(cpuid_fam_id=0x40)) is None
    assert as_dict(MILAN.but(version=2))["product"] is None
    assert as_dict(MILAN.but(version=2), Product.MILAN)["product"] == "Milan"
    assert "not said by this report" in next(as_lines(MILAN.but(version=2)))


def test_reserved_bits_are_shown_when_set() -> None:
    """What has no name is not hidden."""
    odd = MILAN.but(
        reserved_4c=b"\0\1\0\0", reserved_1eb=5, policy=GuestPolicy(1 << 40), signer_info=SignerInfo(4 << 2)
    )
    shown = as_dict(odd)
    assert shown["reserved_4c"] == "00010000"
    assert shown["reserved_1eb"] == 5
    assert shown["policy"]["unnamed_bits"] == "0x10000000000"
    assert shown["signing_key"] == "reserved (4)"
    assert "reserved_18b" not in shown


def test_genuine_reports(vectors: Path) -> None:
    """Genuine AMD reports of every version and product are shown as the index of the vectors has them."""
    index = json.loads((vectors / "index.json").read_text())
    for name, facts in index.items():
        if not isinstance(facts, dict) or "report" not in facts:
            continue
        shown = as_dict(AttestationReport.parse((vectors / facts["report"]).read_bytes()))
        assert shown["reported_tcb"]["raw"] == facts["reported_tcb"], name
        assert shown["measurement"] == facts["measurement"], name
        assert shown["policy"]["raw"] == facts["policy"], name
        assert shown["version"] == facts["version"], name
