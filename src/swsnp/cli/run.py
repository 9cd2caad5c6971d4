"""`swsnp run -- PROGRAM ARGS…`: an unmodified program finds a working /dev/sev-guest and configfs-tsm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from swsnp.cli import common

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from swsnp.guest.boot import BootedGuest
    from swsnp.guest.tsm import ConfigfsTsm
    from swsnp.machine import VirtualMachine

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """The verb; the exit code is the program's own, or 128 plus the signal that ended it."""
    options, program = _options(arguments)
    from swsnp.abi.snp_report import Product
    from swsnp.front import wrap
    from swsnp.machine import Machine

    wrap.require_usable()
    machine = Machine(
        product=Product[options.product.upper()],
        profile=options.profile,
        seed=common.seed_of(options),
        amd_names=options.amd_names,
    )
    certs = None if options.no_certs else options.certs_path or "machine"
    with machine.create_vm("run", certs=certs, vcpus=options.vcpus) as vm:
        guest = vm.boot()
        if options.save_root:
            common.save(options.save_root, machine.root_certificate)
        return wrap.run(program, vm, tsm=_configfs_tsm(vm, guest))


def _configfs_tsm(vm: VirtualMachine, guest: BootedGuest) -> ConfigfsTsm:
    """The guest's configfs-tsm; below VMPL0 it has the attributes about services too."""
    from swsnp.guest.tsm import ConfigfsTsm
    from swsnp.guest.tsm_report import SevGuestProvider, ext_report_through

    tsm = ConfigfsTsm()
    floor = guest.vmpl if vm.driver is None else vm.driver.vmpck_id
    tsm.register(SevGuestProvider(ext_report_through(vm), privlevel_floor=floor, services=guest.vmpl > 0))
    return tsm


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    command = common.parser("run")
    command.usage = "swsnp run [options] -- PROGRAM [ARGS ...]"
    common.add_machine(command)
    command.add_argument(
        "--vcpus", type=common.positive, default=1, metavar="N", help="of the guest (default: 1)"
    )
    certs = command.add_mutually_exclusive_group()
    certs.add_argument(
        "--certs-path",
        type=Path,
        metavar="FILE",
        help="certificate blob to serve (default: the machine's own)",
    )
    certs.add_argument("--no-certs", action="store_true", help="a host without certificates")
    command.add_argument("--save-root", type=Path, metavar="FILE", help="write the machine's root, DER")
    given = list(arguments)
    at = given.index("--") if "--" in given else len(given)
    options, rest = command.parse_known_args(given[:at])
    program = given[at + 1 :]
    if rest:
        command.error(f"{' '.join(rest)}: not an option; put -- before the program")
    if not program:
        command.error("no program: put it after --")
    return options, program
