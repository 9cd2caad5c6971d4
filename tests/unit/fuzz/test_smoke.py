"""Every harness runs, and finds nothing in its first inputs."""

from __future__ import annotations

import logging
import random

import pytest
from fuzz.engine import MAX_SIZE, Harness, harnesses, mutate, run

EXECUTIONS = 300
HARNESSES = harnesses()


@pytest.fixture(autouse=True)
def _without_a_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "swsnp")


@pytest.mark.parametrize("harness", HARNESSES, ids=lambda harness: harness.name)
def test_invariant_holds(harness: Harness) -> None:
    """docs/how-to/fuzz.md: the first line of a harness states an invariant; a few hundred inputs keep it."""
    assert harness.invariant.endswith(".")
    done = run(harness, executions=EXECUTIONS, seed=1)
    assert done.executions >= EXECUTIONS
    assert [finding.trace for finding in done.findings.values()] == []


def test_every_reader_has_a_harness() -> None:
    """docs/how-to/fuzz.md: one harness per parser."""
    assert {harness.name for harness in HARNESSES} >= {
        "records",
        "cert_table",
        "x509",
        "crl",
        "kds",
        "kds_answer",
        "kds_text",
        "kds_url",
        "pem",
        "envelopes",
        "report_forms",
        "batch_results",
        "classify",
        "lint",
        "manifest",
        "verify",
        "qemu",
        "ioctl",
        "message",
        "mailbox",
        "ghcb",
        "psc",
        "tsm_text",
        "firmware",
        "cpuid_dump",
        "kernel_image",
        "kernel_module",
        "virtqueue",
        "console",
        "network",
        "vhost_user",
    }


def test_same_seed_is_the_same_run() -> None:
    """A finding can be found again: seed and number of executions decide every input."""
    seen: list[list[bytes]] = [[], []]
    for inputs in seen:
        run(Harness("noted", "", lambda: [b"abc"], inputs.append), executions=200, seed=5)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 100


def test_broken_invariants_are_findings() -> None:
    """An exception of a harness is kept with its input, once for each place that raises."""

    def one(data: bytes) -> None:
        if len(data) > 3:
            raise ValueError("too long")

    done = run(Harness("broken", "", lambda: [b"abc"], one), executions=500, seed=1)
    (finding,) = done.findings.values()
    assert len(finding.data) > 3
    assert "ValueError" in finding.error
    with pytest.raises(ValueError, match="too long"):
        one(finding.data)


def test_inputs_stay_small() -> None:
    """Insertions do not grow an input without end."""
    chance, data = random.Random(1), bytes(MAX_SIZE)
    for _ in range(200):
        data = mutate(data, chance, [data])
        assert len(data) <= MAX_SIZE
