"""Finds the checks of a module and puts their mutants into its syntax tree.

What counts as a check, `Kind` by `Kind`:

* CHECK: `if COND:` whose body ends by raising or returning a refusal, or whose `else` does; the condition of
  `require(...)` and `findings.holds(...)`; `REFUSAL if COND else ANSWER`. The mutant never refuses.
* CALL: a statement that only calls a check by name (`platform.require_init()`). The mutant leaves it out.
* OPERAND: one arm of the `or` in such a condition (of the `and`, where truth accepts), one half of a chained
  comparison, one operand of a bitwise or, one arm of what a function of type bool returns. Left out.
* ACCEPT: `if COND: return`, `continue` right before a refusal. The mutant always accepts.
* GUARD: `if COND:` that returns None, False, RESUMED or nothing. The mutant never does.
* HANDLER: `except` that refuses. The mutant lets the exception go on; where the handler does no more than
  that (`except HostError: raise` before a wider one), the mutant leaves it to the handlers after it.
* LIMIT: < and <=, > and >= inside any of these conditions. The mutant takes the neighbour.

Conditions are still evaluated in a mutant, so that names bound in them exist: what is removed is the refusal.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["SWITCH_NAME", "Kind", "Mutant", "instrument"]

SWITCH_NAME: Final = "__mutants__"
_CONDITION_OF: Final = {"require": 0, "holds": 1}
"""Functions whose argument of this number is a condition that accepts when true."""
_CHECKING_CALL: Final = re.compile(r"end$|_?(require|check|refuse|look_up|validate|authenticate)(_\w+)?$")
_REFUSAL: Final = re.compile(
    r"-errno\.|\b_?E[A-Z]{4,}\b|\b_?ENXIO\b|_(REFUSED|NOT|UNKNOWN|NO|DEAD|BAD|LOST|BUSY)_?|f'|f\"|"
    r"\b(Failed|Retry|TooLarge|Refused|Broken|RunFailed|UnhandledExit|VmmErrno|Step|EntryFailed|_failed)\(|"
    r"\.refused?\(|_finish\(.*_ERROR_|FirmwareStatus\.(?!SUCCESS)|status=|FAIL_INPUT|_generic\(|\brefused\b|"
    r"\(False\b|PREFERRED_NONE|-result|INVALID|_leave\(|Terminated\(|outcome\.result|_ext_failed|result\.fw"
)
_REFUSING_STATEMENT: Final = re.compile(
    r"\.(fail|warn)\(|^\(?(yield from )?(terminate|_refused)\(|\.wipe\(\)$"
)
_NOTHING: Final = ("None", "False", "", "RESUMED")


class Kind(StrEnum):
    """Which sort of check a mutant removes; see the module."""

    CHECK = "check"
    CALL = "call"
    OPERAND = "operand"
    ACCEPT = "accept"
    GUARD = "guard"
    HANDLER = "handler"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change; `file` counts from the repository's root, `text` is what is removed, printed by Python."""

    number: int
    file: str
    line: int
    function: str
    kind: Kind
    text: str

    @property
    def key(self) -> str:
        """What names it in `equivalent.toml`: no line numbers, those move."""
        return f"{self.file}::{self.function}::{self.kind}::{self.text}"


def instrument(source: str, file: str, first: int = 0) -> tuple[ast.Module, list[Mutant]]:
    """Parse a module and put a switch around every check; mutants are numbered from `first`."""
    tree = ast.parse(source)
    work = _Work(file, first)
    for function, name in _functions(tree, ""):
        _Function(function, name, work).patch()
    ast.fix_missing_locations(tree)
    return tree, work.named()


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, f"{prefix}{child.name}"
        name = getattr(child, "name", "") if isinstance(child, ast.ClassDef | ast.FunctionDef) else ""
        yield from _functions(child, f"{prefix}{name}." if name else prefix)


class _Work:
    """What was found so far in one module."""

    def __init__(self, file: str, first: int) -> None:
        self.file, self.first = file, first
        self.found: list[Mutant] = []

    def new(self, node: ast.expr | ast.stmt | ast.excepthandler, function: str, kind: Kind, text: str) -> int:
        number = self.first + len(self.found)
        self.found.append(
            Mutant(
                number=number, file=self.file, line=node.lineno, function=function, kind=kind, text=text[:200]
            )
        )
        return number

    def named(self) -> list[Mutant]:
        """All of them, each with a key of its own."""
        seen: dict[str, int] = {}
        for at, each in enumerate(self.found):
            count = seen[each.key] = seen.get(each.key, 0) + 1
            if count > 1:
                self.found[at] = Mutant(
                    number=each.number,
                    file=each.file,
                    line=each.line,
                    function=each.function,
                    kind=each.kind,
                    text=f"{each.text} #{count}",
                )
        return self.found


class _Function:
    """One function without the functions inside it."""

    def __init__(self, node: ast.FunctionDef, name: str, work: _Work) -> None:
        self.node, self.name, self.work = node, name, work
        self.is_predicate = node.returns is not None and ast.unparse(node.returns) == "bool"
        self.nodes = list(_own_nodes(node))
        self.done: set[int] = set()
        self.assigned: dict[str, list[ast.Assign]] = {}
        for each in self.nodes:
            if isinstance(each, ast.Assign) and len(each.targets) == 1:
                target = each.targets[0]
                if isinstance(target, ast.Name):
                    self.assigned.setdefault(target.id, []).append(each)

    def patch(self) -> None:
        for block in _blocks(self.node):
            self._block(block)
        for node in self.nodes:
            if isinstance(node, ast.Call):
                self._call(node)
            elif isinstance(node, ast.IfExp):
                self._ternary(node)
            elif isinstance(node, ast.ExceptHandler):
                self._handler(node)
            elif isinstance(node, ast.Return) and self.is_predicate and node.value is not None:
                node.value = self._arms(node.value, refuses=None)

    def _block(self, block: list[ast.stmt]) -> None:
        for at, statement in enumerate(block):
            if isinstance(statement, ast.If):
                self._if(statement, block[at + 1] if at + 1 < len(block) else None)
            elif isinstance(statement, ast.Expr) and _checks_by_name(statement.value):
                block[at] = self._removable(statement)

    def _if(self, node: ast.If, after: ast.stmt | None) -> None:
        last = node.body[-1]
        if _refuses(last, node.test):
            self._condition(node, Kind.CHECK, refuses=True)
        elif node.orelse and not isinstance(node.orelse[0], ast.If) and _refuses(node.orelse[-1], node.test):
            self._condition(node, Kind.CHECK, refuses=False)
        elif isinstance(last, ast.Return | ast.Continue) and after is not None and _refuses(after):
            self._condition(node, Kind.ACCEPT, refuses=False)
        elif isinstance(last, ast.Return) and (ast.unparse(last.value) if last.value else "") in _NOTHING:
            self._condition(node, Kind.GUARD, refuses=True)

    def _condition(self, node: ast.If | ast.IfExp, kind: Kind, *, refuses: bool) -> None:
        number = self.work.new(node.test, self.name, kind, ast.unparse(node.test))
        method = "refuses" if refuses else "accepts"
        node.test = _switch(method, number, self._arms(node.test, refuses=refuses))

    def _call(self, node: ast.Call) -> None:
        position = _CONDITION_OF.get(_called(node), -1)
        if 0 <= position < len(node.args):
            condition = node.args[position]
            what = ", ".join(ast.unparse(each) for each in (condition, *node.args[:position]))
            status = ast.unparse(node.args[1]) if not position and len(node.args) > 1 else ""
            text = f"{what} -> {status}" if status else what
            number = self.work.new(condition, self.name, Kind.CHECK, text)
            node.args[position] = _switch("accepts", number, self._arms(condition, refuses=False))

    def _ternary(self, node: ast.IfExp) -> None:
        if any(isinstance(each, ast.JoinedStr) for each in (node.body, node.orelse)):
            return  # words for a message
        if _is_refusal(node.body, node.test):
            self._condition(node, Kind.CHECK, refuses=True)
        elif _is_refusal(node.orelse, node.test):
            self._condition(node, Kind.CHECK, refuses=False)

    def _handler(self, node: ast.ExceptHandler) -> None:
        last = node.body[-1]
        if not _refuses(last) and not (isinstance(last, ast.Return) and _unparsed(last.value) == "False"):
            return
        number = self.work.new(node, self.name, Kind.HANDLER, f"except {_unparsed(node.type)}")
        if node.type is not None and [ast.unparse(each) for each in node.body] == ["raise"]:
            node.type = _switch("caught", number, node.type)
            return
        go_on = ast.If(test=_switch("passed_on", number), body=[ast.Raise()], orelse=[])
        node.body.insert(0, ast.copy_location(go_on, last))

    def _removable(self, statement: ast.Expr) -> ast.stmt:
        number = self.work.new(statement, self.name, Kind.CALL, ast.unparse(statement))
        raised = ast.ExceptHandler(
            type=ast.Name(id="BaseException", ctx=ast.Load()),
            name=None,
            body=[ast.Expr(value=_switch("raised", number)), ast.Raise()],
        )
        guarded = ast.Try(body=[statement], handlers=[raised], orelse=[], finalbody=[])
        assert isinstance(statement.value, ast.Call)
        raises = not _called(statement.value).lstrip("_").startswith("check")
        test = ast.UnaryOp(op=ast.Not(), operand=_switch("removed" if raises else "removed_unseen", number))
        return ast.copy_location(ast.If(test=test, body=[guarded], orelse=[]), statement)

    def _arms(self, node: ast.expr, *, refuses: bool | None) -> ast.expr:
        """Wrap the arms of a condition; `refuses`: what truth means, None when only the callers know."""
        if id(node) in self.done:
            return node
        self.done.add(id(node))
        match node:
            case ast.UnaryOp(op=ast.Not()):
                node.operand = self._arms(node.operand, refuses=None if refuses is None else not refuses)
            case ast.BoolOp():
                node.values = [self._arm(each, node.op, refuses) for each in node.values]
            case ast.Call(func=ast.Name(id="bool"), args=[inner]):
                node.args = [self._arms(inner, refuses=refuses)]
            case ast.IfExp():
                node.body = self._arms(node.body, refuses=refuses)
                node.orelse = self._arms(node.orelse, refuses=refuses)
            case ast.BinOp(op=ast.BitOr() | ast.BitAnd()) if refuses is not False:
                self._bits(node, None)
            case ast.Compare():
                return self._compare(node, refuses)
            case ast.Name() if len(self.assigned.get(node.id, ())) == 1:
                (assignment,) = self.assigned[node.id]
                assignment.value = self._arms(assignment.value, refuses=refuses)
            case _:
                pass
        return node

    def _arm(self, node: ast.expr, op: ast.boolop, refuses: bool | None) -> ast.expr:
        weakens = isinstance(op, ast.Or) if refuses is not False else isinstance(op, ast.And)
        if refuses is None:
            weakens = True
        if not weakens:
            return self._arms(node, refuses=refuses)
        number = self.work.new(node, self.name, Kind.OPERAND, ast.unparse(node))
        method = "refuses" if isinstance(op, ast.Or) else "accepts"
        return _switch(method, number, self._arms(node, refuses=refuses))

    def _bits(self, node: ast.BinOp, mask: ast.expr | None) -> None:
        """Operands of a bitwise or; `mask` is what the whole is held against, as in `(a | b) & mask`."""
        for side, other in (("left", node.right), ("right", node.left)):
            operand: ast.expr = getattr(node, side)
            if isinstance(operand, ast.BinOp) and isinstance(operand.op, ast.BitOr | ast.BitAnd):
                self._bits(operand, other if isinstance(node.op, ast.BitAnd) else mask)
            elif isinstance(node.op, ast.BitOr) and not _is_constant(operand):
                number = self.work.new(operand, self.name, Kind.OPERAND, ast.unparse(operand))
                setattr(node, side, _switch("bits", number, operand, *([mask] if mask else [])))

    def _compare(self, node: ast.Compare, refuses: bool | None) -> ast.expr:
        if isinstance(node.left, ast.BinOp) and isinstance(node.left.op, ast.BitOr):
            return node
        ordered = [isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops]
        if not any(ordered):
            return node
        values, names = [node.left, *node.comparators], [type(op).__name__ for op in node.ops]
        halves, limits = [-1] * len(names), [-1] * len(names)
        for at, is_ordered in enumerate(ordered):
            one = ast.Compare(left=values[at], ops=[node.ops[at]], comparators=[values[at + 1]])
            text = ast.unparse(ast.copy_location(one, node))
            if len(names) > 1 and refuses is not True:
                halves[at] = self.work.new(node, self.name, Kind.OPERAND, text)
            if is_ordered:
                limits[at] = self.work.new(node, self.name, Kind.LIMIT, text)
        numbers = (_tuple(ast.Constant(each) for each in part) for part in (halves, limits, names))
        return ast.copy_location(_method("compare", [*numbers, *values]), node)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from _own_nodes(child)


def _blocks(function: ast.FunctionDef) -> list[list[ast.stmt]]:
    blocks = []
    for node in (function, *_own_nodes(function)):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                blocks.append(block)
    return blocks


def _refuses(statement: ast.stmt, test: ast.expr | None = None) -> bool:
    match statement:
        case ast.Raise():
            return True
        case ast.Return(value=ast.expr() as value):
            return _is_refusal(value, test)
        case ast.Expr(value=value):
            return _REFUSING_STATEMENT.search(ast.unparse(value)) is not None
        case ast.If() if statement.orelse:
            return _refuses(statement.body[-1]) and _refuses(statement.orelse[-1])
    return False


def _is_refusal(value: ast.expr, test: ast.expr | None) -> bool:
    """A refusal by its looks, or the error that the condition has just looked at."""
    if isinstance(value, ast.IfExp):
        return _is_refusal(value.body, None) and _is_refusal(value.orelse, None)
    text = _unparsed(value)
    if _REFUSAL.search(text):
        return True
    looked_at = {each.id for each in ast.walk(test) if isinstance(each, ast.Name)} if test else set()
    return isinstance(value, ast.Name) and value.id in looked_at


def _checks_by_name(value: ast.expr) -> bool:
    if not isinstance(value, ast.Call):
        return False
    name = _called(value)
    return name not in _CONDITION_OF and _CHECKING_CALL.match(name) is not None


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _unparsed(node: ast.AST | None) -> str:
    return "" if node is None else ast.unparse(node)


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.isupper())


def _tuple(elements: Iterable[ast.expr]) -> ast.Tuple:
    return ast.Tuple(elts=list(elements), ctx=ast.Load())


def _method(name: str, arguments: Sequence[ast.expr]) -> ast.Call:
    switch = ast.Name(id=SWITCH_NAME, ctx=ast.Load())
    return ast.Call(
        func=ast.Attribute(value=switch, attr=name, ctx=ast.Load()), args=list(arguments), keywords=[]
    )


def _switch(method: str, number: int, *rest: ast.expr) -> ast.Call:
    call = _method(method, [ast.Constant(number), *rest])
    return ast.copy_location(call, rest[0]) if rest else call
