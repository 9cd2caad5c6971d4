"""The commands print what they promise; each runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swsnp.abi.snp_report import AttestationReport
from swsnp.cli import common
from swsnp.hypervisor.profiles import DEFAULT, PROFILES

ROOT = Path(__file__).resolve().parents[2]
VM = (
    "-smp 32,maxcpus=255 -cpu EPYC-Milan-v2 -machine q35,confidential-guest-support=sev0,memory-backend=ram1 "
    "-object memory-backend-memfd,id=ram1,size=4G,share=true,reserve=false "
    "-object sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,id-auth="
)
"""The series' command line, after the program's name; certificates are added to its last word."""


def swsnp(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swsnp", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def good(*arguments: str) -> Any:
    done = swsnp(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_readme_shows_the_help() -> None:
    """The README's usage text is the program's."""
    block = re.search(r"```text\n(usage: swsnp.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert block.group(1) == swsnp("--help").stdout


def test_profiles_of_the_command_line_are_the_hypervisors() -> None:
    """The list that --help shows without loading the hypervisor."""
    assert list(common.PROFILES) == list(PROFILES)
    assert common.PROFILES[-1] == DEFAULT


@pytest.mark.parametrize(
    ("profile", "exit_reason"),
    [("coco-v1", 40), ("coco-v1-revised", 40), ("linux-6.12", None), ("linux-7.2", 43)],
)
def test_demo_json(profile: str, exit_reason: int | None) -> None:
    """What the JSON has at least, per profile; null without a certificate exit."""
    shown = good("demo", "--json", "--seed", "demo", "--profile", profile)
    assert shown["profile"] == profile
    assert shown["exit_reason"] == exit_reason
    assert (shown["certs_sha256"] is None) == (exit_reason is None)
    assert shown["verdict"]["authenticated"] is True
    hops = [hop["hop"] for hop in shown["hops"]]
    assert hops[0] == "IoctlCalled"
    assert hops.count("ReportSigned") == 1
    assert ("CertsRead" in hops) == (exit_reason is not None)
    assert shown["report"]["report_data"] == hashlib.sha512(b"swsnp demo").hexdigest()
    assert shown["report"]["chip_id"].startswith(b"SWSN".hex())


def test_demo_is_reproducible_and_says_nothing_of_this_machine() -> None:
    """Two processes, one seed: equal output, no times, paths or process ids; another seed differs."""
    first, again = (swsnp("demo", "--json", "--seed", "s", "--product", "turin").stdout for _ in range(2))
    assert first == again
    assert str(ROOT) not in first
    other = swsnp("demo", "--json", "--seed", "t", "--product", "turin").stdout
    assert json.loads(other)["report_hex"] != json.loads(first)["report_hex"]


def test_demo_compares() -> None:
    """coco-v1 first, then linux-7.2, then what differs."""
    done = swsnp("demo", "--compare", "--seed", "s")
    assert done.returncode == 0
    first, second, differs = (
        done.stdout.index(text) for text in ("profile coco-v1", "profile linux-7.2", "what differs")
    )
    assert first < second < differs
    tail = done.stdout[differs:]
    assert "KVM_EXIT_COCO (40), gfn 0x102" in tail
    assert "KVM_EXIT_SNP_REQ_CERTS (43), gpa 0x102000" in tail


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
def test_demo_with_amd_names(product: str) -> None:
    """--amd-names changes names, not the verdict under the machine's own root."""
    assert good("demo", "--json", "--seed", "s", "--product", product, "--amd-names")["verdict"][
        "authenticated"
    ]


def test_vm_with_the_series_command_line(tmp_path: Path) -> None:
    """Word for word, with and without certificates; random bytes are legal and arrive unchanged."""
    shown = good("vm", "--json", *VM.split())
    assert (shown["vcpus"], shown["exit_reason"], shown["certs_sha256"]) == (32, None, None)
    blob = tmp_path / "cert.blob"
    blob.write_bytes(hashlib.shake_256(b"random data will suffice").digest(7000))
    for profile, number in (("coco-v1", 40), ("linux-7.2", 43)):
        shown = good("vm", "--json", "--profile", profile, "--count", "3", *f"{VM},certs-path={blob}".split())
        assert shown["exit_reason"] == number
        assert shown["certs_sha256"] == hashlib.sha256(blob.read_bytes()).hexdigest()
        assert len(shown["reports"]) == 3
        reports = [AttestationReport.parse(bytes.fromhex(each["report"])) for each in shown["reports"]]
        assert len({report.report_data for report in reports}) == 3
        assert len({report.report_id for report in reports}) == 1


def test_vm_for_people(tmp_path: Path) -> None:
    """The text names product, profile, vCPUs, exit and each report."""
    done = swsnp("vm", "--seed", "s", *VM.split())
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "Milan on linux-7.2: 32 vCPU(s), no certificate exit",
        "certificates: an empty table",
        "report 1: status 0x0, 1184 bytes",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("vm", *VM.replace("cbitpos=51", "cbitpos=47").split()), 2, "cbitpos"),
        (("vm", *VM.replace("EPYC-Milan-v2", "Skylake").split()), 2, "-cpu"),
        (("vm", *VM.split(), "-bios", "/nowhere/OVMF.fd"), 3, "/nowhere/OVMF.fd: cannot be read"),
        (("vm", *VM.split(), "-append", "quiet"), 2, "-append: only allowed with -kernel"),
        (("vm", *VM.split(), "-device", "x"), 2, "-device"),
        (("vm", "--count", "0", *VM.split()), 2, "--count"),
        (("demo", "--profile", "linux-9"), 2, "--profile"),
        (("demo", "extra"), 2, "extra"),
        (("run",), 2, "no program"),
        (("run", "true"), 2, "put -- before the program"),
        (("run", "--certs-path", "x", "--no-certs", "--", "true"), 2, "not allowed with"),
        (("run", "--save-root", "/nowhere/root.der", "--", "true"), 2, "cannot be written"),
        (("report", "show", "/nowhere"), 3, "/nowhere"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: int, message: str) -> None:
    """Bad input ends with its exit code and a line that names it; never a traceback."""
    done = swsnp(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_vm_whose_certificates_are_missing() -> None:
    """A report that cannot be had is a bad verdict: the blob is not there, the guest gets EIO."""
    done = swsnp("vm", *f"{VM},certs-path=/nowhere/cert.blob".split())
    assert done.returncode == 1
    assert "EIO" in done.stderr
    assert "Traceback" not in done.stderr


def test_capabilities() -> None:
    """What a VMM or a test suite probes."""
    shown = good("capabilities", "--json")
    assert shown["profiles"]["coco-v1"] == {"certificate_exit": 40}
    assert shown["profiles"]["linux-6.12"] == {"certificate_exit": None}
    assert shown["accelerators"]["builtin"] == {"usable": True}
    for group in ("accelerators", "run_backends"):
        for verdict in shown[group].values():
            assert verdict["usable"] or (verdict["reason"] and verdict["remedy"])
    assert shown["key_service"] == {"usable": True}
    assert swsnp("capabilities").stdout.startswith("version")


def test_run_saves_the_root(tmp_path: Path) -> None:
    """--save-root writes a whole certificate or none; the exit code is the program's."""
    root = tmp_path / "root.der"
    done = swsnp("run", "--save-root", str(root), "--", "sh", "-c", "test -c /dev/sev-guest && exit 7")
    assert done.returncode == 7, done.stderr
    assert root.read_bytes()[:1] == b"\x30"
    assert list(tmp_path.iterdir()) == [root]
