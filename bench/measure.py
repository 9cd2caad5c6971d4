"""Launch digests against sev-snp-measure, in process and as whole commands, over one 4 MiB image.

The image is Debian 13's OVMF.fd where `tools/debian-package trixie ovmf build/ovmf` has fetched it; else one
made up, with as many empty pages.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sevsnpmeasure import guest
from sevsnpmeasure.sev_mode import SevMode

from bench.jobs import Job
from swsnp.abi.snp_page import PAGE
from swsnp.cli.measure import read_image
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.launch_plan import LaunchConfig, launch_digest
from swsnp.testing.firmware_image import firmware_image

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["command_row", "measure_jobs"]

_DEBIAN_13: Final = Path("build/ovmf/usr/share/ovmf/OVMF.fd")
_SIZE: Final = 4 << 20
_FILLED: Final = 376 * PAGE
_EPYC: Final = 0x800F12
_COMMANDS: Final = 20
_LIBRARY: Final = "sev-snp-measure"


@contextmanager
def _image_file() -> Iterator[Path]:
    if _DEBIAN_13.is_file():
        yield _DEBIAN_13
        return
    with tempfile.NamedTemporaryFile(suffix=".fd") as file:
        file.write(firmware_image(size=_SIZE, text=random.Random(1).randbytes(_FILLED)))
        file.flush()
        yield Path(file.name)


def _ours(image: Path, vcpus: int) -> bytes:
    firmware = FirmwareVolume(read_image(str(image)))
    return launch_digest(LaunchConfig(firmware, vcpus=vcpus, signature=_EPYC))


def _theirs(image: Path, vcpus: int) -> bytes:
    return bytes(guest.calc_launch_digest(SevMode.SEV_SNP, vcpus, _EPYC, str(image), "", "", "", 1))


@contextmanager
def measure_jobs() -> Iterator[list[Job]]:
    """In process, from the file to the digest: 1 and 255 vCPUs against the peer, and against each other."""
    with _image_file() as image:
        for vcpus in (1, 255):
            if _ours(image, vcpus) != _theirs(image, vcpus):
                raise RuntimeError("the two digests differ")
        jobs = [
            ("measure/4-mib", _LIBRARY, 1, partial(_theirs, image, 1), "ratio <= 0.5"),
            ("measure/4-mib-255-vcpus", _LIBRARY, 255, partial(_theirs, image, 255), "ratio <= 0.5"),
            ("measure/255-vcpus", "one vCPU", 255, partial(_ours, image, 1), "ratio <= 1.1"),
        ]
        yield [
            Job(name, library, partial(_ours, image, vcpus), floor, goal)
            for name, library, vcpus, floor, goal in jobs
        ]


def command_row() -> dict[str, object]:
    """CPU time of both commands, which take turns; bytecode is cached for both, as where they live."""
    folder = Path(sys.executable).parent
    ours, theirs = [], []
    with _image_file() as image, tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        options = ["--mode", "snp", "--ovmf", str(image), "--vcpus", "1", "--vcpu-type", "EPYC"]
        for _ in range(_COMMANDS + 1):
            ours.append(_cpu_s([str(folder / "swsnp"), "measure", *options], environment))
            theirs.append(_cpu_s([str(folder / "sev-snp-measure"), *options], environment))
    del ours[0], theirs[0]  # these filled the cache
    value, floor = statistics.median(ours), statistics.median(theirs)
    return {
        "job": "measure/command",
        "value": round(value * 1e3, 1),
        "floor": round(floor * 1e3, 1),
        "ratio": round(value / floor, 3),
        "own": round((value - floor) * 1e3, 1),
        "spread": round(value / min(ours), 2),
        "unit": "ms CPU",
        "library": _LIBRARY,
        "goal": "ratio <= 0.6",
    }


def _cpu_s(command: list[str], environment: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
