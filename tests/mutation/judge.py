"""Runs tests against mutants, inside one pytest session.

1. Every test runs once with no mutant on. It has to pass; what it takes and which mutants it could tell from
   the program are noted. Session fixtures stay alive after that.
2. For each mutant the process forks. The child switches the mutant on and runs the tests that could tell,
   cheapest first, until one fails.
"""

from __future__ import annotations

import gc
import math
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
_ENDED, _NONE_FAILED = b".", b"-"
"""The last byte that a child says; what its tests left running may keep the pipe open."""
_TIMES: Final = 20
"""How much longer than in the first run each of a child's tests may take."""
_LEAST_PATIENCE_S: Final = 2
"""Processor time that it may take besides."""
_WAIT_S: Final = 30.0
"""Time by the clock that it may take besides: for mutants that sleep."""


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
    """`heard` is what came through `pipe`: a line for each test that it began, the `last` one's place."""

    pid: int
    mutant: Mutant
    tests: Sequence[_Witness]
    ends_at: float
    pipe: int
    heard: bytes = b""

    @property
    def last(self) -> int:
        return self.heard.count(b"\n") - 1


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
        return _Child(pid, mutant, tests, self.monotonic() + _WAIT_S, reading)

    def _reap(self, running: dict[int, _Child]) -> None:
        """Listen to the children until one has come to its end, or end those whose time is over."""
        while True:
            left = min(child.ends_at for child in running.values()) - self.monotonic()
            ready, _, _ = select.select(list(running), [], [], max(left, 0))
            ended = [pipe for pipe in ready if not self._hear(running[pipe])]
            now = self.monotonic()
            late = [] if ready else [pipe for pipe, child in running.items() if child.ends_at <= now]
            for pipe in (*ended, *late):
                child = running.pop(pipe)
                if pipe in late:
                    os.kill(child.pid, signal.SIGKILL)
                os.close(pipe)
                _, status = os.waitpid(child.pid, 0)
                self.results.append(_result(child, status, late=pipe in late))
            if ended or late:
                return

    def _hear(self, child: _Child) -> bool:
        """Take what a child says: each test that it begins has its own time. False at the end."""
        said = os.read(child.pipe, 4096)
        child.heard += said
        if child.last >= 0:
            child.ends_at = self.monotonic() + _WAIT_S + _TIMES * child.tests[child.last].cost
        return bool(said) and not said.endswith((_ENDED, _NONE_FAILED))


def _result(child: _Child, status: int, *, late: bool) -> Result:
    """What came of a child: the last test that it began, unless it said that none is left."""
    last = child.tests[max(child.last, 0)].item.nodeid
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return Result(child.mutant, Verdict.TIMEOUT, len(child.tests), last)
    if child.heard.endswith(_NONE_FAILED):
        return Result(child.mutant, Verdict.SURVIVED, len(child.tests))
    return Result(child.mutant, Verdict.KILLED, len(child.tests), last)  # or it died: no test overlooks that


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


def _be_the_child(mutant: Mutant, tests: Sequence[_Witness], pipe: int) -> None:
    """Switch the mutant on, run the tests until one fails, say whether one did; never returns."""
    end = _ENDED
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        SWITCH.active = mutant.number
        if not _fails(mutant, tests, pipe):
            end = _NONE_FAILED
    finally:
        os.write(pipe, end)
        os._exit(0)


def _fails(mutant: Mutant, tests: Sequence[_Witness], pipe: int) -> bool:
    """Run the tests until one fails; each is told of before, and may take its own time."""
    state = tests[0].item.session._setupstate
    for at, each in enumerate(tests):
        os.write(pipe, b"%d\n" % at)
        patience = _LEAST_PATIENCE_S + math.ceil(time.process_time() + _TIMES * each.cost)
        resource.setrlimit(resource.RLIMIT_CPU, (patience, resource.RLIM_INFINITY))
        # what a session fixture did is done: make those again where the mutant may have mattered to them
        state.teardown_exact(None if mutant.number in each.in_setup else each.item)
        reports = runtestprotocol(each.item, log=False, nextitem=_unlike(each.item, each.item))
        if any(report.failed for report in reports):
            return True
    return False
