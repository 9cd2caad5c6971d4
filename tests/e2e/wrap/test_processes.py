"""Many threads and processes on one device, and signals; see processes.c."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.wrap.conftest import Build, Wrapped


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("mode", "reports"),
    [
        (("threads",), 16 * 40),
        (("children",), 8 * 10 + 1),
        (("duplicates",), 6),
        (("chain", "5"), 12),
        (("signals",), 300),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_answer_is_the_right_one(
    wrapped: Wrapped, build: Build, mode: tuple[str, ...], reports: int, static: bool
) -> None:
    """16 threads; forked children; dup, dup2, F_DUPFD, SCM_RIGHTS; execs; a timer's signals."""
    ended = wrapped(build("processes", static=static), *mode)
    assert ended.out == "done\n"
    assert (ended.status, ended.err) == (0, "")
    assert len(ended.requests) == reports


def test_answers_that_signals_take_away_are_played_back(wrapped: Wrapped, build: Build) -> None:
    """Without WAIT_KILLABLE_RECV (before 5.19): the program is called away from each of its 300 requests."""
    ended = wrapped(build("processes"), "called away", options=("--not-killable", "--lose"))
    assert (ended.status, ended.out, ended.err) == (0, "done\n", "")
    assert len(ended.requests) == len(set(ended.requests)) == 300


def test_signals_on_kernels_that_lose_answers(wrapped: Wrapped, build: Build) -> None:
    """Before 5.19 with signals at any moment: each request is answered, with its own answer.

    One window stays: a signal that is taken while the answer is being sent. The kernel then says that it was
    sent, and still makes the program repeat the call; that looks like a new request, and is answered as one.
    """
    ended = wrapped(build("processes"), "signals", options=("--not-killable",))
    assert (ended.status, ended.out, ended.err) == (0, "done\n", "")
    assert len(set(ended.requests)) == 300


def test_more_descriptors_than_the_range_has(wrapped: Wrapped, build: Build) -> None:
    """The 65th gets an ordinary number, over which the SNP requests still work."""
    ended = wrapped(build("processes"), "many")
    assert ended.out == "1\ndone\n"
    assert len(ended.requests) == 1


def test_a_slow_device_does_not_hold_up_other_calls(wrapped: Wrapped, build: Build, tmp_path: Path) -> None:
    """100 calls with paths are answered while another thread waits for the device."""
    ended = wrapped(build("processes"), "aside", str(tmp_path), options=("--gate", str(tmp_path)))
    assert ended.out == "answered first: 0\ndone\n"


def test_program_killed_while_the_device_works(wrapped: Wrapped, build: Build, tmp_path: Path) -> None:
    """The answer finds nobody; the supervisor ends with the program."""
    ended = wrapped(build("processes"), "killed", str(tmp_path), options=("--gate", str(tmp_path)))
    assert (ended.status, ended.err) == (128 + 9, "")


def test_daemon_is_served_after_the_program_has_ended(wrapped: Wrapped, build: Build, tmp_path: Path) -> None:
    """A double fork: the supervisor adopts it, stays, and still reports the program's own status."""
    result = tmp_path / "result"
    ended = wrapped(build("processes"), "daemon", str(result))
    assert ended.status == 3
    assert result.read_text() == "0\n"
    assert len(ended.requests) == 1


def test_signal_dispositions_are_the_defaults(wrapped: Wrapped, build: Build) -> None:
    """Nothing that Python or the supervisor ignores or blocks is inherited."""
    assert wrapped(build("processes"), "dispositions").out == "1 0\n" * 6


def test_ignored_signals_stay_ignored(wrapped: Wrapped, build: Build) -> None:
    """nohup(1) works around the supervisor: SIGHUP is the fourth."""
    ended = wrapped(build("processes"), "dispositions", before=("sh", "-c", 'trap "" HUP; exec "$@"', "sh"))
    assert ended.out.splitlines() == ["1 0", "1 0", "1 0", "0 0", "1 0", "1 0"]
