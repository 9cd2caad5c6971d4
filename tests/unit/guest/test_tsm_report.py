"""The provider sev_guest: status and errno mapping, blobs; over a made-up answer and over the real driver."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.guest.driver import K_A, K_B, K_C, DriverGeneration, SevGuestDriver
from swsnp.guest.tsm_report import (
    Blobs,
    ExtReport,
    ReportInput,
    SevGuestProvider,
    certs_size,
    ext_report_through,
)
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from tests.unit.guest.conftest import ScriptedHost

    from swsnp.guest.caller import CallerMemory

INBLOB = bytes(range(64))
REPORT = bytes(i * 7 & 0xFF for i in range(1184))


def refusal(code: int) -> pytest.RaisesExc[TsmError]:
    return pytest.RaisesExc(TsmError, check=lambda error: error.errno == code)


def entry(offset: int, length: int, guid: bytes = b"G" * 16) -> bytes:
    return struct.pack("<16sII", guid, offset, length)


class Answers:
    """Answers every request alike and remembers what was asked."""

    def __init__(self, result: int = 0, *, status: int = 0, size: int = 1184, certs: bytes = b"") -> None:
        self.asked: list[tuple[bytes, int]] = []
        response = (struct.pack("<II24x", status, size) + REPORT).ljust(4000, b"\0")
        self.answer = ExtReport(result=result, response=response, certs=certs.ljust(0x4000, b"\0"))

    def __call__(self, user_data: bytes, privlevel: int) -> ExtReport:
        self.asked.append((user_data, privlevel))
        return self.answer


@pytest.mark.parametrize("size", [0, 1, 63])
def test_inblob_of_another_length(size: int) -> None:
    """Linux, sev_report_new: exactly 64 bytes, or EINVAL without a request."""
    answers = Answers()
    with refusal(errno.EINVAL):
        SevGuestProvider(answers).report_new(ReportInput(inblob=bytes(size)))
    assert answers.asked == []


@pytest.mark.parametrize("name", [b"", b"svsm", b"other"])
def test_services_are_absent(name: bytes) -> None:
    """Linux: a provider other than svsm is EINVAL; so is an SVSM without the attestation protocol."""
    answers = Answers()
    with refusal(errno.EINVAL):
        SevGuestProvider(answers).report_new(ReportInput(inblob=INBLOB, service_provider=name))
    assert answers.asked == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADMSG, errno.ETIMEDOUT, errno.ENOTTY])
def test_errors_of_the_request(code: int) -> None:
    """Linux, sev_report_new: the request's errno becomes the read's."""
    with refusal(code):
        SevGuestProvider(Answers(-code)).report_new(ReportInput(inblob=INBLOB))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (0x16, errno.EINVAL),
        (0x27, errno.EINVAL),
        (0x01, errno.ENXIO),
        (0x1D, errno.ENXIO),
        (0x99, errno.ENXIO),
    ],
)
def test_status_of_the_payload(status: int, code: int) -> None:
    """Linux, sev_report_new: INVALID_PARAM and INVALID_KEY are EINVAL, the rest ENXIO."""
    with refusal(code):
        SevGuestProvider(Answers(status=status)).report_new(ReportInput(inblob=INBLOB))


@pytest.mark.parametrize("size", [4065, 0xFFFF_FFFF])
def test_report_larger_than_a_page(size: int) -> None:
    """Linux, sev_report_new: 32 bytes of header and the report fit 4,096 bytes, or ENOMEM."""
    with refusal(errno.ENOMEM):
        SevGuestProvider(Answers(size=size)).report_new(ReportInput(inblob=INBLOB))


@pytest.mark.parametrize("size", [0, 1184, 4064])
def test_size_of_the_outblob(size: int) -> None:
    """Linux, sev_report_new: as many bytes as the header says, without the header."""
    blobs = SevGuestProvider(Answers(size=size)).report_new(ReportInput(inblob=INBLOB))
    assert blobs.outblob == REPORT.ljust(4096, b"\0")[:size]


@pytest.mark.parametrize("result", [2, 4])
def test_positive_result(result: int) -> None:
    """Linux: only negative results are failures; there are no blobs then."""
    assert SevGuestProvider(Answers(result)).report_new(ReportInput(inblob=INBLOB)) == Blobs()


def test_what_is_asked() -> None:
    """Linux, sev_report_new: inblob and privilege level."""
    answers = Answers(certs=entry(48, 3) + bytes(24) + b"abc")
    blobs = SevGuestProvider(answers).report_new(ReportInput(inblob=INBLOB, privlevel=2))
    assert answers.asked == [(INBLOB, 2)]
    assert blobs == Blobs(outblob=REPORT, auxblob=entry(48, 3) + bytes(24) + b"abc")


@pytest.mark.parametrize(
    ("table", "size"),
    [
        (b"", 0),
        (bytes(24), 0),
        (entry(48, 100), 148),
        (entry(48, 100) + entry(48, 20) + bytes(24) + entry(0, 9999), 148),
        (entry(72, 8) + entry(80, 8), 88),
        # an entry is the end only when all of it is zero
        (entry(0, 5, bytes(16)) + entry(7, 0, bytes(16)) + entry(0, 0), 7),
        (entry(0, 0) + entry(24, 8), 32),
        # u32 arithmetic
        (entry(0xFFFF_FFFF, 2), 1),
        (entry(0xFFFF_FFFF, 0), 0x4000),
        # beyond the buffer: cut
        (entry(0x3FFF, 1), 0x4000),
        (entry(0x3FFF, 2), 0x4000),
        # no end in 682 entries
        (entry(0, 1) * 681 + entry(0, 77) + b"\xff" * 16, 77),
    ],
)
def test_scan_of_the_certificate_table(table: bytes, size: int) -> None:
    """Linux, sev_report_new: the farthest end of up to 682 entries, in u32, at most 16 KiB."""
    assert certs_size(table.ljust(0x4000, b"\0")) == size


class Guest:
    """The driver on a scripted host, as the machine offers it."""

    def __init__(self, host: ScriptedHost, driver: SevGuestDriver) -> None:
        self._host, self._driver = host, driver

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        result: int = self._host.run(self._driver.ioctl(self._host.cpu, command, argument, caller))
        return result


@pytest.mark.parametrize("generation", [K_A, K_B, K_C], ids=["K-A", "K-B", "K-C"])
def test_through_the_driver(host: ScriptedHost, generation: DriverGeneration) -> None:
    """Linux, sev_report_new: one extended request, version 1, four pages, reserved bytes 0."""
    host.certs = entry(48, 5) + bytes(24) + b"certs" + b"behind"
    provider = SevGuestProvider(ext_report_through(Guest(host, host.driver(generation=generation))))
    blobs = provider.report_new(ReportInput(inblob=INBLOB, privlevel=3))
    assert blobs.outblob is not None
    assert (len(blobs.outblob), blobs.outblob[:64]) == (1184, INBLOB)
    assert blobs.auxblob == entry(48, 5) + bytes(24) + b"certs"
    assert host.firmware.plaintexts == [INBLOB + struct.pack("<I28x", 3)]
    assert [each.msg_version for each in host.firmware.seen] == [1]
    assert [(each.code, each.rbx) for each in host.events] == [(0x8000_0012, 4)]


def test_more_than_four_pages_of_certificates(host: ScriptedHost) -> None:
    """Linux: EIO at each read, and the key is kept."""
    host.certs = b"c" * 0x4001
    provider = SevGuestProvider(ext_report_through(Guest(host, host.driver())))
    for _ in range(2):
        with refusal(errno.EIO):
            provider.report_new(ReportInput(inblob=INBLOB))
    assert not host.wiped()


@pytest.mark.parametrize(("info1", "info2"), [(2, 5), (1, 0x8000_030D)])
def test_host_that_does_not_answer(host: ScriptedHost, info1: int, info2: int) -> None:
    """Linux: first no blobs and no errno, then, the key being wiped, ENOTTY."""
    provider = SevGuestProvider(ext_report_through(Guest(host, host.driver())))
    host.reply(info1, info2)
    assert provider.report_new(ReportInput(inblob=INBLOB)) == Blobs()
    assert host.wiped()
    with refusal(errno.ENOTTY):
        provider.report_new(ReportInput(inblob=INBLOB))


def test_firmware_error(host: ScriptedHost) -> None:
    """Linux: EIO, the key is wiped."""
    provider = SevGuestProvider(ext_report_through(Guest(host, host.driver())))
    host.reply(0, 0x16)
    with refusal(errno.EIO):
        provider.report_new(ReportInput(inblob=INBLOB))
    assert host.wiped()


def test_the_provider_of_a_guest() -> None:
    """Linux: the module's name with an underscore; floor 0 and no services unless told."""
    provider = SevGuestProvider(Answers())
    assert (provider.name, provider.privlevel_floor, provider.services) == ("sev_guest", 0, False)
