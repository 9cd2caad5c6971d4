"""A kernel under QEMU's emulation: for what needs no SNP."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from swsnp.vmm.guest_init import EXIT_PORT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.conftest import Skip

    from swsnp.vmm.initramfs import GuestProgram

__all__ = ["BUILD", "command_of", "emulator", "package_of", "qemu_status", "run"]

BUILD = Path(__file__).resolve().parents[3] / "build" / "real-guest"
"""Where tools/real-guest-files has left kernels, a busybox, and a QEMU if the installed one is old."""
_QEMU = "qemu-system-x86_64"
_TIMEOUT_S = 300


def emulator() -> str | None:
    """The QEMU: the fetched one, or the installed one."""
    return shutil.which(BUILD / "qemu" / "usr" / "bin" / _QEMU) or shutil.which(_QEMU)


def package_of(name: str, cannot_run: Skip) -> Path:
    """An unpacked kernel package; ends the test where it is missing, or there is no QEMU to run it."""
    if emulator() is None:
        cannot_run(f"no {_QEMU}", "apt-get install qemu-system-x86")
    if not list((BUILD / name).glob("boot/vmlinuz-*")):
        cannot_run(f"no {name} under build/real-guest", "tools/real-guest-files build/real-guest")
    return BUILD / name


def command_of(package: Path, tmp_path: Path, made: GuestProgram, line: str) -> list[str]:
    """QEMU with a package's kernel and what was made for it."""
    (tmp_path / "initramfs").write_bytes(made.initramfs)
    (image,) = (package / "boot").glob("vmlinuz-*")
    command = [emulator() or _QEMU, "-accel", "tcg", "-m", "512", "-display", "none", "-no-reboot"]
    command += ["-kernel", str(image), "-initrd", str(tmp_path / "initramfs")]
    command += ["-append", f"{made.cmdline} oops=panic panic=-1 {line}"]
    command += ["-serial", "stdio", "-serial", f"file:{tmp_path / 'output'}"]
    return [*command, "-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"]


def run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Exit status and console.

    QEMU 7.2's emulation makes kernels die at random: what ends in a panic is tried again, twice.
    """
    for _ in range(3):
        done = subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
        if b"Kernel panic" not in done.stdout:
            break
    return done


def qemu_status(status: int) -> int:
    """QEMU's isa-debug-exit makes 2n + 1 of it, of which the operating system keeps eight bits."""
    return (2 * status + 1) & 0xFF
