"""The number of steps that the state machines made, at the end of every run that made any."""

from __future__ import annotations

import logging

import pytest
from tests.property.steps import STEPS


@pytest.fixture(autouse=True)
def _without_a_log(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of refusals that were provoked are no news."""
    caplog.set_level(logging.CRITICAL, "swsnp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that counts comes after everything it counts."""
    items.sort(key=lambda item: item.path.name == "test_steps.py")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line: the total, and each machine's share."""
    if STEPS:
        shares = ", ".join(f"{name} {count:,}" for name, count in sorted(STEPS.items()))
        terminalreporter.write_line(f"state machines: {STEPS.total():,} steps ({shares})")
