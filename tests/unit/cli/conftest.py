"""What commands that boot a kernel are given."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.cli import main
from swsnp.cpu.plain_kvm import Verdict, probe
from swsnp.testing.tiny_kernel import tiny_kernel

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip

GOOD_HOST = Verdict(usable=True)


def vm(*arguments: str) -> int:
    """`swsnp vm`: its exit status."""
    return main(["vm", *arguments])


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinuz"
    path.write_bytes(tiny_kernel())
    return str(path)


@pytest.fixture
def static_program(tmp_path: Path) -> str:
    """An ELF-64 program that needs no interpreter."""
    program = tmp_path / "p"
    program.write_bytes(b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 2, 62, *[0] * 11))
    return str(program)


@pytest.fixture
def any_kvm(cannot_run: Skip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose KVM runs tiny guests; the tiny kernel needs no more, whatever Linux would."""
    verdict = probe()
    if not verdict.usable:
        cannot_run(verdict.reason, verdict.remedy, avoidable=False)
    monkeypatch.setattr("swsnp.cli.vm_kernel.probe_for_linux", lambda: GOOD_HOST)
