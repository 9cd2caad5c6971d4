"""What kind of outcome an execution had: a word, or the text of the refusal without its numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["attempt", "kind_of"]

_NUMBERS: Final = re.compile(r"0x[0-9a-f]+|[0-9a-f]{6,}|\d+|b'.*'|'.*'")


def kind_of(error: Exception) -> str:
    """The refusal's type and text, alike for inputs that are refused for the same reason."""
    return f"{type(error).__name__}: {_NUMBERS.sub('#', str(error))[:160]}"


def attempt(call: Callable[[], Any], *refusals: type[Exception]) -> tuple[Any, str]:
    """What `call` returns and "", or None and the kind of its refusal; any other exception goes on."""
    try:
        return call(), ""
    except refusals as error:
        return None, kind_of(error)
