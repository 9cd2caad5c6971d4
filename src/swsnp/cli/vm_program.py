"""`swsnp vm -kernel K`: what the guest boots into instead of a distribution's initial RAM disk.

`--exec PROGRAM` makes a guest of one program; `--modules` with `root=` in `-append` one that goes on in the
root file system of its disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.cli.qemu_chardevs import STDIN, STDIO
from swsnp.cli.qemu_devices import DiskDevice, EntropyDevice
from swsnp.cli.qemu_folders import FolderDevice
from swsnp.cli.qemu_netdevs import NetDevice
from swsnp.cli.qemu_ports import SerialDevice
from swsnp.errors import InputError, UsageError
from swsnp.vmm.initramfs import (
    REPORT_CRYPTO,
    REPORT_MODULES,
    GuestProgram,
    prepare_program,
    prepare_root,
    root_plan,
)
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    import argparse

    from swsnp.cli.qemu_options import QemuOptions
    from swsnp.measure.kernel_image import KernelImage
    from swsnp.vmm.guest_init import RootPlan
    from swsnp.vmm.kernel_modules import KernelModule

__all__ = ["program_of"]

_DRIVERS: Final = {
    DiskDevice: "virtio_blk",
    EntropyDevice: "virtio_rng",
    FolderDevice: "virtiofs",
    NetDevice: "virtio_net",
    SerialDevice: "virtio_console",
}
_CHECKSUMS: Final = ("crc32c_generic",)
"""Up to Linux 6.12 ext4 and btrfs ask the kernel's crypto API for crc32c, which no dependency tells."""


def program_of(ours: argparse.Namespace, options: QemuOptions, kernel: KernelImage) -> GuestProgram | None:
    """The program that the guest shall run, or the root that it shall go on in; None for neither.

    An ordinary guest has no sev-guest device: what reports need is not loaded there.

    Args:
        ours: our own options.
        options: QEMU's; with --exec what `with_program_input` makes of them.
        kernel: what is to be booted.

    Raises:
        UsageError: options of --exec without it, or --module without --modules.
        InputError: program or modules cannot be read, do not fit the guest, or are another kernel's.
    """
    root = root_plan(options.append) if ours.exec is None and ours.modules is not None else None
    if ours.exec is None and (root is None or ours.exec_dir is not None):
        given = [name for name in ("exec_dir", "modules", "module") if getattr(ours, name) is not None]
        if not given:
            return None
        other = "" if given[0] == "exec_dir" else ", or root=/dev/vda in -append"
        raise UsageError(f"--{given[0].replace('_', '-')}: wanted --exec PROGRAM with it{other}")
    if ours.module is not None and ours.modules is None:
        raise UsageError("--module: wanted --modules DIR with it, where the module is")
    modules = _modules(ours, options, root)
    for each in modules:
        if kernel.release and each.release != kernel.release:
            raise InputError(
                f"{ours.modules}: module {each.name} is for kernel {each.release}, "
                f"the kernel is {kernel.release}"
            )
    if root is not None:
        return prepare_root(root, modules)
    return prepare_program(
        ours.exec,
        tree=ours.exec_dir,
        modules=modules,
        ports=_ports(options),
        virtio=bool(options.devices),
    )


def _ports(options: QemuOptions) -> tuple[str, str] | None:
    """The guest's names of the ports that have the standard input and output; None when none has.

    Linux numbers virtio devices in the order of the namespace.
    """
    found: dict[str, str] = {}
    for number, device in enumerate(options.devices):
        for port in device.ports if isinstance(device, SerialDevice) else ():
            if port.chardev.kind == STDIO and port.is_console:
                raise UsageError("-chardev stdio: with --exec wanted a virtserialport, not a virtconsole")
            found[port.chardev.kind] = f"vport{number}p{port.number}"
    return (found[STDIN], found[STDIO]) if STDIO in found else None


def _modules(ours: argparse.Namespace, options: QemuOptions, root: RootPlan | None) -> list[KernelModule]:
    """Those that are named, or what devices, root file system and reports need."""
    if ours.modules is None:
        return []
    if ours.module is not None:
        return find_modules(ours.modules, tuple(ours.module))
    drivers = [_DRIVERS[type(each)] for each in options.devices]
    wanted = [*dict.fromkeys(["virtio_mmio", *drivers])] if drivers else []
    if root is not None:
        wanted.append(root.kind)
    if_there = list(_CHECKSUMS) if root is not None else []
    if not options.ordinary:
        if_there += REPORT_CRYPTO
        wanted += REPORT_MODULES
    return find_modules(ours.modules, tuple(wanted), if_there=tuple(if_there))
