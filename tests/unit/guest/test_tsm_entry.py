"""Attributes of an entry: generations, the privilege level, blobs, services."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.guest.tsm_entry import ATTRIBUTES, Entry, Registry
from swsnp.guest.tsm_report import Blobs, ReportInput
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from collections.abc import Callable

INBLOB = bytes(range(64))
GUID = "c476f1eb-0123-45a5-9641-b4e7dde5bfe3"
OTHER_GUID = "a4453a59-9e1b-4787-a033-1986d6adbe55"


class Provider:
    """Answers from what it is given; `fail` are the errno values of the next requests."""

    name = "sev_guest"

    def __init__(self, *, privlevel_floor: int = 0, services: bool = False) -> None:
        self.privlevel_floor, self.services = privlevel_floor, services
        self.given: list[ReportInput] = []
        self.fail: list[int] = []
        self.auxblob = b"certificates"
        self.outblob: Callable[[ReportInput], bytes | None] = lambda given: given.inblob[::-1]

    def report_new(self, given: ReportInput) -> Blobs:
        self.given.append(given)
        if self.fail:
            raise TsmError(self.fail.pop(0))
        return Blobs(
            outblob=self.outblob(given), auxblob=self.auxblob, manifestblob=given.service_provider or b""
        )


class Files:
    """An entry by attribute names."""

    def __init__(self, provider: Provider) -> None:
        self.registry = Registry()
        self.registry.provider = self.provider = provider
        self.entry = Entry(self.registry, services=provider.services)

    def read(self, name: str) -> bytes:
        return self.entry.show(self.entry.kinds[name])

    def write(self, name: str, data: bytes | str) -> None:
        self.entry.store(self.entry.kinds[name], data.encode() if isinstance(data, str) else data)

    def generation(self) -> int:
        return int(self.read("generation"))


@pytest.fixture
def files() -> Files:
    return Files(Provider())


@pytest.fixture
def svsm() -> Files:
    """A guest below VMPL0."""
    return Files(Provider(privlevel_floor=2, services=True))


def refusal(code: int) -> pytest.RaisesExc[TsmError]:
    return pytest.RaisesExc(TsmError, check=lambda error: error.errno == code)


def test_what_is_there(files: Files, svsm: Files) -> None:
    """Documentation/ABI/testing/configfs-tsm-report; services only where an SVSM can be (VMPL above 0)."""
    table = {each.name: (each.mode, each.st_size, each.max_size, each.services) for each in ATTRIBUTES}
    assert table == {
        "generation": (0o444, 4096, None, False),
        "provider": (0o444, 4096, None, False),
        "privlevel": (0o200, 4096, None, False),
        "privlevel_floor": (0o444, 4096, None, False),
        "service_provider": (0o200, 4096, None, True),
        "service_guid": (0o200, 4096, None, True),
        "service_manifest_version": (0o200, 4096, None, True),
        "inblob": (0o200, 0, 64, False),
        "outblob": (0o444, 0, 32 << 10, False),
        "auxblob": (0o444, 0, 32 << 10, False),
        "manifestblob": (0o444, 0, 32 << 10, True),
    }
    assert set(files.entry.kinds) == {name for name, row in table.items() if not row[3]}
    assert set(svsm.entry.kinds) == set(table)


@pytest.mark.parametrize("blob", ["outblob", "auxblob"])
def test_without_inblob(files: Files, blob: str) -> None:
    """Linux, tsm_report_read: EINVAL before anything else, also without a provider."""
    files.registry.provider = None
    with refusal(errno.EINVAL):
        files.read(blob)
    files.write("inblob", b"")
    with refusal(errno.EINVAL):
        files.read(blob)
    assert files.provider.given == []


def test_without_provider(files: Files) -> None:
    """Linux: ENXIO for whatever needs the provider, after the text was parsed; the rest goes on."""
    files.registry.provider = None
    files.write("inblob", INBLOB)
    for name in ("provider", "privlevel_floor", "outblob", "auxblob"):
        with refusal(errno.ENXIO):
            files.read(name)
    with refusal(errno.ENXIO):
        files.write("privlevel", "1")
    with refusal(errno.EINVAL):
        files.write("privlevel", "x")
    assert files.generation() == 1


@pytest.mark.parametrize(("name", "value"), [("provider", b"sev_guest\n"), ("privlevel_floor", b"2\n")])
def test_shown_text(svsm: Files, name: str, value: bytes) -> None:
    """Linux: name and number with a newline; the floor is the VMPCK's number."""
    assert svsm.read(name) == value


@pytest.mark.parametrize("level", ["0", "1", "4", "0x10", "4294967295"])
def test_privlevel_out_of_bounds(svsm: Files, level: str) -> None:
    """Linux, tsm_report_privlevel_store: below the floor or above 3 is EINVAL, and no write."""
    with refusal(errno.EINVAL):
        svsm.write("privlevel", level)
    with refusal(errno.ERANGE):
        svsm.write("privlevel", "4294967296")
    assert svsm.generation() == 0


def test_privlevel(files: Files, svsm: Files) -> None:
    """Linux: 0 until written, even where the floor is higher."""
    svsm.write("inblob", INBLOB)
    svsm.read("outblob")
    assert svsm.provider.given[-1].privlevel == 0
    for level in ("2", "0x3\n"):
        svsm.write("privlevel", level)
        svsm.read("outblob")
    assert [each.privlevel for each in svsm.provider.given] == [0, 2, 3]
    files.write("privlevel", "0")
    assert files.generation() == 1


def test_generation_counts_accepted_writes(files: Files) -> None:
    """Linux: 0 at first, then one more for each write that was accepted; reports do not count."""
    assert files.read("generation") == b"0\n"
    files.write("inblob", INBLOB)
    files.write("privlevel", "1")
    files.write("inblob", INBLOB)
    files.read("outblob")
    files.read("auxblob")
    with refusal(errno.EINVAL):
        files.write("privlevel", "9")
    assert files.read("generation") == b"3\n"


def test_one_request_for_all_blobs(files: Files) -> None:
    """Linux, read_cached_report: auxblob asks the firmware, outblob comes from the same report."""
    files.write("inblob", INBLOB)
    assert files.read("auxblob") == b"certificates"
    assert files.read("outblob") == INBLOB[::-1]
    assert len(files.provider.given) == 1


def test_a_write_makes_the_report_stale(files: Files) -> None:
    """Linux: read and write generation differ, so the next read asks again, even for the same input."""
    for count in (1, 2):
        files.write("inblob", INBLOB)
        files.read("outblob")
        files.read("outblob")
        assert len(files.provider.given) == count
    files.write("privlevel", "1")
    files.read("auxblob")
    assert len(files.provider.given) == 3


def test_a_failure_is_not_kept(files: Files) -> None:
    """Linux: no blob is left, of this report or of an earlier one, and the next read asks again."""
    files.write("inblob", INBLOB)
    files.read("outblob")
    files.write("inblob", bytes(64))
    files.provider.fail = [errno.EIO, errno.EBADMSG]
    with refusal(errno.EIO):
        files.read("outblob")
    with refusal(errno.EBADMSG):
        files.read("auxblob")
    assert files.read("outblob") == bytes(64)
    assert len(files.provider.given) == 4


def test_failure_of_a_first_report_then_success(files: Files) -> None:
    """Linux: likewise for a fresh entry, whose generations are only then equal."""
    files.write("inblob", INBLOB)
    files.provider.fail = [errno.ENOTTY]
    with refusal(errno.ENOTTY):
        files.read("auxblob")
    assert files.read("auxblob") == b"certificates"


def test_auxblob_of_an_earlier_report_does_not_linger(files: Files) -> None:
    """A host that has no certificates any more: auxblob is empty."""
    files.write("inblob", INBLOB)
    assert files.read("auxblob") == b"certificates"
    files.provider.auxblob = b""
    files.write("inblob", INBLOB)
    assert files.read("auxblob") == b""


def test_no_blobs_without_failure(files: Files) -> None:
    """A positive result of the request: outblob is read as empty, without errno, and is asked for again."""
    files.provider.outblob, files.provider.auxblob = lambda _: None, b""
    files.write("inblob", INBLOB)
    assert files.read("outblob") == b""
    assert files.read("auxblob") == b""
    assert len(files.provider.given) == 2


def test_empty_report_is_a_report(files: Files) -> None:
    """Linux: a blob of length 0 is present, so it is not asked for again."""
    files.provider.outblob = lambda _: b""
    files.write("inblob", INBLOB)
    assert (files.read("outblob"), files.read("outblob")) == (b"", b"")
    assert len(files.provider.given) == 1


def test_writes_without_a_read_come_round(files: Files) -> None:
    """Linux, try_advance_write_generation: the 2^64th write without a read is EBUSY and changes nothing."""
    files.entry._written = (1 << 64) - 1
    assert files.read("generation") == b"18446744073709551615\n"
    for name, value in (("inblob", INBLOB), ("privlevel", "1")):
        with refusal(errno.EBUSY):
            files.write(name, value)
    assert files.generation() == (1 << 64) - 1
    with refusal(errno.EINVAL):  # nothing was stored
        files.read("outblob")


def test_generation_wraps(files: Files) -> None:
    """Linux: unsigned long."""
    files.entry._written = files.entry._read = (1 << 64) - 1
    files.write("inblob", INBLOB)
    assert files.generation() == 0


def test_services(svsm: Files) -> None:
    """Linux: each write counts; one newline is stripped; the provider judges them when a report is made."""
    svsm.write("inblob", INBLOB)
    svsm.write("service_provider", "svsm\n")
    svsm.write("service_guid", GUID + "\n")
    svsm.write("service_manifest_version", "0xFFFFFFFF")
    assert svsm.read("manifestblob") == b"svsm"
    assert svsm.provider.given == [
        ReportInput(
            inblob=INBLOB,
            service_provider=b"svsm",
            service_guid=bytes.fromhex("ebf176c42301a5459641b4e7dde5bfe3"),
            service_manifest_version=0xFFFF_FFFF,
        )
    ]
    assert svsm.generation() == 4
    svsm.write("service_provider", "a\n\n")
    assert svsm.read("manifestblob") == b"a\n"
    svsm.write("service_provider", b"b\0c")
    assert svsm.read("manifestblob") == b"b"


def test_bad_guid_clears_the_old_one_and_counts(svsm: Files) -> None:
    """Linux, tsm_report_service_guid_store: reset and counted before the text is parsed."""
    svsm.write("inblob", INBLOB)
    svsm.write("service_guid", OTHER_GUID)
    with refusal(errno.EINVAL):
        svsm.write("service_guid", "nonsense")
    assert svsm.generation() == 3
    svsm.read("outblob")
    assert svsm.provider.given[-1].service_guid == bytes(16)


@pytest.mark.parametrize(("text", "code"), [("x", errno.EINVAL), ("4294967296", errno.ERANGE)])
def test_bad_manifest_version(svsm: Files, text: str, code: int) -> None:
    """Linux: as the privilege level, without bounds; a refused one does not count."""
    with refusal(code):
        svsm.write("service_manifest_version", text)
    assert svsm.generation() == 0


def test_removed_entry(files: Files) -> None:
    """Linux, fs/configfs/file.c: every operation ends with ENOENT."""
    files.entry.dead = True
    with refusal(errno.ENOENT):
        files.read("generation")
    with refusal(errno.ENOENT):
        files.write("inblob", INBLOB)


def test_wrong_direction(files: Files) -> None:
    """What cannot be opened so cannot be done either: EACCES."""
    with refusal(errno.EACCES):
        files.read("inblob")
    with refusal(errno.EACCES):
        files.write("outblob", b"x")
