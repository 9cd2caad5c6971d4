"""Debian's kernels as SNP guests with devices: they go on in a disk's root, and what they write stays.

The disk is an ext4 image that holds one program. Both kernels boot from it, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.real_guest.builds import build_static
from tests.real_guest.conftest import KERNELS, MEMORY, SEED, Answers, Guest
from tests.real_guest.lanes import run_lanes
from tests.real_guest.place import BUILD, here_or_nested

from swsnp.abi.snp_report import AttestationReport
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.cli.vm_program import program_of
from swsnp.measure.kernel_image import read_kernel
from swsnp.verify import Roots, verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Skip
    from tests.real_guest.lanes import Lane

    from swsnp.machine import Machine

_LINE: Final = "console=ttyS0 quiet random.trust_cpu=on tsc=reliable root=/dev/vda rw"
_TOOLS: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
_SOURCE: Final = Path(__file__).with_name("disk_init.c")


def tool(name: str, cannot_run: Skip) -> str:
    found = shutil.which(name, path=_TOOLS)
    if found is None:
        cannot_run(f"no {name}", "apt-get install e2fsprogs")
    return found


def name_of(kernel: str) -> str:
    return f"disk.{kernel}"


def options_of(kernel: str) -> list[str]:
    """Those that `swsnp vm` and `swsnp measure kernel` have in common."""
    image = str(Guest(kernel, "linux-7.2").image)
    devices = ["-device", "virtio-rng-device", "-drive", "file=$JOB/root.img,format=raw,if=virtio"]
    return ["-kernel", image, "-m", MEMORY, *devices]


def command_of(kernel: str) -> list[str]:
    line = [sys.executable, "-m", "swsnp", "vm", "--seed", SEED, "--timeout", "300", "-no-reboot"]
    line += ["--stats", f"$JOB/{name_of(kernel)}.json", "--modules", str(BUILD / kernel)]
    return [*line, *options_of(kernel), "-append", f"{_LINE} from={kernel}"]


@pytest.fixture(scope="module")
def disk(
    cannot_run: Skip, tmp_path_factory: pytest.TempPathFactory, seconds_left: Callable[[], float]
) -> Answers:
    """Boots both kernels from one image."""
    if not os.environ.get("REAL_GUEST"):
        cannot_run("real guests take minutes", "make real-guest", avoidable=False)
    job = tmp_path_factory.mktemp("disk")
    tree = job / "tree"
    for each in ("dev", "proc", "sys", "sbin"):
        (tree / each).mkdir(parents=True)
    build_static(_SOURCE, tree / "sbin" / "init", cannot_run)
    make = [tool("mke2fs", cannot_run), "-q", "-t", "ext4", "-d", str(tree), str(job / "root.img"), "16M"]
    subprocess.run(make, check=True, capture_output=True)
    lane: Lane = {name_of(kernel): command_of(kernel) for kernel in KERNELS}
    return Answers(job, run_lanes(here_or_nested(), job, [lane], timeout_s=seconds_left()))


def file_of(disk: Answers, name: str, cannot_run: Skip) -> bytes:
    """A file in the image."""
    taken = disk.folder / f"taken{name.replace('/', '.')}"
    command = [tool("debugfs", cannot_run), "-R", f"dump {name} {taken}", str(disk.folder / "root.img")]
    subprocess.run(command, check=True, capture_output=True)
    return taken.read_bytes()


@pytest.mark.parametrize("kernel", KERNELS)
def test_guest_powers_off(disk: Answers, kernel: str) -> None:
    """The program on the disk is the first one; S5 ends the machine with status 0."""
    ended = disk.of(name_of(kernel))
    assert b"disk: root mounted" in ended.out, ended
    assert b"disk: done" in ended.out, ended
    assert ended.status == 0, ended
    stats = json.loads((disk.folder / f"{name_of(kernel)}.json").read_text())
    assert (stats["stop"], stats["status"]) == ("PoweredOff", None)


def test_what_is_written_stays(disk: Answers, cannot_run: Skip) -> None:
    """Each boot has added its line behind those before."""
    assert file_of(disk, "/boots", cannot_run).decode().splitlines() == [f"from={each}" for each in KERNELS]


def test_chance(disk: Answers, cannot_run: Skip) -> None:
    """The entropy device gives each guest other bytes."""
    data = file_of(disk, "/chance", cannot_run)
    assert len(data) == 32 * len(KERNELS)
    assert len({data[at : at + 32] for at in range(0, len(data), 32)}) == len(KERNELS)


def test_file_system_is_sound(disk: Answers, cannot_run: Skip) -> None:
    """e2fsck finds nothing to mend."""
    command = [tool("e2fsck", cannot_run), "-f", "-n", str(disk.folder / "root.img")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_report_on_the_disk(disk: Answers, real_machine: Machine, cannot_run: Skip, tmp_path: Path) -> None:
    """The last guest's report is genuine, and its measurement is that of these options, disk included."""
    raw = file_of(disk, "/report", cannot_run)
    verdict = verify(
        raw,
        table=real_machine.certificate_table(),
        roots=Roots.of(real_machine.root_certificate),
        at=real_machine.now(),
        report_data=b"D" * 64,
    )
    assert verdict.passed, verdict.failures
    kernel = KERNELS[-1]
    stats = json.loads((disk.folder / f"{name_of(kernel)}.json").read_text())
    given = argparse.Namespace(exec=None, exec_dir=None, modules=BUILD / kernel, module=None)
    line = [*options_of(kernel), "-append", f"{_LINE} from={kernel}"]
    program = program_of(given, parse_qemu_options(line), read_kernel(Guest(kernel, "").image))
    assert program is not None
    (tmp_path / "initrd").write_bytes(program.initramfs)
    line = [sys.executable, "-m", "swsnp", "measure", "kernel", "--cbitpos", str(stats["cbitpos"])]
    line += [*options_of(kernel), "-initrd", str(tmp_path / "initrd")]
    line += ["-append", f"{program.cmdline} {_LINE} from={kernel}"]
    measured = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    assert measured == stats["measurement"] == AttestationReport.parse(raw).measurement.hex()
