"""docs/how-to/relying-party.md: its commands run, in their order, and print what the page shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.docs.page import blocks_of, prints, run

from swsnp.abi.snp_report import AttestationReport
from swsnp.machine import Machine

if TYPE_CHECKING:
    from pathlib import Path

STEPS = [step for block in blocks_of("how-to/relying-party.md") for step in block]
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


def test_commands(folder: Path) -> None:
    """Every command prints what the page shows; one that shows nothing says nothing and ends well."""
    for step in STEPS:
        done = run(step.command, folder)
        assert done.stderr == "", step.command
        assert prints(step.shown, done.stdout), (step.command, done.stdout)
        assert step.shown or done.returncode == 0, step.command
    assert len(STEPS) >= 15
