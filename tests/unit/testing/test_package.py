"""What swsnp.testing promises: its names, and that it needs neither pytest nor Hypothesis."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import swsnp.testing
from swsnp.crypto.derive import SeededEntropy
from swsnp.testing import FakeClock

if TYPE_CHECKING:
    from pathlib import Path


def test_promised_names_exist() -> None:
    """Every promised name is there, and every one is said once."""
    assert len(set(swsnp.testing.__all__)) == len(swsnp.testing.__all__)
    for name in swsnp.testing.__all__:
        assert getattr(swsnp.testing, name) is not None


@pytest.mark.parametrize("absent", ["pytest", "_pytest", "hypothesis"])
def test_import_needs_no_test_framework(absent: str) -> None:
    """The package is usable in any suite: unittest, or none."""
    code = f"import swsnp.testing, sys; print({absent!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_entropy_is_the_machines_own() -> None:
    """SeededEntropy is re-exported, not copied."""
    assert swsnp.testing.SeededEntropy is SeededEntropy


def test_time_passes_only_in_sleep() -> None:
    """FakeClock: monotonic stands still, a pause is kept and passes at once."""
    clock = FakeClock(5.0)
    assert (clock.monotonic(), clock.monotonic()) == (5.0, 5.0)
    clock.sleep(2)
    clock.sleep(0.25)
    assert clock.monotonic() == 7.25
    assert clock.slept == [2, 0.25]


FIXTURE_TEST = """
from swsnp.machine import Machine, VirtualMachine
from swsnp.testing import FakeClock, attacks, HostileHost, ask_report

def test_fixtures(swsnp_machine, swsnp_clock, swsnp_vm, swsnp_seeded_machine):
    assert isinstance(swsnp_machine, Machine) and isinstance(swsnp_vm, VirtualMachine)
    assert swsnp_machine.clock is swsnp_clock and isinstance(swsnp_clock, FakeClock)
    assert swsnp_vm.report(bytes(64)).status == 0
    assert swsnp_seeded_machine.chip.chip_id == Machine(seed=b"swsnp.testing.fixtures").chip.chip_id
    with HostileHost(attacks.Busy()).between(swsnp_vm):
        assert ask_report(swsnp_vm).result == -110
    assert swsnp_clock.slept == [2] * 31
"""
KDS_TEST = """
from urllib.request import urlopen

import pytest

from swsnp.machine import Machine
from swsnp.testing.kds import Misbehaviour, Trouble

@pytest.fixture
def swsnp_seeded_machine():
    return Machine()  # whose keys are made faster than those of a seed

def test_key_service(swsnp_kds, swsnp_seeded_machine):
    with urlopen(f"{swsnp_kds.url}/vcek/v1/Milan/cert_chain") as answer:
        assert answer.read() == swsnp_seeded_machine.hierarchy.chain_pem()
    swsnp_kds.double.misbehave(Misbehaviour(trouble=Trouble.OUTAGE))
    assert [each.status for each in swsnp_kds.double.asked] == [200]
"""


def test_fixtures_in_a_suite_of_its_own(tmp_path: Path) -> None:
    """The plugin works in a project that has nothing but one line about it."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["swsnp.testing.fixtures"]\n')
    (tmp_path / "test_one.py").write_text(FIXTURE_TEST)
    (tmp_path / "test_two.py").write_text(KDS_TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_fixtures_are_not_loaded_by_themselves(tmp_path: Path) -> None:
    """Installing swsnp adds no fixture to anybody's suite."""
    (tmp_path / "test_one.py").write_text("def test_one(swsnp_clock): ...\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "fixture 'swsnp_clock' not found" in done.stdout
