"""The directories of configfs-tsm, and the whole path over the driver on a scripted host."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.guest.tsm import Attribute, ConfigfsTsm, Directory, EntryDirectory
from swsnp.guest.tsm_report import SevGuestProvider, ext_report_through
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.guest.conftest import ScriptedHost

    from swsnp.guest.caller import CallerMemory
    from swsnp.guest.driver import SevGuestDriver

INBLOB = bytes(range(64))
PLAIN = ["auxblob", "generation", "inblob", "outblob", "privlevel", "privlevel_floor", "provider"]


class Guest:
    """The driver on a scripted host, as the machine offers it."""

    def __init__(self, host: ScriptedHost, driver: SevGuestDriver) -> None:
        self._host, self._driver = host, driver

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        result: int = self._host.run(self._driver.ioctl(self._host.cpu, command, argument, caller))
        return result


@pytest.fixture
def provider(host: ScriptedHost) -> SevGuestProvider:
    return SevGuestProvider(ext_report_through(Guest(host, host.driver())))


@pytest.fixture
def tsm(provider: SevGuestProvider) -> ConfigfsTsm:
    made = ConfigfsTsm()
    made.register(provider)
    return made


def refusal(code: int) -> pytest.RaisesExc[TsmError]:
    return pytest.RaisesExc(TsmError, check=lambda error: error.errno == code)


def entry_of(tsm: ConfigfsTsm, name: str = "r") -> EntryDirectory:
    found = tsm.report.child(name)
    assert isinstance(found, EntryDirectory)
    return found


def made(tsm: ConfigfsTsm, name: str = "r") -> EntryDirectory:
    tsm.report.mkdir(name)
    return entry_of(tsm, name)


def read(entry: EntryDirectory, name: str) -> bytes:
    file = entry.open(name, os.O_RDONLY)
    data = b"".join(iter(lambda: file.read(4096), b""))
    file.close()
    return data


def write(entry: EntryDirectory, name: str, data: bytes) -> None:
    file = entry.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    file.write(data)
    file.close()


# directories


def test_what_is_there_at_first() -> None:
    """Documentation/ABI/testing/configfs-tsm-report: tsm/report is there without a provider too."""
    tsm = ConfigfsTsm()
    inner = tsm.root.child("tsm")
    assert isinstance(inner, Directory)
    assert inner.child("report") is tsm.report
    assert (list(tsm.root.children()), list(inner.children()), list(tsm.report.children())) == (
        ["tsm"],
        ["report"],
        [],
    )


def test_mkdir_without_provider() -> None:
    """Linux, tsm_report_make_item: ENXIO."""
    with refusal(errno.ENXIO):
        ConfigfsTsm().report.mkdir("r")


def test_mkdir(tsm: ConfigfsTsm) -> None:
    """Linux: an entry with its attributes; again is EEXIST."""
    assert sorted(made(tsm).children()) == PLAIN
    with refusal(errno.EEXIST):
        tsm.report.mkdir("r")
    made(tsm, "other")
    assert list(tsm.report.children()) == ["r", "other"]


def test_mkdir_elsewhere(tsm: ConfigfsTsm) -> None:
    """Linux, fs/configfs/dir.c: EPERM where the kernel makes the directories, EEXIST where one is."""
    inner = tsm.root.children()["tsm"]
    assert isinstance(inner, Directory)
    for directory in (tsm.root, inner, made(tsm)):
        with refusal(errno.EPERM):
            directory.mkdir("x")
    with refusal(errno.EEXIST):
        inner.mkdir("report")
    with refusal(errno.EEXIST):
        entry_of(tsm).mkdir("inblob")


@pytest.mark.parametrize(
    ("name", "fits"), [("n" * 255, True), ("n" * 256, False), ("ü" * 127, True), ("ü" * 128, False)]
)
def test_length_of_a_name(tsm: ConfigfsTsm, name: str, fits: bool) -> None:
    """Linux, configfs_lookup: 255 bytes."""
    if fits:
        tsm.report.mkdir(name)
        assert list(tsm.report.children()) == [name]
        return
    for operation in (tsm.report.mkdir, tsm.report.child, tsm.report.rmdir, tsm.report.unlink):
        with refusal(errno.ENAMETOOLONG):
            operation(name)


def test_rmdir(tsm: ConfigfsTsm) -> None:
    """Linux: an entry goes with its attributes; what the kernel made stays (EPERM)."""
    entry = made(tsm)
    with refusal(errno.ENOTDIR):
        entry.rmdir("inblob")
    tsm.report.rmdir("r")
    assert list(tsm.report.children()) == []
    with refusal(errno.ENOENT):
        tsm.report.rmdir("r")
    with refusal(errno.ENOENT):
        entry.open("generation", os.O_RDONLY)
    inner = tsm.root.children()["tsm"]
    assert isinstance(inner, Directory)
    with refusal(errno.EPERM):
        inner.rmdir("report")
    with refusal(errno.EPERM):
        tsm.root.rmdir("tsm")


def test_unlink(tsm: ConfigfsTsm) -> None:
    """Linux: EISDIR for a directory (what Go's os.Remove expects first), EPERM for an attribute."""
    entry = made(tsm)
    with refusal(errno.EISDIR):
        tsm.report.unlink("r")
    with refusal(errno.EPERM):
        entry.unlink("inblob")
    with refusal(errno.ENOENT):
        tsm.report.unlink("x")


def test_a_new_entry_of_an_old_name_is_new(tsm: ConfigfsTsm) -> None:
    """Linux: nothing is left of the old one."""
    write(made(tsm), "inblob", INBLOB)
    tsm.report.rmdir("r")
    assert read(made(tsm), "generation") == b"0\n"


# opening


@pytest.mark.parametrize(
    ("name", "flags", "code"),
    [
        ("x", os.O_RDONLY, errno.ENOENT),
        ("x", os.O_WRONLY | os.O_CREAT, errno.EACCES),
        ("x", os.O_WRONLY | os.O_CREAT | os.O_EXCL, errno.EACCES),
        ("inblob", os.O_WRONLY | os.O_CREAT | os.O_EXCL, errno.EEXIST),
        ("inblob", os.O_RDONLY, errno.EACCES),
        ("inblob", os.O_RDWR, errno.EACCES),
        ("inblob", os.O_RDWR | os.O_CREAT | os.O_TRUNC, errno.EACCES),
        ("privlevel", os.O_RDONLY, errno.EACCES),
        ("outblob", os.O_WRONLY, errno.EACCES),
        ("outblob", os.O_RDWR, errno.EACCES),
        ("generation", os.O_WRONLY | os.O_TRUNC, errno.EACCES),
        ("generation", os.O_ACCMODE, errno.EACCES),
        ("generation", os.O_DIRECTORY, errno.ENOTDIR),
        ("n" * 256, os.O_RDONLY | os.O_CREAT, errno.ENAMETOOLONG),
    ],
)
def test_refused_openings(tsm: ConfigfsTsm, name: str, flags: int, code: int) -> None:
    """Linux, fs/configfs/file.c and fs/namei.c; the wrong direction is refused even to root."""
    with refusal(code):
        made(tsm).open(name, flags)


def test_directories_are_not_opened_for_writing(tsm: ConfigfsTsm) -> None:
    """Linux, fs/namei.c: EISDIR."""
    made(tsm)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT):
        with refusal(errno.EISDIR):
            Directory.check_open(flags)
        with refusal(errno.EISDIR):
            tsm.report.open("r", flags)
    Directory.check_open(os.O_RDONLY | os.O_DIRECTORY)
    with refusal(errno.EEXIST):
        tsm.report.open("r", os.O_CREAT | os.O_EXCL)


def test_truncating_changes_nothing(tsm: ConfigfsTsm) -> None:
    """configfs: O_TRUNC and O_CREAT on an attribute are accepted and have no effect."""
    entry = made(tsm)
    write(entry, "inblob", INBLOB)
    entry.open("inblob", os.O_WRONLY | os.O_CREAT | os.O_TRUNC).close()
    assert read(entry, "generation") == b"1\n"
    assert read(entry, "outblob")[:64] == INBLOB


def test_opening_an_attribute_of_a_removed_entry(tsm: ConfigfsTsm) -> None:
    """Linux, __configfs_open_file: ENOENT for one that lost the race."""
    attribute = made(tsm).child("generation")
    assert isinstance(attribute, Attribute)
    tsm.report.rmdir("r")
    with refusal(errno.ENOENT):
        attribute.open(os.O_RDONLY)


def test_rmdir_with_open_files(tsm: ConfigfsTsm, host: ScriptedHost) -> None:
    """Linux: what was read stays; a first read is ENOENT; what was written is dropped at the close."""
    entry = made(tsm)
    write(entry, "inblob", INBLOB)
    known, fresh = (entry.open("outblob", os.O_RDONLY) for _ in range(2))
    writer = entry.open("inblob", os.O_WRONLY)
    known.read(1)
    writer.write(bytes(64))
    tsm.report.rmdir("r")
    assert len(known.read(9999)) == 1183
    with refusal(errno.ENOENT):
        fresh.read(1)
    writer.close()
    assert len(host.pages) == 1


# providers


def test_register(provider: SevGuestProvider) -> None:
    """Linux, tsm_report_register: EBUSY for a second provider, or over entries of an earlier one."""
    tsm = ConfigfsTsm()
    tsm.register(provider)
    with refusal(errno.EBUSY):
        tsm.register(provider)
    made(tsm)
    tsm.unregister()
    with refusal(errno.EBUSY):
        tsm.register(provider)
    tsm.report.rmdir("r")
    tsm.register(provider)


def test_entries_outlive_their_provider(tsm: ConfigfsTsm) -> None:
    """Linux: what needs the provider is ENXIO, mkdir included; the rest goes on."""
    entry = made(tsm)
    write(entry, "inblob", INBLOB)
    tsm.unregister()
    with refusal(errno.ENXIO):
        read(entry, "outblob")
    with refusal(errno.ENXIO):
        tsm.report.mkdir("s")
    assert read(entry, "generation") == b"1\n"


def test_services_below_vmpl_0(provider: SevGuestProvider) -> None:
    """Linux, sev_report_attr_visible: the attributes about services, and no service that answers."""
    tsm = ConfigfsTsm()
    tsm.register(SevGuestProvider(provider.get_ext_report, privlevel_floor=1, services=True))
    entry = made(tsm)
    assert sorted({*entry.children()} - {*PLAIN}) == [
        "manifestblob",
        "service_guid",
        "service_manifest_version",
        "service_provider",
    ]
    write(entry, "inblob", INBLOB)
    assert read(entry, "manifestblob") == b""
    write(entry, "service_provider", b"svsm")
    with refusal(errno.EINVAL):
        read(entry, "outblob")


# over the driver


def test_entries_do_not_share_anything(tsm: ConfigfsTsm) -> None:
    """Each entry has its own input, generation and report."""
    first, second = made(tsm, "first"), made(tsm, "second")
    write(first, "inblob", INBLOB)
    write(second, "inblob", INBLOB[::-1])
    write(second, "privlevel", b"1")
    assert read(first, "outblob")[:64] == INBLOB
    assert read(second, "outblob")[:64] == INBLOB[::-1]
    assert (read(first, "generation"), read(second, "generation")) == (b"1\n", b"2\n")


def test_the_sequence_of_go_clients(tsm: ConfigfsTsm, host: ScriptedHost) -> None:
    """go-configfs-tsm: generation beside every read; auxblob first, which makes the one request."""
    host.certs = struct.pack("<16sII", b"G" * 16, 48, 4) + bytes(24) + b"cert"
    made(tsm, "probe")  # never removed: harmless
    entry = made(tsm)
    assert read(entry, "generation") == b"0\n"
    write(entry, "inblob", INBLOB)
    write(entry, "privlevel", b"1")
    seen = {}
    for name in ("auxblob", "outblob", "provider"):
        seen[name] = read(entry, name)
        assert read(entry, "generation") == b"2\n"
    assert seen["auxblob"] == host.certs
    assert (len(seen["outblob"]), seen["provider"]) == (1184, b"sev_guest\n")
    assert len(host.pages) == 1
    with refusal(errno.EISDIR):
        tsm.report.unlink("r")
    tsm.report.rmdir("r")


@pytest.mark.parametrize("size", [1, 63])
def test_inblob_of_another_length(tsm: ConfigfsTsm, host: ScriptedHost, size: int) -> None:
    """Linux: stored, and EINVAL at the read; the firmware is not asked."""
    entry = made(tsm)
    write(entry, "inblob", bytes(size))
    assert read(entry, "generation") == b"1\n"
    with refusal(errno.EINVAL):
        read(entry, "outblob")
    assert host.pages == []


def test_level_below_the_keys(tsm: ConfigfsTsm, host: ScriptedHost) -> None:
    """A firmware that refuses the level in its payload (16h): EINVAL at each read; the key lives."""
    entry = made(tsm)
    write(entry, "inblob", INBLOB)
    host.firmware.payload = lambda header, plaintext: struct.pack("<II24x", 0x16, 0x4A0) + bytes(0x4A0)
    for _ in range(2):
        with refusal(errno.EINVAL):
            read(entry, "outblob")
    assert (host.wiped(), len(host.pages)) == (False, 2)


@pytest.mark.parametrize(
    ("disturb", "code"),
    [
        (lambda host: host.reply(0, 0x16), errno.EIO),
        (lambda host: host.tamper(lambda page: page.__setitem__(0x60, page[0x60] ^ 1)), errno.EBADMSG),
    ],
)
def test_failure_then_key_gone(
    tsm: ConfigfsTsm, host: ScriptedHost, disturb: Callable[[ScriptedHost], None], code: int
) -> None:
    """Linux: the request's errno at the read; then, the key being wiped, ENOTTY."""
    entry = made(tsm)
    write(entry, "inblob", INBLOB)
    disturb(host)
    with refusal(code):
        read(entry, "outblob")
    with refusal(errno.ENOTTY):
        read(entry, "auxblob")


def test_host_that_does_not_answer(tsm: ConfigfsTsm, host: ScriptedHost) -> None:
    """Linux: a positive result is an empty outblob first and ENOTTY then."""
    entry = made(tsm)
    write(entry, "inblob", INBLOB)
    host.reply(2, 5)
    assert read_once(entry) == b""
    with refusal(errno.ENOTTY):
        read_once(entry)


def read_once(entry: EntryDirectory) -> bytes:
    return entry.open("outblob", os.O_RDONLY).read(4096)


def test_certificates_that_went_away(tsm: ConfigfsTsm, host: ScriptedHost) -> None:
    """A later report of the same entry without certificates: auxblob is empty."""
    entry = made(tsm)
    host.certs = struct.pack("<16sII", b"G" * 16, 48, 4) + bytes(24) + b"cert"
    write(entry, "inblob", INBLOB)
    assert read(entry, "auxblob") == host.certs
    host.certs = b""
    write(entry, "inblob", INBLOB)
    assert read(entry, "auxblob") == b""
