"""Whether the state machines ran as long as they are meant to."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.property.steps import ENOUGH, MACHINES, STEPS, soaking


def test_machines_made_enough_steps(request: pytest.FixtureRequest) -> None:
    """CONTRIBUTING.md, truth: a whole run makes at least 100,000 steps, and `make soak` what it was asked."""
    here = Path(__file__).parent
    ran = {item.path for item in request.session.items}
    if missing := sorted(path.name for path in here.glob("test_*.py") if path not in ran):
        pytest.skip(f"a part of the machines only; not run: {', '.join(missing)}")
    assert STEPS.total() >= (soaking() or ENOUGH)
    assert set(STEPS) == set(MACHINES)
