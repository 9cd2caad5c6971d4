"""Programs that nobody wrote for this, and how a wrapped program is started and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.e2e.wrap.conftest import HARNESS
from tests.e2e.wrap.harness import report_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Skip
    from tests.e2e.wrap.conftest import Build, Wrapped

PYTHON_CLIENT = """
import ctypes, errno, fcntl, os, struct, sys
with open("/dev/sev-guest", sys.argv[1], buffering=int(sys.argv[2])) as device:
    request = ctypes.create_string_buffer(bytes(range(64)), 96)
    response = ctypes.create_string_buffer(4000)
    argument = bytearray(struct.pack("<B7xQQQ", 1, ctypes.addressof(request), ctypes.addressof(response), 0))
    print(fcntl.ioctl(device, 0xC0205300, argument), os.isatty(device.fileno()))
    sys.stdout.flush()
    sys.stdout.buffer.write(response.raw)
"""


def need(program: str, cannot_run: Skip) -> None:
    if not any(Path(folder, program).exists() for folder in os.environ["PATH"].split(":")):
        cannot_run(f"no {program}", f"install {program}")


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that has to come; what does not within a minute never will."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("waited for a minute")


@pytest.mark.parametrize(("mode", "buffering"), [("rb", "-1"), ("rb", "0"), ("r+b", "0"), ("wb", "0")])
def test_python_client(wrapped: Wrapped, mode: str, buffering: str) -> None:
    """open(), which asks for TCGETS and seeks, then fcntl.ioctl with a bytearray."""
    ended = wrapped(sys.executable, "-c", PYTHON_CLIENT, mode, buffering)
    assert ended.err == ""
    assert ended.out.encode("utf-8", "surrogateescape").startswith(b"0 False\n")
    assert ended.requests == [bytes(range(64)).hex()]


def test_python_client_gets_the_report(tmp_path: Path, wrapped: Wrapped) -> None:
    """Every byte of the response buffer."""
    ended = wrapped("sh", "-c", f"'{sys.executable}' -c '{PYTHON_CLIENT}' rb -1 > {tmp_path}/out")
    assert ended.status == 0
    assert (tmp_path / "out").read_bytes() == b"0 False\n" + report_for(bytes(range(64)))


def test_python_cannot_buffer_reading_and_writing(wrapped: Wrapped) -> None:
    """The device cannot seek, so io refuses "r+b" with a buffer, as on a real guest."""
    ended = wrapped(sys.executable, "-c", 'open("/dev/sev-guest", "r+b")')
    assert "File or stream is not seekable" in ended.err


@pytest.mark.parametrize(
    ("script", "out"),
    [
        ("test -c /dev/sev-guest && echo character", "character\n"),
        ("[ -r /dev/sev-guest ] && [ -w /dev/sev-guest ] && [ ! -x /dev/sev-guest ] && echo ours", "ours\n"),
        (
            "[ -e /dev/sev-guest ] && [ ! -d /dev/sev-guest ] && [ ! -L /dev/sev-guest ] && echo there",
            "there\n",
        ),
        ("ls -l /dev/sev-guest | cut -c1-10", "crw-------\n"),
        ("ls /dev/sev-guest", "/dev/sev-guest\n"),
        ("cd /dev && ls sev-guest", "sev-guest\n"),
        ("stat -c '%F %a %t:%T' /dev/sev-guest", "character special file 600 a:104\n"),
        ("readlink -f /dev/../dev/sev-guest", "/dev/sev-guest\n"),
        ("exec 3<> /dev/sev-guest && test -c /dev/fd/3 && echo open", "open\n"),
        ("cat /dev/sev-guest", "cat: /dev/sev-guest: Invalid argument\n"),
        ("ls /dev/sev-gues /dev/sev-guest2 2>&1 | wc -l", "2\n"),
        ("(exec 2>/dev/null; ! mkdir /dev/sev-guest) && echo refused", "refused\n"),
    ],
)
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_shell(wrapped: Wrapped, cannot_run: Skip, shell: str, script: str, out: str) -> None:
    """What scripts do to find the device."""
    need(shell, cannot_run)
    ended = wrapped("env", "LC_ALL=C", shell, "-c", f"{script} 2>&1")
    assert ended.out == out


def test_exit_status(wrapped: Wrapped) -> None:
    """The program's own; 128 + N when signal N ended it, as a shell says it."""
    assert wrapped("sh", "-c", "exit 41").status == 41
    assert wrapped("sh", "-c", "kill -9 $$").status == 128 + 9
    assert wrapped("sh", "-c", "kill -TERM $$").status == 128 + 15
    assert wrapped("true").status == 0


def test_program_that_cannot_be_executed(wrapped: Wrapped, tmp_path: Path) -> None:
    """127 when it was not found, 126 when it cannot be executed, with the reason; as under a shell."""
    ended = wrapped("no-such-program")
    assert (ended.status, ended.err) == (127, "swsnp: no-such-program: not found\n")
    plain = tmp_path / "plain"
    plain.write_text("text")
    ended = wrapped(str(plain))
    assert (ended.status, ended.err) == (126, f"swsnp: {plain}: Permission denied\n")
    plain.chmod(0o755)
    ended = wrapped(str(plain))
    assert (ended.status, ended.err) == (126, f"swsnp: {plain}: Exec format error\n")


def test_nesting_is_explained(wrapped: Wrapped) -> None:
    """seccomp(2): one listener per chain of filters (EBUSY)."""
    ended = wrapped(*HARNESS, "--", "true")
    assert ended.status == 4
    assert "under a seccomp filter with a listener already" in ended.err
    assert "remedy: start it outside" in ended.err


def test_low_limit_of_descriptors(wrapped: Wrapped, build: Build) -> None:
    """The range lies below the limit; when the program lowers it, reports are still given."""
    limited = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    ended = wrapped(build("probe"), "descriptors", before=limited)
    assert "lseek ESPIPE\n" in ended.out
    ended = wrapped("sh", "-c", f"ulimit -n 100; exec {build('processes')} duplicates")
    assert ended.requests


def test_environment_and_arguments(wrapped: Wrapped) -> None:
    """Passed on as they are."""
    ended = wrapped("sh", "-c", 'echo "$WORD|$1|$2"', "sh", "a b", "", before=("env", "WORD=x y"))
    assert ended.out == "x y|a b|\n"


def test_no_descriptors_of_ours_are_left_in_the_program(wrapped: Wrapped) -> None:
    """Neither the listener nor the socket it was sent over."""
    listing = 'import os; print([os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")])'
    inside = wrapped(sys.executable, "-c", f"try:\n {listing}\nexcept OSError: print('gone')")
    assert "seccomp" not in inside.out
    assert "socket" not in inside.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(build: Build, number: signal.Signals) -> None:
    """SIGTERM and SIGHUP reach the program through the supervisor, which outlives SIGINT and SIGQUIT."""
    command = [*HARNESS, "--", build("processes"), "waits"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGQUIT)
        process.send_signal(number)
        assert process.stdout.readline() == f"got {number.value:02}\n"
        assert process.wait(timeout=60) == 33


def test_stopped_after_the_program_has_ended(tmp_path: Path) -> None:
    """What a program leaves behind is served until SIGTERM ends the supervisor."""
    script = f"sleep 60 & echo $! > {tmp_path}/pid; mkfifo {tmp_path}/never; exit 5"
    command = [*HARNESS, "--", "sh", "-c", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            until((tmp_path / "never").exists)  # the script's last act
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            sleeper = (tmp_path / "pid").read_text().strip()
            # the script has ended and the sleeper was adopted
            until(lambda: not children.exists() or children.read_text().split() == [sleeper])
            # its execve needs the supervisor too
            until(lambda: Path(f"/proc/{sleeper}/comm").read_text() == "sleep\n")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 5
            assert process.stderr is not None
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
            process.kill()
        assert "stopped by a signal" in process.stderr.read()
