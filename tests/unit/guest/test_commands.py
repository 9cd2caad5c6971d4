"""SNP_GET_REPORT, SNP_GET_DERIVED_KEY and SNP_GET_EXT_REPORT: arguments, buffers, certificates."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.sev_guest import SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT, SNP_GET_REPORT
from swsnp.guest.driver import K_A, K_B, K_C, DriverGeneration, SevGuestDriver

if TYPE_CHECKING:
    from tests.unit.guest.conftest import Caller, ScriptedHost

MARK = 0x1122334455667788
COMMANDS = [SNP_GET_REPORT, SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT]
REQUEST_SIZE = {SNP_GET_REPORT: 96, SNP_GET_DERIVED_KEY: 32, SNP_GET_EXT_REPORT: 112}
RESPONSE_SIZE = {SNP_GET_REPORT: 4000, SNP_GET_DERIVED_KEY: 64, SNP_GET_EXT_REPORT: 4000}
USER_SPACE_END = 0x7FFF_FFFF_F000


@pytest.fixture(params=[K_A, K_B, K_C], ids=["K-A", "K-B", "K-C"])
def generation(request: pytest.FixtureRequest) -> DriverGeneration:
    made: DriverGeneration = request.param
    return made


@pytest.fixture
def driver(host: ScriptedHost, generation: DriverGeneration) -> SevGuestDriver:
    return host.driver(generation=generation)


def refused(host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int, error: int) -> None:
    """An argument error: exitinfo2 FFh, no VMGEXIT, counter and key as before."""
    assert host.ioctl(driver, caller, command) == -error
    assert caller.exitinfo2 == 0xFF
    assert host.events == []
    assert host.stored() == 0
    assert not host.wiped()
    assert caller.resp == b"\xee" * 4000


# all three


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("null", [{"req": 0}, {"resp": 0}, {"req": 0, "resp": 0}])
def test_null_pointers(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int, null: dict[str, int]
) -> None:
    """Linux: req_data or resp_data 0 is EINVAL."""
    caller.set(**null)
    refused(host, driver, caller, command, errno.EINVAL)


@pytest.mark.parametrize("command", COMMANDS)
def test_unreadable_request(host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int) -> None:
    """Linux: a request structure that cannot be read in full is EFAULT."""
    short = caller.memory.place(bytes(REQUEST_SIZE[command] - 1))
    caller.set(req=short)
    refused(host, driver, caller, command, errno.EFAULT)


@pytest.mark.parametrize("command", COMMANDS)
def test_unwritable_response(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int
) -> None:
    """Linux: EFAULT after the firmware answered: number used, key kept, nothing written back."""
    caller.set(resp=caller.memory.place(bytes(RESPONSE_SIZE[command] - 1)))
    assert host.ioctl(driver, caller, command) == -errno.EFAULT
    assert caller.exitinfo2 == MARK
    assert not host.wiped()
    assert (host.stored(), host.firmware.counters[0]) == (2, 2)
    caller.set()
    assert host.ioctl(driver, caller, command) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_exact_sizes(host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int) -> None:
    """Linux: 96, 32 or 112 bytes are read and 4000 or 64 written, not one more."""
    response = bytearray(b"\xee" * RESPONSE_SIZE[command])
    request = caller.req[: REQUEST_SIZE[command]]
    caller.set(req=caller.memory.place(request), resp=caller.memory.place(response))
    assert host.ioctl(driver, caller, command) == 0
    assert b"\xee" * 16 not in response


def test_report_payloads(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: the 96 bytes go to the firmware unchanged, reserved bytes and KEY_SEL included."""
    caller.req[:] = bytes(range(112))
    caller.offer(0, 0)
    for command in (SNP_GET_REPORT, SNP_GET_EXT_REPORT):
        assert host.ioctl(driver, caller, command) == 0
        assert caller.resp[:0x80] == struct.pack("<II24x", 0, 0x4A0) + bytes(range(96))
        assert caller.resp[0x4C0:] == bytes(4000 - 0x4C0)
    assert host.firmware.plaintexts == [bytes(range(96))] * 2
    assert [header.msg_size for header in host.firmware.seen] == [96, 96]


def test_derived_key_payload(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: 32 bytes of request; of a caller's 40-byte structure (version 2) only the first 32 are sent."""
    caller.req[:] = bytes(range(100, 212))
    caller.set(req=caller.memory.place(caller.req[:40]))
    assert host.ioctl(driver, caller, SNP_GET_DERIVED_KEY) == 0
    assert host.firmware.plaintexts == [bytes(range(100, 132))]
    assert (host.firmware.seen[0].msg_type, host.firmware.seen[0].msg_size) == (3, 32)
    assert caller.resp == bytes(32) + bytes(range(100, 132)) + b"\xee" * (4000 - 64)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("status", [0x16, 0x27])
def test_payload_status_is_success(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int, status: int
) -> None:
    """Linux does not look into the payload: status 16h (VMPL) or 27h (key) is success, the key alive."""
    host.firmware.payload = lambda *_: struct.pack("<I", status) + bytes(60)
    for _ in range(2):
        assert host.ioctl(driver, caller, command) == 0
        assert caller.resp[:4] == struct.pack("<I", status)
        assert caller.exitinfo2 == MARK


# SNP_GET_EXT_REPORT


@pytest.mark.parametrize("certs_len", [0x4001, 0x5000, 0x8000, 0xFFFFF000, 1, 0xFFF, 0x1001, 24])
def test_certificate_length(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, certs_len: int
) -> None:
    """Linux: more than 4000h bytes, or not whole pages, is EINVAL."""
    caller.offer(caller.certs_address, certs_len)
    refused(host, driver, caller, SNP_GET_EXT_REPORT, errno.EINVAL)


@pytest.mark.parametrize(
    "address",
    [USER_SPACE_END, USER_SPACE_END - 0x3FFF, 0xFFFF_8000_0000_0000, (1 << 64) - 0x1000],
)
def test_certificates_outside_user_space(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, address: int
) -> None:
    """Linux, access_ok: a range beyond user space is EFAULT before the firmware is asked."""
    caller.offer(address, 0x4000)
    refused(host, driver, caller, SNP_GET_EXT_REPORT, errno.EFAULT)


def test_length_is_checked_before_the_range(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """Linux: a bad length at a bad address is EINVAL."""
    caller.offer(USER_SPACE_END, 1)
    refused(host, driver, caller, SNP_GET_EXT_REPORT, errno.EINVAL)


@pytest.mark.parametrize("address", [USER_SPACE_END - 0x4000, 0x6666_0000])
def test_unmapped_certificate_buffer(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, address: int
) -> None:
    """Linux: an unmapped address inside user space is EFAULT only after the firmware has answered."""
    caller.offer(address, 0x4000)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EFAULT
    assert caller.exitinfo2 == MARK
    assert host.stored() == 2
    assert not host.wiped()
    assert caller.resp == b"\xee" * 4000  # certificates are copied first


@pytest.mark.parametrize(("address", "size"), [(0, 0x4000), (0, 0), (None, 0), (0, 1), (0, 0x5000)])
def test_no_certificates_wanted(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, address: int | None, size: int
) -> None:
    """Linux: certs_address 0 or certs_len 0 means none are wanted; the other one is not checked."""
    caller.offer(caller.certs_address if address is None else address, size)
    before = bytes(caller.req)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == 0
    assert host.events[0].rbx == 0
    assert caller.req == before
    assert caller.certs == b"\xcc" * 0x4000


def test_certificates_exist_but_none_wanted(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """Linux: a host with certificates answers INVALID_LEN then, and certs_len tells the size."""
    host.certs = b"c" * 5000
    caller.offer(0, 0)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert (caller.exitinfo2, caller.certs_len) == (1 << 32, 0x2000)
    assert not host.wiped()


@pytest.mark.parametrize(
    ("table", "offered"),
    [(0x1000, 0x1000), (0x3001, 0x4000), (0x4000, 0x4000), (24, 0x4000), (0x1000, 0x2000)],
)
def test_certificates(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, table: int, offered: int
) -> None:
    """Linux: all certs_len bytes are copied, zero-padded; the request structure is untouched."""
    host.certs = bytes(1 + i % 255 for i in range(table))
    caller.offer(caller.certs_address, offered)
    before = bytes(caller.req)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == 0
    assert caller.certs == host.certs.ljust(offered, b"\0") + b"\xcc" * (0x4000 - offered)
    assert caller.req == before
    assert caller.resp[4:8] == struct.pack("<I", 0x4A0)


def test_host_without_certificates(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux zeroes the shared buffer first: an old table never shows again."""
    host.certs = b"old" * 1000
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == 0
    host.certs = b""
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == 0
    assert caller.certs == bytes(0x4000)


@pytest.mark.parametrize(
    ("offered", "wanted", "told"),
    [
        (0x3000, 4, 0x4000),
        (0x4000, 5, 0x5000),
        (0x1000, 0, 0),
        (0x1000, 1 << 20, 0),
        (0x1000, (1 << 32) + 2, 0x2000),
    ],
)
def test_wanted_size_is_told(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, offered: int, wanted: int, told: int
) -> None:
    """Linux: certs_len := RBX << 12 in 32 bits, whatever the host says; all other bytes are as they were."""
    caller.offer(caller.certs_address, offered)
    expected = bytearray(caller.req)
    expected[0x68:0x6C] = struct.pack("<I", told)
    host.too_small(wanted)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert caller.req == expected
    assert caller.exitinfo2 == 1 << 32


def test_more_than_four_pages_is_a_dead_end(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """Linux: a host that wants five pages is asked with five, which the driver itself refuses."""
    host.certs = bytes(0x4001)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert caller.certs_len == 0x5000
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EINVAL
    assert not host.wiped()


def test_size_cannot_be_told(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: if the request structure cannot be written the result is EFAULT; exitinfo2 is written."""
    caller.set(req=caller.memory.place(bytes(caller.req), writable=False))
    host.too_small(4)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EFAULT
    assert caller.exitinfo2 == 1 << 32
    assert not host.wiped()


def test_both_errors_at_once(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: VMM error 1 beside a firmware error is no INVALID_LEN: wiped, certs_len as offered."""
    caller.offer(caller.certs_address, 0x2000)
    before = bytes(caller.req)
    host.reply(0, 0x00000001_00000016)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert len(host.pages) == 1
    assert caller.exitinfo2 == 0x00000001_00000016
    assert caller.req == before
    assert host.wiped()


def test_both_errors_at_once_without_buffer(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """Linux: the pages offered are what is written then: none, even if certs_len said otherwise."""
    caller.offer(0, 0x4000)
    host.reply(0, 0x00000001_00000016)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert caller.certs_len == 0
