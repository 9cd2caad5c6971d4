"""docs/policy.md: every key of the policy with its form and check, and examples that are policies."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from swsnp.abi.snp_report import PlatformInfo
from swsnp.verify import policy as policy_module
from swsnp.verify.policy import Entry, Policy, entries
from swsnp.verify.policy_file import policy_schema, read_policy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text()
ROWS = [
    tuple(cell.strip() for cell in line.split("|")[1:-1])
    for line in PAGE.splitlines()
    if line.startswith("| `")
]
EXAMPLES = re.findall(r"```(?:json|toml)\n(.*?)```", PAGE, re.DOTALL)


def test_every_key_has_its_row_in_the_order_of_the_dataclass() -> None:
    """Nothing is left out, nothing is invented, and the check is the one that applies the key."""
    shown = [(row[0].strip("`"), row[3]) for row in ROWS]
    assert shown == [(each.name, each.check) for each in entries()]


@pytest.mark.parametrize(("row", "entry"), list(zip(ROWS, entries(), strict=True)), ids=[r[0] for r in ROWS])
def test_the_row_has_the_limits_of_the_key(row: tuple[str, ...], entry: Entry) -> None:
    """Sizes and limits in the page are those of the form."""
    form = entry.form.schema()
    numbers = set(map(int, re.findall(r"\d+", row[1])))
    if form["type"] == "integer":
        assert numbers == {form["minimum"], form["maximum"]}
    elif "items" in form and "pattern" in form["items"]:
        assert numbers == set(map(int, re.findall(r"\{(\d+)\}", form["items"]["pattern"])))
    elif form.get("pattern", "").startswith("^([0-9a-fA-F]"):
        assert numbers == set(map(int, re.findall(r"\{(\d+)\}", form["pattern"])))
    else:
        assert numbers == set()
    assert row[2].startswith("Waives: ") is entry.waives


def test_names_of_bits() -> None:
    """The page lists the names that PLATFORM_INFO's bits have here."""
    line = next(each for each in PAGE.splitlines() if each.startswith("Names of PLATFORM_INFO bits"))
    assert re.findall(r"`(\w+)`", line) == list(PlatformInfo.ranges())


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_policies(text: str) -> None:
    """Whoever copies an example gets no error."""
    assert read_policy(text.encode(), "docs/policy.md") != Policy()


def test_there_are_examples() -> None:
    """An empty list would prove nothing."""
    assert len(EXAMPLES) == 3


def test_the_schema_is_shipped() -> None:
    """The file beside the module is what `policy_schema` says; rewrite it when the policy grows."""
    shipped = Path(policy_module.__file__).with_name("policy.schema.json")
    assert shipped.read_text() == json.dumps(policy_schema(), indent=2) + "\n"
