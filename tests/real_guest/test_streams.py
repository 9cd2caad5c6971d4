"""Debian's kernel as an SNP guest with ports and a network: bytes come through as they are."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

import pytest
from tests.real_guest.builds import build_static
from tests.real_guest.conftest import Answers
from tests.real_guest.lanes import run_lanes
from tests.real_guest.place import ROOT, here_or_nested
from tests.real_guest.streams_host import LINE, PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Skip

_NAME: Final = "streams"
_SOURCE: Final = ROOT / "tests" / "real_guest" / "streams.c"
_KERNEL: Final = "debian-13"


@pytest.fixture(scope="module")
def streams(
    cannot_run: Skip, tmp_path_factory: pytest.TempPathFactory, seconds_left: Callable[[], float]
) -> Answers:
    """Boots a guest and speaks with it."""
    if not os.environ.get("REAL_GUEST"):
        cannot_run("real guests take minutes", "make real-guest", avoidable=False)
    job = tmp_path_factory.mktemp("streams")
    build_static(_SOURCE, job / "streams", cannot_run)
    command = [sys.executable, "-m", "tests.real_guest.streams_host", "$JOB", _KERNEL]
    return Answers(job, run_lanes(here_or_nested(), job, [{_NAME: command}], timeout_s=seconds_left()))


def test_guest_comes_to_its_end(streams: Answers) -> None:
    """Nothing failed in the guest."""
    ended = streams.of(_NAME)
    assert ended.status == 0, ended


def test_output_of_a_port(streams: Answers) -> None:
    """VIRTIO 1.2, 5.3: 300,000 bytes, in order."""
    wanted = bytes(number % 251 for number in range(300_000))
    assert (streams.folder / "many").read_bytes() == wanted


def test_port_both_ways(streams: Answers) -> None:
    """A line to the guest, and the guest's answer."""
    assert (streams.folder / "capitals").read_bytes() == LINE.upper()


def test_network(streams: Answers) -> None:
    """VIRTIO 1.2, 5.1, and passt(1): a page of this host's, by HTTP over 10.0.2.2."""
    head, _, body = streams.of(_NAME).out.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert body == PAGE
