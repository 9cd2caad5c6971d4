"""What `swsnp vm -bios` launches: the same plan that `swsnp measure` measures."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from swsnp.cli.measure import hash_file, read_image
from swsnp.errors import UsageError
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.kernel_hashes import NO_INITRD, KernelHashes
from swsnp.measure.launch_plan import LaunchConfig
from swsnp.measure.vmsa_pages import signature_of_model

if TYPE_CHECKING:
    from swsnp.cli.qemu_options import QemuOptions

__all__ = ["NOT_EXECUTED", "plan_of"]

NOT_EXECUTED = "measured, not executed"
"""What became of a firmware: its pages were launched, and the built-in guest ran in its place."""


def plan_of(options: QemuOptions) -> LaunchConfig | None:
    """The launch of a command line with -bios; None without.

    Raises:
        InputError: a file that cannot be read.
        UsageError: a CPU model without a known signature.
    """
    if options.bios is None:
        return None
    signature = signature_of_model(options.cpu_model)
    if signature is None:
        raise UsageError(f"-cpu: got model {options.cpu_model!r}, wanted one whose CPUID signature is known")
    return LaunchConfig(
        FirmwareVolume(read_image(str(options.bios))),
        vcpus=options.cpus,
        signature=signature,
        hashes=_hashes(options) if options.snp.kernel_hashes else None,
    )


def _hashes(options: QemuOptions) -> KernelHashes:
    initrd = NO_INITRD if options.initrd is None else hash_file(str(options.initrd))
    return KernelHashes(hash_file(str(options.kernel)), initrd, os.fsencode(options.append))
