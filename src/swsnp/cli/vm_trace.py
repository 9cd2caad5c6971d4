"""`swsnp vm -kernel … --trace FILE --system-map MAP`: every event in a file, addresses with names."""

from __future__ import annotations

import sys
from bisect import bisect_right
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from swsnp.errors import InputError, UsageError
from swsnp.trace import GuestLeft

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from swsnp.trace import Trace, TraceEvent

__all__ = ["read_file", "symbols_of", "traced"]


def read_file(path: Path) -> bytes:
    """A file that a boot needs.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def symbols_of(path: Path | None) -> Callable[[int], str]:
    """Names addresses by a System.map.

    Raises:
        InputError: it cannot be read, or is none.
    """
    if path is None:
        return hex
    addresses: list[int] = []
    names: list[str] = []
    try:
        for line in read_file(path).decode().splitlines():
            address, _, name = line.split(maxsplit=2)
            addresses.append(int(address, 16))
            names.append(name)
    except ValueError:
        raise InputError(
            f"{path}: line {len(names) + 1}: wanted address, type and name (System.map)"
        ) from None

    def name_of(address: int) -> str:
        at = bisect_right(addresses, address) - 1
        return hex(address) if at < 0 else f"{address:#x} ({names[at]}+{address - addresses[at]:#x})"

    return name_of


def traced(trace: Trace, path: Path | None, symbols: Callable[[int], str]) -> AbstractContextManager[None]:
    """Write every event into the file while the block runs."""

    @contextmanager
    def writing() -> Any:
        if path is None:
            yield
            return
        from swsnp.cli.hops import describe

        file = sys.stderr if str(path) == "-" else _opened(path)

        def show(event: TraceEvent) -> None:
            if isinstance(event, GuestLeft):
                file.write(f"vCPU {event.vcpu}: {event.exit} at {symbols(event.rip)}\n")
            else:
                hop = describe(event)
                file.write(f"  {hop.party}: {hop.text}\n")

        try:
            with trace.listen(show):
                yield
        finally:
            if file is sys.stderr:
                file.flush()
            else:
                file.close()

    return writing()


def _opened(path: Path) -> Any:
    try:
        return path.open("w")
    except OSError as error:
        raise UsageError(f"--trace: {path}: cannot be written: {error.strerror}") from None
