"""`swsnp run -- PROGRAM ARGS…`: an unmodified program finds a working /dev/sev-guest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swsnp.cli import parser
from swsnp.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """The verb; the exit code is the program's own, or 128 plus the signal that ended it."""
    from swsnp.abi.snp_report import Product
    from swsnp.front import wrap
    from swsnp.machine import Machine

    options, program = _options(arguments)
    wrap.require_usable()
    machine = Machine(
        product=Product[options.product.upper()],
        profile=options.profile,
        seed=options.seed.encode() if options.seed else None,
        amd_names=options.amd_names,
    )
    certs = options.certs_path if options.certs_path else machine.certificate_table
    with machine.create_vm("run", certs=None if options.no_certs else certs, vcpus=options.vcpus) as vm:
        vm.boot()
        if options.save_root:
            save(options.save_root, machine.root_certificate)
        return wrap.run(program, vm)


def save(path: Path, data: bytes) -> None:
    """Write a whole file or none: beside it, synced, then renamed over it.

    Raises:
        UsageError: it cannot be written there.
    """
    import os
    from tempfile import NamedTemporaryFile

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


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    command = parser("run")
    command.usage = "swsnp run [options] -- PROGRAM [ARGS ...]"
    command.add_argument(
        "--profile",
        default="linux-7.2",
        choices=["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"],
        help="which KVM (default: linux-7.2)",
    )
    command.add_argument(
        "--product", default="milan", choices=["milan", "genoa", "turin"], help="which chip (default: milan)"
    )
    command.add_argument("--vcpus", type=int, default=1, metavar="N", help="vCPUs of the guest (default: 1)")
    certs = command.add_mutually_exclusive_group()
    certs.add_argument(
        "--certs-path",
        type=Path,
        metavar="FILE",
        help="certificate blob to serve (default: the machine's own)",
    )
    certs.add_argument("--no-certs", action="store_true", help="a host without certificates")
    command.add_argument(
        "--save-root", type=Path, metavar="FILE", help="write the machine's root certificate (DER)"
    )
    command.add_argument(
        "--amd-names", action="store_true", help="AMD's names in certificates; the root stays ours"
    )
    command.add_argument("--seed", help="make every byte reproducible; whoever knows the seed knows the keys")
    command.add_argument(
        "program", nargs="*", metavar="PROGRAM", help="after --, the program and its arguments"
    )
    given = list(arguments)
    at = given.index("--") if "--" in given else len(given)
    options = command.parse_args(given[:at])
    program = given[at + 1 :]
    if options.program:
        command.error(f"put -- before the program: swsnp run -- {' '.join([*options.program, *program])}")
    if not program:
        command.error("no program after --")
    return options, program
