"""docs/how-to/kds.md: its commands run, with the imitated service in AMD's place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from swsnp.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Skip

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "kds.md"
BLOCKS = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
STEP = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
STEPS = [step for block in BLOCKS for step in STEP.findall(block)]
SERVE = next(command for command, _ in STEPS if command.startswith("swsnp kds serve"))
PATHS = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


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
        return subprocess.run(
            ["bash", "-c", command.replace("0a1b…", self.hwid)],
            cwd=self.folder, env=PATHS, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The page's own command starts the service, on a free port; its seed's machine makes the report."""
    folder = tmp_path_factory.mktemp("kds")
    seed = re.search(r"--seed (\S+)", SERVE)
    assert seed is not None
    machine = Machine(seed=seed[1].encode())
    with machine.create_vm(certs=None) as vm:
        vm.boot()
        report = vm.report(bytes(64)).report
    (folder / "reports").mkdir()
    for name in ("report.bin", "reports/host-17.bin"):
        (folder / name).write_bytes(report)
    fleet = next(shown for command, shown in STEPS if command == "cat fleet")
    (folder / "fleet").write_text(fleet.replace("0a1b…", machine.hwid.hex()))
    command = SERVE.removesuffix("&").replace("--port 8080", "--port 0").split()
    with subprocess.Popen(command, cwd=folder, env=PATHS, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        ready = served.stdout.readline()
        try:
            assert ready.startswith("ready http://127.0.0.1:")
            yield Place(folder=folder, url=ready.split()[1], hwid=machine.hwid.hex())
        finally:
            served.terminate()


@pytest.mark.parametrize(
    ("command", "shown"), [step for step in STEPS if not step[0].startswith(("swsnp kds serve", "swsnp run"))]
)
def test_commands(command: str, shown: str, place: Place, cannot_run: Skip) -> None:
    """Each succeeds, and prints what stands below it."""
    if command.startswith("curl") and shutil.which("curl") is None:
        cannot_run("no curl here", "install curl")
    done = place.run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    if shown:
        assert done.stdout == shown.replace("0a1b…", place.hwid)


def test_there_are_commands() -> None:
    """A page without commands would prove nothing."""
    assert len(STEPS) >= 10
    assert "ready http://127.0.0.1:8080\n" in PAGE.read_text()
