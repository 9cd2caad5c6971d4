"""What the real guests are started with; needs no KVM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from tests.real_guest.builds import build_client
from tests.real_guest.lanes import Ended, run_lanes
from tests.real_guest.outer_machine import MachineLostError, OuterMachine, _processor_times
from tests.real_guest.place import ROOT, Here, Nested, here_or_nested
from tests.real_guest.said import BINARY, Said

from swsnp.cpu.plain_kvm import Verdict
from swsnp.errors import HostError
from swsnp.front.wrap.doctor import examine
from swsnp.machine import Machine

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip

TOOLS = ROOT / "tools"


def test_lanes(tmp_path: Path) -> None:
    """Both lanes run to their end, whatever a command's status; arguments arrive as they are."""
    lanes = [
        {"fails": ["sh", "-c", "echo why >&2; exit 3"], "next": ["printf", "%s", "a 'b' $HOME"]},
        {"file": ["touch", "$JOB/file of it"]},
    ]
    ended = run_lanes(Here(), tmp_path, lanes, timeout_s=60)
    assert ended["fails"] == Ended(3, b"", "why\n")
    assert ended["next"] == Ended(0, b"a 'b' $HOME", "")
    assert (tmp_path / "file of it").exists()


def test_lanes_that_take_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has come to an end is there, what has not is missing, and the reason is printed."""
    ended = run_lanes(Here(), tmp_path, [{"quick": ["true"], "slow": ["sleep", "2"]}], timeout_s=1)
    assert list(ended) == ["quick"]
    time.sleep(1.5)
    assert not (tmp_path / "slow.status").exists(), "it was stopped"
    assert "stopped after 1 s" in capsys.readouterr().out


class LosesMachines(Here):
    """A place whose machines run the first command that is left, and are lost then."""

    def __init__(self, lost: int) -> None:
        self.lost = lost
        self.scripts: list[str] = []

    def run(self, job: Path, script: str, *, timeout_s: float) -> int:
        self.scripts.append(script)
        if len(self.scripts) > self.lost:
            return super().run(job, script, timeout_s=timeout_s)
        head, first, *_ = script.partition("\nrun ")
        super().run(job, head + first + script[len(head + first) :].splitlines()[0], timeout_s=timeout_s)
        raise MachineLostError("it died")


COMMANDS = {name: ["sh", "-c", f"echo x >> $JOB/{name}; exit 3"] for name in ("one", "two", "three", "four")}


def test_machine_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another goes on with what is left; what has ended, well or not, is not run again."""
    place = LosesMachines(2)
    ended = run_lanes(place, tmp_path, [COMMANDS], timeout_s=60)
    assert {name: each.status for name, each in ended.items()} == dict.fromkeys(COMMANDS, 3)
    assert all((tmp_path / name).read_text() == "x\n" for name in COMMANDS)
    said = capsys.readouterr().out
    assert "one, two, three, four: machine 1 of at most 3 was lost: it died" in said
    assert "two, three, four: machine 2 of at most 3 was lost: it died" in said


def test_machines_are_lost_for_ever(tmp_path: Path) -> None:
    """Three machines for one lane, and no more."""
    place = LosesMachines(9)
    assert list(run_lanes(place, tmp_path, [COMMANDS], timeout_s=60)) == ["one", "two", "three"]
    assert len(place.scripts) == 3


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("exit 0", "it died; its last words are above and in"),
        ("while :; do :; done", "it gave no sign of life for 0.5 s, and was stopped"),
        ("exec sleep 60", "it gave no sign of life for 0.5 s, and was stopped"),
    ],
)
def test_outer_machine_is_lost(
    program: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine that ends without a status, and one that hangs, are told from a script that fails."""
    monkeypatch.setattr("tests.real_guest.outer_machine._SILENT_S", 0.5)
    monkeypatch.setattr("tests.real_guest.outer_machine._SILENT_OWN_S", 0.2)
    with pytest.raises(MachineLostError, match=words):
        fake_machine(monkeypatch, tmp_path, program).run(tmp_path, "true", timeout_s=30)


def test_outer_machine_has_to_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that the host gives no time is silent, and not lost."""
    monkeypatch.setattr("tests.real_guest.outer_machine._SILENT_S", 0.1)
    monkeypatch.setattr("tests.real_guest.outer_machine._SILENT_OWN_S", 0.1)
    busy = "tests.real_guest.outer_machine._processor_times"
    monkeypatch.setattr(busy, lambda _: (0.0, time.monotonic()))
    with pytest.raises(HostError, match="was stopped after 1 s") as caught:
        fake_machine(monkeypatch, tmp_path, "exec sleep 60").run(tmp_path, "true", timeout_s=1.4)
    assert not isinstance(caught.value, MachineLostError)


def test_processor_times() -> None:
    """proc(5), schedstat: this process has had a processor, and waited for one; one that is gone has not."""
    used, waited = _processor_times(os.getpid())
    assert used > 0
    assert 0 < waited < time.monotonic()
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert _processor_times(gone.pid) == (0, 0)


def test_outer_machine_takes_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That is no loss: another one would take as long."""
    with pytest.raises(HostError, match="was stopped after 0 s") as caught:
        fake_machine(monkeypatch, tmp_path, "exec sleep 60").run(tmp_path, "true", timeout_s=0.3)
    assert not isinstance(caught.value, MachineLostError)


def test_outer_machine_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The status is the script's, from the machine's own folder, which the kernel's command line names."""
    program = 'for a; do case $a in *mine=*) echo 7 > "${0%/*}/${a##*mine=}/status";; esac; done'
    assert fake_machine(monkeypatch, tmp_path, program).run(tmp_path, "exit 7", timeout_s=30) == 7


def fake_machine(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> OuterMachine:
    """An outer machine whose QEMU is a shell script, so that what happens to it can be said."""
    qemu = folder / "qemu"
    qemu.write_text(f"#!/bin/sh\n{program}\n")
    qemu.chmod(0o755)
    (folder / "boot").mkdir()
    (folder / "boot" / "vmlinuz-1").touch()
    monkeypatch.setattr(OuterMachine, "_initramfs", lambda _: b"")
    return OuterMachine(kernel=folder, busybox=folder, qemu=qemu)


@pytest.mark.parametrize(("wanted", "kind"), [("here", Here), ("nested", Nested)], ids=["here", "nested"])
def test_place_that_is_wanted(monkeypatch: pytest.MonkeyPatch, wanted: str, kind: type) -> None:
    """REAL_GUEST decides."""
    monkeypatch.setenv("REAL_GUEST", wanted)
    assert isinstance(here_or_nested(), kind)


@pytest.mark.parametrize(("usable", "kind"), [(True, Here), (False, Nested)])
def test_place_that_the_probe_finds(monkeypatch: pytest.MonkeyPatch, usable: bool, kind: type) -> None:
    """A KVM that emulates every instruction runs tiny guests, and not Linux."""
    monkeypatch.delenv("REAL_GUEST", raising=False)
    assert isinstance(here_or_nested(lambda: Verdict(usable=usable)), kind)


def test_place_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that nothing knows is refused."""
    monkeypatch.setenv("REAL_GUEST", "elsewhere")
    with pytest.raises(HostError, match="REAL_GUEST: got 'elsewhere', wanted yes, here or nested"):
        here_or_nested()


def test_no_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="install qemu-system-x86"):
        OuterMachine(kernel=tmp_path, busybox=tmp_path).run(tmp_path, "true", timeout_s=1)


def test_client(tmp_path: Path, cannot_run: Skip) -> None:
    """The client knows nothing of where it runs: under `swsnp run` it gets all that a guest gives it."""
    verdict = examine()
    if not verdict.usable:
        cannot_run(verdict.reason, verdict.remedy, avoidable=False)
    client, certs = build_client(tmp_path, cannot_run), tmp_path / "certs"
    certs.write_bytes(Machine(seed=b"client").certificate_table())
    command = [sys.executable, "-m", "swsnp", "run", "--seed", "client", "--", str(client), str(certs)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    said = Said.of(done.stdout)
    assert said.done, done
    assert [len(said.blob(name)) for name in BINARY] == [1184, 1184, 1184, 1184, 32, 32, 32]
    assert said.blob("key") == said.blob("key-again") != said.blob("other-key")
    assert said.lines["certs"] == "8192 same"
    assert said.lines["tsm-auxblob"] == f"{certs.stat().st_size} same"


def test_package_that_is_there(tmp_path: Path) -> None:
    """A folder that holds a package is left as it is, and no network is asked."""
    (tmp_path / ".package").write_text("linux-image_6.1")
    command = [str(TOOLS / "debian-package"), "bookworm", "linux-image-amd64", str(tmp_path)]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout == f"debian-package: linux-image_6.1 is in {tmp_path}\n"


def test_packages_without_debian(tmp_path: Path) -> None:
    """Where there is no apt the tool ends with status 4, says so, and leaves nothing behind."""
    for each in ("realpath", "bash", "env"):
        (tmp_path / each).symlink_to(f"/usr/bin/{each}")
    command = [str(TOOLS / "debian-package"), "bookworm", "linux-image-amd64", str(tmp_path / "into")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "needs Debian's apt-get" in done.stderr
    assert not list(tmp_path.glob("into*"))


def test_root_that_is_there(tmp_path: Path) -> None:
    """An archive that was made before is left as it is, and no network is asked."""
    (tmp_path / "root.tar").touch()
    command = [str(TOOLS / "debian-root"), "bookworm", "udev", str(tmp_path / "root.tar")]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout == f"debian-root: {tmp_path}/root.tar is there\n"


@pytest.mark.parametrize(
    ("programs", "words"),
    [((), "needs mmdebstrap"), (("mmdebstrap",), "no Debian archive is configured here")],
    ids=["no-mmdebstrap", "no-archive"],
)
def test_root_without_debian(tmp_path: Path, programs: tuple[str, ...], words: str) -> None:
    """Without what it needs the tool ends with status 4, says so, and leaves nothing behind."""
    for each in ("awk", "bash", "dirname", "env", "realpath"):
        (tmp_path / each).symlink_to(f"/usr/bin/{each}")
    for each in (*programs, *(["apt-get"] if programs else [])):
        (tmp_path / each).write_text("#!/bin/bash\n")
        (tmp_path / each).chmod(0o755)
    command = [str(TOOLS / "debian-root"), "bookworm", "udev", str(tmp_path / "into.tar")]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert words in done.stderr
    assert not list(tmp_path.glob("into*"))
