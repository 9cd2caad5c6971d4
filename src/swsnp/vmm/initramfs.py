"""What a guest has before any root file system: its first files, and what goes on the kernel's command line.

The guest mounts /proc, /sys, /dev and, where its module is given, configfs, and loads modules.

Then it runs one program. What the program writes to its standard output leaves by the second serial port, or
by a virtio port, byte for byte, and another virtio port may have its standard input; what it writes to its
standard error goes to the console among the kernel's lines; its exit status leaves by a port.

Or it mounts the root file system that the command line names, and goes on as that one's first program.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from swsnp.errors import InputError, UsageError
from swsnp.vmm.cpio import CpioEntry, device, directory, pack_cpio, program, tree_entries
from swsnp.vmm.guest_init import INIT_FAILED, InitPlan, RootPlan, build_init

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from swsnp.vmm.kernel_modules import KernelModule

__all__ = [
    "REPORT_CRYPTO",
    "REPORT_MODULES",
    "GuestProgram",
    "exit_status",
    "prepare_program",
    "prepare_root",
    "root_plan",
]

REPORT_CRYPTO: Final = ("ctr", "ghash-generic", "gcm")
"""Up to Linux 6.12 sev-guest asks the kernel's crypto API for gcm(aes), which no dependency tells."""
REPORT_MODULES: Final = ("sev-guest",)
"""What a guest needs to ask for reports; where the kernel's depends on tsm and configfs, they come along."""
_OURS: Final = ".swsnp"
_CONSOLE: Final = "console=ttyS0 loglevel=4 panic=-1"
_NO_PCI: Final = "pci=off"
"""The machine has none, for which Linux would ask hundreds of ports, each an exit."""
_BOUNCE: Final = "swiotlb=4096"
"""8 MiB of bounce buffers: Linux makes 64 MiB or more of a guest's memory shared, before 6.6 page by page."""
_NO_BOUNCE: Final = "swiotlb=128"
"""256 KiB, the least that Linux takes: no device of the guest reaches its memory."""
_BOUNCE_DISKS: Final = "swiotlb=8192"
"""16 MiB: a disk's largest request, whatever else goes on."""
_MOUNTS: Final = (("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"))
_CONFIGFS: Final = ("configfs", "/sys/kernel/config")
_ROOT: Final = f"/{_OURS}/root"
_FIRST_PROGRAMS: Final = ("/sbin/init", "/etc/init", "/bin/init", "/bin/sh")
"""Those that the kernel itself would try."""
_FILE_SYSTEM: Final = "ext4"
_ENVIRONMENT: Final = ("PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/", "TERM=dumb")
_EHDR: Final = struct.Struct("<16xHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_X86_64, _PT_INTERP = 62, 3


@dataclass(frozen=True, slots=True)
class GuestProgram:
    """`initramfs` is a cpio archive, not compressed; `cmdline` goes before what the user appends.

    `release` is the kernel release that the modules are for, "" when there are none. `tells_status`: the
    guest ends with one program, whose output and status leave as this module's text says.
    """

    initramfs: bytes = field(repr=False)
    cmdline: str
    release: str = ""
    tells_status: bool = True


def prepare_program(
    command: Sequence[str],
    *,
    tree: Path | None = None,
    modules: Sequence[KernelModule] = (),
    ports: tuple[str, str] | None = None,
    virtio: bool = False,
) -> GuestProgram:
    """A guest for one command.

    Args:
        command: the program and its arguments. Without `tree` the program is a file of the host's and lies in
            the guest's /bin; with `tree` it is a path in the guest.
        tree: a directory that becomes the guest's root, with the program and all that it needs.
        modules: loaded in this order.
        ports: virtio ports for the program's input and output, as the guest calls them; None: it has no
            input, and the second serial port takes its output.
        virtio: the guest has devices that reach its memory: it gets bounce buffers for them.

    Raises:
        InputError: program or tree cannot be read, or cannot run in the guest: not for x86-64, or its
            interpreter (the dynamic linker, or a script's) would not be there.
        UsageError: no program.
    """
    if not command or not command[0]:
        raise UsageError("wanted a program for the guest to execute")
    entries = tree_entries(tree) if tree is not None else []
    path = _guest_path(command[0], tree, entries)
    plan = InitPlan(argv=(path, *command[1:]), environment=_ENVIRONMENT)
    if ports is not None:
        plan = replace(plan, input=f"/dev/{ports[0]}", output=f"/dev/{ports[1]}", by_ports=True)
    return GuestProgram(
        _packed(plan, entries, modules),
        f"{_CONSOLE} {_NO_PCI} {_BOUNCE if virtio else _NO_BOUNCE} rdinit=/{_OURS}/init",
        _release(modules),
    )


def prepare_root(plan: RootPlan, modules: Sequence[KernelModule]) -> GuestProgram:
    """A guest that goes on in its root file system, with these modules loaded in this order."""
    entries = [directory(_ROOT.lstrip("/"))]
    initramfs = _packed(InitPlan(root=plan), entries, modules)
    line = f"{_BOUNCE_DISKS} rdinit=/{_OURS}/init"
    return GuestProgram(initramfs, line, _release(modules), tells_status=False)


def root_plan(cmdline: str) -> RootPlan | None:
    """What a command line says of the root file system, as the kernel takes it; None: nothing.

    `root=`, `rootfstype=` (one; ext4 when not given), `rootflags=`, `ro` (when nothing is given) or `rw`, and
    `init=`.

    Raises:
        UsageError: a root that is no device's path, or more than one type.
    """
    words = cmdline.split()
    given = dict(each.split("=", 1) for each in words if "=" in each)
    if "root" not in given:
        return None
    if not given["root"].startswith("/dev/"):
        raise UsageError(f"-append: got root={given['root']}, wanted a path such as root=/dev/vda")
    kind = given.get("rootfstype", _FILE_SYSTEM)
    if not kind or "," in kind:
        raise UsageError(f"-append: got rootfstype={kind}, wanted one file system")
    modes = [each for each in words if each in ("ro", "rw")]
    return RootPlan(
        device=given["root"],
        kind=kind,
        read_only=modes[-1:] != ["rw"],
        options=given.get("rootflags", ""),
        init=(given["init"],) if "init" in given else _FIRST_PROGRAMS,
        where=_ROOT,
    )


def _packed(plan: InitPlan, entries: list[CpioEntry], modules: Sequence[KernelModule]) -> bytes:
    """The archive: what there is, with the first program, its modules and what it mounts on."""
    places = tuple(f"{_OURS}/modules/{number:02}-{each.name}.ko" for number, each in enumerate(modules))
    has_configfs = any(each.name in {"configfs", "tsm"} for each in modules)
    plan = replace(
        plan,
        mounts=_MOUNTS,
        modules=tuple(f"/{each}" for each in places),
        late_mounts=(_CONFIGFS,) if has_configfs else (),
    )
    entries += [directory(each) for each in ("dev", "proc", "sys") if not _is_directory(entries, each)]
    entries += [device("dev/console", 5, 1), program(f"{_OURS}/init", build_init(plan))]
    entries += [program(place, each.data) for place, each in zip(places, modules, strict=True)]
    return pack_cpio(entries)


def _release(modules: Sequence[KernelModule]) -> str:
    return modules[0].release if modules else ""


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
