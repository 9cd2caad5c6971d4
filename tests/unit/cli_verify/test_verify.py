"""`swsnp verify` over one report: verdicts, exit codes, forms and texts."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.unit.cli_verify.conftest import genuine_looking

from swsnp.abi.snp_report import AttestationReport, GuestPolicy, Product
from swsnp.amd_ca.kds_double import KdsDouble
from swsnp.amd_ca.kds_server import KdsServer
from swsnp.cli import main
from swsnp.cli.common import utc_now
from swsnp.cli.verify import run
from swsnp.cli.verify.evidence import Evidence, wanted_list
from swsnp.machine import Machine
from swsnp.verify import Policy, Roots

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli_verify.conftest import Files


def test_accepted(files: Files) -> None:
    """Exit code 0 means accepted: all checks, the policy, report data and measurement given and matched."""
    code, out, err = files.verify(files("report.bin"), *files.certified, *files.wanted)
    assert (code, err) == (0, "")
    first, *rest = out.splitlines()
    assert first.startswith("ACCEPTED: ")
    assert first.endswith("and report data, measurement and policy are as wanted")
    assert "missing:" not in rest
    assert "why:" not in rest


def test_authentic_is_not_accepted(files: Files) -> None:
    """Without report data and measurement: exit code 1, authenticated, not accepted, and what is missing."""
    code, found = files.json(files("report.bin"), *files.certified)
    assert code == 1
    assert (found["verdict"], found["authenticated"], found["accepted"]) == ("authentic", True, False)
    assert found["missing"] == ["report_data", "measurement"]
    code, out, _ = files.verify(files("report.bin"), *files.certified, "--report-data", files.data)
    assert code == 1
    assert out.startswith("AUTHENTIC: ")
    assert out.splitlines()[0].endswith("nothing was given to compare measurement with")
    assert "  measurement: give --measurement or a policy, or ask for less by --authentic-only" in out
    assert "report_data: give" not in out


def test_authentic_only(files: Files) -> None:
    """--authentic-only: exit code 0 on authenticity and the default policy; what was not checked is told."""
    code, out, _ = files.verify(files("report.bin"), *files.certified, "--authentic-only")
    assert code == 0
    assert out.startswith("AUTHENTIC: ")
    _, _, unchecked = out.partition("not checked:\n")
    assert "policy: report_data, measurements," in unchecked
    assert "C10: no CRL" in unchecked


def test_authentic_only_still_applies_what_was_given(files: Files) -> None:
    """Asking for less does not waive a comparison that was asked for."""
    code, found = files.json(
        files("report.bin"), *files.certified, "--authentic-only", "--measurement", "00" * 48
    )
    assert (code, found["verdict"]) == (1, "refused")


@pytest.mark.parametrize("report", ["report.bin", "response.bin", "hcl.bin", "report.hex"])
@pytest.mark.parametrize(
    "certificates",
    [
        ("--certs", "table.bin"),
        ("--certs", "all.pem"),
        ("--vcek", "vcek.der", "--chain", "chain.pem"),
        ("--vcek", "vcek.pem", "--chain", "ask.der", "--chain", "root.der"),
        ("--vcek", "all.pem"),
        ("--certs", "vcek.der", "--certs", "chain.pem"),
    ],
    ids=" ".join,
)
def test_forms(files: Files, report: str, certificates: tuple[str, ...]) -> None:
    """DER, PEM and table forms are told by content, in any mixture, and the report's envelopes too."""
    given = [each if each.startswith("--") else files(each) for each in certificates]
    roots = ("--roots", files("root.pem"), "--at", files.at.isoformat())
    code, out, err = files.verify(files(report), *given, *roots, *files.wanted)
    assert (code, err) == (0, ""), out


def test_emulated_evidence_is_never_amds(files: Files) -> None:
    """Without --roots AMD's roots count: emulated evidence is refused, and no URL of AMD's is named."""
    code, found = files.json(
        files("report.bin"), "--certs", files("table.bin"), "--at", files.at.isoformat(), *files.wanted
    )
    assert code == 1
    assert "C5" in [each["check"] for each in found["findings"] if each["outcome"] == "fail"]
    assert found["roots"]["chosen_by"] == "swsnp: AMD's"
    assert set(found["roots"]["spki_sha256"]) == {"Milan", "Genoa", "Turin"}
    code, out, _ = files.verify(files("report.bin"))
    assert code == 1
    assert "kdsintf" not in out


def test_chosen_roots_are_told(files: Files) -> None:
    """Emulated or private roots count only by explicit choice, and the result says that they were chosen."""
    _, out, _ = files.verify(files("report.bin"), *files.certified, *files.wanted)
    assert "roots are those of --roots, emulated or private: this says nothing about AMD's processors" in out
    assert "root of Milan: public key SHA-256 " in out
    _, found = files.json(files("report.bin"), *files.certified, *files.wanted)
    assert found["roots"]["chosen_by"] == "--roots"
    assert list(found["roots"]["spki_sha256"]) == ["Milan"]


def test_refusal_says_why_first(files: Files) -> None:
    """The verdict, then each failure with check, offset, got, wanted and document."""
    code, out, _ = files.verify(
        files("report.bin"), *files.certified, "--measurement", "00" * 48, "--report-data", files.data
    )
    assert code == 1
    first, why, finding, *_ = out.splitlines()
    assert first.startswith("REFUSED: ")
    assert first.endswith("genuine by a root given by --roots, but not as wanted")
    assert why == "why:"
    assert finding.startswith(f"  Y4 at 090h: MEASUREMENT: got {files.measurement}")
    assert finding.endswith("(AMD 56860, ATTESTATION_REPORT)")


def test_forged_report(files: Files, content: dict[str, bytes]) -> None:
    """One changed byte: not authenticated, and nothing of the report is called signed."""
    forged = bytearray(content["report.bin"])
    forged[0x90] ^= 1
    code, out, _ = files.verify(files.write("forged", bytes(forged)), *files.certified, *files.wanted)
    assert code == 1
    assert "not shown to be genuine" in out
    assert "R1" in out
    assert "signed:" not in out


def test_policy_file(files: Files) -> None:
    """Report data and measurements may come from a policy; what the policy forbids refuses."""
    good = files.write(
        "good.toml", f'report_data = "{files.data}"\nmeasurements = ["{"00" * 48}", "{files.measurement}"]\n'
    )
    code, found = files.json(files("report.bin"), *files.certified, "--policy", good)
    assert (code, found["verdict"]) == (0, "accepted")
    assert "report_data" not in found["not_checked"]
    strict = files.write("strict.json", '{"minimum_guest_svn": 7}')
    code, out, _ = files.verify(files("report.bin"), *files.certified, *files.wanted, "--policy", strict)
    assert code == 1
    assert "Y11" in out


def test_policy_and_option_both_hold(files: Files) -> None:
    """A policy's measurements and --measurement are two demands: the option cannot widen the policy."""
    other = files.write("other.json", f'{{"measurements": ["{"00" * 48}"]}}')
    code, found = files.json(files("report.bin"), *files.certified, *files.wanted, "--policy", other)
    assert (code, found["verdict"]) == (1, "refused")


def test_crl(files: Files) -> None:
    """A CRL of the root is applied; with a policy that requires one, none is a refusal."""
    policy = files.write("crl.toml", "require_crl = true\n")
    wanted = (*files.certified, *files.wanted, "--policy", policy)
    assert files.verify(files("report.bin"), *wanted)[0] == 1
    code, out, _ = files.verify(files("report.bin"), *wanted, "--crl", files("crl.der"))
    assert code == 0
    assert "no CRL" not in out


def test_json_names_the_inputs(files: Files, content: dict[str, bytes]) -> None:
    """Every file with option, form and hash, so that a stored result can be held against its inputs."""
    _, found = files.json(files("report.hex"), *files.certified, *files.wanted)
    assert [(each["option"], each["form"]) for each in found["inputs"]] == [
        ("report", "hex text of a report"),
        ("certs", "certificate table"),
        ("roots", "DER certificate"),
    ]
    assert all(len(each["sha256"]) == 64 for each in found["inputs"])
    assert found["at"] == files.at.isoformat()
    assert found["schema"].startswith("swsnp.verification/")


def test_standard_input(files: Files, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` is standard input, for one of the files."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content["table.bin"])))
    roots = ("--roots", files("root.der"), "--at", files.at.isoformat())
    assert files.verify(files("report.bin"), "--certs", "-", *roots, *files.wanted)[0] == 0
    code, _, err = files.verify("-", "--certs", "-", *roots)
    assert code == 2
    assert "standard input can be read once only" in err


def test_time(files: Files) -> None:
    """--at is the time to judge at: a date is its first second in UTC; without it the clock counts."""
    wanted = ("--certs", files("table.bin"), "--roots", files("root.der"), *files.wanted)
    assert files.verify(files("report.bin"), *wanted, "--at", "1999-01-01")[0] == 1
    _, found = files.json(files("report.bin"), *wanted, "--at", "1999-01-01")
    assert found["at"] == "1999-01-01T00:00:00+00:00"
    assert run([files("report.bin"), *wanted], now=lambda: files.at) == 0
    assert utc_now().utcoffset() is not None


@pytest.mark.parametrize("engine", ["cryptography", "awscrt"])
def test_engines_agree(files: Files, engine: str) -> None:
    """P-384 by one library or the other: one setting, identical verdicts."""
    code, found = files.json(files("report.bin"), *files.certified, *files.wanted, "--engine", engine)
    assert (code, found["engine"]) == (0, engine)


def test_engine_that_is_not_installed(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast library is an extra: without it, exit code 4 and the remedy."""
    monkeypatch.setitem(sys.modules, "awscrt", None)
    monkeypatch.setitem(sys.modules, "awscrt.crypto", None)
    code, _, err = files.verify(files("report.bin"), *files.certified, "--engine", "awscrt")
    assert code == 4
    assert "awscrt" in err


def test_like_go_sev_guest(files: Files, seeded_machine: Machine) -> None:
    """attestation.md, compatibility mode: what that library lets pass is told and not refused; said so."""
    _, out, _ = files.verify(files("report.bin"), *files.certified, *files.wanted, "--like", "go-sev-guest")
    assert "judged like go-sev-guest" in out
    _, found = files.json(files("report.bin"), *files.certified, "--like", "go-sev-guest")
    assert found["like"] == "go-sev-guest"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "wanted either REPORT or --batch"),
        (("x", "--batch", "y"), "wanted either REPORT or --batch"),
        (("x", "--out", "y"), "--out and --jobs go with --batch"),
        (("x", "--jobs", "2"), "--out and --jobs go with --batch"),
        (("x", "--report-data", "00"), "--report-data: got 1 bytes, wanted 64"),
        (("x", "--measurement", "zz"), "--measurement: got 'zz', wanted 48 bytes in hexadecimal"),
        (("x", "--at", "today"), "--at: got 'today', wanted a time such as"),
        (("x", "--at", "2026-01-01T10:00"), "without a time zone"),
        (("x", "--product", "rome"), "--product: invalid choice: 'rome'"),
        (("x", "--like", "snpguest"), "--like: invalid choice: 'snpguest'"),
        (("x", "--engine", "openssl"), "--engine: invalid choice: 'openssl'"),
        (("x", "--auth"), "unrecognized arguments: --auth"),
    ],
)
def test_usage(files: Files, arguments: tuple[str, ...], text: str) -> None:
    """What cannot be meant is exit code 2 and names option, got and wanted."""
    code, out, err = files.verify(*arguments)
    assert (code, out) == (2, "")
    assert text in err.splitlines()[-1]


def test_two_tables(files: Files) -> None:
    """One report has one certificate table."""
    code, _, err = files.verify(files("report.bin"), "--certs", files("table.bin"), *files.certified)
    assert code == 2
    assert "got 2 certificate tables, wanted one" in err


def test_refusal_names_what_to_fetch(files: Files, content: dict[str, bytes]) -> None:
    """Offline is the default: a missing leaf or issuer is a refusal that names the URL and the option."""
    report = files.write("genuine.bin", genuine_looking(content))
    code, found = files.json(report)
    assert code == 1
    leaf, chain = found["fetch"]
    assert leaf["url"].startswith(f"https://kdsintf.amd.com/vcek/v1/Milan/{bytes(range(64)).hex()}?blSPL=")
    assert leaf["option"] == "--vcek"
    assert chain == {"url": "https://kdsintf.amd.com/vcek/v1/Milan/cert_chain", "option": "--chain"}
    _, out, _ = files.verify(report)
    assert "or let swsnp fetch what is missing: --kds https://kdsintf.amd.com" in out
    assert files.json(report, "--roots", files("root.der"))[1]["fetch"] == []


def test_nothing_to_fetch_for_a_vlek(files: Files, content: dict[str, bytes]) -> None:
    """AMD 57230: a VLEK comes from its provider, so only the chain above it can be fetched."""
    signer = AttestationReport.parse(content["report.bin"]).signer_info.but(signing_key=1)
    report = files.write("vlek.bin", genuine_looking(content, signer_info=signer))
    urls = [each["url"] for each in files.json(report)[1]["fetch"]]
    assert urls == ["https://kdsintf.amd.com/vlek/v1/Milan/cert_chain"]


def test_kds(files: Files, service: KdsServer) -> None:
    """--kds fetches leaf and chain, and the CRL where a policy requires one; --offline uses what was kept."""
    policy = files.write("crl.toml", "require_crl = true\n")
    roots = ("--roots", files("root.der"), "--at", files.at.isoformat(), *files.wanted)
    options = (*roots, "--kds", service.url, "--policy", policy)
    code, found = files.json(files("report.bin"), *options, "--offline")
    assert code == 4
    assert service.url in found["error"]["message"]
    asked = len(service.double.asked)
    code, found = files.json(files("report.bin"), *options)
    assert (code, found["verdict"]) == (0, "accepted")
    assert [each["option"] for each in found["inputs"]].count("kds") == 4
    assert len(service.double.asked) == asked + 3
    code, found = files.json(files("report.bin"), *options, "--offline")
    assert (code, len(service.double.asked)) == (0, asked + 3)


def test_kds_is_not_asked_for_what_is_there(files: Files, service: KdsServer) -> None:
    """Evidence that is complete needs no network even where it is allowed."""
    asked = len(service.double.asked)
    code, *_ = files.verify(files("report.bin"), *files.certified, *files.wanted, "--kds", service.url)
    assert (code, len(service.double.asked)) == (0, asked)


def test_no_list_where_it_is_known_already(files: Files, content: dict[str, bytes]) -> None:
    """A revocation list is asked for only where none was given, and a leaf says whose it would be."""
    wanted = Evidence(roots=Roots.amd(), policy=Policy(require_crl=True))
    vcek = content["vcek.der"]
    for evidence in (
        wanted,
        replace(wanted, certificates=(content["root.der"],)),
        replace(wanted, certificates=(vcek.replace(b"SEV-Milan", b"SEV-Malin"),)),
        replace(wanted, certificates=(vcek,), crls=(b"list",)),
    ):
        assert wanted_list(evidence) is None
    assert wanted_list(replace(wanted, certificates=(vcek,))) == (Product.MILAN, "vcek")


def test_kds_that_is_not_there(files: Files) -> None:
    """No network, or no service: exit code 4 and the URL; an address that is none: exit code 2."""
    with KdsServer(KdsDouble([Machine(seed=b"e2e")])) as server:
        gone = server.url
    code, out, err = files.verify(files("report.bin"), "--kds", gone, "--offline")
    assert (code, out) == (4, "")
    assert gone in err
    code, _, err = files.verify(files("report.bin"), "--kds", "ftp://x")
    assert code == 2
    assert "ftp://x" in err


def test_unknown_chip(files: Files, content: dict[str, bytes], service: KdsServer) -> None:
    """404 of the service is an answer about this chip: a refusal, not a host that cannot."""
    report = files.write("other.bin", genuine_looking(content))
    code, _, err = files.verify(report, "--kds", service.url)
    assert code == 1
    assert service.url in err


def test_debug_guest(files: Files, seeded_machine: Machine) -> None:
    """Guests that allow DEBUG are refused unless the policy allows them, though they are genuine."""
    with seeded_machine.create_vm(policy=GuestPolicy(0x30000).but(debug=1)) as vm:
        vm.boot()
        answer = vm.extended_report(bytes(64))
    report, certs = files.write("debug.bin", answer.report), files.write("debug.certs", answer.certs)
    options = ("--certs", certs, "--roots", files("root.der"), "--at", files.at.isoformat())
    code, found = files.json(report, *options, "--authentic-only")
    assert (code, found["authenticated"], found["verdict"]) == (1, True, "refused")
    allowed = files.write("allow.toml", "allow_debug = true\n")
    assert files.verify(report, *options, "--authentic-only", "--policy", allowed)[0] == 0


def test_product_of_version_2(files: Files, content: dict[str, bytes]) -> None:
    """Version 2 does not name its product line: --product does."""
    report = files.write("v2.bin", genuine_looking(content, version=2))
    assert files.json(report)[1]["fetch"] == []
    assert len(files.json(report, "--product", "genoa")[1]["fetch"]) == 2


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """--help says what exit code 0 means."""
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "exit code 0 means accepted" in out
    assert "0 good, 1 bad verdict, 2 usage, 3 unreadable input, 4 not possible" in out


def test_products_can_be_named() -> None:
    """Every product line of the documents is a choice of --product."""
    from swsnp.cli.verify.options import parse

    for product in Product:
        assert parse(["x", "--product", product.value.lower()]).product is product


def test_a_link_that_leads_nowhere(files: Files, tmp_path: Path) -> None:
    """A dangling link is unreadable input, by name."""
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    code, _, err = files.verify(files("link"))
    assert code == 3
    assert err.count("\n") == 1
