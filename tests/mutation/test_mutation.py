"""The mutation tool itself: what it takes for a check, and that its switches do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.mutation.finder import SWITCH_NAME, Kind, instrument
from tests.mutation.report import read_equivalent
from tests.mutation.switch import Switch

SOURCE = """
def refuse(a: int, b: int) -> str:
    if a < 0 or b < 0:
        raise ValueError("negative")
    if (a | b) & 4:
        return -errno.EINVAL
    require(a + b != 3, "three")
    if a == 1:
        return None
    try:
        return 1 // b
    except ZeroDivisionError:
        raise ValueError("zero") from None


def pass_on(a: int) -> int:
    try:
        return [1][1 // a]
    except IndexError:
        raise
    except Exception:
        raise ValueError("any") from None


def predicate(a: int) -> bool:
    return 0 <= a < 10


def table(a: int) -> str:
    if a == 2:
        check_two(a)
    return "good" if a else EINVAL
"""


DIVIDED = "integer division or modulo by zero"


class _Errno:
    EINVAL = 22


def _require(condition: object, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _check_two(_: int) -> None:
    raise ValueError("two")


def loaded(active: str = "") -> tuple[dict[str, Any], Switch]:
    """The functions of `SOURCE` with one mutant on."""
    tree, mutants = instrument(SOURCE, "x.py")
    switch = Switch()
    names = {f"{each.kind}: {each.text}": each.number for each in mutants}
    if active:
        switch.active = names[active]
    space = {SWITCH_NAME: switch, "errno": _Errno, "require": _require, "check_two": _check_two, "EINVAL": 22}
    exec(compile(tree, "x.py", "exec", dont_inherit=True), space)
    return space, switch


def outcome(function: Any, *arguments: int) -> object:
    try:
        return function(*arguments)
    except (ValueError, ZeroDivisionError, IndexError) as error:
        return str(error)


def test_what_counts_as_a_check() -> None:
    """tests/mutation/finder.py: every kind is found, whole conditions and arms apart."""
    found = sorted(f"{each.kind}: {each.text}" for each in instrument(SOURCE, "x.py")[1])
    assert found == [
        "call: check_two(a)",
        "check: (a | b) & 4",
        "check: a",
        "check: a + b != 3 -> 'three'",
        "check: a < 0 or b < 0",
        "guard: a == 1",
        "handler: except Exception",
        "handler: except IndexError",
        "handler: except ZeroDivisionError",
        "limit: 0 <= a",
        "limit: a < 0",
        "limit: a < 10",
        "limit: b < 0",
        "operand: 0 <= a",
        "operand: a",
        "operand: a < 0",
        "operand: a < 10",
        "operand: b",
        "operand: b < 0",
    ]


@pytest.mark.parametrize(
    ("mutant", "function", "arguments", "without", "with_it"),
    [
        ("check: a < 0 or b < 0", "refuse", (-1, 5), "negative", -22),
        ("operand: a < 0", "refuse", (-1, 8), "negative", -22),
        ("operand: b < 0", "refuse", (-1, 8), "negative", "negative"),
        ("limit: a < 0", "refuse", (0, 1), 1, "negative"),
        ("check: (a | b) & 4", "refuse", (8, 4), -22, 0),
        ("operand: a", "refuse", (8, 4), -22, -22),
        ("operand: b", "refuse", (8, 4), -22, 0),
        ("check: a + b != 3 -> 'three'", "refuse", (2, 1), "three", 1),
        ("guard: a == 1", "refuse", (1, 1), None, 1),
        ("handler: except ZeroDivisionError", "refuse", (0, 0), "zero", DIVIDED),
        ("handler: except IndexError", "pass_on", (1,), "list index out of range", "any"),
        ("handler: except Exception", "pass_on", (0,), "any", DIVIDED),
        ("operand: 0 <= a", "predicate", (-1,), False, True),
        ("limit: a < 10", "predicate", (10,), False, True),
        ("limit: 0 <= a", "predicate", (0,), True, False),
        ("call: check_two(a)", "table", (2,), "two", "good"),
        ("check: a", "table", (0,), 22, "good"),
    ],
)
def test_a_mutant_lacks_its_check(
    mutant: str, function: str, arguments: tuple[int, ...], without: object, with_it: object
) -> None:
    """Nothing changes while no mutant is on; then only that check is missing."""
    space, switch = loaded()
    assert outcome(space[function], *arguments) == without
    noted = {
        f"{each.kind}: {each.text}" for each in instrument(SOURCE, "x.py")[1] if each.number in switch.seen
    }
    assert without == with_it or mutant in noted
    assert outcome(loaded(mutant)[0][function], *arguments) == with_it


def test_keys_are_unique() -> None:
    """The same text twice in one function is told apart by a number."""
    _, mutants = instrument("def f(a):\n    if a:\n        raise E\n    if a:\n        raise E\n", "x.py")
    assert [each.key for each in mutants] == ["x.py::f::check::a", "x.py::f::check::a #2"]
    assert {each.kind for each in mutants} == {Kind.CHECK}


def test_every_exception_has_a_reason(tmp_path: Path) -> None:
    """tests/mutation/equivalent.toml: no entry without a reason."""
    assert read_equivalent(Path(__file__).with_name("equivalent.toml"))
    file = tmp_path / "equivalent.toml"
    file.write_text('[[equivalent]]\nmutant = "x"\nreason = " "\n')
    with pytest.raises(ValueError, match="wanted mutant and reason"):
        read_equivalent(file)
