"""What swsnp loads does not bring the interpreter's lock back."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

_ATTEST: Final = """
import sys
from swsnp import Machine
with Machine(engine=sys.argv[1]).create_vm() as vm:
    vm.boot()
    vm.report(bytes(64))
    vm.extended_report(bytes(64))
print(sys._is_gil_enabled())
"""


@pytest.mark.parametrize("engine", ["cryptography", "awscrt"])
def test_no_module_brings_the_lock_back(engine: str) -> None:
    """PEP 703: loading one extension that does not say it can do without enables the lock for the process."""
    run = [sys.executable, "-W", "error", "-c", _ATTEST, engine]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)
