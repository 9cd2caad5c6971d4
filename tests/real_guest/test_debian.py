"""Whole Debians as SNP guests: their own init, their own services, and a report by what they come with.

Debian 13 has systemd and asks by the files of configfs-tsm, Debian 12 has System V's init and asks by an
ioctl out of Perl. Debian 13 also boots without SNP, from the same image by the same VMM.
"""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from tests.real_guest.disks import DEBIANS, Debian, hash_of
from tests.real_guest.outside import judge, measure

from swsnp.abi.snp_report import AttestationReport

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.real_guest.conftest import Answers

    from swsnp.machine import Machine

INIT = {"debian-13": "/usr/lib/systemd/systemd", "debian-12": "/usr/sbin/init"}
REACHED = {"debian-13": "active", "debian-12": "N 2"}
"""What `systemctl is-active multi-user.target` says, and `runlevel`: none before, now 2."""


@pytest.fixture(params=DEBIANS, ids=lambda each: each.name)
def debian(request: pytest.FixtureRequest) -> Debian:
    """Every boot."""
    chosen: Debian = request.param
    return chosen


@pytest.fixture
def answer(disks: Answers, debian: Debian) -> Mapping[str, bytes]:
    """The files on the disk that the guest answers on."""
    disks.of(debian.name)
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO((disks.folder / f"{debian.name}.answer").read_bytes())) as archive:
        for each in archive:
            if (file := archive.extractfile(each)) is not None:
                found[each.name.removeprefix("./")] = file.read()
    return found


def stats_of(disks: Answers, debian: Debian) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads((disks.folder / f"{debian.name}.json").read_text())
    return stats


def test_powers_off(disks: Answers, debian: Debian) -> None:
    """The service's end is the machine's: the whole way down, file systems and all, with status 0."""
    ended = disks.of(debian.name)
    assert ended.status == 0, ended
    stats = stats_of(disks, debian)
    assert (stats["stop"], stats["status"], stats["snp"]) == ("PoweredOff", None, debian.snp), ended


def test_init(answer: Mapping[str, bytes], debian: Debian) -> None:
    """The release's own init is the first process, and has reached what it is for."""
    assert f'VERSION_ID="{debian.release.removeprefix("debian-")}"' in answer["os-release"].decode()
    assert answer["init"].decode().strip() == INIT[debian.release]
    assert answer["reached"].decode().strip() == REACHED[debian.release]


def test_kernel(answer: Mapping[str, bytes], debian: Debian) -> None:
    """The kernel is the release's, unmodified."""
    assert debian.kernel.name == f"vmlinuz-{answer['kernel'].decode().strip()}"


def test_init_speaks(disks: Answers, debian: Debian) -> None:
    """The console's first words are init's, so that `seconds.console` of the statistics means it."""
    said = disks.of(debian.name).out.decode(errors="replace")
    first = {"debian-13": "Welcome to Debian GNU/Linux 13", "debian-12": "INIT: version"}[debian.release]
    assert first in said[:200], said[:2000]


def test_report(
    answer: Mapping[str, bytes], disks: Answers, debian: Debian, real_machine: Machine, tmp_path: Path
) -> None:
    """It is genuine, answers the guest's nonce, and its measurement is what these options come to.

    A guest without SNP has none.
    """
    if not debian.snp:
        assert "report" not in answer
        return
    verdict = judge(real_machine, answer["report"], b"0" * 64)
    assert verdict.passed, verdict.failures
    stats = stats_of(disks, debian)
    measured = measure(
        debian.release, debian.options(), debian.command_line, cbitpos=stats["cbitpos"], folder=tmp_path
    )
    assert measured == stats["measurement"] == AttestationReport.parse(answer["report"]).measurement.hex()


@pytest.mark.parametrize("image", sorted({each.image for each in DEBIANS}))
def test_snapshot(disks: Answers, image: str) -> None:
    """`-snapshot`: guests have written logs and more into their roots, and the file is as it was."""
    file = disks.folder / image
    assert hash_of(file) == file.with_suffix(".sha256").read_text()


def test_ratio(disks: Answers) -> None:
    """What SNP costs a whole boot is told: seconds from the launch's end, in one machine after each other."""
    snp, plain = (stats_of(disks, each)["seconds"] for each in DEBIANS if each.release == "debian-13")
    for what, until in (("init's first line", "console"), ("power-off", "ended")):
        took, without = snp[until] - snp["launched"], plain[until] - plain["launched"]
        assert min(took, without) > 0
        print(f"\nDebian 13 to {what}: SNP {took:.1f} s, {took / without:.2f} times the plain boot")
