"""How long the state machines run, and how many steps they have made."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Final

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant

if TYPE_CHECKING:
    from unittest import TestCase

__all__ = ["ENOUGH", "MACHINES", "STEPS", "CountedMachine", "machine_test", "soaking"]

ENOUGH: Final = 100_000
"""Steps that one whole run of the machines makes at least."""
STEPS: Final[Counter[str]] = Counter()
"""Steps made in this session, by machine."""
MACHINES: Final[dict[str, int]] = {}
"""Steps planned in a plain run, by machine: more than ENOUGH together, since some runs end early."""

settings.register_profile(
    "derandomized",
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "soak", deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)  # random, and what failed is kept in .hypothesis and tried first the next time


def soaking() -> int:
    """How many steps SWSNP_SOAK_STEPS asks for; 0 in a plain run."""
    return int(os.environ.get("SWSNP_SOAK_STEPS", "0"))


class CountedMachine(RuleBasedStateMachine):
    """A machine whose steps are counted: every rule that ran to its end and past every invariant."""

    def __init__(self) -> None:
        super().__init__()
        self._checks = -1  # invariants are checked once before the first step

    @invariant()
    def step_is_counted(self) -> None:
        self._checks += 1

    def teardown(self) -> None:
        STEPS[type(self).__name__] += max(self._checks, 0)


def machine_test(machine: type[CountedMachine], *, steps: int, per_run: int = 100) -> type[TestCase]:
    """The test of a machine.

    Args:
        machine: the class.
        steps: how many it makes in a plain run.
        per_run: how many it makes before it starts afresh.
    """
    MACHINES[machine.__name__] = steps
    wanted = steps * soaking() // ENOUGH if soaking() else steps
    rounds = max(1, round(wanted / steps))

    class Rounds(machine.TestCase):  # type: ignore[name-defined, misc]  # made by Hypothesis
        """Hypothesis remembers every choice of a run, gigabytes in a long one: so a long one is many runs."""

        settings = settings_of(-(-wanted // rounds), per_run)

        def runTest(self) -> None:  # unittest's name
            for _ in range(rounds):
                super().runTest()

    Rounds.__name__ = Rounds.__qualname__ = f"Test{machine.__name__}"
    return Rounds


def settings_of(steps: int, per_run: int) -> settings:
    """The settings of one run of `steps` steps."""
    return settings(
        settings.get_profile("soak" if soaking() else "derandomized"),
        max_examples=max(1, -(-steps // per_run)),
        stateful_step_count=per_run,
    )
