"""Modules are found by name, after what they depend on, and refused when the guest could not load them."""

from __future__ import annotations

import gzip
import lzma
import sys
from typing import TYPE_CHECKING

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.guest_program.conftest import RELEASE, elf_object

from swsnp.errors import HostError, InputError
from swsnp.vmm import kernel_modules
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


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)],
    ids=["gzip", "zstd"],
)
def test_compression(package: Callable[..., Path], suffix: str, compress: Callable[[bytes], bytes]) -> None:
    """Linux, CONFIG_MODULE_COMPRESS_*: the same object comes out, as of one that is in xz."""
    where = package(REPORTS)
    (before,) = (each for each in find_modules(where, ("tsm",)) if each.name == "tsm")
    (path,) = where.rglob("tsm.ko.xz")
    path.unlink()
    path.with_suffix(suffix).write_bytes(compress(before.data))
    assert before in find_modules(where, ("tsm",))


def test_damaged(package: Callable[..., Path]) -> None:
    """Compressed data that ends in garbage is refused with its path."""
    where = package(REPORTS)
    (path,) = where.rglob("tsm.ko.xz")
    path.write_bytes(b"\xfd7zXZ\0garbage")
    with pytest.raises(InputError, match=r"tsm\.ko\.xz: damaged"):
        find_modules(where, ("tsm",))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor().compress)],
    ids=["gzip", "xz", "zstd"],
)
def test_ends_early(package: Callable[..., Path], suffix: str, compress: Callable[[bytes], bytes]) -> None:
    """A download that broke off gives part of an object, which the guest's kernel would refuse."""
    where = package(REPORTS)
    (path,) = where.rglob("tsm.ko.xz")
    whole = compress(lzma.decompress(path.read_bytes()))
    path.unlink()
    path.with_suffix(suffix).write_bytes(whole[:-1])
    rule = rf"tsm\.ko\{suffix}: damaged: it cannot be expanded: it ends early"
    with pytest.raises(InputError, match=rule):
        find_modules(where, ("tsm",))


def test_each_is_read_once(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What two modules depend on is not read again for the second."""
    reads: list[str] = []
    read = kernel_modules._read

    def counted(name: str, path: Path) -> kernel_modules.KernelModule:
        reads.append(name)
        return read(name, path)

    monkeypatch.setattr(kernel_modules, "_read", counted)
    find_modules(package({"a": "b,c", "b": "d", "c": "d", "d": ""}), ("a", "d"))
    assert sorted(reads) == ["a", "b", "c", "d"]


def test_other_files(package: Callable[..., Path]) -> None:
    """A signature beside a module is none, nor is a directory with such a name."""
    where = package(REPORTS)
    (path,) = where.rglob("tsm.ko.xz")
    path.with_name("tsm.ko.zzz").write_bytes(b"")
    path.with_name("zzz").mkdir()
    (path.parent / "zzz" / "tsm.ko").mkdir()
    assert [each.name for each in find_modules(where, ("tsm",))] == ["configfs", "tsm"]


def test_unreadable(package: Callable[..., Path]) -> None:
    """What the host refuses to read is named."""
    where = package(REPORTS)
    (path,) = where.rglob("tsm.ko.xz")
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match=r"tsm\.ko\.xz: cannot be read: Input/output error"):
        find_modules(where, ("tsm",))
    (where / "lib" / "modules" / RELEASE / "modules.builtin").unlink(missing_ok=True)
    (where / "lib" / "modules" / RELEASE / "modules.builtin").mkdir()
    with pytest.raises(InputError, match=r"modules\.builtin: cannot be read: .*Is a directory"):
        find_modules(where, ("tsm",))


def test_missing_library(package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, a module in zstd is not called damaged: the error says what to install."""
    where = package(REPORTS)
    (path,) = where.rglob("tsm.ko.xz")
    path.rename(path.with_suffix(".zst"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(HostError, match=r"remedy: pip install 'swsnp\[guest\]'"):
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


@pytest.mark.parametrize(("at", "bytes_"), [(4, b"\1"), (60, b"\0\0")], ids=["ELF-32", "no sections"])
def test_other_objects(at: int, bytes_: bytes) -> None:
    """ELF-64 with sections; what is whole but something else is not called damaged."""
    raw = bytearray(elf_object({"depends": ""}))
    raw[at : at + len(bytes_)] = bytes_
    with pytest.raises(InputError, match="wanted a kernel module: an ELF-64 object"):
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
