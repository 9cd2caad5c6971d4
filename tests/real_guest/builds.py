"""Builds the client, which is static: in a guest there is nothing beside it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.conftest import Skip

__all__ = ["build_client", "build_static"]

_SOURCE: Final = Path(__file__).with_name("client.c")


def build_client(folder: Path, cannot_run: Skip) -> Path:
    """The client; see `build_static`."""
    return build_static(_SOURCE, folder / "client", cannot_run)


def build_static(source: Path, program: Path, cannot_run: Skip) -> Path:
    """Compile a program against the system's <linux/sev-guest.h>; ends the test where that cannot be done."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        cannot_run("no C compiler", "install gcc")
    command = [compiler, "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "linux/sev-guest.h: No such file" in done.stderr or "cannot find -lc" in done.stderr:
        cannot_run("the C library's or the kernel's headers are missing", "install libc6-dev, linux-libc-dev")
    assert done.returncode == 0, done.stderr
    return program
