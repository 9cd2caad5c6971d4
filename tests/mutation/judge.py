"""Runs tests against mutants, inside one pytest session.

1. Every test runs once with no mutant on. It has to pass; what it takes and which mutants it could tell from
   the program are noted. Session fixtures stay alive after that.
2. For each mutant the process forks. The child switches the mutant on and runs the tests that could tell,
   cheapest first, until one fails.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

import pytest
from _pytest.runner import runtestprotocol
from tests.mutation.switch import SWITCH

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from tests.mutation.finder import Mutant

__all__ = ["Judge", "Result", "Verdict"]

_FEW: Final = 5
_TIMES: Final = 20
"""How much longer than in the first run a child's tests may take."""
_LEAST_PATIENCE_S: Final = 2
"""Processor time that a child may take besides."""
_WAIT_S: Final = 30.0
"""How long it may live besides: for mutants that sleep."""


class Verdict(StrEnum):
    """What came of a mutant."""

    KILLED = "killed"
    TIMEOUT = "killed (timeout)"
    SURVIVED = "survived"
    UNREACHED = "never refused"
    EQUIVALENT = "equivalent"


@dataclass(frozen=True, slots=True)
class Result:
    """A mutant's end: `tests` that could tell, and the one that did."""

    mutant: Mutant
    verdict: Verdict
    tests: int = 0
    killer: str = ""


@dataclass(slots=True)
class _Witness:
    """A test that refuses at least once where a mutant would not."""

    item: pytest.Item
    cost: float
    in_setup: set[int]


_Witnesses: TypeAlias = dict[int, list[_Witness]]


@dataclass(slots=True)
class _Child:
    pid: int
    mutant: Mutant
    tests: Sequence[_Witness]
    ends_at: float
    pipe: int


@dataclass(slots=True, eq=False)
class Judge:
    """A pytest plugin; `results`, `failed` and the two times are filled by the session.

    Args:
        mutants: to be judged.
        processes: how many children at a time.
        attempts: how many tests of one file may try; those that could tell nearly always do at the first.
        hopeless: keys of mutants that are not expected to be killed: few tests try.
        tell: where progress goes.
        monotonic: the clock for costs and patience.
    """

    mutants: Sequence[Mutant]
    processes: int = 2
    attempts: int = 40
    hopeless: Collection[str] = ()
    tell: Callable[[str], object] = print
    monotonic: Callable[[], float] = time.monotonic
    results: list[Result] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    first_run_s: float = 0.0
    mutants_s: float = 0.0

    def pytest_configure(self, config: pytest.Config) -> None:
        """Nobody reads why a test fails: finding the lines of a traceback takes longer than most tests."""
        config.option.tbstyle = "value"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        """The fixtures are there."""
        SWITCH.seen_in_setup = set(SWITCH.seen)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of pytest's own loop."""
        if session.testsfailed or not session.items:
            raise session.Interrupted(f"{session.testsfailed} errors in {len(session.items)} tests")
        start = self.monotonic()
        witnesses, unseen = self._first_run(session.items)
        self.first_run_s = self.monotonic() - start
        self.tell(f"{len(session.items)} tests without a mutant: {self.first_run_s:.1f} s")
        start = self.monotonic()
        gc.collect()
        gc.freeze()  # else the first collection in a child writes to, and so copies, every page
        self._judge(witnesses, unseen)
        self.mutants_s = self.monotonic() - start
        self.tell(f"{len(self.mutants)} mutants: {self.mutants_s:.1f} s")
        return True

    def _first_run(self, items: Sequence[pytest.Item]) -> tuple[_Witnesses, _Witnesses]:
        """For each mutant the tests that can tell; and those that only reach a check that never raises."""
        witnesses: _Witnesses = defaultdict(list)
        reached: _Witnesses = defaultdict(list)
        for at, item in enumerate(items):
            SWITCH.forget()
            reports = runtestprotocol(item, log=False, nextitem=_unlike(item, items[(at + 1) % len(items)]))
            if any(report.failed for report in reports):
                self.failed.append(item.nodeid)
            elif all(report.passed for report in reports):
                cost = sum(report.duration for report in reports)
                witness = _Witness(item, cost, SWITCH.seen_in_setup)
                for number in SWITCH.seen:
                    witnesses[number].append(witness)
                for number in SWITCH.reached:
                    reached[number].append(witness)
        for each in (*witnesses.values(), *reached.values()):
            each.sort(key=lambda witness: witness.cost)
        return witnesses, reached

    def _judge(self, witnesses: _Witnesses, unseen: _Witnesses) -> None:
        running: dict[int, _Child] = {}
        for mutant in self.mutants:
            attempts = _FEW if mutant.key in self.hopeless else self.attempts
            tests = _chosen(witnesses.get(mutant.number, ()), attempts) or unseen.get(mutant.number, ())
            if not tests:
                self.results.append(Result(mutant, Verdict.UNREACHED))
                continue
            while len(running) >= self.processes:
                self._reap(running)
            child = self._fork(mutant, tests)
            running[child.pipe] = child
        while running:
            self._reap(running)
        self.results.sort(key=lambda result: result.mutant.number)

    def _fork(self, mutant: Mutant, tests: Sequence[_Witness]) -> _Child:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            os.close(reading)
            _be_the_child(mutant, tests, writing)
        os.close(writing)
        ends_at = self.monotonic() + _WAIT_S + _usual(tests)
        return _Child(pid, mutant, tests, ends_at, reading)

    def _reap(self, running: dict[int, _Child]) -> None:
        """Wait for one child, or end those whose time is over."""
        left = min(child.ends_at for child in running.values()) - self.monotonic()
        ready, _, _ = select.select(list(running), [], [], max(left, 0))
        now = self.monotonic()
        late = [] if ready else [pipe for pipe, child in running.items() if child.ends_at <= now]
        for pipe in (*ready, *late):
            child = running.pop(pipe)
            if pipe in late:
                os.kill(child.pid, signal.SIGKILL)
            answer = os.read(pipe, 8)
            os.close(pipe)
            _, status = os.waitpid(child.pid, 0)
            spent = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
            self.results.append(_result(child, answer, late=spent or pipe in late))


def _result(child: _Child, answer: bytes, *, late: bool) -> Result:
    tests = len(child.tests)
    if late:
        return Result(child.mutant, Verdict.TIMEOUT, tests, child.tests[0].item.nodeid)
    if not answer:  # the child died: no test can overlook that
        return Result(child.mutant, Verdict.KILLED, tests, child.tests[0].item.nodeid)
    number = int(answer)
    if number < 0:
        return Result(child.mutant, Verdict.SURVIVED, tests)
    return Result(child.mutant, Verdict.KILLED, tests, child.tests[number].item.nodeid)


def _chosen(witnesses: Sequence[_Witness], attempts: int) -> Sequence[_Witness]:
    """The cheapest, at most some per file: tests of one file like to miss the same thing."""
    chosen: list[_Witness] = []
    per_file: dict[Path, int] = defaultdict(int)
    for each in witnesses:
        per_file[each.item.path] += 1
        if per_file[each.item.path] <= attempts:
            chosen.append(each)
    return chosen


def _unlike(item: pytest.Item, following: pytest.Item) -> pytest.Item:
    """What to tell pytest about the next test: never that it is the same one, which would stay set up."""
    # pytest asks the next item only for its chain of collectors
    return following if following is not item else item.parent  # type: ignore[return-value]


def _usual(tests: Sequence[_Witness]) -> float:
    """Seconds that are not too long for these tests."""
    return _TIMES * sum(each.cost for each in tests)


def _be_the_child(mutant: Mutant, tests: Sequence[_Witness], pipe: int) -> None:
    """Switch the mutant on, run the tests, say which one failed; never returns."""
    answer = b""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        patience = _LEAST_PATIENCE_S + round(_usual(tests))
        resource.setrlimit(resource.RLIMIT_CPU, (patience, resource.RLIM_INFINITY))
        SWITCH.active = mutant.number
        answer = b"%d" % _first_failure(mutant, tests)
    finally:
        os.write(pipe, answer)
        os._exit(0)


def _first_failure(mutant: Mutant, tests: Sequence[_Witness]) -> int:
    """The place of the first test that fails, or -1."""
    state = tests[0].item.session._setupstate
    for at, each in enumerate(tests):
        # what a session fixture did is done: make those again where the mutant may have mattered to them
        state.teardown_exact(None if mutant.number in each.in_setup else each.item)
        reports = runtestprotocol(each.item, log=False, nextitem=_unlike(each.item, each.item))
        if any(report.failed for report in reports):
            return at
    return -1
