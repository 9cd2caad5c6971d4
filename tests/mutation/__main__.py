"""`python -m tests.mutation`: remove each check in turn and see whether a test fails. See the how-to page."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from tests.mutation.finder import Kind
from tests.mutation.judge import Judge
from tests.mutation.loader import install, read_sources
from tests.mutation.report import conclude, read_equivalent

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

ROOT: Final = Path(__file__).resolve().parents[2]
SOURCES: Final = [
    f"src/swsnp/{part}"
    for part in (
        *("firmware", "hypervisor", "guest", "vmm", "cpu", "hardware"),
        *("abi/ovmf.py", "measure", "verify", "certs"),
        *("cli/verify", "cli/certs", "cli/common.py", "cli/inputs.py", "cli/id_block.py"),
        *("cli/measure.py", "cli/measure_explain.py", "cli/measure_kernel.py"),
        *("cli/qemu_options.py", "cli/qemu_values.py", "cli/qemu_chardevs.py", "cli/qemu_devices.py"),
        *("cli/qemu_drives.py", "cli/qemu_netdevs.py", "cli/qemu_ports.py", "cli/vm_devices.py"),
        *(
            "cli/kds",
            "cli/vm.py",
            "cli/vm_firmware.py",
            "cli/vm_input.py",
            "cli/vm_kernel.py",
            "cli/vm_program.py",
        ),
        "cli/vm_terminal.py",
    )
]
NO_JUDGES: Final = (
    *("amd_ca", "crypto", "front", "fuzz"),
    *("machine", "testing"),
)
"""Unit tests of other packages; and those that start programs, where no mutant is on."""
CHECKS: Final = (Kind.CHECK, Kind.CALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 when every mutant was killed or is known to be equivalent."""
    options = _parser().parse_args(arguments)
    os.chdir(ROOT)
    # the same examples in every run, none of them kept or made smaller
    settings.register_profile(
        "mutation",
        database=None,
        deadline=None,
        derandomize=True,
        max_examples=25,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("mutation")
    found = read_sources(ROOT, options.only or SOURCES)
    install(found)
    chosen = [each for each in found.mutants if not options.checks or each.kind in CHECKS]
    equivalent = read_equivalent(Path(__file__).with_name("equivalent.toml"))
    attempts = 40 if options.checks else 400
    judge = Judge(chosen, processes=options.jobs, attempts=attempts, hopeless=equivalent)
    status = pytest.main([*_PYTEST, *(options.tests or _judges())], plugins=[judge])
    if status != pytest.ExitCode.OK:
        print(f"pytest could not collect or run the tests: {status!r}")
        return 2
    whole = not (options.only or options.tests or options.checks)
    return conclude(judge, equivalent, ROOT / "build" / "mutation.json", table=options.table, whole=whole)


_PYTEST: Final = (
    "-p",
    "no:terminal",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:pytest_cov",
    "-m",
    "not slow",
    "--capture=sys",
    "--assert=plain",
    "-o",
    "addopts=--strict-markers --strict-config --import-mode=importlib",
)


def _judges() -> list[str]:
    areas = {each.parent.relative_to(ROOT) for each in ROOT.glob("tests/unit/*/test_*.py")}
    units = sorted(str(each) for each in areas if each.name not in NO_JUDGES)
    return [*units, "tests/conformance", "tests/e2e/test_machine.py"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--checks", action="store_true", help="one mutant per refusal, as in `make test`")
    parser.add_argument("--only", nargs="+", metavar="PATH", help="mutate these files or folders")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="let only these tests judge")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all)")
    parser.add_argument("--table", action="store_true", help="print every mutant, not only survivors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
