"""Guests with a disk: a small root file system of one program, and whole Debians."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.real_guest.builds import build_static
from tests.real_guest.guests import KERNELS, MEMORY, SEED, Guest
from tests.real_guest.place import BUILD

if TYPE_CHECKING:
    from tests.conftest import Skip
    from tests.real_guest.lanes import Lane

__all__ = [
    "DEBIANS",
    "LINE",
    "SMALL_ROOT",
    "Debian",
    "hash_of",
    "name_of",
    "options_of",
    "small_root",
    "tool",
    "whole_debians",
]

LINE: Final = "console=ttyS0 quiet random.trust_cpu=on tsc=reliable root=/dev/vda rw"
SMALL_ROOT: Final = "root.img"
_TOOLS: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
_SOURCE: Final = Path(__file__).with_name("disk_init.c")
_MAKE_IMAGE: Final = Path(__file__).parent / "debian_root" / "make-image"
_ANSWER_SIZE: Final = 1 << 20
_LONGEST_S: Final = "420"


def tool(name: str, cannot_run: Skip, package: str = "e2fsprogs") -> str:
    """A program's path; ends the test where it is not installed."""
    found = shutil.which(name, path=_TOOLS)
    if found is None:
        cannot_run(f"no {name}", f"apt-get install {package}")
    return found


# One program


def small_root(job: Path, cannot_run: Skip) -> Lane:
    """Makes the image; boots both kernels from it, one after the other."""
    tree = job / "tree"
    for each in ("dev", "proc", "sys", "sbin"):
        (tree / each).mkdir(parents=True)
    build_static(_SOURCE, tree / "sbin" / "init", cannot_run)
    make = [tool("mke2fs", cannot_run), "-q", "-t", "ext4", "-d", str(tree), str(job / SMALL_ROOT), "16M"]
    subprocess.run(make, check=True, capture_output=True)
    return {name_of(kernel): _small_command(kernel) for kernel in KERNELS}


def name_of(kernel: str) -> str:
    """Of the kernel's boot from the small root."""
    return f"disk.{kernel}"


def options_of(kernel: str) -> list[str]:
    """Those that `swsnp vm` and `swsnp measure kernel` have in common."""
    image = str(Guest(kernel, "linux-7.2").image)
    devices = ["-device", "virtio-rng-device", "-drive", f"file=$JOB/{SMALL_ROOT},format=raw,if=virtio"]
    return ["-kernel", image, "-m", MEMORY, *devices]


def _small_command(kernel: str) -> list[str]:
    line = [sys.executable, "-m", "swsnp", "vm", "--seed", SEED, "--timeout", "300", "-no-reboot"]
    line += ["--stats", f"$JOB/{name_of(kernel)}.json", "--modules", str(BUILD / kernel)]
    return [*line, *options_of(kernel), "-append", f"{LINE} from={kernel}"]


# A whole Debian


@dataclass(frozen=True)
class Debian:
    """A boot of a whole Debian, with the kernel of the same release; `snp`: as an SNP guest.

    Nothing stays on the root, since `-snapshot` says so; but what a guest answers does, on a disk of its own.
    """

    release: str
    snp: bool = True

    @property
    def name(self) -> str:
        """Of the command and its files."""
        return f"whole.{self.release}.{'snp' if self.snp else 'plain'}"

    @property
    def image(self) -> str:
        """The root file system, in the job's folder; a boot with SNP and one without have the same."""
        return f"whole.{self.release}.img"

    @property
    def kernel(self) -> Path:
        """The release's."""
        return Guest(self.release, "linux-7.2").image

    @property
    def command_line(self) -> str:
        """Init speaks first, for the kernel's own complaints are not shown; without colours, and briefly."""
        line = LINE.replace("quiet", "loglevel=3 TERM=dumb")
        return f"{line} systemd.unit=multi-user.target systemd.show_status=1 systemd.status_unit_format=name"

    def options(self) -> list[str]:
        """Those that `swsnp vm` and `swsnp measure kernel` have in common."""
        line = ["-kernel", str(self.kernel), "-m", MEMORY, "-snapshot"]
        line += ["-drive", f"file=$JOB/{self.image},format=raw,if=none,id=root"]
        line += ["-drive", f"file=$JOB/{self.name}.answer,format=raw,if=none,id=answer,snapshot=off"]
        line += ["-device", "virtio-rng-device", "-device", "virtio-blk-device,drive=root"]
        return [*line, "-device", "virtio-blk-device,drive=answer,serial=answer"]

    def command(self) -> list[str]:
        """What boots it."""
        line = [sys.executable, "-m", "swsnp", "vm", "--seed", SEED, "--timeout", _LONGEST_S, "-no-reboot"]
        line += ["--stats", f"$JOB/{self.name}.json", "--modules", str(BUILD / self.release)]
        line += [] if self.snp else ["-machine", "q35"]
        return [*line, *self.options(), "-append", self.command_line]


DEBIANS: Final = (Debian("debian-13"), Debian("debian-13", snp=False), Debian("debian-12"))


def hash_of(image: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole_debians(job: Path, cannot_run: Skip) -> list[Lane]:
    """Makes the images; a lane for each release, where SNP and plain boots take turns."""
    make = [tool("fakeroot", cannot_run, "fakeroot"), str(_MAKE_IMAGE)]
    releases = list(dict.fromkeys(each.release for each in DEBIANS))
    for release in releases:
        archive = BUILD / f"{release}.tar"
        if not archive.exists():
            cannot_run(f"no {archive}", "apt-get install mmdebstrap, then make real-guest")
        image = job / Debian(release).image
        subprocess.run([*make, str(archive), str(image)], check=True)
        image.with_suffix(".sha256").write_text(hash_of(image))
    for each in DEBIANS:
        (job / f"{each.name}.answer").write_bytes(bytes(_ANSWER_SIZE))
    return [
        {each.name: each.command() for each in DEBIANS if each.release == release} for release in releases
    ]
