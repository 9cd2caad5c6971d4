"""Guests of a few instructions, on a processor that virtualizes and not on a KVM that emulates them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.real_guest.conftest import Answers


def test_tiny_guests(answers: Answers) -> None:
    """The tests of tests/e2e/plain_kvm pass, and none of them is skipped."""
    tests = answers.of("tiny-guests")
    assert tests.status == 0, tests.out.decode()
    last = tests.out.decode().splitlines()[-1]
    assert " passed" in last
    assert "skipped" not in last
