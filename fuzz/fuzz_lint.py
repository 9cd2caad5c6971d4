"""The lint: findings with known rules for any bytes; clean, and without T and E, only what parses."""

from __future__ import annotations

from datetime import timedelta

from fuzz.evidence import NOW, evidence
from fuzz.outcome import attempt
from swsnp.certs.lint import RULES, Expected, Severity, lint_table
from swsnp.certs.table import parse
from swsnp.errors import LayoutError

__all__ = ["one", "seeds"]

AT = NOW + timedelta(days=1)


def seeds() -> list[bytes]:
    """A good table, one with padding, without its terminator, empty."""
    table = evidence().table
    return [table, table.ljust(16384, b"\0"), table[:72] + table[96:], bytes(24), b""]


def one(data: bytes) -> object:
    """Look; hold the layout's errors against the strict reader."""
    result = lint_table(data, at=AT, expected=Expected(report=evidence().report))
    broken = {each.rule for each in result.findings}
    assert broken <= RULES.keys()
    assert not broken & result.not_checked.keys() & {"K6", "K7", "K8", "K9"}
    entries, refusal = attempt(lambda: parse(data), LayoutError)
    layout = {rule for rule in broken if rule[0] == "T" and RULES[rule].severity is Severity.ERROR}
    if refusal:
        assert layout, refusal
    else:
        # what the strict reader reads may still be too large, or have GUIDs in two byte orders
        assert layout <= {"T9", "T10", "T11"}, (layout, len(entries))
    return tuple(sorted(broken))
