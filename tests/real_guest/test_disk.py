"""Debian's kernels as SNP guests with devices: they go on in a disk's root, and what they write stays.

The disk is an ext4 image that holds one program. Both kernels boot from it, one after the other.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from tests.real_guest.disks import LINE, SMALL_ROOT, name_of, options_of, tool
from tests.real_guest.guests import KERNELS
from tests.real_guest.outside import judge, measure

from swsnp.abi.snp_report import AttestationReport

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip
    from tests.real_guest.conftest import Answers

    from swsnp.machine import Machine


def file_of(disks: Answers, name: str, cannot_run: Skip) -> bytes:
    """A file in the image."""
    taken = disks.folder / f"taken{name.replace('/', '.')}"
    command = [tool("debugfs", cannot_run), "-R", f"dump {name} {taken}", str(disks.folder / SMALL_ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return taken.read_bytes()


@pytest.mark.parametrize("kernel", KERNELS)
def test_guest_powers_off(disks: Answers, kernel: str) -> None:
    """The program on the disk is the first one; S5 ends the machine with status 0."""
    ended = disks.of(name_of(kernel))
    assert b"disk: root mounted" in ended.out, ended
    assert b"disk: done" in ended.out, ended
    assert ended.status == 0, ended
    stats = json.loads((disks.folder / f"{name_of(kernel)}.json").read_text())
    assert (stats["stop"], stats["status"]) == ("PoweredOff", None)


def test_what_is_written_stays(disks: Answers, cannot_run: Skip) -> None:
    """Each boot has added its line behind those before."""
    assert file_of(disks, "/boots", cannot_run).decode().splitlines() == [f"from={each}" for each in KERNELS]


def test_chance(disks: Answers, cannot_run: Skip) -> None:
    """The entropy device gives each guest other bytes."""
    data = file_of(disks, "/chance", cannot_run)
    assert len(data) == 32 * len(KERNELS)
    assert len({data[at : at + 32] for at in range(0, len(data), 32)}) == len(KERNELS)


def test_file_system_is_sound(disks: Answers, cannot_run: Skip) -> None:
    """e2fsck finds nothing to mend."""
    command = [tool("e2fsck", cannot_run), "-f", "-n", str(disks.folder / SMALL_ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_report_on_the_disk(disks: Answers, real_machine: Machine, cannot_run: Skip, tmp_path: Path) -> None:
    """The last guest's report is genuine, and its measurement is that of these options, disk included."""
    raw = file_of(disks, "/report", cannot_run)
    verdict = judge(real_machine, raw, b"D" * 64)
    assert verdict.passed, verdict.failures
    kernel = KERNELS[-1]
    stats = json.loads((disks.folder / f"{name_of(kernel)}.json").read_text())
    command_line = f"{LINE} from={kernel}"
    cbitpos = stats["cbitpos"]
    measured = measure(kernel, options_of(kernel), command_line, cbitpos=cbitpos, folder=tmp_path)
    assert measured == stats["measurement"] == AttestationReport.parse(raw).measurement.hex()
