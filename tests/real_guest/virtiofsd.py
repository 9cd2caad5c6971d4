"""Debian's virtiofsd, unmodified, over one folder of the host's.

Source: the manual page virtiofsd(1) of QEMU 7.2.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Virtiofsd", "virtiofsd_program"]

_INSTALLED: Final = Path("/usr/lib/qemu/virtiofsd")
_END_S: Final = 5


def virtiofsd_program(build: Path) -> Path | None:
    """What was fetched under `build`, else what is installed; None: neither."""
    for each in (build / "virtiofsd" / _INSTALLED.relative_to("/"), _INSTALLED):
        if each.exists():
            return each
    return None


class Virtiofsd:
    """Running; a context manager that waits until it has ended, which it does with its only connection.

    Args:
        program: the daemon.
        path: where it shall listen; it does when this object is made.
        folder: what it shares.
        log: what it says.
    """

    def __init__(self, program: Path, path: Path, folder: Path, log: IO[bytes]) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            fd = listener.fileno()
            command = [*_as_root(), str(program), f"--fd={fd}", "-f", "-o", f"source={folder},cache=none"]
            self._process = subprocess.Popen(
                command, pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def status(self) -> int | None:
        """What it has ended with; None: it runs."""
        return self._process.poll()


def _as_root() -> Sequence[str]:
    """It isolates itself, and may do so in a user namespace of its own; root needs none."""
    return () if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user")
