"""Wrapped programs: C clients built from this folder, and `harness.py` around them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pytest

from swsnp.front.wrap.doctor import examine

if TYPE_CHECKING:
    from tests.conftest import Skip

HERE = Path(__file__).parent
HARNESS = (sys.executable, str(HERE / "harness.py"))


class Ended(NamedTuple):
    """A wrapped program that has ended. `calls` are the device's: command, msg_version, result."""

    status: int
    out: str
    err: str
    calls: list[tuple[int, int, int]]
    requests: list[str]


class Wrapped(Protocol):
    """`wrapped("program", "argument", options=["--slow", "0.1"], before=["env", "A=b"])`."""

    def __call__(self, *argv: str, options: tuple[str, ...] = (), before: tuple[str, ...] = ()) -> Ended: ...


@pytest.fixture(scope="session", autouse=True)
def _usable(cannot_run: Skip) -> None:
    verdict = examine()
    if not verdict.usable:
        cannot_run(verdict.reason, verdict.remedy, avoidable=False)


def _default_signals() -> None:
    """Whoever runs the tests may ignore some: a shell's background job does, and nohup(1)."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def wrapped(tmp_path: Path) -> Wrapped:
    """Runs a program to its end; what hangs fails after a minute, which no load makes of it."""

    def run(*argv: str, options: tuple[str, ...] = (), before: tuple[str, ...] = ()) -> Ended:
        log = tmp_path / "calls.json"
        log.unlink(missing_ok=True)
        command = [*before, *HARNESS, "--log", str(log), *options, "--", *argv]
        done = subprocess.run(
            command, capture_output=True, timeout=60, check=False, preexec_fn=_default_signals
        )
        out, err = (each.decode(errors="surrogateescape") for each in (done.stdout, done.stderr))
        known = json.loads(log.read_text()) if log.exists() else {"calls": [], "requests": []}
        calls = [(command, version, result) for command, version, result in known["calls"]]
        return Ended(done.returncode, out, err, calls, known["requests"])

    return run


class Build(Protocol):
    """`build("probe", static=True)` returns the path of the program."""

    def __call__(self, name: str, *, static: bool = False) -> str: ...


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory, cannot_run: Skip) -> Build:
    """Compiles a client of this folder against the system's <linux/sev-guest.h>, once."""
    folder = tmp_path_factory.mktemp("clients")

    def compiled(name: str, *, static: bool = False) -> str:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            cannot_run("no C compiler", "install gcc")
        program = folder / f"{name}{'-static' if static else ''}"
        if not program.exists():
            command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
            command += ["-static"] if static else []
            command += ["-o", str(program), str(HERE / f"{name}.c")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "linux/sev-guest.h: No such file" in done.stderr or "cannot find -lc" in done.stderr:
                cannot_run(
                    "the C library's or the kernel's headers are missing",
                    "install libc6-dev and linux-libc-dev",
                )
            assert done.returncode == 0, done.stderr
        return str(program)

    return compiled
