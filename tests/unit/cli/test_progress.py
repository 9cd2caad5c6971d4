"""The bar of long runs: on a terminal only."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from swsnp.cli.progress import progress

if TYPE_CHECKING:
    import pytest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress("mirror", 3, 1) as advance:
        advance(1)
        advance(1)
    return stream.getvalue()


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word before it, and how many of how many, those done before included."""
    shown = run(Terminal(), monkeypatch)
    assert "mirror" in shown
    assert "3/3" in shown


def test_no_terminal_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes into logs and pipes."""
    assert run(io.StringIO(), monkeypatch) == ""


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is a comfort: a terminal without rich has none, and nothing else changes."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run(Terminal(), monkeypatch) == ""
