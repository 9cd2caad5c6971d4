"""What became of hostile guest code, and the bound on code that never ends.

Each kind of end is a value of its own, so that a test compares one value with one value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from swsnp.errors import SwsnpError

if TYPE_CHECKING:
    from collections.abc import Generator

    from swsnp.vmm.stop import StopReason

__all__ = [
    "Answer",
    "Held",
    "MsrReplied",
    "Replied",
    "RunError",
    "Running",
    "Seen",
    "StillRunning",
    "Stopped",
    "Unanswered",
    "limited",
]

_T = TypeVar("_T")


class Answer(Enum):
    """What the guest finds in its response page."""

    NONE = "what it was before"
    OPENED = "the firmware's message, which the guest can open"
    GARBAGE = "something else"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replied:
    """KVM replied in the GHCB.

    Attributes:
        info1: SW_EXITINFO1.
        info2: SW_EXITINFO2.
        answer: the response page.
        rbx: RBX of the reply where the case is about it.
        data: the first bytes of what else the case is about: the data page, a page state change's header.
    """

    info1: int
    info2: int
    answer: Answer = Answer.NONE
    rbx: int | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class MsrReplied:
    """KVM replied in the GHCB MSR; `value` without the bits that the case leaves open."""

    value: int


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The guest went on and found no reply: GHCB and MSR as it had left them."""


@dataclass(frozen=True, slots=True)
class RunError:
    """KVM_RUN failed; `errno` is positive."""

    errno: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """The VMM's run loop ended, for another reason than an error of KVM_RUN."""

    reason: StopReason


@dataclass(frozen=True, slots=True)
class Held:
    """KVM keeps the vCPU: halted, and its program has not ended."""


@dataclass(frozen=True, slots=True)
class Running:
    """The program was still running when the budget was used up; `exits` takes no part in comparisons."""

    exits: int = field(default=0, compare=False)


Seen: TypeAlias = Replied | MsrReplied | Unanswered | RunError | Stopped | Held | Running


class StillRunning(SwsnpError):
    """Guest code left its processor `exits` times and had not come to an end."""

    def __init__(self, exits: int) -> None:
        super().__init__(f"guest: still running after {exits} exits")
        self.exits = exits


def limited(program: Generator[None, None, _T], budget: int) -> Generator[None, None, _T]:
    """The same guest program, ended after so many exits.

    Args:
        program: guest code for a built-in processor; each `yield` is one exit.
        budget: how often it may leave the guest.

    Raises:
        StillRunning: it wants to leave once more.
    """
    exits = 0
    try:
        while True:
            try:
                next(program)
            except StopIteration as end:
                return cast("_T", end.value)
            if exits == budget:
                raise StillRunning(exits)
            exits += 1
            yield
    finally:
        program.close()  # what it holds, a driver's mutex for one, is let go
