"""The first file system of a guest that runs one program; what could not run is refused before a boot."""

from __future__ import annotations

import argparse
import stat
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.guest_program.conftest import RELEASE
from tests.unit.guest_program.test_cpio import unpack

from swsnp.cli.qemu_devices import with_program_input
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.cli.vm_program import program_of
from swsnp.errors import InputError, SwsnpError, UsageError
from swsnp.measure.kernel_image import parse_kernel
from swsnp.testing.tiny_kernel import tiny_kernel
from swsnp.vmm.guest_init import INIT_FAILED, InitPlan, build_init
from swsnp.vmm.initramfs import exit_status, prepare_program
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STATIC = build_init(InitPlan(argv=("/bin/p",), environment=()))


def dynamic(interpreter: str, machine: int = 62) -> bytes:
    """An ELF-64 program that names a dynamic linker."""
    ehdr = b"\x7fELF\2\1\1".ljust(16, b"\0")
    ehdr += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    raw = interpreter.encode() + b"\0"
    return ehdr + struct.pack("<IIQQQQQQ", 3, 4, 120, 0, 0, len(raw), len(raw), 1) + raw


@pytest.fixture
def client(tmp_path: Path) -> Path:
    """A static program."""
    path = tmp_path / "client"
    path.write_bytes(STATIC)
    return path


def test_static_program(client: Path) -> None:
    """The program lies in /bin, the init is told its arguments, and the kernel is told the init."""
    made = prepare_program([str(client), "a b", "-c"])
    files = unpack(made.initramfs)
    assert files["bin/client"].data == STATIC
    assert all(text in files[".swsnp/init"].data for text in (b"/bin/client\0", b"a b\0", b"-c\0"))
    assert made.cmdline.split()[-3:] == ["pci=off", "swiotlb=128", "rdinit=/.swsnp/init"]
    assert stat.S_ISCHR(files["dev/console"].mode)
    assert files["dev/console"].rdev == (5, 1)


def test_same_bytes(client: Path) -> None:
    """A measurement that covers the archive can be computed beforehand anywhere."""
    assert prepare_program([str(client)]) == prepare_program([str(client)])


def test_ports_of_a_program(client: Path) -> None:
    """The port with the standard output takes the program's, another has its input; else COM2, and none."""
    ports = "-device virtio-rng-device -device virtio-serial-device -device virtserialport,chardev=n "
    ports += "-device virtserialport,chardev=c -chardev null,id=n -chardev"
    kernel, given = parse_kernel(tiny_kernel(), "k"), options(exec=[str(client)])
    for chardev, there, missing in (
        ("stdio,id=c", (b"/dev/vport1p3\0", b"/dev/vport1p2\0"), (b"/dev/ttyS1", b"/dev/null")),
        ("null,id=c", (b"/dev/null\0", b"/dev/ttyS1\0"), (b"/dev/vport",)),
    ):
        qemu = parse_qemu_options(["-kernel", "k", *ports.split(), chardev])
        made = program_of(given, replace(qemu, devices=with_program_input(qemu.devices)), kernel)
        assert made is not None
        init = unpack(made.initramfs)[".swsnp/init"].data
        assert sorted(there, key=init.index) == list(there)
        assert not any(each in init for each in missing)


@pytest.mark.parametrize(("line", "slabs"), [("", "128"), ("-device virtio-rng-device", "4096")])
def test_bounce_buffers_for_devices_only(client: Path, line: str, slabs: str) -> None:
    """Linux before 6.6 makes them shared page by page: a guest without a device has next to none."""
    qemu, kernel = parse_qemu_options(["-kernel", "k", *line.split()]), parse_kernel(tiny_kernel(), "k")
    made = program_of(options(exec=[str(client)]), qemu, kernel)
    assert made is not None
    assert f"swiotlb={slabs}" in made.cmdline.split()


def test_output_by_a_console(client: Path) -> None:
    """A console is a terminal, which changes bytes."""
    line = "-device virtio-serial-device -device virtconsole,chardev=c -chardev stdio,id=c"
    qemu, kernel = parse_qemu_options(["-kernel", "k", *line.split()]), parse_kernel(tiny_kernel(), "k")
    with pytest.raises(UsageError, match="with --exec wanted a virtserialport, not a virtconsole"):
        program_of(options(exec=[str(client)]), qemu, kernel)


def test_drivers_of_devices(client: Path, package: Callable[..., Path]) -> None:
    """--modules loads what the devices need, each once, in their order."""
    names = ("virtio_mmio", "virtio_blk", "virtio_rng", "virtio_net", "virtio_console", "virtiofs")
    qemu = parse_qemu_options(
        [
            *("-kernel", "k", "-machine", "q35", "-nic", "user", "-device", "virtio-serial-device"),
            *("-device", "virtio-rng-device", "-drive", "file=d,if=virtio", "-nic", "user"),
            *("-chardev", "socket,id=c,path=s", "-device", "vhost-user-fs-device,chardev=c,tag=t"),
        ]
    )
    given = options(exec=[str(client)], modules=package(dict.fromkeys(names, "")))
    made = program_of(given, qemu, parse_kernel(tiny_kernel(), "k"))
    assert made is not None
    files = unpack(made.initramfs)
    loaded = [path.split("-")[1][:-3] for path in files if path.endswith(".ko")]
    assert loaded == ["virtio_mmio", "virtio_net", "virtio_console", "virtio_rng", "virtio_blk", "virtiofs"]


def test_modules(client: Path, package: Callable[..., Path]) -> None:
    """Modules lie in the archive in their order; configfs is mounted where its module is loaded."""
    modules = find_modules(package({"tsm": "configfs", "configfs": ""}), ("tsm",))
    made = prepare_program([str(client)], modules=modules)
    files = unpack(made.initramfs)
    assert [path for path in files if path.endswith(".ko")] == [
        ".swsnp/modules/00-configfs.ko",
        ".swsnp/modules/01-tsm.ko",
    ]
    init = files[".swsnp/init"].data
    assert init.index(b"/.swsnp/modules/00") < init.index(b"/.swsnp/modules/01") < init.index(b"/sys/kernel")
    assert made.release == RELEASE


def test_tree(tmp_path: Path) -> None:
    """With a directory the program is a path in it, and its interpreter may lie there."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "ld.so").write_bytes(STATIC)
    (tmp_path / "client").write_bytes(dynamic("/lib/ld.so"))
    files = unpack(prepare_program(["/client"], tree=tmp_path).initramfs)
    assert files["lib/ld.so"].data == STATIC
    assert b"/client\0" in files[".swsnp/init"].data


def test_tree_with_linked_directory(tmp_path: Path) -> None:
    """Debian's /lib64 is a link into /usr: what lies behind it counts as there."""
    (tmp_path / "usr" / "lib64").mkdir(parents=True)
    (tmp_path / "lib64").symlink_to("usr/lib64")
    (tmp_path / "client").write_bytes(dynamic("/lib64/ld.so"))
    assert prepare_program(["client"], tree=tmp_path).initramfs


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (dynamic("/lib64/ld.so"), r"needs /lib64/ld\.so, which the guest does not have"),
        (b"#!/bin/sh\n", r"needs /bin/sh, which the guest does not have"),
        (b"#!\n", r"needs , which"),
        (b"text", r"begins with 74 65 78 74; wanted an ELF-64 program or a script"),
        (dynamic("/lib64/ld.so", machine=183), r"is for ELF machine 183, wanted 62"),
        (dynamic("/l")[:32] + b"\xff" * 8 + dynamic("/l")[40:], r"damaged: program headers lie outside"),
        (dynamic("/lib64/ld.so")[:70], r"damaged: program headers lie outside its 70 bytes"),
    ],
)
def test_refused_programs(tmp_path: Path, content: bytes, why: str) -> None:
    """execve(2) in the guest would fail for these."""
    path = tmp_path / "client"
    path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        prepare_program([str(path)])


def test_missing_program(tmp_path: Path) -> None:
    """A file that is not there, on the host or in the directory."""
    with pytest.raises(InputError, match="cannot be read"):
        prepare_program([str(tmp_path / "none")])
    with pytest.raises(InputError, match="no none; with a directory"):
        prepare_program(["/none"], tree=tmp_path)


@pytest.mark.parametrize("command", [[], [""]])
def test_no_program(command: list[str]) -> None:
    """--exec without a word."""
    with pytest.raises(UsageError, match="wanted a program"):
        prepare_program(command)


@given(st.binary(max_size=200))
def test_hostile_programs(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    """Any file is a program for the guest or refused, with its name."""
    path = tmp_path_factory.mktemp("hostile") / "client"
    path.write_bytes(b"\x7fELF\2\1" + tail)
    try:
        prepare_program([str(path)])
    except SwsnpError as error:
        assert str(path) in str(error)  # noqa: PT017  # either outcome is right


def test_exit_status() -> None:
    """A guest that ended without a status has failed, whatever its kernel thinks."""
    assert (exit_status(0), exit_status(137), exit_status(None)) == (0, 137, INIT_FAILED)


# The command line's part


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**(dict.fromkeys(("exec", "exec_dir", "modules", "module")) | given))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"exec_dir": "d"}, "--exec-dir: wanted --exec PROGRAM with it"),
        ({"modules": "d"}, "--modules: wanted --exec PROGRAM with it"),
        ({"module": ["m"]}, "--module: wanted --exec PROGRAM with it"),
        ({"exec": "p", "module": ["m"]}, "--module: wanted --modules DIR with it"),
    ],
)
def test_options_that_go_together(given: dict[str, object], text: str) -> None:
    """What only a program in the guest would use is refused without one."""
    kernel, qemu = parse_kernel(tiny_kernel(), "k"), parse_qemu_options(["-kernel", "k"])
    assert program_of(options(), qemu, kernel) is None
    with pytest.raises(UsageError, match=text):
        program_of(options(**given), qemu, kernel)


@pytest.mark.parametrize("release", [RELEASE, "", "6.1.0"])
def test_modules_of_another_kernel(client: Path, package: Callable[..., Path], release: str) -> None:
    """init_module(2): the kernel takes modules of its own release; a file that does not tell is believed."""
    kernel = replace(parse_kernel(tiny_kernel(), "k"), release=release)
    qemu = parse_qemu_options(["-kernel", "k"])
    given = options(exec=[str(client)], modules=package({"tsm": ""}), module=["tsm"])
    if release in (RELEASE, ""):
        assert program_of(given, qemu, kernel) is not None
    else:
        with pytest.raises(InputError, match=f"module tsm is for kernel {RELEASE}, the kernel is 6.1.0"):
            program_of(given, qemu, kernel)
