"""All that needs a KVM able to run Linux runs once, before the first test; in an outer machine if need be."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
from tests.real_guest.builds import build_client
from tests.real_guest.disks import small_root, whole_debians
from tests.real_guest.guests import FOUR, GUESTS, KERNELS, SEED, Guest, four_processors
from tests.real_guest.lanes import run_lanes
from tests.real_guest.place import Nested, here_or_nested
from tests.real_guest.said import Said
from tests.real_guest.streams import streams

from swsnp.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tests.conftest import Skip
    from tests.real_guest.lanes import Ended, Lane

_LONGEST_S: Final = 870
"""All guests together: less than the 15 minutes of the whole job, so that its tests can say what came out."""
_TINY_GUESTS: Final = "-m pytest -q --color=no -p no:cacheprovider tests/e2e/plain_kvm"


@dataclass(frozen=True)
class Answers:
    """What every command came to, with the folder that holds the files that it wrote."""

    folder: Path
    ended: Mapping[str, Ended]

    def of(self, name: str) -> Ended:
        """What became of a command; fails where it was not reached."""
        assert name in self.ended, f"{name} did not come to its end; see what was printed above"
        return self.ended[name]


@pytest.fixture(scope="session")
def real_machine() -> Machine:
    """The machine that guests run on, made again on this side."""
    return Machine(seed=SEED.encode())


@pytest.fixture(scope="session")
def seconds_left() -> Callable[[], float]:
    """Of the time that all guests together may take."""
    end = time.monotonic() + _LONGEST_S
    return lambda: max(0.0, end - time.monotonic())


@pytest.fixture(scope="session")
def answers(
    cannot_run: Skip,
    tmp_path_factory: pytest.TempPathFactory,
    real_machine: Machine,
    seconds_left: Callable[[], float],
) -> Answers:
    """Runs everything, each kernel in a lane of its own."""
    if not os.environ.get("REAL_GUEST"):
        cannot_run("real guests take minutes", "make real-guest", avoidable=False)
    job = tmp_path_factory.mktemp("job")
    (job / "certs.blob").write_bytes(real_machine.certificate_table())
    root = job / "root"
    root.mkdir()
    build_client(root, cannot_run)
    shutil.copy(job / "certs.blob", root)
    lanes: list[Lane] = [
        {each.name: each.command() for each in GUESTS if each.kernel == kernel} for kernel in KERNELS
    ]
    place = here_or_nested()
    lanes[0][FOUR] = four_processors(twice=isinstance(place, Nested))
    lanes[-1] |= streams(job, cannot_run)
    lanes[-1]["tiny-guests"] = [sys.executable, *_TINY_GUESTS.split()]
    return Answers(job, run_lanes(place, job, lanes, timeout_s=seconds_left()))


@pytest.fixture(scope="session")
def disks(
    cannot_run: Skip, tmp_path_factory: pytest.TempPathFactory, seconds_left: Callable[[], float]
) -> Iterator[Answers]:
    """Boots everything that has a disk: whole Debians, and the small root before the last of them."""
    if not os.environ.get("REAL_GUEST"):
        cannot_run("real guests take minutes", "make real-guest", avoidable=False)
    job = tmp_path_factory.mktemp("disks")
    lanes = whole_debians(job, cannot_run)
    lanes[-1] = small_root(job, cannot_run) | lanes[-1]
    yield Answers(job, run_lanes(here_or_nested(), job, lanes, timeout_s=seconds_left()))
    for image in job.glob("whole.*.img"):  # which are large, and pytest keeps folders of several runs
        image.unlink()


@pytest.fixture(params=GUESTS, ids=lambda guest: guest.name)
def guest(request: pytest.FixtureRequest) -> Guest:
    """Every kernel on every profile."""
    chosen: Guest = request.param
    return chosen


@pytest.fixture
def said(answers: Answers, guest: Guest) -> Said:
    """What the guest's client said."""
    ended = answers.of(guest.name)
    said = Said.of(ended.out)
    assert said.done, f"{guest.name}: {ended.err[-2000:]}{ended.out.decode(errors='replace')[-4000:]}"
    return said
