"""`swsnp vm -kernel K --exec PROGRAM …`: what the guest boots into instead of a distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swsnp.errors import InputError, UsageError
from swsnp.vmm.initramfs import REPORT_CRYPTO, REPORT_MODULES, GuestProgram, prepare_program
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from swsnp.measure.kernel_image import KernelImage
    from swsnp.vmm.kernel_modules import KernelModule

__all__ = ["program_of"]


def program_of(
    ours: argparse.Namespace, kernel: KernelImage, *, ordinary: bool = False
) -> GuestProgram | None:
    """The program that the guest shall run; None without --exec. An ordinary guest has no sev-guest device.

    Raises:
        UsageError: options of --exec without it, or --module without --modules.
        InputError: program or modules cannot be read, do not fit the guest, or are another kernel's.
    """
    if ours.exec is None:
        if given := [name for name in ("exec_dir", "modules", "module") if getattr(ours, name) is not None]:
            raise UsageError(f"--{given[0].replace('_', '-')}: wanted --exec PROGRAM with it")
        return None
    if ours.module is not None and ours.modules is None:
        raise UsageError("--module: wanted --modules DIR with it, where the module is")
    modules = _modules(ours.modules, [] if ordinary and ours.module is None else ours.module)
    for each in modules:
        if kernel.release and each.release != kernel.release:
            raise InputError(
                f"{ours.modules}: module {each.name} is for kernel {each.release}, "
                f"the kernel is {kernel.release}"
            )
    return prepare_program(ours.exec, tree=ours.exec_dir, modules=modules)


def _modules(where: Path | None, names: list[str] | None) -> list[KernelModule]:
    if where is None:
        return []
    if names is not None:
        return find_modules(where, tuple(names))
    return find_modules(where, REPORT_MODULES, if_there=REPORT_CRYPTO)
