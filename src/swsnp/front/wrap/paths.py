"""From the path that a thread passed to the path it means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from swsnp.front.wrap.bpf import AT_FDCWD

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Resolver", "signed"]

_INT_MAX: Final = 0x7FFF_FFFF


def signed(argument: int) -> int:
    """A C `int` from a 64-bit argument register, whose upper half means nothing."""
    low = argument & 0xFFFF_FFFF
    return low - (1 << 32) if low > _INT_MAX else low


class Resolver:
    """Makes paths absolute and plain, without following symbolic links.

    A link to a virtual path, and `..` behind a link, are therefore seen as the kernel sees them: not found.
    """

    def __init__(self, prefixes: tuple[bytes, ...], *, readlink: Callable[[str], str] = os.readlink) -> None:
        """A resolver.

        Args:
            prefixes: what every virtual path starts with.
            readlink: reads a link of /proc; raises OSError.
        """
        self._prefixes = prefixes
        self._readlink = readlink

    def resolve(self, tid: int, dirfd: int, path: bytes) -> bytes | None:
        """The absolute path, or None when it cannot be a virtual one.

        Args:
            tid: the thread that passed it.
            dirfd: AT_FDCWD or a descriptor of that thread; looked at for relative paths only.
            path: as passed, without NUL.

        Returns:
            Absolute, without `.`, `..` and empty components; a slash at the end is kept, since it asks for a
            directory.
        """
        if path.startswith(b"/"):
            if not path.startswith(self._prefixes) and b"//" not in path and b"/." not in path:
                return None  # nearly every call of nearly every program ends here
            whole = path
        else:
            base = self._base(tid, dirfd) if path else None
            if base is None:
                return None
            whole = base + b"/" + path
        plain = b"/" + os.path.normpath(whole).lstrip(b"/")  # normpath keeps two slashes at the start
        if not plain.startswith(self._prefixes):
            return None
        return plain + b"/" if path.endswith((b"/", b"/.")) else plain

    def _base(self, tid: int, dirfd: int) -> bytes | None:
        link = f"/proc/{tid}/cwd" if dirfd == AT_FDCWD else f"/proc/{tid}/fd/{dirfd}"
        try:
            return os.fsencode(self._readlink(link))
        except OSError:
            return None  # no such descriptor: the kernel will say so
