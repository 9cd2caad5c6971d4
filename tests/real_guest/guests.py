"""What boots: a kernel on one of the host's KVMs, with its command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.real_guest.place import BUILD

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "CLIENT",
    "COMMAND_LINE",
    "FOUR",
    "GUESTS",
    "KERNELS",
    "MEMORY",
    "PROFILES",
    "SEED",
    "Guest",
    "four_processors",
]

KERNELS: Final = ("debian-12", "debian-13")
PROFILES: Final = ("coco-v1", "linux-7.2")
SEED: Final = "real-guest"
"""Of every machine, so that this side knows its root and its certificates."""

_LONGEST_BOOT_S: Final = 600
COMMAND_LINE: Final = "quiet random.trust_cpu=on tsc=reliable"
MEMORY: Final = "512M"
CLIENT: Final = ("/client", "/certs.blob")


@dataclass(frozen=True)
class Guest:
    """A boot: which kernel, on which of the host's, with how many vCPUs."""

    kernel: str
    profile: str
    cpus: int = 1

    @property
    def name(self) -> str:
        """Of the command and its files."""
        return f"{self.kernel}.{self.profile}.smp-{self.cpus}"

    @property
    def image(self) -> Path:
        """The kernel."""
        (image,) = (BUILD / self.kernel).glob("boot/vmlinuz-*")
        return image

    def command(self) -> list[str]:
        """What boots it; files are in the job's folder, the kernel where it was unpacked."""
        line = [sys.executable, "-m", "swsnp", "vm", "--profile", self.profile, "--seed", SEED]
        line += ["--timeout", str(_LONGEST_BOOT_S), "--stats", f"$JOB/{self.name}.json"]
        line += ["-kernel", str(self.image), "-append", COMMAND_LINE, "-m", MEMORY, "-smp", str(self.cpus)]
        line += ["-machine", "q35,confidential-guest-support=sev0"]
        line += ["-object", "sev-snp-guest,id=sev0,certs-path=$JOB/certs.blob"]
        line += ["--modules", str(BUILD / self.kernel), "--exec-dir", "$JOB/root"]
        return [*line, "--exec", *CLIENT]


GUESTS: Final = (
    *(Guest(kernel, profile) for kernel in KERNELS for profile in PROFILES),
    Guest("debian-13", "linux-7.2", cpus=2),
)

FOUR: Final = "smp-4"


def four_processors(*, twice: bool) -> list[str]:
    """A guest with four vCPUs that says which are online.

    With `twice` it is started again where it fails: once in some boots in the outer machine such a guest has
    halted for good, all vCPUs at rest.
    """
    line = [sys.executable, "-m", "swsnp", "vm", "--seed", SEED, "--timeout", "150", "-smp", "4"]
    line += ["--stats", f"$JOB/{FOUR}.json", "-kernel", str(Guest("debian-13", "linux-7.2").image)]
    line += ["-append", COMMAND_LINE, "-m", MEMORY]
    line += ["--exec", str(BUILD / "busybox" / "bin" / "busybox"), "cat", "/sys/devices/system/cpu/online"]
    return ["sh", "-c", '"$@" || "$@"', "sh", *line] if twice else line
