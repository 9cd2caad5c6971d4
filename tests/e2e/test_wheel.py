"""The wheel, installed without extras into a clean environment, verifies a report."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Skip

    from swsnp.machine import Machine

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A program that knows nothing of this checkout."""
    return subprocess.run(
        [*map(str, command)], cwd=folder, capture_output=True, text=True, check=False, timeout=300, env={}
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, cannot_run: Skip) -> Path:
    """The folder of programs of an environment that holds the wheel and what it requires, nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], capture_output=True, text=True, check=False
    )
    if built.returncode:
        _unless_offline(built.stderr, cannot_run)
    (wheel,) = folder.glob("swsnp-*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    constraints = ROOT / "requirements-dev.txt"
    done = subprocess.run(
        [python, "-m", "pip", "--quiet", "install", "-c", constraints, wheel],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        _unless_offline(done.stderr, cannot_run)
    return folder / "env" / "bin"


def _unless_offline(error: str, cannot_run: Skip) -> None:
    """Without a registry there is nothing to install from; any other trouble is the wheel's."""
    if any(each in error for each in ("No matching distribution", "ConnectionError", "NewConnectionError")):
        cannot_run("no package registry can be reached", "network access for pip")
    pytest.fail(error)


@pytest.fixture
def evidence(seeded_machine: Machine, tmp_path: Path) -> Path:
    """A folder with a report, its certificate table and the emulated root."""
    with seeded_machine.create_vm() as vm:
        vm.boot()
        answer = vm.extended_report(bytes(64))
    (tmp_path / "report.bin").write_bytes(answer.report)
    (tmp_path / "certs.bin").write_bytes(answer.certs)
    (tmp_path / "root.der").write_bytes(seeded_machine.root_certificate)
    return tmp_path


def test_nothing_but_the_core(installed: Path, tmp_path: Path) -> None:
    """The environment holds no extra, so that what follows rests on the wheel's own requirements."""
    listed = run(installed / "python", "-m", "pip", "list", "--format=json", folder=tmp_path)
    names = {each["name"].lower() for each in json.loads(listed.stdout)}
    assert {"swsnp", "cryptography"} <= names
    assert not names & {"awscrt", "urllib3", "pyarrow", "rich", "pytest", "hypothesis"}


def test_verifies(installed: Path, evidence: Path, seeded_machine: Machine) -> None:
    """`swsnp verify` takes authentic evidence under the root that was chosen, and refuses it under AMD's."""
    options = ("--certs", "certs.bin", "--at", seeded_machine.now().isoformat(), "--authentic-only", "--json")
    command = (installed / "swsnp", "verify", "report.bin", *options)
    good = run(*command, "--roots", "root.der", folder=evidence)
    assert (good.returncode, good.stderr) == (0, "")
    found = json.loads(good.stdout)
    assert (found["verdict"], found["authenticated"]) == ("authentic", True)
    bad = run(*command, folder=evidence)
    assert (bad.returncode, bad.stderr) == (1, "")
    assert json.loads(bad.stdout)["authenticated"] is False


def test_what_needs_an_extra_says_so(installed: Path, evidence: Path) -> None:
    """Without its extra, an option ends with exit code 4 and the remedy, not with a traceback."""
    swsnp = installed / "swsnp"
    fast = run(swsnp, "verify", "report.bin", "--engine", "awscrt", folder=evidence)
    assert fast.returncode == 4
    assert fast.stderr.count("\n") == 1
    (evidence / "x.parquet").write_bytes(b"PAR1")
    batch = run(swsnp, "verify", "--batch", "x.parquet", folder=evidence)
    assert batch.returncode == 4
    assert "swsnp[batch]" in batch.stderr


def test_a_batch_of_files_needs_no_extra(installed: Path, evidence: Path) -> None:
    """A directory of reports can be judged by the core alone."""
    (evidence / "reports").mkdir()
    (evidence / "report.bin").rename(evidence / "reports" / "report.bin")
    done = run(installed / "swsnp", "verify", "--batch", "reports", "--out", "out.jsonl", folder=evidence)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "1 report: 0 accepted, 0 authentic, 1 refused, 0 unreadable\n"
