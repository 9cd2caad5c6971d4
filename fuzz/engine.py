"""Mutation of inputs in plain Python, and what a harness found.

An input whose outcome was never seen before joins the corpus, so that the search goes deeper than its seeds.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import random
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import fuzz

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Finding", "Harness", "Run", "harnesses", "mutate", "run"]

MAX_SIZE: Final = 1 << 16
_CORPUS_MAX: Final = 512
_NUMBERS: Final = (0, 1, 2, 0x10, 0x20, 0x7F, 0x80, 0xFF, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0xFFFF)
_EDGES: Final = (*_NUMBERS, *((1 << bits) - 1 for bits in (31, 32, 52, 63, 64)), 1 << 32, 1 << 63)


@dataclass(frozen=True)
class Harness:
    """One module: its name, its invariant and its two functions."""

    name: str
    invariant: str
    seeds: Callable[[], list[bytes]]
    one: Callable[[bytes], object]


@dataclass(frozen=True)
class Finding:
    """An input that breaks the invariant."""

    data: bytes
    error: str
    trace: str

    @property
    def name(self) -> str:
        """A name for the file with the input."""
        return hashlib.sha256(self.data).hexdigest()[:16]


@dataclass
class Run:
    """What running a harness came to."""

    harness: Harness
    executions: int = 0
    seconds: float = 0.0
    corpus: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)


def harnesses() -> list[Harness]:
    """Every harness of this package."""
    found = []
    for info in pkgutil.iter_modules(fuzz.__path__):
        if info.name.startswith("fuzz_"):
            module = importlib.import_module(f"fuzz.{info.name}")
            invariant = (module.__doc__ or "").splitlines()[0]
            found.append(Harness(info.name.removeprefix("fuzz_"), invariant, module.seeds, module.one))
    return found


def _flip(data: bytearray, chance: random.Random, _: list[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _replace(data: bytearray, chance: random.Random, _: list[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.randrange(256)


def _edge(data: bytearray, chance: random.Random, _: list[bytes]) -> None:
    size = chance.choice((1, 2, 4, 8))
    if len(data) >= size:
        at = chance.randrange(0, len(data) - size + 1)
        at -= at % chance.choice((1, size))
        value = chance.choice(_EDGES) & ((1 << 8 * size) - 1)
        data[at : at + size] = value.to_bytes(size, chance.choice(("little", "little", "big")))


def _delete(data: bytearray, chance: random.Random, _: list[bytes]) -> None:
    if data:
        at = chance.randrange(len(data))
        del data[at : at + chance.choice((1, 2, 4, 16, 64, len(data)))]


def _insert(data: bytearray, chance: random.Random, _: list[bytes]) -> None:
    at = chance.randrange(len(data) + 1)
    data[at:at] = chance.randbytes(chance.choice((1, 2, 4, 16)))


def _repeat(data: bytearray, chance: random.Random, _: list[bytes]) -> None:
    if data:
        at = chance.randrange(len(data))
        part = bytes(data[at : at + chance.choice((1, 4, 24, 48, 256))])
        data[at:at] = part * chance.choice((1, 1, 2, 16))


def _splice(data: bytearray, chance: random.Random, corpus: list[bytes]) -> None:
    other = chance.choice(corpus)
    at = chance.randrange(len(data) + 1)
    data[at:] = other[chance.randrange(len(other) + 1) :]


_MUTATIONS: Final = (_flip, _flip, _replace, _edge, _edge, _delete, _insert, _repeat, _splice)


def mutate(data: bytes, chance: random.Random, corpus: list[bytes]) -> bytes:
    """A neighbour of `data`: one to eight small changes."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        chance.choice(_MUTATIONS)(changed, chance, corpus)
    return bytes(changed[:MAX_SIZE])


def run(
    harness: Harness, *, seconds: float | None = None, executions: int | None = None, seed: int = 0
) -> Run:
    """Run a harness: its seeds first, then mutations, until time or number is used up.

    Args:
        harness: which.
        seconds: how long.
        executions: how often; the seeds are run in any case.
        seed: of the random numbers; the same seed and number of executions is the same run.
    """
    chance, done = random.Random(seed), Run(harness)
    corpus = harness.seeds()
    outcomes: set[object] = set()
    start = time.perf_counter()
    for each in corpus:
        _execute(done, each, outcomes)
    while True:
        done.seconds = time.perf_counter() - start
        if done.executions >= (executions or 1 << 62) or done.seconds >= (seconds or 1e9):
            done.corpus = len(corpus)
            return done
        data = mutate(chance.choice(corpus), chance, corpus)
        if _execute(done, data, outcomes) and len(corpus) < _CORPUS_MAX:
            corpus.append(data)


def _execute(done: Run, data: bytes, outcomes: set[object]) -> bool:
    """One execution; whether its outcome is new."""
    done.executions += 1
    try:
        outcome = done.harness.one(data)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {frame.filename}:{frame.lineno}"
        done.findings.setdefault(where, Finding(data, f"{where}: {error}", traceback.format_exc()))
        return False
    if outcome in outcomes:
        return False
    outcomes.add(outcome)
    return True
