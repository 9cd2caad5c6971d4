"""The archive is read back by a reader of another make, and by rules of the kernel's document."""

from __future__ import annotations

import errno
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.guest_program.emulated import BUILD

from swsnp.errors import InputError, UsageError
from swsnp.vmm.cpio import CpioEntry, device, directory, link, pack_cpio, program, tree_entries

if TYPE_CHECKING:
    from tests.conftest import Skip


def unpack(raw: bytes) -> dict[str, CpioEntry]:
    """By Documentation/driver-api/early-userspace/buffer-format.rst, written apart from the packer."""
    found: dict[str, CpioEntry] = {}
    at = 0
    while True:
        assert raw[at : at + 6] == b"070701"
        fields = [int(raw[at + 6 + 8 * number : at + 14 + 8 * number], 16) for number in range(13)]
        name = raw[at + 110 : at + 110 + fields[11]]
        assert name.endswith(b"\0")
        start = (at + 110 + fields[11] + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert start == len(raw)
            return found
        path = name[:-1].decode(errors="surrogateescape")
        found[path] = CpioEntry(path, fields[1], raw[start : start + fields[6]], (fields[9], fields[10]))
        at = (start + fields[6] + 3) & ~3


def test_entries() -> None:
    """Every kind of entry, with the directories that it needs; sizes of all lengths are padded."""
    entries = [program("a/b/p", b"12345"), link("l", "a/b/p"), device("dev/console", 5, 1)]
    found = unpack(pack_cpio(entries))
    assert list(found) == ["a", "a/b", "a/b/p", "dev", "dev/console", "l"]
    assert [found[each.path] for each in entries] == entries
    assert stat.S_ISDIR(found["a/b"].mode)


@given(st.dictionaries(st.text("abc-", min_size=1, max_size=4), st.binary(max_size=9), max_size=6))
def test_content(files: dict[str, bytes]) -> None:
    """What goes in comes out; the order in which entries are given changes nothing."""
    entries = [program(name, data) for name, data in files.items()]
    packed = pack_cpio(entries)
    assert {path: each.data for path, each in unpack(packed).items()} == files
    assert pack_cpio(reversed(entries)) == packed


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", "../a", "a/./b", "a\0b", "TRAILER!!!", "a" * 4096])
def test_refused_paths(path: str) -> None:
    """init/initramfs.c would end the archive there, or unpack elsewhere than is said."""
    with pytest.raises(UsageError, match="archive: path"):
        pack_cpio([program(path, b"")])


def test_longest_path() -> None:
    """init/initramfs.c: PATH_MAX counts the NUL."""
    assert list(unpack(pack_cpio([program("a" * 4095, b"1")]))) == ["a" * 4095]


def test_file_as_directory() -> None:
    """What lies in a file cannot be unpacked."""
    with pytest.raises(UsageError, match="archive: a: something lies below it"):
        pack_cpio([program("a", b""), program("a/b", b"")])


def test_tree(tmp_path: Path) -> None:
    """A directory's content without the host's times and owners."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"data")
    (tmp_path / "d" / "l").symlink_to("f")
    found = {each.path: each for each in tree_entries(tmp_path)}
    assert (found["d/f"].data, found["d/l"].data) == (b"data", b"f")
    assert stat.S_ISDIR(found["d"].mode)


def test_tree_with_socket(tmp_path: Path) -> None:
    """What is neither file, directory nor link is refused by name."""
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe: mode 0o.*; wanted a file, a directory or a symbolic link"):
        tree_entries(tmp_path)


@pytest.mark.parametrize(("operation", "path"), [("iterdir", "d"), ("read_bytes", "d/f"), ("readlink", "l")])
def test_tree_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, path: str) -> None:
    """What the host refuses is named."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(b"data")
    (tmp_path / "l").symlink_to("d")
    genuine = getattr(Path, operation)

    def refuse(self: Path) -> object:
        if self == tmp_path / path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return genuine(self)

    monkeypatch.setattr(Path, operation, refuse)
    with pytest.raises(InputError, match=f"{path}: cannot be read: Permission denied"):
        tree_entries(tmp_path)


def test_tree_missing(tmp_path: Path) -> None:
    """A tree that is none is refused."""
    with pytest.raises(InputError, match="wanted a directory"):
        tree_entries(tmp_path / "none")


def test_busybox_reads_it(tmp_path: Path, cannot_run: Skip) -> None:
    """An unpacker of another make finds the same files."""
    busybox = shutil.which(BUILD / "busybox" / "bin" / "busybox") or shutil.which("busybox")
    if busybox is None:
        cannot_run("no busybox", "tools/real-guest-files build/real-guest")
    packed = pack_cpio([program("a/p", b"12345"), link("l", "a/p"), directory("e")])
    subprocess.run([busybox, "cpio", "-i", "-d", "-m"], input=packed, cwd=tmp_path, check=True)
    assert (tmp_path / "l").read_bytes() == b"12345"
    assert (tmp_path / "e").is_dir()


def test_refused_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newc has eight hexadecimal digits for a file's size."""
    monkeypatch.setattr("swsnp.vmm.cpio._LARGEST", 4)
    pack_cpio([program("p", b"1234")])
    with pytest.raises(UsageError, match="archive: p: 5 bytes, wanted at most 4"):
        pack_cpio([program("p", b"12345")])
