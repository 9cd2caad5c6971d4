"""A guest that runs one program: its first file system, and what goes on the kernel's command line.

The guest mounts /proc, /sys, /dev and, where its module is given, configfs; loads modules; and runs the
program. What the program writes to its standard output leaves by the second serial port byte for byte; what
it writes to its standard error goes to the console among the kernel's lines; its exit status leaves by
a port.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.errors import InputError, UsageError
from swsnp.vmm.cpio import CpioEntry, device, directory, pack_cpio, program, tree_entries
from swsnp.vmm.guest_init import INIT_FAILED, InitPlan, build_init

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from swsnp.vmm.kernel_modules import KernelModule

__all__ = ["REPORT_CRYPTO", "REPORT_MODULES", "GuestProgram", "exit_status", "prepare_program"]

REPORT_CRYPTO: Final = ("ctr", "ghash-generic", "gcm")
"""Up to Linux 6.12 sev-guest asks the kernel's crypto API for gcm(aes), which no dependency tells."""
REPORT_MODULES: Final = ("sev-guest",)
"""What a guest needs to ask for reports; where the kernel's depends on tsm and configfs, they come along."""
_OURS: Final = ".swsnp"
_CONSOLE: Final = "console=ttyS0 loglevel=4 panic=-1"
_BOUNCE: Final = "swiotlb=4096"
"""8 MiB of bounce buffers: Linux makes 64 MiB or more of a guest's memory shared, before 6.6 page by page."""
_MOUNTS: Final = (("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"))
_CONFIGFS: Final = ("configfs", "/sys/kernel/config")
_ENVIRONMENT: Final = ("PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/", "TERM=dumb")
_EHDR: Final = struct.Struct("<16xHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_X86_64, _PT_INTERP = 62, 3


@dataclass(frozen=True, slots=True)
class GuestProgram:
    """`initramfs` is a cpio archive, not compressed; `cmdline` goes before what the user appends.

    `release` is the kernel release that the modules are for, "" when there are none.
    """

    initramfs: bytes = field(repr=False)
    cmdline: str
    release: str = ""


def prepare_program(
    command: Sequence[str],
    *,
    tree: Path | None = None,
    modules: Sequence[KernelModule] = (),
) -> GuestProgram:
    """A guest for one command.

    Args:
        command: the program and its arguments. Without `tree` the program is a file of the host's and lies in
            the guest's /bin; with `tree` it is a path in the guest.
        tree: a directory that becomes the guest's root, with the program and all that it needs.
        modules: loaded in this order.

    Raises:
        InputError: program or tree cannot be read, or cannot run in the guest: not for x86-64, or its
            interpreter (the dynamic linker, or a script's) would not be there.
        UsageError: no program.
    """
    if not command or not command[0]:
        raise UsageError("wanted a program for the guest to execute")
    entries = tree_entries(tree) if tree is not None else []
    path = _guest_path(command[0], tree, entries)
    places = tuple(f"{_OURS}/modules/{number:02}-{each.name}.ko" for number, each in enumerate(modules))
    has_configfs = any(each.name in {"configfs", "tsm"} for each in modules)
    plan = InitPlan(
        argv=(path, *command[1:]),
        environment=_ENVIRONMENT,
        mounts=_MOUNTS,
        modules=tuple(f"/{each}" for each in places),
        late_mounts=(_CONFIGFS,) if has_configfs else (),
    )
    entries += [directory(each) for each in ("dev", "proc", "sys") if not _is_directory(entries, each)]
    entries += [device("dev/console", 5, 1), program(f"{_OURS}/init", build_init(plan))]
    entries += [program(place, each.data) for place, each in zip(places, modules, strict=True)]
    release = modules[0].release if modules else ""
    return GuestProgram(pack_cpio(entries), f"{_CONSOLE} {_BOUNCE} rdinit=/{_OURS}/init", release)


def exit_status(status: int | None) -> int:
    """What the program ended with, as a shell says it: 128 + N for signal N, 127 when it was not executable.

    Args:
        status: the byte at the exit port; None when the guest ended otherwise, which counts as `INIT_FAILED`.
    """
    return INIT_FAILED if status is None else status


def _is_directory(entries: Sequence[CpioEntry], path: str) -> bool:
    return any(each.path == path and each.mode >> 12 == 0o4 for each in entries)


def _guest_path(name: str, tree: Path | None, entries: list[CpioEntry]) -> str:
    """Where the program lies in the guest; adds it to the entries when it is the host's."""
    from pathlib import Path

    if tree is not None:
        inside = name.lstrip("/")
        found = next((each for each in entries if each.path == inside), None)
        if found is None:
            raise InputError(f"{tree}: no {inside}; with a directory the program is a path in it")
        if found.mode >> 12 == 0o10:
            _judge_program(found.data, name, entries)
        return f"/{inside}"
    host = Path(name)
    try:
        data = host.read_bytes()
    except OSError as error:
        raise InputError(f"{host}: cannot be read: {error.strerror or error}") from None
    _judge_program(data, name, entries)
    entries.append(program(f"bin/{host.name}", data))
    return f"/bin/{host.name}"


def _judge_program(data: bytes, name: str, entries: Sequence[CpioEntry]) -> None:
    """Refuse what the guest could not execute, before it is booted for that."""
    if data.startswith(b"#!"):
        words = data.partition(b"\n")[0][2:].split()
        interpreter = words[0].decode(errors="replace") if words else ""
    elif data.startswith(b"\x7fELF\2\1"):
        interpreter = _elf_interpreter(data, name)
        if not interpreter:
            return
    else:
        raise InputError(f"{name}: begins with {data[:4].hex(' ')}; wanted an ELF-64 program or a script")
    if not any(each.path == interpreter.lstrip("/") for each in entries) and not _through_link(
        interpreter, entries
    ):
        raise InputError(
            f"{name}: needs {interpreter}, which the guest does not have; "
            "wanted a static program, or a directory with all that it needs"
        )


def _through_link(path: str, entries: Sequence[CpioEntry]) -> bool:
    """Whether a directory on the way is a symbolic link: then the kernel finds out."""
    parts = path.lstrip("/").split("/")
    ways = {"/".join(parts[:number]) for number in range(1, len(parts))}
    return any(each.path in ways and each.mode >> 12 == 0o12 for each in entries)


def _elf_interpreter(data: bytes, name: str) -> str:
    """The dynamic linker that a program names; "" when it is static."""
    try:
        header = _EHDR.unpack_from(data)
        machine, start, size, count = header[1], header[4], header[8], header[9]
        segments = [_PHDR.unpack_from(data, start + size * number) for number in range(count)]
    except (struct.error, OverflowError):
        raise InputError(f"{name}: damaged: program headers lie outside its {len(data)} bytes") from None
    if machine != _X86_64:
        raise InputError(f"{name}: is for ELF machine {machine}, wanted {_X86_64} (x86-64)")
    for kind, _, offset, _, _, length, *_ in segments:
        if kind == _PT_INTERP:
            return data[offset : offset + length].rstrip(b"\0").decode(errors="replace")
    return ""
