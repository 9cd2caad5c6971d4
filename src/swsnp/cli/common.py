"""What several verbs share: their parser, options of the machine, writing a file."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Final

from swsnp.cli.arguments import parser
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "PROFILES",
    "TIMES",
    "add_at",
    "add_lock_timeout",
    "add_machine",
    "add_profile",
    "add_seed",
    "at_of",
    "folder",
    "moment",
    "parser",
    "positive",
    "save",
    "seconds",
    "seed_of",
    "utc_now",
]

PROFILES: Final = ("coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2")
"""Named here too, so that --help loads no hypervisor; a test holds them against its table."""
TIMES: Final = "2026-01-31, 2026-01-31T12:00Z or 2026-01-31T12:00+01:00"
"""Examples of what `moment` reads."""
_DAY_S: Final = 86400.0


def add_profile(command: argparse.ArgumentParser) -> None:
    """--profile."""
    command.add_argument(
        "--profile", default=PROFILES[-1], choices=PROFILES, help=f"which KVM (default: {PROFILES[-1]})"
    )


def add_seed(command: argparse.ArgumentParser) -> None:
    """--seed."""
    command.add_argument(
        "--seed", metavar="S", help="make every byte reproducible; whoever knows the seed knows the keys"
    )


def add_machine(command: argparse.ArgumentParser) -> None:
    """--profile, --product, --seed and --amd-names."""
    add_profile(command)
    command.add_argument(
        "--product", default="milan", choices=["milan", "genoa", "turin"], help="which chip (default: milan)"
    )
    add_seed(command)
    command.add_argument(
        "--amd-names",
        action="store_true",
        help="AMD's names in the certificates; the root stays this machine's",
    )


def seed_of(options: argparse.Namespace) -> bytes | None:
    """The seed's bytes."""
    return None if options.seed is None else str(options.seed).encode()


def positive(text: str) -> int:
    """A whole number of at least one; ValueError otherwise, which argparse reports."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def utc_now() -> datetime:
    """The present, aware."""
    return datetime.now(UTC)


def moment(text: str) -> datetime:
    """A time with its zone, or a day, which begins in UTC; argparse reports anything else."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a time such as {TIMES}") from None
    if at.tzinfo is None and len(text) > len("2026-01-31"):
        raise argparse.ArgumentTypeError(f"got {text!r} without a time zone, wanted one such as {TIMES}")
    return at.replace(tzinfo=at.tzinfo or UTC)


def add_at(command: argparse.ArgumentParser, what: str) -> None:
    """--at; `what` is judged at that time. It is None until `at_of` fills it."""
    command.add_argument("--at", type=moment, metavar="TIME", help=f"{what} (default: now): {TIMES}")


def at_of(options: argparse.Namespace, *, now: Callable[[], datetime]) -> datetime:
    """The time of --at, or else the present."""
    return now() if options.at is None else options.at


def add_lock_timeout(command: argparse.ArgumentParser) -> None:
    """--lock-timeout."""
    command.add_argument(
        "--lock-timeout",
        type=seconds,
        default=60.0,
        metavar="S",
        help="seconds to wait for VMMs and other updaters to let go of the blob (default: 60)",
    )


def seconds(text: str) -> float:
    """A duration of at least 0 s; ValueError otherwise, which argparse reports."""
    value = float(text)
    if not 0 <= value < _DAY_S:
        raise ValueError(text)
    return value


def folder(name: str) -> Path:
    """A directory to write into, made if it is not there.

    Raises:
        UsageError: it cannot be made.
    """
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path}: cannot be made: {error.strerror}") from None
    return path


def save(path: Path, data: bytes) -> None:
    """Write a whole file or none: beside it, synced, then renamed over it.

    Raises:
        UsageError: it cannot be written there.
    """
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
