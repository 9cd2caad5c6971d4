"""What the client in a guest has said: see client.c."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BINARY", "Said"]

BINARY: Final = ("report-1", "report-2", "report-3", "extended", "key", "key-again", "other-key")
"""Lines in base64; "tsm-outblob" too, where the kernel has configfs-tsm."""


@dataclass(frozen=True)
class Said:
    """The client's lines by name; what else was on the console is left out."""

    lines: Mapping[str, str]

    @classmethod
    def of(cls, console: bytes) -> Said:
        """Take the client's lines from all that a console showed."""
        words = (line.strip().partition(" ") for line in console.decode(errors="replace").splitlines())
        return cls({name: value for name, _, value in words if name in _NAMES})

    def blob(self, name: str) -> bytes:
        """A binary value."""
        return base64.b64decode(self.lines[name], validate=True)

    @property
    def done(self) -> bool:
        """The client came to its end, and nothing failed."""
        return "done" in self.lines and "failed" not in self.lines


_NAMES: Final = {
    *BINARY,
    *("certs", "cpus", "done", "failed", "features", "finished", "report-us", "started", "without-room"),
    *("tsm", "tsm-auxblob", "tsm-generation", "tsm-outblob", "tsm-provider"),
}
