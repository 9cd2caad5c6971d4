"""What several verbs share: their parser, options of the machine, writing a file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

from swsnp.cli import VERBS
from swsnp.errors import UsageError

__all__ = [
    "PROFILES",
    "add_machine",
    "add_profile",
    "add_seed",
    "parser",
    "positive",
    "save",
    "seed_of",
]

PROFILES: Final = ("coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2")
"""Named here too, so that --help loads no hypervisor; a test holds them against its table."""
_EXIT_CODES: Final = (
    "exit codes: 0 good, 1 bad verdict, 2 usage, 3 unreadable input, 4 not possible on this host"
)


def parser(verb: str, *, description: str | None = None, epilog: str = "") -> argparse.ArgumentParser:
    """The argument parser of one verb; `description` for a verb below another."""
    return argparse.ArgumentParser(
        prog=f"swsnp {verb}",
        description=VERBS[verb] if description is None else description,
        epilog=f"{epilog}\n\n{_EXIT_CODES}".lstrip(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


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
