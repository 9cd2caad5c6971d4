"""The switch: every mutant is in the loaded code at once, and a number says which one is on.

`finder.instrument` wraps each check into a call of a method below. With no mutant on they hand back what they
got, and note for which mutants the outcome would have been another: only those tests can tell the mutant
from the program, so only they are run later.
"""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OPERATORS", "SWITCH", "Switch"]

OPERATORS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Is": operator.is_,
    "IsNot": operator.is_not,
    "In": lambda a, b: a in b,
    "NotIn": lambda a, b: a not in b,
}
_Types: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]
_NEIGHBOUR: Final = {"Lt": "LtE", "LtE": "Lt", "Gt": "GtE", "GtE": "Gt"}


class Switch:
    """Attributes: `active`, the number of the mutant that is on (-1: none); `seen`, the numbers noted.

    `seen_in_setup` is what was noted when the test proper began; `reached` are statements that were carried
    out, for those that check without raising.
    """

    def __init__(self) -> None:
        self.active = -1
        self.seen: set[int] = set()
        self.seen_in_setup: set[int] = set()
        self.reached: set[int] = set()

    def forget(self) -> None:
        """Begin with another test."""
        self.seen, self.seen_in_setup, self.reached = set(), set(), set()

    def refuses(self, number: int, value: object) -> object:
        """A condition that refuses when true; its mutant is never true."""
        if not value:
            return value
        self.seen.add(number)
        return False if self.active == number else value

    def accepts(self, number: int, value: object) -> object:
        """A condition that accepts when true; its mutant is always true."""
        if value:
            return value
        self.seen.add(number)
        return True if self.active == number else value

    def bits(self, number: int, value: int, mask: int = -1) -> int:
        """An operand of a bitwise or of which `mask` is looked at; its mutant is 0."""
        if not value & mask:
            return value
        self.seen.add(number)
        return 0 if self.active == number else value

    def removed(self, number: int) -> bool:
        """Whether a statement is left out; `raised` notes when that matters."""
        return self.active == number

    def removed_unseen(self, number: int) -> bool:
        """The same for a check that notes what is wrong instead of raising: it may matter to any test."""
        self.reached.add(number)
        return self.active == number

    def raised(self, number: int) -> None:
        """A statement that may be left out has raised."""
        self.seen.add(number)

    def passed_on(self, number: int) -> bool:
        """Whether a handler lets the exception go on instead of refusing in the documents' words."""
        self.seen.add(number)
        return self.active == number

    def caught(self, number: int, types: _Types) -> _Types:
        """What a handler catches that only lets the exception go on; its mutant catches nothing."""
        if not isinstance(sys.exception(), types):
            return types
        self.seen.add(number)
        return () if self.active == number else types

    def compare(
        self, halves: tuple[int, ...], limits: tuple[int, ...], ops: tuple[str, ...], *values: object
    ) -> object:
        """A comparison, chained or not.

        Args:
            halves: the mutants that leave out one comparison of a chain, or -1.
            limits: the mutants that take the neighbour (< for <=), or -1.
            ops: names of the operators, as `ast` has them.
            values: one more than operators.
        """
        result: object = True
        for at, op in enumerate(ops):
            left, right = values[at], values[at + 1]
            part = OPERATORS[op](left, right)
            if limits[at] >= 0:
                other = OPERATORS[_NEIGHBOUR[op]](left, right)
                if bool(other) != bool(part):
                    self.seen.add(limits[at])
                    part = other if self.active == limits[at] else part
            result = part if halves[at] < 0 else self.accepts(halves[at], part)
            if not result:
                return result
        return result


SWITCH: Final = Switch()
