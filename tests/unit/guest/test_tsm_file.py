"""Open files: snapshots, stores, positions, and what happens at the last close."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from swsnp.guest.tsm_entry import AttributeKind, Entry, Registry
from swsnp.guest.tsm_file import BinaryFile, TextFile, TsmFile
from swsnp.guest.tsm_report import Blobs, ReportInput
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from collections.abc import Callable

INBLOB = bytes(range(64))
BLOB_MAX = 32 << 10


class Provider:
    """Every report is another one: its inblob, its number, and as much as it takes to be long."""

    name, privlevel_floor, services = "sev_guest", 0, False

    def __init__(self) -> None:
        self.reports = 0
        self.fail: list[int] = []
        self.size = 300

    def report_new(self, given: ReportInput) -> Blobs:
        self.reports += 1
        if self.fail:
            raise TsmError(self.fail.pop(0))
        return Blobs(outblob=(given.inblob + bytes([self.reports])).ljust(self.size, b"\xaa"))


class Files:
    """An entry whose attributes are opened by name."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.registry.provider = self.provider = Provider()
        self.entry = Entry(self.registry, services=False)

    def open(self, name: str, access: int) -> TsmFile:
        kind = self.entry.kinds[name]
        return (BinaryFile if kind.binary else TextFile)(self.entry, kind, access)

    def reader(self, name: str) -> TsmFile:
        return self.open(name, os.O_RDONLY)

    def writer(self, name: str) -> TsmFile:
        return self.open(name, os.O_WRONLY)

    def put(self, data: bytes = INBLOB) -> None:
        """Write inblob and close it."""
        file = self.writer("inblob")
        assert file.write(data) == len(data)
        file.close()

    def generation(self) -> int:
        return int(self.reader("generation").read(100))


@pytest.fixture
def files() -> Files:
    return Files()


def refusal(code: int) -> pytest.RaisesExc[TsmError]:
    return pytest.RaisesExc(TsmError, check=lambda error: error.errno == code)


@pytest.mark.parametrize("name", ["generation", "outblob"])
def test_write_to_a_reader(files: Files, name: str) -> None:
    """Linux, fs/read_write.c: EBADF."""
    with refusal(errno.EBADF):
        files.reader(name).write(b"1")


@pytest.mark.parametrize("name", ["privlevel", "inblob"])
def test_read_from_a_writer(files: Files, name: str) -> None:
    """Linux, fs/read_write.c: EBADF."""
    with refusal(errno.EBADF):
        files.writer(name).read(1)


# text


def test_text_is_made_at_the_first_read(files: Files) -> None:
    """Linux, configfs_read_iter: the value of the first read is kept for this descriptor."""
    early, late = files.reader("generation"), files.reader("generation")
    assert early.read(10) == b"0\n"
    files.put()
    assert early.pread(10, 0) == b"0\n"
    assert late.read(10) == b"1\n"
    assert (late.read(10), late.read(10)) == (b"", b"")


def test_text_in_pieces(files: Files) -> None:
    """Linux, configfs_read_iter: reads honour the offset; nothing is beyond the end."""
    file = files.reader("provider")
    assert [file.read(4) for _ in range(4)] == [b"sev_", b"gues", b"t\n", b""]
    assert file.pread(5, 4) == b"guest"
    assert file.pread(5, 9999) == b""
    assert file.position == 10


def test_reading_no_bytes(files: Files) -> None:
    """Linux, configfs_read_iter: EFAULT where there are some, the end otherwise."""
    file = files.reader("provider")
    with refusal(errno.EFAULT):
        file.read(0)
    assert file.pread(0, 10) == b""


def test_text_error_is_the_reads(files: Files) -> None:
    """Linux, fill_read_buffer: a failure is not kept."""
    file = files.reader("provider")
    files.registry.provider = None
    with refusal(errno.ENXIO):
        file.read(100)
    files.registry.provider = files.provider
    assert file.read(100) == b"sev_guest\n"


def test_every_write_is_one_store(files: Files) -> None:
    """Linux, configfs_write_iter: the offset does not matter, and the store's errno is the write's."""
    file = files.writer("privlevel")
    assert (file.write(b"1"), file.write(b"2\n"), file.pwrite(b"3", 77)) == (1, 2, 1)
    assert (files.generation(), file.position) == (3, 3)
    with refusal(errno.EINVAL):
        file.write(b"4")
    assert files.generation() == 3
    file.close()
    assert files.generation() == 3


@pytest.mark.parametrize("lost", [0, 5])
def test_text_write_of_nothing(files: Files, lost: int) -> None:
    """Linux, fill_write_buffer: EFAULT when no byte was copied."""
    with refusal(errno.EFAULT):
        files.writer("privlevel").write(b"", lost=lost)


def test_text_write_of_a_page(files: Files) -> None:
    """Linux, fill_write_buffer: 4,095 bytes are stored, and so many are reported as written."""
    file = files.writer("privlevel")
    assert file.write(b"0" * 4094 + b"3" + b"rest") == 4095
    assert files.generation() == 1
    with refusal(errno.EINVAL):
        file.write(b"0" * 4094 + b"x")


def test_removed_while_text_is_open(files: Files) -> None:
    """Linux, fs/configfs/file.c: what was read stays readable; the rest is ENOENT."""
    read, fresh, writer = files.reader("provider"), files.reader("provider"), files.writer("privlevel")
    read.read(1)
    files.entry.dead = True
    assert read.read(100) == b"ev_guest\n"
    with refusal(errno.ENOENT):
        fresh.read(1)
    with refusal(errno.ENOENT):
        writer.write(b"1")


@pytest.mark.parametrize(
    ("offset", "whence", "result"),
    [
        (3, os.SEEK_SET, 3),
        (0, os.SEEK_CUR, 2),
        (-2, os.SEEK_CUR, 0),
        (-1, os.SEEK_END, 4095),
        (5, 3, 5),
        (0, 3, 0),
        (5, 4, 4096),
        (0, 4, 4096),
        (0x7FFF_FFFF, os.SEEK_SET, 0x7FFF_FFFF),
        (-1, os.SEEK_SET, -errno.EINVAL),
        (-3, os.SEEK_CUR, -errno.EINVAL),
        (0x8000_0000, os.SEEK_SET, -errno.EINVAL),
        (0, 5, -errno.EINVAL),
        (4096, 3, -errno.ENXIO),
        (-1, 4, -errno.ENXIO),
    ],
)
def test_seek_in_text(files: Files, offset: int, whence: int, result: int) -> None:
    """Linux, generic_file_llseek over the 4,096 bytes that stat shows."""
    file = files.reader("provider")
    file.read(2)
    if result < 0:
        with refusal(-result):
            file.seek(offset, whence)
        assert file.position == 2
    else:
        assert file.seek(offset, whence) == file.position == result


# binary, read


def test_binary_cannot_seek(files: Files) -> None:
    """Linux: binary attributes have no llseek operation."""
    for file in (files.reader("outblob"), files.writer("inblob")):
        with refusal(errno.ESPIPE):
            file.seek(0, os.SEEK_CUR)


def test_snapshot(files: Files) -> None:
    """Linux, configfs_bin_read_iter: taken at the first read, whatever is written then; reopen for more."""
    files.put()
    old = files.reader("outblob")
    assert old.read(10) == INBLOB[:10]
    files.put(INBLOB[::-1])
    assert old.read(55) == INBLOB[10:] + b"\x01"
    new = files.reader("outblob")
    assert new.read(65) == INBLOB[::-1] + b"\x02"
    assert old.pread(65, 0) == INBLOB + b"\x01"


def test_many_small_reads(files: Files) -> None:
    """One report over many reads of one descriptor, as Rust's fs::read makes them."""
    files.put()
    file = files.reader("outblob")
    pieces = list(iter(lambda: file.read(32), b""))
    assert b"".join(pieces) == (INBLOB + b"\x01").ljust(300, b"\xaa")
    assert files.provider.reports == 1


@pytest.mark.parametrize("size", [1, 63])
def test_error_is_the_reads(files: Files, size: int) -> None:
    """Linux, configfs_bin_read_iter: opening succeeds; the errno is the read's, and a later read retries."""
    file = files.reader("outblob")
    with refusal(errno.EINVAL):
        file.read(100)
    files.put(INBLOB[:size])
    files.provider.fail = [errno.EIO]
    with refusal(errno.EIO):
        file.read(100)
    assert file.read(size) == INBLOB[:size]


def test_empty_blob_is_the_end_and_is_looked_for_again(files: Files) -> None:
    """Linux, configfs_bin_read_iter: no snapshot of nothing."""
    files.put()
    file = files.reader("auxblob")
    assert file.read(100) == b""
    assert file.read(0) == b""
    assert files.provider.reports == 1
    files.put()
    assert file.read(100) == b""
    assert files.provider.reports == 2


@pytest.mark.parametrize(("size", "fits"), [(BLOB_MAX, True), (BLOB_MAX + 1, False)])
def test_blob_above_the_maximum(files: Files, size: int, fits: bool) -> None:
    """Linux, configfs_bin_read_iter: EFBIG."""
    files.provider.size = size
    files.put()
    file = files.reader("outblob")
    if fits:
        assert len(file.read(1 << 20)) == size
    else:
        with refusal(errno.EFBIG):
            file.read(1)


def test_removed_while_a_blob_is_open(files: Files) -> None:
    """Linux: a snapshot stays readable; a first read is ENOENT."""
    files.put()
    read, fresh = files.reader("outblob"), files.reader("outblob")
    read.read(1)
    files.entry.dead = True
    assert len(read.read(1 << 20)) == 299
    with refusal(errno.ENOENT):
        fresh.read(1)


# binary, write


def test_inblob_is_stored_at_the_last_close(files: Files) -> None:
    """Linux, configfs_release_bin_file; a second close of the model's object stores nothing more."""
    file = files.writer("inblob")
    assert (file.write(INBLOB[:30]), file.write(INBLOB[30:])) == (30, 34)
    assert files.generation() == 0
    file.close()
    file.close()
    assert files.generation() == 1
    assert files.reader("outblob").read(64) == INBLOB


def test_opened_and_closed(files: Files) -> None:
    """Linux: nothing was written, nothing is stored."""
    files.writer("inblob").close()
    files.reader("outblob").close()
    files.reader("provider").close()
    assert files.generation() == 0


@pytest.mark.parametrize(
    ("size", "before", "stored"), [(65, b"", b""), (4096, b"", b""), (2, INBLOB[:63], INBLOB[:63])]
)
def test_inblob_too_large(files: Files, size: int, before: bytes, stored: bytes) -> None:
    """Linux: EFBIG, nothing of this write is kept, and at the close what there is is stored."""
    files.put(bytes(64))
    file = files.writer("inblob")
    if before:
        file.write(before)
    with refusal(errno.EFBIG):
        file.write(bytes(size))
    file.close()
    assert files.generation() == 2
    if stored:
        assert files.reader("outblob").read(64) == stored + b"\x01"
    else:
        with refusal(errno.EINVAL):
            files.reader("outblob").read(1)


def test_write_of_no_bytes(files: Files) -> None:
    """Linux: EFAULT, and an empty inblob is stored at the close."""
    files.put()
    file = files.writer("inblob")
    with refusal(errno.EFAULT):
        file.write(b"")
    file.close()
    assert files.generation() == 2
    with refusal(errno.EINVAL):
        files.reader("outblob").read(1)


def test_write_from_memory_that_cannot_be_read(files: Files) -> None:
    """Linux: the buffer grows by what was asked for; what could not be copied is zero."""
    file = files.writer("inblob")
    with refusal(errno.EFAULT):
        file.write(b"", lost=64)
    file.close()
    assert files.reader("outblob").read(64) == bytes(64)
    file = files.writer("inblob")
    assert file.write(b"ab", lost=2) == 2
    assert file.write(b"c") == 1
    file.close()
    assert files.reader("outblob").read(5) == b"abc\0\x02"


def test_write_at_an_offset(files: Files) -> None:
    """Linux: what lies before it is zero; later writes may lie within."""
    file = files.writer("inblob")
    assert file.pwrite(b"end", 61) == 3
    assert file.pwrite(b"start", 0) == 5
    with refusal(errno.EFBIG):
        file.pwrite(b"x", 64)
    file.close()
    assert files.reader("outblob").read(64) == b"start".ljust(61, b"\0") + b"end"


def test_removed_before_the_close(files: Files) -> None:
    """Linux, configfs_release_bin_file: what was written is dropped."""
    file = files.writer("inblob")
    file.write(INBLOB)
    files.entry.dead = True
    file.close()
    files.entry.dead = False
    assert files.generation() == 0


def test_error_of_the_store_is_lost(files: Files) -> None:
    """Linux: the result of a release is ignored (here EBUSY)."""
    files.entry._written = (1 << 64) - 1
    file = files.writer("inblob")
    file.write(INBLOB)
    file.close()
    assert files.generation() == (1 << 64) - 1


def both_ways(files: Files) -> TsmFile:
    """No attribute of this driver can be opened both ways; configfs itself knows such attributes."""
    kind = AttributeKind(name="both", show=lambda _: b"value", store=lambda *_: None, max_size=8)
    return BinaryFile(files.entry, kind, os.O_RDWR)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (lambda file: file.read(1), lambda file: file.write(b"x")),
        (lambda file: file.write(b"x"), lambda file: file.read(1)),
    ],
)
def test_both_ways(
    files: Files, first: Callable[[TsmFile], object], then: Callable[[TsmFile], object]
) -> None:
    """Linux, configfs_bin_read_iter and configfs_bin_write_iter: ETXTBSY after the other direction."""
    file = both_ways(files)
    first(file)
    with refusal(errno.ETXTBSY):
        then(file)


def test_a_base_file_does_nothing(files: Files) -> None:
    """What each kind of attribute has to say itself."""
    file = TsmFile(files.entry, files.entry.kinds["provider"], os.O_RDWR)
    for operation in (lambda: file.read(1), lambda: file.write(b"x"), lambda: file.seek(0, 0)):
        with pytest.raises(NotImplementedError):
            operation()
