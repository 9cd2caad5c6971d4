"""What this side says of a guest that booted from a disk: is its report genuine, what is its measurement."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.real_guest.guests import Guest
from tests.real_guest.place import BUILD

from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.cli.vm_program import program_of
from swsnp.measure.kernel_image import read_kernel
from swsnp.verify import Roots, verify

if TYPE_CHECKING:
    from pathlib import Path

    from swsnp.machine import Machine
    from swsnp.verify import Verification

__all__ = ["judge", "measure"]


def judge(machine: Machine, raw: bytes, report_data: bytes) -> Verification:
    """By the machine's root and its own certificates."""
    return verify(
        raw,
        table=machine.certificate_table(),
        roots=Roots.of(machine.root_certificate),
        at=machine.now(),
        report_data=report_data,
    )


def measure(kernel: str, options: list[str], command_line: str, *, cbitpos: int, folder: Path) -> str:
    """What `swsnp measure kernel` says of a guest that goes on in its root file system; hexadecimal.

    Args:
        kernel: one of `guests.KERNELS`.
        options: those that `swsnp vm` was given too.
        command_line: what `-append` said there.
        cbitpos: the host's, as the guest's statistics tell.
        folder: for the initial RAM disk.
    """
    given = argparse.Namespace(exec=None, exec_dir=None, modules=BUILD / kernel, module=None)
    parsed = parse_qemu_options([*options, "-append", command_line])
    program = program_of(given, parsed, read_kernel(Guest(kernel, "").image))
    assert program is not None
    (folder / "initrd").write_bytes(program.initramfs)
    line = [sys.executable, "-m", "swsnp", "measure", "kernel", "--cbitpos", str(cbitpos)]
    line += [*options, "-initrd", str(folder / "initrd"), "-append", f"{program.cmdline} {command_line}"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
