"""A guest that goes on in the root file system of its disk."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.guest_program.conftest import RELEASE
from tests.unit.guest_program.emulated import command_of, qemu_status, run
from tests.unit.guest_program.test_cpio import unpack
from tests.unit.guest_program.test_init import kernel, says

from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.cli.vm_program import program_of
from swsnp.errors import InputError, UsageError
from swsnp.measure.kernel_image import parse_kernel
from swsnp.testing.tiny_kernel import tiny_kernel
from swsnp.vmm.guest_init import EXIT_PORT, NOT_EXECUTED, RootPlan, _Code
from swsnp.vmm.initramfs import prepare_root, root_plan
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Skip

    from swsnp.measure.kernel_image import KernelImage
    from swsnp.vmm.initramfs import GuestProgram

__all__ = ["kernel"]

LINE = "console=ttyS0 loglevel=4 no_timer_check"
"""On a busy host QEMU's timer comes too late for the kernel's own check."""
TINY = parse_kernel(tiny_kernel(), "k")
WHERE = "/.swsnp/root"
PROGRAMS = ("/sbin/init", "/etc/init", "/bin/init", "/bin/sh")
MODULES = {
    "sev-guest": "",
    "virtio_mmio": "virtio",
    "virtio": "",
    "virtio_blk": "virtio",
    "virtio-rng": "virtio",
    "ext4": "jbd2",
    "jbd2": "",
    "crc32c_generic": "",
    "gcm": "",
}


def plan(**changes: Any) -> RootPlan:
    values: dict[str, Any] = {"device": "/dev/vda", "kind": "ext4", "read_only": True, "options": ""}
    return RootPlan(**{**values, "init": PROGRAMS, "where": WHERE, **changes})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", None),
        ("rw console=ttyS0", None),
        ("root=/dev/vda", plan()),
        ("root=/dev/vdb root=/dev/vda1 rw", plan(device="/dev/vda1", read_only=False)),
        ("rw root=/dev/vda ro", plan()),
        ("root=/dev/vda rootfstype=xfs rootflags=noatime,x=y", plan(kind="xfs", options="noatime,x=y")),
        ("root=/dev/vda init=/bin/true", plan(init=("/bin/true",))),
    ],
)
def test_command_lines(line: str, found: RootPlan | None) -> None:
    """Linux, Documentation/admin-guide/kernel-parameters: what comes last counts, and ro without a word."""
    assert root_plan(line) == found


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("root=UUID=1", "-append: got root=UUID=1, wanted a path such as root=/dev/vda"),
        ("root=", "-append: got root=, wanted a path"),
        ("root=/dev/vda rootfstype=ext4,xfs", "got rootfstype=ext4,xfs, wanted one file system"),
        ("root=/dev/vda rootfstype=", "got rootfstype=, wanted one file system"),
    ],
)
def test_refused_command_lines(line: str, text: str) -> None:
    """What the kernel might find and our first program does not is refused before a boot."""
    with pytest.raises(UsageError, match=text):
        root_plan(line)


def test_archive(package: Callable[..., Path]) -> None:
    """The modules in their order, a place for the root, and a first program that knows it all."""
    made = prepare_root(plan(options="noatime"), find_modules(package(MODULES), ("ext4",)))
    files = unpack(made.initramfs)
    assert [each for each in files if each.endswith(".ko")] == [
        ".swsnp/modules/00-jbd2.ko",
        ".swsnp/modules/01-ext4.ko",
    ]
    init = files[".swsnp/init"].data
    wanted = (
        "/dev/vda",
        "ext4",
        "noatime",
        WHERE,
        f"{WHERE}/dev",
        f"{WHERE}/proc",
        f"{WHERE}/sys",
        *PROGRAMS,
    )
    assert all(f"{each}\0".encode() in init for each in wanted)
    assert ".swsnp/root" in files
    assert (made.cmdline, made.release, made.tells_status) == (
        "swiotlb=8192 rdinit=/.swsnp/init",
        RELEASE,
        False,
    )


# The command line of `swsnp vm`


def made_of(words: str, kernel: KernelImage | None = None, **ours: Any) -> GuestProgram | None:
    options = parse_qemu_options(["-kernel", "k", *words.split("|")])
    arguments = {"exec": None, "exec_dir": None, "modules": None, "module": None, **ours}
    return program_of(argparse.Namespace(**arguments), options, kernel or TINY)


def names(made: GuestProgram | None) -> list[str]:
    assert made is not None
    return [each.partition("-")[2] for each in unpack(made.initramfs) if each.endswith(".ko")]


DISK = "-drive|file=a,if=virtio"
ROOT = "-append|root=/dev/vda"


@pytest.mark.parametrize(
    ("words", "module", "loaded"),
    [
        (
            f"{DISK}|{ROOT}",
            None,
            "crc32c_generic gcm virtio virtio_mmio virtio_blk jbd2 ext4 sev_guest",
        ),
        (
            f"{DISK}|{DISK}|{ROOT}|-device|virtio-rng-device",
            None,
            "crc32c_generic gcm virtio virtio_mmio virtio_blk virtio_rng jbd2 ext4 sev_guest",
        ),
        (
            f"{DISK}|{ROOT} rootfstype=jbd2",
            None,
            "crc32c_generic gcm virtio virtio_mmio virtio_blk jbd2 sev_guest",
        ),
        (f"{DISK}|{ROOT}", ["jbd2"], "jbd2"),
    ],
)
def test_modules_for_a_root(
    package: Callable[..., Path], words: str, module: list[str] | None, loaded: str
) -> None:
    """Drivers of the devices, the file system, and what reports need; --module says it instead."""
    made = made_of(words, modules=package(MODULES), module=module)
    assert made is not None
    assert not made.tells_status
    assert names(made) == [f"{each}.ko" for each in loaded.split()]


def test_modules_for_a_program(package: Callable[..., Path], tmp_path: Path) -> None:
    """A program's guest gets the drivers of its devices, too."""
    program = tmp_path / "program"
    program.write_bytes(says(b"", 0))
    modules = package(MODULES)
    made = made_of("-device|virtio-rng-device", modules=modules, exec=[str(program)])
    assert made is not None
    assert made.tells_status
    assert names(made) == ["gcm.ko", "virtio.ko", "virtio_mmio.ko", "virtio_rng.ko", "sev_guest.ko"]
    made = made_of("-append|root=/dev/vda", modules=modules, exec=[str(program)])
    assert names(made) == ["gcm.ko", "sev_guest.ko"]


def test_modules_without_snp(package: Callable[..., Path]) -> None:
    """A guest without SNP has no device for sev-guest: loading it would fail, and with it the boot."""
    made = made_of(f"-machine|q35|{DISK}|{ROOT}", modules=package(MODULES))
    assert names(made) == [
        f"{each}.ko" for each in ["crc32c_generic", "virtio", "virtio_mmio", "virtio_blk", "jbd2", "ext4"]
    ]


def test_modules_that_do_not_fit(package: Callable[..., Path]) -> None:
    """Modules are named in a directory, and are the kernel's own."""
    with pytest.raises(UsageError, match="--module: wanted --modules DIR with it, where the module is"):
        made_of("-m|512M", exec=["x"], module=["ext4"])
    released = dataclasses.replace(TINY, release="6.1.0")
    with pytest.raises(InputError, match=f"is for kernel {RELEASE}, the kernel is 6.1.0"):
        made_of(f"{DISK}|{ROOT}", kernel=released, modules=package(MODULES))


def test_options_without_use(tmp_path: Path) -> None:
    """Modules are for a program or a root; a directory is for a program only."""
    assert made_of("-m|512M") is None
    assert made_of(ROOT) is None
    for words, ours, text in (
        (
            "-m|512M",
            {"modules": tmp_path},
            "--modules: wanted --exec PROGRAM with it, or root=/dev/vda in -append",
        ),
        ("-m|512M", {"module": ["x"]}, "--module: wanted --exec PROGRAM with it, or root="),
        (ROOT, {"module": ["x"]}, "--module: wanted --exec PROGRAM with it, or root="),
        (ROOT, {"modules": tmp_path, "exec_dir": tmp_path}, "--exec-dir: wanted --exec PROGRAM with it$"),
    ):
        with pytest.raises(UsageError, match=text):
            made_of(words, **ours)


# A real kernel


@pytest.fixture
def image(tmp_path: Path, cannot_run: Skip) -> Callable[[bytes | None], Path]:
    """Makes an ext4 image with one program as /sbin/init, or none."""
    tool = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if tool is None:
        cannot_run("no mke2fs", "apt-get install e2fsprogs")

    def make(program: bytes | None) -> Path:
        tree = tmp_path / "tree"
        for each in ("dev", "proc", "sys", "sbin"):
            (tree / each).mkdir(parents=True)
        if program is not None:
            (tree / "sbin" / "init").write_bytes(program)
            (tree / "sbin" / "init").chmod(0o755)
        path = tmp_path / "root.img"
        subprocess.run([tool, "-q", "-t", "ext4", "-d", tree, path, "16M"], check=True, capture_output=True)
        return path

    return make


def boot(package: Path, tmp_path: Path, disk: Path, line: str) -> tuple[int, bytes]:
    """Exit status and console of QEMU, with the disk on its own bus."""
    modules = find_modules(package, ("virtio_pci", "virtio_blk", "ext4"), if_there=("crc32c_generic",))
    plan = root_plan(line)
    assert plan is not None
    made = prepare_root(plan, modules)
    command = command_of(package, tmp_path, made, f"{LINE} {line}")
    done = run([*command, "-drive", f"file={disk},format=raw,if=virtio"])
    return done.returncode, done.stdout


@pytest.mark.slow
def test_root_is_entered(kernel: Path, tmp_path: Path, image: Callable[[bytes | None], Path]) -> None:
    """The disk's program is the first one, with devices in its tree; it ends the machine itself."""
    code = _Code()
    code.call(2, code.text("/dev/vda"), 0)  # open
    code.emit("48 89 C3")  # mov rbx, rax
    code.call(39)  # getpid
    code.emit("01 C3")  # add ebx, eax: 3 + 1, since 0 to 2 are the console
    code.call(173, EXIT_PORT, 1, 1)  # ioperm
    code.move(2, EXIT_PORT)
    code.emit("89 D8 EE")  # mov eax, ebx; out dx, al
    status, console = boot(kernel, tmp_path, image(code.linked()), "root=/dev/vda rw")
    assert status == qemu_status(4), console


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "text", "code"),
    [
        ("root=/dev/vdx", b"swsnp init: mount /dev/vdx as ext4: errno 002", 125),
        ("root=/dev/vda rootflags=nonsense", b"swsnp init: mount /dev/vda as ext4: errno 022", 125),
        ("root=/dev/vda", b"swsnp init: execute /bin/sh: errno 002", NOT_EXECUTED),
    ],
)
def test_root_that_cannot_be_entered(
    kernel: Path, tmp_path: Path, image: Callable[[bytes | None], Path], line: str, text: bytes, code: int
) -> None:
    """The console says what failed, and the status that something did."""
    status, console = boot(kernel, tmp_path, image(None), line)
    assert text in console
    assert status == qemu_status(code)
