"""Where Linux can run as a guest: on this host, else in an outer machine on it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from tests.real_guest.outer_machine import OuterMachine

from swsnp.cpu.plain_kvm import probe_for_linux
from swsnp.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.cpu.plain_kvm import Verdict

__all__ = ["BUILD", "Here", "Nested", "Place", "here_or_nested"]

ROOT: Final = Path(__file__).resolve().parents[2]
BUILD: Final = ROOT / "build" / "real-guest"


class Place(Protocol):
    """Runs shell scripts that may use a capable `/dev/kvm`."""

    def run(self, job: Path, script: str, *, timeout_s: float) -> int:
        """Run a script, which finds the folder `job` as `$JOB`; returns its exit status.

        Raises:
            HostError: it did not come to an end.
        """
        ...


class Here:
    """This host."""

    def run(self, job: Path, script: str, *, timeout_s: float) -> int:
        """Run a script as this user. See `Place`."""
        command, environment = ["/bin/sh", "-c", script], {**os.environ, "JOB": str(job)}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        ) as shell:
            try:
                return shell.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise HostError(f"stopped after {timeout_s:.0f} s") from None
            finally:
                # what the script has started, too
                with suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)


class Nested:
    """The outer machine, made of what `make real-guest` has fetched."""

    def __init__(self, folder: Path) -> None:
        fetched = folder / "qemu" / "usr" / "bin" / "qemu-system-x86_64"
        self._machine = OuterMachine(
            kernel=folder / "debian-12",
            busybox=folder / "busybox" / "bin" / "busybox",
            qemu=fetched if fetched.exists() else None,
        )

    def run(self, job: Path, script: str, *, timeout_s: float) -> int:
        """Run a script as root, in this folder and with this environment's paths. See `Place`."""
        paths = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in paths.items())
        before = f"export JOB=/run/job\n{exports}cd {shlex.quote(str(ROOT))}\n"
        return self._machine.run(job, f"{before}{script}\n", timeout_s=timeout_s)


def here_or_nested(probe: Callable[[], Verdict] = probe_for_linux) -> Place:
    """This host where its KVM can run Linux, else an outer machine; REAL_GUEST=here or nested decides.

    Raises:
        HostError: REAL_GUEST is none of here, nested and yes.
    """
    wanted = os.environ.get("REAL_GUEST", "yes")
    if wanted not in ("yes", "here", "nested"):
        raise HostError(f"REAL_GUEST: got {wanted!r}, wanted yes, here or nested")
    if wanted == "yes":
        wanted = "here" if probe().usable else "nested"
    return Here() if wanted == "here" else Nested(BUILD)
