"""docs/how-to/kds.md: its commands run, with the imitated service in AMD's place."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.docs.page import Step, blocks_of, prints, run

from swsnp.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Skip

STEPS = [step for block in blocks_of("how-to/kds.md") for step in block]
SERVE = next(step for step in STEPS if step.command.startswith("swsnp kds serve"))


@dataclass(frozen=True)
class Place:
    """A folder with what the page takes for granted, and the service that stands in for AMD's."""

    folder: Path
    url: str
    hwid: str

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        command = command.replace("https://kdsintf.amd.com", self.url).replace(
            "http://127.0.0.1:8080", self.url
        )
        if re.match("swsnp (certs fetch|kds mirror)", command):
            command += f" --kds {self.url} --cache cache" if "fetch" in command else f" --kds {self.url}"
        if command.startswith("swsnp verify"):
            command = command.replace("--policy policy.toml", "--roots roots.pem --authentic-only")
        return run(command.replace("0a1b…", self.hwid), self.folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The page's own command starts the service, on a free port; its seed's machine makes the report."""
    folder = tmp_path_factory.mktemp("kds")
    seed = re.search(r"--seed (\S+)", SERVE.command)
    assert seed is not None
    machine = Machine(seed=seed[1].encode())
    with machine.create_vm(certs=None) as vm:
        vm.boot()
        report = vm.report(bytes(64)).report
    (folder / "reports").mkdir()
    for name in ("report.bin", "reports/host-17.bin"):
        (folder / name).write_bytes(report)
    fleet = next(step.shown for step in STEPS if step.command == "cat fleet")
    (folder / "fleet").write_text(fleet.replace("0a1b…", machine.hwid.hex()))
    command = SERVE.command.removesuffix("&").replace("--port 8080", "--port 0").split()
    command[0] = str(Path(sys.executable).with_name(command[0]))
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        ready = served.stdout.readline()
        try:
            assert ready.startswith("ready http://127.0.0.1:")
            yield Place(folder=folder, url=ready.split()[1], hwid=machine.hwid.hex())
        finally:
            served.terminate()


@pytest.mark.parametrize(
    "step", [step for step in STEPS if not step.command.startswith(("swsnp kds serve", "swsnp run"))]
)
def test_commands(step: Step, place: Place, cannot_run: Skip) -> None:
    """Each succeeds, and prints what stands below it."""
    if step.command.startswith("curl") and shutil.which("curl") is None:
        cannot_run("no curl here", "install curl")
    done = place.run(step.command)
    assert done.returncode == 0, done.stdout + done.stderr
    if step.shown:
        assert prints(step.shown.replace("0a1b…", place.hwid), done.stdout), done.stdout


def test_there_are_commands() -> None:
    """A page without commands would prove nothing."""
    assert len(STEPS) >= 10
    assert SERVE.shown == "ready http://127.0.0.1:8080\n"
