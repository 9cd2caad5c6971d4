"""docs/how-to/relying-party.md: its commands run, in their order, and print what the page shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import AttestationReport
from swsnp.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "relying-party.md"
BLOCKS = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
NONCE = b"\x42" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page says lies there; made now, so that the certificates are valid."""
    made = tmp_path_factory.mktemp("relying-party")
    machine = Machine()
    with machine.create_vm() as vm:
        vm.boot()
        answer = vm.extended_report(NONCE)
    (made / "report.bin").write_bytes(answer.report)
    (made / "certs.bin").write_bytes(answer.certs)
    (made / "root.der").write_bytes(machine.root_certificate)
    (made / "nonce.hex").write_text(NONCE.hex())
    (made / "measurement.hex").write_text(AttestationReport.parse(answer.report).measurement.hex())
    return made


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a block with the lines that stand below it."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        yield command, shown


def pattern(shown: list[str]) -> str:
    """A line `…` stands for any lines, and … in a line for anything."""
    lines = [r"(?:.*\n)*" if line == "…" else re.escape(line).replace("…", ".*") + r"\n" for line in shown]
    return "".join(lines)


def test_commands(folder: Path) -> None:
    """Every command prints what the page shows; one that shows nothing says nothing and ends well."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    count = 0
    for block in BLOCKS:
        for command, shown in commands(block):
            done = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert done.stderr == "", command
            assert re.fullmatch(pattern(shown), done.stdout), (command, done.stdout)
            assert shown or done.returncode == 0, command
            count += 1
    assert count >= 15


def test_the_pattern_is_not_too_kind() -> None:
    """What the page does not show is not accepted."""
    assert re.fullmatch(pattern(["a …", "…", "end"]), "a b\nx\ny\nend\n")
    assert not re.fullmatch(pattern(["a …", "end"]), "a b\nx\nend\n")
    assert not re.fullmatch(pattern([]), "noise\n")
