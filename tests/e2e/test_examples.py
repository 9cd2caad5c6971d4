"""The examples as a user runs them: what they print, their JSON, their exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One example in a process of its own; it must not write to stderr."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.stderr == ""
    return done


def result(name: str, *arguments: str, status: int) -> dict[str, Any]:
    """The JSON that an example prints; `held` and the exit status say the same."""
    done = run(name, "--json", *arguments)
    found: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, found["held"]) == (status, status == 0)
    return found


def test_attest() -> None:
    """The shortest way to a verified report: no check fails."""
    done = run("attest.py")
    assert done.returncode == 0
    assert " fail " not in done.stdout


def test_per_guest_keys() -> None:
    """Reason 1 of the series: VCEK, VLEK A and VLEK B on one host, 0 mismatches in 90 reports."""
    found = result("per_guest_keys.py", "--requests", "30", status=0)
    assert found["mismatches"] == 0
    assert [(row["vm"], row["key"], row["reports"], row["mismatches"]) for row in found["guests"]] == [
        ("vcek", "VCEK", 30, 0),
        ("CN=provider-a.example", "VLEK", 30, 0),
        ("CN=provider-b.example", "VLEK", 30, 0),
    ]


def test_per_guest_keys_without_lock() -> None:
    """Let go too early, and provider A's guest gets A's table with B's signature; the VCEK's does not."""
    found = result("per_guest_keys.py", "--requests", "5", "--without-lock", status=1)
    by_vm = {row["vm"]: row["mismatches"] for row in found["guests"]}
    assert by_vm["CN=provider-a.example"] == 5
    assert by_vm["vcek"] == 0


def test_per_guest_keys_for_people() -> None:
    """One line for each VM, and the verdict."""
    done = run("per_guest_keys.py", "--requests", "2", "--profile", "coco-v1")
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            "vcek                   VCEK     2 reports, 0 mismatches",
            "CN=provider-a.example  VLEK     2 reports, 0 mismatches",
            "CN=provider-b.example  VLEK     2 reports, 0 mismatches",
            "held",
        ],
    )


@pytest.mark.parametrize(
    ("source", "destination"), [("coco-v1", "linux-7.2"), ("linux-7.2", "coco-v1-revised")]
)
def test_moved_guest(source: str, destination: str) -> None:
    """Reason 2 of the series: every promise of a move holds, in both directions between the generations."""
    found = result("moved_guest.py", "--source", source, "--destination", destination, status=0)
    assert len(found["checks"]) == 11
    assert all(found["checks"].values())
    assert (found["source"]["profile"], found["destination"]["profile"]) == (source, destination)
    assert found["source"]["chip_id"] != found["destination"]["chip_id"]
    assert found["source"]["message_numbers"] == [1, 3, 5, 7, 9]
    assert found["destination"]["message_numbers"] == [11, 13, 15]


def test_moved_guest_fails_where_no_certificates_are_served() -> None:
    """A destination without a certificate exit serves an empty table: that is told, and exit status 1."""
    done = run("moved_guest.py", "--destination", "linux-6.12")
    assert done.returncode == 1
    assert "FAIL after the move: the destination's table" in done.stdout
    assert "ok   message numbers go on" in done.stdout
    assert done.stdout.splitlines()[-1] == "did not hold"


@pytest.mark.parametrize("profile", ["coco-v1", "linux-7.2"])
def test_rotate_under_load(profile: str) -> None:
    """Reason 3 of the series: five rotations, every guest sees all six TCBs, nobody a mismatch."""
    found = result("rotate_under_load.py", "--profile", profile, status=0)
    assert (found["lock"], found["rotations"], found["operator_had_to_wait"]) == (True, 5, 5)
    assert (found["mismatches"], found["failed_checks"]) == (0, [])
    assert found["tcbs_seen"] == [6, 6, 6]
    assert found["reports"] >= 3 * 3 * 6


def test_rotate_without_lock() -> None:
    """Each of three careless rotations costs at least the request that it met: wrong signature, wrong TCB."""
    found = result("rotate_under_load.py", "--rotations", "3", "--without-lock", status=1)
    assert found["lock"] is False
    assert found["operator_had_to_wait"] == 0
    assert found["mismatches"] >= 3
    assert found["failed_checks"] == ["R1", "R2"]


@pytest.mark.parametrize("name", ["per_guest_keys.py", "moved_guest.py", "rotate_under_load.py"])
def test_usage(name: str) -> None:
    """--help says what the example is; an option that it does not have is exit status 2."""
    done = run(name, "--help")
    assert (done.returncode, "--json" in done.stdout) == (0, True)
    command = [sys.executable, str(EXAMPLES / name), "--no-such-option"]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert wrong.returncode == 2
