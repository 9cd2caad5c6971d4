"""configfs-tsm as nodes: the calls of a program in this very process, over real descriptors."""

from __future__ import annotations

import errno
import os
import select
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.unit.front.tsm_parts import INBLOB, Provider, made_up

from swsnp.front.wrap import tsm_nodes, tsm_openings
from swsnp.front.wrap.handles import FdInfo
from swsnp.front.wrap.transfer import Transfer
from swsnp.front.wrap.tree import Node, VirtualTree, guest_tree
from swsnp.front.wrap.tsm_nodes import CONFIGFS, PLATFORM_DEVICE
from swsnp.guest.caller import BufferMemory, CallerFault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.guest.caller import CallerMemory

REPORT = f"{CONFIGFS}/tsm/report"
INFO = FdInfo(0, b"")


class NoDevice:
    """A device that nobody asks."""

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        raise NotImplementedError


def names(descriptor: int) -> list[str]:
    """What a directory descriptor lists."""
    return sorted(os.listdir(descriptor))  # it has no path that a Path could take


def own_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def shown(descriptor: int) -> Path:
    """What the kernel calls an open file."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


class Program:
    """Does what a program would do, with its descriptors in this process."""

    def __init__(self, tree: VirtualTree) -> None:
        self.tree = tree
        self.open_ones: set[int] = set()

    def node(self, path: str) -> Node:
        return self.tree.find(os.fsencode(path))

    def mkdir(self, path: str) -> None:
        parent, name = self.tree.parent(os.fsencode(path))
        parent.mkdir(name)

    def open(self, path: str, flags: int) -> int:
        descriptor = self.node(path).open(flags).source
        self.open_ones.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        self.open_ones.discard(descriptor)
        os.close(descriptor)

    def behind(self, descriptor: int) -> Node:
        found = self.tree.behind(os.getpid(), descriptor)
        assert found is not None
        return found[0]

    def read(self, descriptor: int, size: int = 4096, offset: int | None = None) -> bytes:
        memory = BufferMemory()
        buffer = bytearray(max(size, 1))
        transfer = Transfer(memory, ((memory.place(buffer), size),), offset)
        return bytes(buffer[: self.behind(descriptor).read(INFO, transfer)])

    def write(self, descriptor: int, data: bytes, offset: int | None = None) -> int:
        memory = BufferMemory()
        transfer = Transfer(memory, ((memory.place(data), len(data)),), offset)
        return self.behind(descriptor).write(INFO, transfer)

    def content(self, path: str) -> bytes:
        descriptor = self.open(path, os.O_RDONLY)
        data = self.read(descriptor)
        self.close(descriptor)
        return data

    def put(self, path: str, data: bytes) -> None:
        descriptor = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        assert self.write(descriptor, data) == len(data)
        self.close(descriptor)


@pytest.fixture
def parts() -> Iterator[tuple[Program, Provider]]:
    tsm, provider = made_up()
    tree = guest_tree(NoDevice(), tsm)
    program = Program(tree)
    yield program, provider
    for descriptor in program.open_ones:
        os.close(descriptor)
    tree.close()


@pytest.fixture
def program(parts: tuple[Program, Provider]) -> Program:
    return parts[0]


@pytest.fixture
def entry(program: Program) -> str:
    program.mkdir(f"{REPORT}/r")
    return f"{REPORT}/r"


def refusal(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.RaisesExc(OSError, check=lambda error: error.errno == code)


# paths


@pytest.mark.parametrize(
    ("path", "operation", "code"),
    [
        (CONFIGFS, "rmdir", errno.EBUSY),
        (f"{CONFIGFS}/tsm", "rmdir", errno.EPERM),
        (REPORT, "rmdir", errno.EPERM),
        (REPORT, "unlink", errno.EISDIR),
        (REPORT, "create", errno.EACCES),
        (f"{REPORT}/r", "unlink", errno.EISDIR),
        (f"{REPORT}/r/inblob", "unlink", errno.EPERM),
        (f"{REPORT}/r/inblob", "rmdir", errno.ENOTDIR),
        (f"{REPORT}/r/inblob", "chdir", errno.ENOTDIR),
        (PLATFORM_DEVICE, "rmdir", errno.EPERM),
    ],
)
def test_refusals(program: Program, entry: str, path: str, operation: str, code: int) -> None:
    """Linux, fs/configfs/dir.c, fs/namei.c, fs/kernfs/dir.c."""
    with refusal(code):
        getattr(program.node(path), operation)()


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (f"{CONFIGFS}/x", errno.EPERM),
        (f"{CONFIGFS}/tsm/x", errno.EPERM),
        (f"{REPORT}/r", errno.EEXIST),
        (f"{REPORT}/r/x", errno.EPERM),
        (f"{REPORT}/none/x", errno.ENOENT),
        (f"{REPORT}/{'n' * 256}", errno.ENAMETOOLONG),
        (f"{PLATFORM_DEVICE}/x", errno.EPERM),
    ],
)
def test_refused_mkdir(program: Program, entry: str, path: str, code: int) -> None:
    """Linux, fs/configfs/dir.c; sysfs has no mkdir."""
    with refusal(code):
        program.mkdir(path)


@pytest.mark.parametrize(
    ("name", "flags", "code"),
    [
        ("outblob", os.O_RDWR, errno.EACCES),
        ("inblob", os.O_RDONLY, errno.EACCES),
        ("outblob", os.O_DIRECTORY, errno.ENOTDIR),
        ("outblob", os.O_DIRECTORY | os.O_PATH, errno.ENOTDIR),
        ("outblob", os.O_DIRECT, errno.EINVAL),
        ("", os.O_WRONLY, errno.EISDIR),
        ("", os.O_CREAT, errno.EISDIR),
        ("", os.O_TMPFILE | os.O_RDWR, errno.EOPNOTSUPP),
    ],
)
def test_refused_openings(program: Program, entry: str, name: str, flags: int, code: int) -> None:
    """Linux, fs/configfs/file.c, fs/open.c, fs/namei.c."""
    with refusal(code):
        program.open(f"{entry}/{name}", flags)


def test_status(program: Program, entry: str) -> None:
    """Types, permissions and sizes of configfs, and the same inode as a look into the directory shows."""
    for path, mode, size in (
        (REPORT, 0o040755, None),
        (entry, 0o040755, None),
        (f"{entry}/inblob", 0o100200, 0),
        (f"{entry}/outblob", 0o100444, 0),
        (f"{entry}/generation", 0o100444, 4096),
        (f"{entry}/privlevel", 0o100200, 4096),
        (PLATFORM_DEVICE, 0o040755, None),
    ):
        status = program.node(path).status()
        assert status.mode == mode
        assert size is None or status.size == size
    directory = program.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    numbers = {name: os.stat(name, dir_fd=directory).st_ino for name in names(directory)}
    assert numbers == {name: program.node(f"{entry}/{name}").status().ino for name in numbers}
    assert len(numbers) == 7


@pytest.mark.parametrize(
    ("uid", "mode", "permitted"),
    [
        (0, os.R_OK | os.W_OK, True),
        (0, os.X_OK, False),
        (1000, os.W_OK, True),
        (1000, os.R_OK, False),
    ],
)
def test_access(
    program: Program, entry: str, monkeypatch: pytest.MonkeyPatch, uid: int, mode: int, permitted: bool
) -> None:
    """access(2) on a file of mode 0200: root may read and write whatever the mode says."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    node = program.node(f"{entry}/inblob")
    if permitted:
        node.access(mode)
    else:
        with refusal(errno.EACCES):
            node.access(mode)
    program.node(entry).access(os.X_OK)


def test_what_there_is_no_attribute_for(program: Program, entry: str) -> None:
    """Linux: configfs has no extended attributes; a directory may be asked for chdir."""
    assert program.node(entry).xattr_error == errno.EOPNOTSUPP
    program.node(entry).chdir()


def test_listing_lives(program: Program, entry: str) -> None:
    """An open directory shows entries that are made and removed after it was opened."""
    descriptor = program.open(REPORT, os.O_RDONLY)
    assert names(descriptor) == ["r"]
    program.mkdir(f"{REPORT}/s")
    assert names(descriptor) == ["r", "s"]
    program.node(entry).rmdir()
    assert names(descriptor) == ["s"]
    with refusal(errno.ENOENT):
        program.node(entry)


def test_paths_through_an_open_directory(program: Program, entry: str) -> None:
    """What the kernel calls the directory is a path of the tree too."""
    descriptor = program.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    assert program.content(f"{shown(descriptor)}/provider") == b"sev_guest\n"


def test_configfs_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other directories of a mounted configfs stay visible."""
    (tmp_path / "usb_gadget").mkdir()
    monkeypatch.setattr(tsm_nodes, "CONFIGFS", str(tmp_path))
    tree = guest_tree(NoDevice(), made_up()[0])
    try:
        program = Program(tree)
        program.mkdir(f"{tmp_path}/tsm/report/r")
        assert program.content(f"{tmp_path}/tsm/report/r/generation") == b"0\n"
        assert not tree.covers(os.fsencode(f"{tmp_path}/usb_gadget"))
    finally:
        tree.close()


def test_path_descriptors(program: Program, entry: str) -> None:
    """open(2), O_PATH: any file, and nothing can be read."""
    for path in (entry, f"{entry}/inblob"):
        descriptor = program.open(path, os.O_PATH)
        assert program.tree.behind(os.getpid(), descriptor) is None
        with refusal(errno.EBADF):
            os.read(descriptor, 1)


# open attributes


def test_a_report(parts: tuple[Program, Provider], entry: str) -> None:
    """The sequence of Documentation/ABI/testing/configfs-tsm-report."""
    program, provider = parts
    assert program.content(f"{entry}/generation") == b"0\n"
    program.put(f"{entry}/inblob", INBLOB)
    program.put(f"{entry}/privlevel", b"2\n")
    assert program.content(f"{entry}/generation") == b"2\n"
    assert program.content(f"{entry}/outblob") == INBLOB + b"\x01"
    assert program.content(f"{entry}/auxblob") == b"certificates"
    assert provider.reports == 1
    program.node(entry).rmdir()


def test_errors_of_reads_and_writes(program: Program, entry: str) -> None:
    """At the read or write, not at the opening."""
    out, level, blob = (
        program.open(f"{entry}/{name}", flags)
        for name, flags in (("outblob", os.O_RDONLY), ("privlevel", os.O_WRONLY), ("inblob", os.O_WRONLY))
    )
    with refusal(errno.EINVAL):
        program.read(out)
    with refusal(errno.EINVAL):
        program.write(level, b"9")
    with refusal(errno.EFBIG):
        program.write(blob, bytes(65))
    with refusal(errno.EFBIG):
        program.write(blob, bytes(9000))
    with refusal(errno.EBADF):
        program.write(out, b"x")
    with refusal(errno.EBADF):
        program.read(blob)


def test_several_empty_buffers(program: Program, entry: str) -> None:
    """Linux, vfs_readv: nothing is done, so no report is made and no empty inblob is stored."""
    empty = Transfer(BufferMemory(), (), several=True)
    out, blob = program.open(f"{entry}/outblob", os.O_RDONLY), program.open(f"{entry}/inblob", os.O_WRONLY)
    assert program.behind(out).read(INFO, empty) == 0
    assert program.behind(blob).write(INFO, empty) == 0
    program.close(blob)
    assert program.content(f"{entry}/generation") == b"0\n"


def test_positions(program: Program, entry: str) -> None:
    """One position per opening, which pread does not move; text can seek."""
    text = program.open(f"{entry}/provider", os.O_RDONLY)
    other = os.dup(text)
    program.open_ones.add(other)
    assert (program.read(text, 4), program.read(other, 4)) == (b"sev_", b"gues")
    assert program.read(text, 3, offset=0) == b"sev"
    assert program.behind(text).seek(-2, os.SEEK_CUR) == 6
    assert program.read(text) == b"es" + b"t\n"
    assert program.behind(text).status().mode == 0o100444


def test_memory_that_cannot_be_written(program: Program, entry: str) -> None:
    """Linux, copy_to_iter: EFAULT, and the next read gets the same bytes."""
    text = program.open(f"{entry}/provider", os.O_RDONLY)
    with pytest.raises(CallerFault):
        program.behind(text).read(INFO, Transfer(BufferMemory(), ((0x5000, 4),)))
    assert program.read(text) == b"sev_guest\n"


def test_memory_that_cannot_be_read(program: Program, entry: str) -> None:
    """Linux, configfs_bin_write_iter: EFAULT, and zeros are stored at the close."""
    blob = program.open(f"{entry}/inblob", os.O_WRONLY)
    with refusal(errno.EFAULT):
        program.behind(blob).write(INFO, Transfer(BufferMemory(), ((0x5000, 64),)))
    program.close(blob)
    assert program.content(f"{entry}/outblob") == bytes(64) + b"\x01"


# descriptors that are out of reach of the supervisor


def test_reading_after_a_redirection(parts: tuple[Program, Provider], entry: str) -> None:
    """The value is made when the descriptor is duplicated, and goes on where reading had come to."""
    program, provider = parts
    program.put(f"{entry}/inblob", INBLOB)
    descriptor = program.open(f"{entry}/outblob", os.O_RDONLY)
    assert program.read(descriptor, 10) == INBLOB[:10]
    program.behind(descriptor).duplicate()
    assert (os.read(descriptor, 30), os.read(descriptor, 999)) == (INBLOB[10:40], INBLOB[40:] + b"\x01")
    assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o444
    assert provider.reports == 1
    assert program.tree.behind(os.getpid(), descriptor) is None


def test_error_of_a_redirection(parts: tuple[Program, Provider], entry: str) -> None:
    """What the read would have ended with ends the duplication; the descriptor stays as it was."""
    program, provider = parts
    descriptor = program.open(f"{entry}/outblob", os.O_RDONLY)
    with refusal(errno.EINVAL):
        program.behind(descriptor).duplicate()
    program.put(f"{entry}/inblob", INBLOB)
    provider.fail = errno.EIO
    with refusal(errno.EIO):
        program.behind(descriptor).duplicate()
    provider.fail = 0
    assert program.read(descriptor) == INBLOB + b"\x02"


def test_an_opening_that_lands_elsewhere(program: Program, entry: str) -> None:
    """Told so, it is made ready for the kernel at once."""
    opened = program.node(f"{entry}/provider").open(os.O_RDONLY)
    program.open_ones.add(opened.source)
    assert opened.outside is not None
    opened.outside()
    assert os.read(opened.source, 100) == b"sev_guest\n"


def test_writing_through_a_duplicate(program: Program, entry: str) -> None:
    """What the kernel took is written, in order with the rest, and committed at the last close."""
    descriptor = program.open(f"{entry}/inblob", os.O_WRONLY | os.O_APPEND)
    program.behind(descriptor).duplicate()
    other = os.dup(descriptor)
    assert os.write(other, INBLOB[:20]) == 20
    assert program.write(descriptor, INBLOB[20:50]) == 30
    program.close(descriptor)
    assert os.write(other, INBLOB[50:]) == 14
    assert program.content(f"{entry}/generation") == b"0\n"
    os.close(other)
    assert program.content(f"{entry}/generation") == b"1\n"
    assert program.content(f"{entry}/outblob") == INBLOB + b"\x01"


def test_each_write_through_a_duplicate_is_a_store(
    program: Program, entry: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe in packet mode keeps writes apart; a refusal is logged, since the program cannot be told."""
    descriptor = program.open(f"{entry}/privlevel", os.O_WRONLY)
    for data in (b"1\n", b"2", b"9\n", b"3"):
        os.write(descriptor, data)
    program.close(descriptor)
    assert program.content(f"{entry}/generation") == b"3\n"
    assert "privlevel: a write of 2 bytes through a duplicate descriptor was refused" in caplog.text


def test_nobody_waits_for_room(program: Program, entry: str) -> None:
    """More writes than a pipe holds: they are taken out without any other call of the program."""
    descriptor = program.open(f"{entry}/inblob", os.O_WRONLY)
    for _ in range(100):
        os.write(descriptor, bytes(4096))
    program.close(descriptor)
    assert program.content(f"{entry}/generation") == b"1\n"


def test_removed_before_the_close(parts: tuple[Program, Provider], entry: str) -> None:
    """What was written is dropped."""
    program, provider = parts
    descriptor = program.open(f"{entry}/inblob", os.O_WRONLY)
    program.write(descriptor, INBLOB)
    program.node(entry).rmdir()
    program.close(descriptor)
    program.mkdir(entry)
    assert program.content(f"{entry}/generation") == b"0\n"
    assert provider.reports == 0


def test_pollable(program: Program, entry: str) -> None:
    """Linux: files without a poll operation are always ready."""
    reader = program.open(f"{entry}/outblob", os.O_RDONLY | os.O_NONBLOCK)
    writer = program.open(f"{entry}/inblob", os.O_WRONLY)
    assert select.select([reader], [writer], [], 0)[:2] == ([reader], [writer])
    assert (os.get_blocking(reader), os.get_blocking(writer)) == (False, True)


def test_closed_readers_are_let_go(program: Program, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many descriptors of ours as the program has, not as it had."""
    monkeypatch.setattr(tsm_openings, "_SWEEP_FROM", 4)
    program.tree._openings._sweep_at = 4  # type: ignore[union-attr]
    kept = program.open(f"{entry}/provider", os.O_RDONLY)
    before = own_descriptors()
    for _ in range(50):
        assert program.content(f"{entry}/provider") == b"sev_guest\n"
    assert own_descriptors() < before + 8
    assert program.read(kept) == b"sev_guest\n"


def test_foreign_descriptors(program: Program, entry: str) -> None:
    """Not ours: closed, never open, or opened elsewhere."""
    assert program.tree.behind(os.getpid(), 0) is None
    program.open(f"{entry}/provider", os.O_RDONLY)
    null = os.open("/dev/null", os.O_RDONLY)
    program.open_ones.add(null)
    assert program.tree.behind(os.getpid(), null) is None
    openings = program.tree._openings
    assert openings is not None
    assert openings.find(os.getpid(), 99_999) is None


def test_closing_the_tree_commits_and_cleans_up(entry: str, parts: tuple[Program, Provider]) -> None:
    """Descriptors that programs still have do not keep anything of ours."""
    program, _ = parts
    root = shown(program.open(CONFIGFS, os.O_RDONLY)).parent
    program.open(f"{entry}/outblob", os.O_RDONLY)
    program.open(f"{entry}/inblob", os.O_WRONLY)
    program.tree.close()
    assert not root.exists()
