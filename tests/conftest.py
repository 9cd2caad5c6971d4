"""Fixtures that every test may use, and the rule that CI does not skip what it could run."""

from __future__ import annotations

import os
import signal
import sys
from functools import lru_cache
from pathlib import Path
from typing import NoReturn, Protocol

import pytest

from swsnp.machine import Machine

ROOT = Path(__file__).resolve().parent.parent
REMEMBERS = type(lru_cache(int))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's job in the background ignores Ctrl-C, and so would every program that a test starts and ends
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _skip(reason: str, remedy: str, *, avoidable: bool = True) -> NoReturn:
    """End the test: it cannot run on this host. In CI a skip that CI could have avoided is a failure."""
    text = f"{reason}; remedy: {remedy}"
    if avoidable and os.environ.get("CI") == "true":
        pytest.fail(f"skipped in CI: {text}")
    pytest.skip(text)


class Skip(Protocol):
    """`cannot_run(reason, remedy)`; `avoidable=False` when even CI cannot provide it."""

    def __call__(self, reason: str, remedy: str, *, avoidable: bool = True) -> NoReturn: ...


@pytest.fixture(scope="session")
def cannot_run() -> Skip:
    """Ends a test that this host cannot run, with the reason and the remedy."""
    return _skip


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Readers and judges keep what they found last; a test is about finding it, and so is its mutant."""
    for name, module in tuple(sys.modules.items()):
        if name.startswith(("swsnp.certs.", "swsnp.verify.")):
            for each in vars(module).values():
                if isinstance(each, REMEMBERS):
                    each.cache_clear()


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Genuine AMD reports and certificates; not part of the project."""
    folder = Path(os.environ.get("SWSNP_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not (folder / "index.json").is_file():
        _skip("no genuine vectors here", "set SWSNP_VECTORS to a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def seeded_machine() -> Machine:
    """The machine of seed "e2e"; its RSA keys are made once for all tests."""
    return Machine(seed=b"e2e")
