"""`swsnp measure kernel`: the launch digest of a guest that `swsnp vm -kernel` starts without firmware."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from swsnp.abi.snp_launch import CpuidPage
from swsnp.cli import GOOD
from swsnp.cli.arguments import parser
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.errors import InputError, UsageError
from swsnp.measure.direct_boot import LAYOUT, DirectBoot, virtio_places
from swsnp.measure.kernel_image import read_kernel
from swsnp.measure.vmsa_pages import signature_of_model
from swsnp.vmm.config import memory_map

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from swsnp.cli.qemu_options import QemuOptions

__all__ = ["run_kernel"]

_EPILOG = """The options of swsnp vm that decide it, as there: -kernel, -initrd, -append, -m, -smp, -cpu; of
-drive, -blockdev and -device how many devices they make, since ACPI's tables name each.
The C-bit is in the page tables that are launched, so it is measured: --cbitpos is that of the host
(swsnp vm --stats names it). What --exec adds is measured as the -initrd and -append that it makes."""


def run_kernel(arguments: Sequence[str]) -> int:
    """The verb; errors as `swsnp vm -kernel`."""
    ours, rest = _options(arguments)
    options = parse_qemu_options(rest)
    if options.kernel is None or options.bios is not None:
        raise UsageError("measure kernel: wanted -kernel, and no -bios")
    boot, signature = _boot(options, ours.cbitpos)
    digest = boot.digest(signature=signature)
    parts = [
        {"origin": each.origin, "type": each.page_type.name, "gpa": each.gpa, "pages": len(each.data) // 4096}
        for each in boot.parts
    ]
    if ours.json:
        print(json.dumps({"measurement": digest.hex(), "layout": LAYOUT, "parts": parts}, indent=2))
        return GOOD
    if ours.explain:
        for each in parts:
            print(f"{each['gpa']:#012x}  {each['pages']:>6} pages  {each['type']:10} {each['origin']}")
    print(digest.hex())
    return GOOD


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    text = "the launch digest of a kernel that runs without firmware"
    command = parser("measure kernel", description=text, epilog=_EPILOG)
    command.add_argument("--cbitpos", type=int, required=True, metavar="N", help="the host's C-bit position")
    command.add_argument("--explain", action="store_true", help="what is launched, in order")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    return command.parse_known_args(arguments)


def _boot(options: QemuOptions, c_bit: int) -> tuple[DirectBoot, int]:
    if not 32 <= c_bit <= 51:
        raise UsageError(f"--cbitpos: got {c_bit}, wanted 32..51")
    if options.snp.cbitpos not in (None, c_bit):
        raise UsageError(f"--cbitpos: got {c_bit}, and cbitpos={options.snp.cbitpos} in the object; give one")
    signature = signature_of_model(options.cpu_model)
    if signature is None:
        raise UsageError(f"-cpu: got model {options.cpu_model!r}, wanted one whose CPUID signature is known")
    assert options.kernel is not None  # noqa: S101  # the caller looked
    boot = DirectBoot(
        read_kernel(options.kernel),
        initrd=b"" if options.initrd is None else _read(options.initrd),
        cmdline=options.append,
        memory=memory_map(options.memory_size, ()),
        vcpus=options.cpus,
        c_bit=c_bit,
        cpuid=CpuidPage(),
        devices=virtio_places(len(options.devices)),
    )
    return boot, signature


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
