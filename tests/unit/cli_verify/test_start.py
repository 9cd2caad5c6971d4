"""What `swsnp verify` and `swsnp report` load: nothing that the case at hand does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from tests.unit.cli_verify.conftest import Files

LOADED: Final = """
import json, sys
from swsnp.cli import main
main(sys.argv[1:])
names = set(sys.modules)
ours = {name for name in names if name.startswith("swsnp")}
print(json.dumps(sorted({name.partition(".")[0] for name in names} | ours)))
"""
NEVER: Final = {
    "rich",
    "pyarrow",
    "urllib3",
    "awscrt",
    "Crypto",
    "multiprocessing",
    "concurrent",
    "ssl",
    "http",
}
IMITATES: Final = ("amd_ca", "machine", "firmware", "hypervisor", "guest", "vmm", "cpu", "testing", "front")


def loaded(*arguments: str) -> set[str]:
    """Top-level packages, and modules of this one, after a command has run."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=False
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("more", [(), ("--json",), ("--authentic-only",)])
def test_one_report(files: Files, more: tuple[str, ...]) -> None:
    """One report: no extra, no network, no worker, nothing that imitates, and no policy reader."""
    names = loaded("verify", files("report.bin"), *files.certified, *more)
    assert "cryptography" in names
    assert names & (NEVER | {"tomllib"}) == set()
    assert [name for name in names if name.removeprefix("swsnp.").startswith(IMITATES)] == []


def test_showing_a_report(files: Files) -> None:
    """`report show` judges nothing, so it loads no cryptography."""
    names = loaded("report", "show", files("report.bin"))
    assert names & (NEVER | {"cryptography", "asn1crypto"}) == set()
    assert not any(name.startswith(("swsnp.verify", "swsnp.certs")) for name in names)


def test_help(files: Files) -> None:
    """--help loads neither verifier nor certificates."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "swsnp", "verify", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "swsnp.verify" not in done.stderr
    assert "cryptography" not in done.stderr
