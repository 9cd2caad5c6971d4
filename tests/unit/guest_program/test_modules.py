"""Modules are found by name, after what they depend on, and refused when the guest could not load them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.guest_program.conftest import RELEASE, elf_object

from swsnp.errors import InputError
from swsnp.vmm.kernel_modules import find_modules, module_info

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REPORTS = {"sev-guest": "tsm,aead", "tsm": "configfs", "configfs": "", "aead": ""}


def test_order(package: Callable[..., Path]) -> None:
    """finit_module(2): symbols must be there before, so what a module depends on comes first, each once."""
    found = find_modules(package(REPORTS), ("sev-guest", "tsm"))
    assert [each.name for each in found] == ["configfs", "tsm", "aead", "sev_guest"]
    assert {each.release for each in found} == {RELEASE}
    assert all(each.data.startswith(b"\x7fELF") for each in found)


def test_if_there(package: Callable[..., Path]) -> None:
    """Linux up to 6.12: what sev-guest asks the crypto API for comes before it, where it is a module."""
    where = package({**REPORTS, "gcm": ""})
    found = find_modules(where, ("sev-guest",), if_there=("ctr", "ghash-generic", "gcm"))
    assert [each.name for each in found] == ["gcm", "configfs", "tsm", "aead", "sev_guest"]


def test_release_directory(package: Callable[..., Path]) -> None:
    """The directory that modprobe reads serves as well as the package around it."""
    directory = package(REPORTS) / "lib" / "modules"
    assert find_modules(directory, ("tsm",)) == find_modules(directory / RELEASE, ("tsm",))


def test_release_directory_beside_sources(package: Callable[..., Path]) -> None:
    """Modprobe's directory has a link to the kernel's sources, which have a directory `kernel` too."""
    directory = package(REPORTS) / "lib" / "modules" / RELEASE
    (directory / "build" / "kernel").mkdir(parents=True)
    assert [each.name for each in find_modules(directory, ("tsm",))] == ["configfs", "tsm"]


def test_built_in(package: Callable[..., Path]) -> None:
    """modules.builtin: what the kernel has needs no loading."""
    where = package({"sev-guest": "tsm"}, "kernel/drivers/virt/coco/tsm.ko\n")
    assert [each.name for each in find_modules(where, ("sev_guest",))] == ["sev_guest"]


def test_missing(package: Callable[..., Path]) -> None:
    """The chain that asked for it is named."""
    with pytest.raises(InputError, match=r"no module sev_guest -> tsm, and modules\.builtin"):
        find_modules(package({"sev-guest": "tsm"}), ("sev-guest",))


def test_loop(package: Callable[..., Path]) -> None:
    """No order loads modules that depend on each other."""
    with pytest.raises(InputError, match="depend on each other: a -> b -> a"):
        find_modules(package({"a": "b", "b": "a"}), ("a",))


def test_damaged(package: Callable[..., Path]) -> None:
    """Compressed data that ends in garbage is refused with its path."""
    where = package(REPORTS)
    (path,) = where.rglob("tsm.ko.xz")
    path.write_bytes(b"\xfd7zXZ\0garbage")
    with pytest.raises(InputError, match=r"tsm\.ko\.xz: damaged"):
        find_modules(where, ("tsm",))


def test_no_modules(tmp_path: Path) -> None:
    """A directory of something else is refused before modules are looked for."""
    with pytest.raises(InputError, match=r"wanted lib/modules/RELEASE of one kernel; found none"):
        find_modules(tmp_path, ("tsm",))


def test_two_kernels(package: Callable[..., Path]) -> None:
    """Which of two kernels' modules are meant is not guessed."""
    where = package(REPORTS)
    (where / "lib" / "modules" / "6.1.0" / "kernel").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"found 6\.1\.0, {RELEASE}"):
        find_modules(where, ("tsm",))


def test_section_headers_beyond_any_file() -> None:
    """ELF-64: e_shoff has 64 bits, of which a file uses few."""
    raw = bytearray(elf_object({"depends": ""}))
    raw[40:48] = b"\xff" * 8
    with pytest.raises(InputError, match="module: damaged: section headers lie outside"):
        module_info(bytes(raw), "module")


@given(st.data())
def test_hostile_objects(data: st.DataObject) -> None:
    """Any bytes are a module's or an InputError."""
    raw = bytearray(elf_object({"depends": "a,b"}))
    for at in data.draw(st.lists(st.integers(16, len(raw) - 1), max_size=6)):
        raw[at] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(0, len(raw))) :]
    try:
        module_info(bytes(raw), "module")
    except InputError as error:
        assert str(error).startswith("module: ")  # noqa: PT017  # either outcome is right
