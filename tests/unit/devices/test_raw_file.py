"""Files as disks: judged when they are opened, and locked as QEMU does it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from swsnp.errors import InputError
from swsnp.vmm.devices.raw_file import RawFile

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip

SIZE = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def test_reads_and_writes(image: Path) -> None:
    """Bytes go where they belong, and stay."""
    with RawFile(image) as disk:
        assert (disk.size, disk.read_only) == (SIZE, False)
        disk.write(512, b"a" * 1024)
        disk.flush()
        assert disk.read(0, 2048) == bytes(512) + b"a" * 1024 + bytes(512)
    assert image.read_bytes() == bytes(512) + b"a" * 1024 + bytes(SIZE - 1536)


def test_read_only(image: Path) -> None:
    """The host itself refuses a write."""
    image.chmod(0o444)
    with RawFile(image, read_only=True) as disk, pytest.raises(OSError, match="Bad file descriptor"):
        disk.write(0, b"x")


def test_file_that_becomes_shorter(image: Path) -> None:
    """An I/O error, not fewer bytes."""
    with RawFile(image) as disk:
        os.truncate(image, SIZE - 1)
        with pytest.raises(OSError, match="shorter") as caught:
            disk.read(SIZE - 512, 512)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("size", [0, 511, 513])
def test_sizes(tmp_path: Path, size: int) -> None:
    """Whole sectors, one at least."""
    path = tmp_path / "odd"
    path.write_bytes(bytes(size))
    with pytest.raises(InputError, match=f"odd: got {size} bytes, wanted whole sectors of 512"):
        RawFile(path)


def test_what_is_no_disk(tmp_path: Path) -> None:
    """Directories, pipes and what is not there; a pipe nobody writes to does not stop us."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, read_only, text in (
        (tmp_path, True, "wanted a regular file or a block device"),
        (tmp_path, False, "cannot be opened: Is a directory"),
        (pipe, True, "wanted a regular file or a block device"),
        (tmp_path / "none", False, "cannot be opened: No such file"),
    ):
        with pytest.raises(InputError, match=text):
            RawFile(path, read_only=read_only)


def test_image_of_another_format(tmp_path: Path) -> None:
    """A guest must not be handed the inside of a qcow2 file by mistake; by intention it may."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    with pytest.raises(InputError, match="is a qcow2 image; wanted a raw one"):
        RawFile(path, format_given=False)
    RawFile(path).close()


@pytest.mark.parametrize(
    ("first", "second", "goes"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
def test_locks(image: Path, first: bool, second: bool, goes: bool) -> None:
    """QEMU: one writer and nobody else, or any number of readers; given back with the file."""
    with RawFile(image, read_only=first):
        if goes:
            RawFile(image, read_only=second).close()
        else:
            with pytest.raises(InputError, match="disk.img: is in use by another virtual machine"):
                RawFile(image, read_only=second)
    RawFile(image, read_only=second).close()


def test_closed_twice(image: Path) -> None:
    """Again is allowed."""
    disk = RawFile(image)
    disk.close()
    disk.close()


QMP_QUIT = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'


@pytest.fixture
def qemu(cannot_run: Skip) -> str:
    """An unmodified QEMU."""
    found = shutil.which("qemu-system-x86_64")
    if found is None:
        cannot_run("no qemu-system-x86_64", "apt-get install qemu-system-x86")
    return found


def command_of(qemu: str, image: Path, read_only: str) -> list[str]:
    """A machine that stands still, with the disk."""
    line = [qemu, "-M", "q35", "-display", "none", "-S", "-nodefaults", "-qmp", "stdio", "-blockdev"]
    line += [f"driver=raw,node-name=d,read-only={read_only},file.driver=file,file.filename={image}"]
    return [*line, "-device", "virtio-blk-pci,drive=d"]


@pytest.mark.parametrize(
    ("ours", "theirs", "goes"), [(True, "on", True), (False, "on", False), (False, "off", False)]
)
def test_qemu_sees_our_locks(qemu: str, image: Path, ours: bool, theirs: str, goes: bool) -> None:
    """QEMU does not start on a disk that we write; beside a reader of ours it may read."""
    with RawFile(image, read_only=ours):
        done = subprocess.run(
            command_of(qemu, image, theirs), input=QMP_QUIT, capture_output=True, timeout=60, check=False
        )
    assert (done.returncode == 0) is goes, done
    assert goes or b"Is another process using the image" in done.stderr


def test_we_see_the_locks_of_qemu(qemu: str, image: Path) -> None:
    """Nor do we on one that QEMU writes."""
    with subprocess.Popen(
        command_of(qemu, image, "off"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as vm:
        assert vm.stdin is not None
        assert vm.stdout is not None
        greeting = vm.stdout.readline()
        vm.stdin.write(QMP_QUIT.splitlines(keepends=True)[0])
        vm.stdin.flush()
        assert b"QMP" in greeting
        assert b"return" in vm.stdout.readline(), "by now the disk is open"
        with pytest.raises(InputError, match="is in use"):
            RawFile(image, read_only=True)
        vm.communicate(QMP_QUIT, timeout=60)
    RawFile(image).close()


def test_file_system_without_locks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a writer cannot be kept out nothing is started."""

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("swsnp.vmm.devices.raw_file.fcntl.fcntl", refuse)
    with pytest.raises(InputError, match=r"disk\.img: cannot be used: Invalid argument"):
        RawFile(image)
