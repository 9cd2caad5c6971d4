"""The exchange: outcomes of VMGEXIT, BUSY with a clock, the fallback without certificates, verification."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.sev_guest import SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT, SNP_GET_REPORT
from swsnp.crypto.seal import MessageKey
from swsnp.guest.driver import K_A, K_B, K_C, DriverGeneration, SevGuestDriver
from swsnp.guest.exchange import BUSY, INVALID_LEN
from swsnp.hardware import GuestAccessFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.guest.conftest import Caller, FakeClock, FakeCpu, ScriptedHost

MARK = 0x1122334455667788
NO_FW_CALL = 0xFFFFFFFFFFFFFFFF
PLAIN = [SNP_GET_REPORT, SNP_GET_DERIVED_KEY]
COMMANDS = [*PLAIN, SNP_GET_EXT_REPORT]
RESPONSE = 0x6000


@pytest.fixture(params=[K_A, K_B, K_C], ids=["K-A", "K-B", "K-C"])
def generation(request: pytest.FixtureRequest) -> DriverGeneration:
    made: DriverGeneration = request.param
    return made


@pytest.fixture
def driver(host: ScriptedHost, generation: DriverGeneration, clock: FakeClock) -> SevGuestDriver:
    return host.driver(generation=generation, clock=clock)


def untouched(caller: Caller) -> bool:
    """Neither the response nor the certificate buffer was written."""
    return caller.resp == b"\xee" * 4000 and caller.certs == b"\xcc" * len(caller.certs)


def test_numbers() -> None:
    """GHCB 2.0: BUSY and INVALID_LEN stand in the high half of info 2."""
    assert (BUSY, INVALID_LEN) == (0x0000000200000000, 0x0000000100000000)


# what the host is asked


def test_plain_request_in_the_ghcb(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """GHCB 2.0, guest request: info 1 and 2 are request and response page; neither RAX nor RBX is valid."""
    for command in PLAIN:
        assert host.ioctl(driver, caller, command) == 0
    for event in host.events:
        assert (event.code, event.info1, event.info2) == (0x80000011, 0x5000, 0x6000)
        assert (event.rax, event.rbx, event.scratch) == (None, None, None)
        assert (event.version, event.usage) == (2, 0)
    assert len(host.events) == 2


@pytest.mark.parametrize("npages", [0, 1, 4])
def test_extended_request_in_the_ghcb(
    host: ScriptedHost, driver: SevGuestDriver, generation: DriverGeneration, caller: Caller, npages: int
) -> None:
    """GHCB 2.0: RAX and RBX are valid; without a buffer RAX is its address in K-A and 0 later."""
    caller.offer(caller.certs_address, npages * 4096)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == 0
    (event,) = host.events
    assert event.code == 0x80000012
    assert event.rax == (0x8000 if npages or generation is K_A else 0)
    assert event.rbx == npages


def test_response_page_is_zero_when_the_host_gets_it(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """Linux zeroes the shared response page before each request."""
    seen: list[bytes] = []

    def look(_: object) -> tuple[int, int]:
        seen.append(bytes(host.memory.shared[RESPONSE : RESPONSE + 4096]))
        return host._honest(host.events[-1])

    for _ in range(2):
        host.plan.append(look)
        assert host.ioctl(driver, caller) == 0
    assert seen == [bytes(4096)] * 2


def test_requests_count_up(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """AMD 56860: 1, 3, 5, whatever the command."""
    for command in COMMANDS:
        assert host.ioctl(driver, caller, command) == 0
    assert [header.msg_seqno for header in host.firmware.seen] == [1, 3, 5]
    assert [header.msg_type for header in host.firmware.seen] == [5, 3, 5]
    assert host.stored() == 6


# errors of VMM and firmware


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "info2",
    [
        0x16,
        0x1D,
        0x0B,
        1,
        0xFFFFFFFF_00000000,
        0x80000000_00000000,
        0x00000003_00000000,
        0x00000002_00000001,
        0x00000001_00000016,
        0xFFFFFFFF_FFFFFFFF,
    ],
)
def test_any_other_info2(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int, info2: int
) -> None:
    """Linux: firmware error, unknown VMM error, or both: EIO, the word verbatim, the key wiped."""
    host.reply(0, info2)
    assert host.ioctl(driver, caller, command) == -errno.EIO
    assert caller.exitinfo2 == info2
    assert host.wiped()
    assert host.stored() == 2
    assert untouched(caller)


@pytest.mark.parametrize("command", COMMANDS)
def test_wipe_is_for_good(host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int) -> None:
    """Linux: after one firmware error every further command is ENOTTY; the other keys are intact."""
    host.reply(0, 0x16)
    assert host.ioctl(driver, caller, command) == -errno.EIO
    for each in COMMANDS:
        assert host.ioctl(driver, caller, each) == -errno.ENOTTY
    assert len(host.pages) == 1
    assert [host.wiped(n) for n in range(4)] == [True, False, False, False]
    reloaded = host.driver(vmpck_id=1)
    assert host.ioctl(reloaded, caller) == 0


def test_unsupported_message_version(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: msg_version goes into the header; one that the firmware lacks is 16h, EIO and a wiped key."""
    caller.set(msg_version=2)
    assert host.ioctl(driver, caller) == -errno.EIO
    assert caller.exitinfo2 == 0x16
    assert host.wiped()


def test_replayed_request(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """AMD 56860: an old request opens, but its number is not the next: AEAD_OFLOW (1Dh), wiped."""
    assert host.ioctl(driver, caller) == 0

    def replay(event: object) -> tuple[int, int]:
        host.memory.shared[0x5000:0x6000] = host.pages[0]
        return host._honest(host.events[-1])

    host.plan.append(replay)
    assert host.ioctl(driver, caller) == -errno.EIO
    assert caller.exitinfo2 == 0x1D
    assert host.wiped()


# replies that are none


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("info1", "info2", "result"),
    [(1, 0x8000030D, 4), (1, 0x80000306, 4), (1, 0x8000030E, 2), (1, 0, 2), (2, 4, 2), (2, 5, 2), (7, 0, 2)],
)
def test_positive_results(
    host: ScriptedHost,
    driver: SevGuestDriver,
    caller: Caller,
    command: int,
    info1: int,
    info2: int,
    result: int,
) -> None:
    """Linux: info 1 other than 0: the ioctl returns +4 (sane exception) or +2; exitinfo2 all ones; wiped."""
    host.reply(info1, info2)
    assert host.ioctl(driver, caller, command) == result
    assert caller.exitinfo2 == NO_FW_CALL
    assert host.wiped()
    assert host.stored() == 2
    assert untouched(caller)
    assert caller.certs_len == 0x4000


def test_high_half_of_info1_is_ignored(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux looks at the low 32 bits of info 1 only."""
    host.plan.append(lambda event: (1 << 32, host._honest(event)[1]))
    assert host.ioctl(driver, caller) == 0
    host.reply(1 << 32, 0x16)
    assert host.ioctl(driver, caller) == -errno.EIO
    assert caller.exitinfo2 == 0x16


@pytest.mark.parametrize("command", COMMANDS)
def test_vcpu_without_ghcb(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, second_cpu: FakeCpu, command: int
) -> None:
    """Linux: no GHCB available is EIO with exitinfo2 all ones, and as a failed exchange it wipes the key."""
    program = driver.ioctl(second_cpu, command, caller.argument, caller.memory)
    assert host.run(program, second_cpu) == -errno.EIO
    assert caller.exitinfo2 == NO_FW_CALL
    assert host.wiped()
    assert host.pages == []


# BUSY


@pytest.mark.parametrize("command", COMMANDS)
def test_busy_then_success(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, clock: FakeClock, command: int
) -> None:
    """GHCB 2.0: BUSY: the identical page after 2 s, as the same event; in the end one number was used."""
    host.busy(5)
    assert host.ioctl(driver, caller, command) == 0
    assert clock.slept == [2] * 5
    assert host.pages == [host.pages[0]] * 6
    assert host.events == [host.events[0]] * 6
    assert caller.exitinfo2 == MARK
    assert (host.stored(), len(host.firmware.seen)) == (2, 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_busy_for_ever(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, clock: FakeClock, command: int
) -> None:
    """Linux: BUSY more than 60 s after the first send is ETIMEDOUT; exactly 60 s is not yet; key wiped."""
    host.busy(100)
    assert host.ioctl(driver, caller, command) == -errno.ETIMEDOUT
    assert clock.slept == [2] * 31  # at 0, 2, ... 60 s; the BUSY at 62 s is the last
    assert host.pages == [host.pages[0]] * 32
    assert caller.exitinfo2 == BUSY
    assert host.wiped()
    assert untouched(caller)
    assert host.ioctl(driver, caller, command) == -errno.ENOTTY


def test_busy_up_to_the_limit(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: the answer after the last permitted pause still counts."""
    host.busy(31)
    assert host.ioctl(driver, caller) == 0
    assert len(host.pages) == 32


def test_signal_shortens_the_pauses_not_the_loop(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, clock: FakeClock
) -> None:
    """Linux: a fatal signal ends each pause at once, yet the request goes on to its end."""
    clock.share = 0.25
    host.busy(200)
    assert host.ioctl(driver, caller) == -errno.ETIMEDOUT
    assert len(clock.slept) == 121
    assert host.pages == [host.pages[0]] * 122


def test_host_that_changed_the_request_gets_the_true_page_again(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """The resent page comes from private memory: a host cannot make the guest send anything else."""

    def scribble(_: object) -> tuple[int, int]:
        host.memory.shared[0x5000:0x6000] = b"\x99" * 4096
        return 0, BUSY

    host.plan.append(scribble)
    assert host.ioctl(driver, caller) == 0
    assert host.pages[0] == host.pages[1]


# INVALID_LEN


@pytest.mark.parametrize("command", PLAIN)
def test_invalid_len_on_a_plain_request(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int
) -> None:
    """Linux: EIO, no wipe although nothing was executed; the next request is out of step: 1Dh."""
    host.reply(0, INVALID_LEN)
    assert host.ioctl(driver, caller, command) == -errno.EIO
    assert caller.exitinfo2 == INVALID_LEN
    assert len(host.pages) == 1
    assert not host.wiped()
    assert (host.stored(), host.firmware.counters[0]) == (2, 0)
    assert untouched(caller)
    assert host.ioctl(driver, caller, command) == -errno.EIO
    assert caller.exitinfo2 == 0x1D
    assert host.wiped()


def test_fallback(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: buffer too small: the identical page as a plain request, then EIO with the size wanted."""
    host.certs = bytes(3 * 4096 + 1)
    caller.offer(caller.certs_address, 0x3000)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert [event.code for event in host.events] == [0x80000012, 0x80000011]
    assert (host.events[1].rax, host.events[1].rbx) == (None, None)
    assert host.pages[0] == host.pages[1]
    assert caller.exitinfo2 == INVALID_LEN
    assert caller.certs_len == 0x4000
    assert untouched(caller)
    assert not host.wiped()
    assert (host.stored(), host.firmware.counters[0]) == (2, 2)
    caller.offer(caller.certs_address, 0x4000)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == 0


def test_fallback_masks_a_firmware_error(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: a firmware error of the repetition is hidden, the key kept; the next request gets 1Dh."""
    host.too_small(4)
    host.reply(0, 0x16)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert caller.exitinfo2 == INVALID_LEN
    assert not host.wiped()
    assert (host.stored(), host.firmware.counters[0]) == (2, 0)
    assert host.ioctl(driver, caller) == -errno.EIO
    assert caller.exitinfo2 == 0x1D
    assert host.wiped()


def test_fallback_that_is_too_small_again(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: INVALID_LEN to the plain repetition is masked like any EIO; there is no second repetition."""
    host.too_small(4)
    host.too_small(9)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert len(host.pages) == 2
    assert caller.certs_len == 0x4000
    assert not host.wiped()


def test_fallback_busy_then_done(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, clock: FakeClock
) -> None:
    """Linux: BUSY before and during the repetition: always the same page, one clock for both."""
    host.busy(2)
    host.too_small(2)
    host.busy(3)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.EIO
    assert [event.code & 0xFF for event in host.events] == [0x12] * 3 + [0x11] * 4
    assert host.pages == [host.pages[0]] * 7
    assert clock.slept == [2] * 5
    assert (caller.exitinfo2, caller.certs_len) == (INVALID_LEN, 0x2000)
    assert not host.wiped()


def test_fallback_timed_out(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: a repetition that times out is ETIMEDOUT and wipes; the size is told all the same."""
    host.too_small(2)
    host.busy(100)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == -errno.ETIMEDOUT
    assert (caller.exitinfo2, caller.certs_len) == (INVALID_LEN, 0x2000)
    assert host.wiped()


def test_fallback_without_answer(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: a repetition that is answered with an exception returns +4 and wipes."""
    host.too_small(2)
    host.reply(1, 0x8000030D)
    assert host.ioctl(driver, caller, SNP_GET_EXT_REPORT) == 4
    assert (caller.exitinfo2, caller.certs_len) == (INVALID_LEN, 0x2000)
    assert host.wiped()


# verification


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda page: page.__setitem__(0x20, 9), id="number"),
        pytest.param(lambda page: page.__setitem__(0x34, 9), id="type"),
        pytest.param(lambda page: page.__setitem__(0x35, 9), id="version"),
        pytest.param(lambda page: page.__setitem__(slice(0x36, 0x38), b"\xff\xff"), id="size"),
        pytest.param(lambda page: page.__setitem__(0x00, page[0] ^ 1), id="tag"),
        pytest.param(lambda page: page.__setitem__(0x60, page[0x60] ^ 1), id="ciphertext"),
        pytest.param(lambda page: page.__setitem__(slice(0, 4096), bytes(4096)), id="no response at all"),
    ],
)
def test_unfit_response(
    host: ScriptedHost,
    driver: SevGuestDriver,
    caller: Caller,
    command: int,
    change: Callable[[bytearray], object],
) -> None:
    """Linux, verify_and_dec_payload: EBADMSG; exitinfo2 is 0 and so not written; the key is wiped."""
    host.tamper(change)
    assert host.ioctl(driver, caller, command) == -errno.EBADMSG
    assert caller.exitinfo2 == MARK
    assert host.wiped()
    assert untouched(caller)
    assert host.ioctl(driver, caller, command) == -errno.ENOTTY


def test_replayed_response(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: an old response has an old number: EBADMSG, wiped."""
    old: list[bytes] = []
    host.tamper(lambda page: old.append(bytes(page)))
    assert host.ioctl(driver, caller) == 0
    host.tamper(lambda page: page.__setitem__(slice(0, 4096), old[0]))
    assert host.ioctl(driver, caller) == -errno.EBADMSG
    assert host.wiped()


def test_response_under_another_key(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """AMD 56860: a response sealed with another VMPCK does not open."""
    host.firmware.header_changes = {"key": 1}
    assert host.ioctl(driver, caller) == -errno.EBADMSG
    assert host.wiped()


@pytest.mark.parametrize(
    ("command", "room"), [(SNP_GET_REPORT, 4000), (SNP_GET_EXT_REPORT, 4000), (SNP_GET_DERIVED_KEY, 64)]
)
def test_room_for_the_response(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int, room: int
) -> None:
    """Linux: payload and tag fit in 4016 or 80 bytes; a full payload is taken, one byte more is EBADMSG."""
    host.firmware.payload = lambda *_: b"\x11" * room
    assert host.ioctl(driver, caller, command) == 0
    assert caller.resp == b"\x11" * room + b"\xee" * (4000 - room)
    host.tamper(lambda page: page.__setitem__(slice(0x36, 0x38), struct.pack("<H", room + 1)))
    assert host.ioctl(driver, caller, command) == -errno.EBADMSG
    assert host.wiped()


@pytest.mark.parametrize(
    ("command", "room"), [(SNP_GET_REPORT, 4000), (SNP_GET_EXT_REPORT, 4000), (SNP_GET_DERIVED_KEY, 64)]
)
def test_short_payload_is_padded(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int, room: int
) -> None:
    """Linux: a payload shorter than the structure is accepted; the rest is zero."""
    host.firmware.payload = lambda *_: b"\x11" * 16
    assert host.ioctl(driver, caller, command) == 0
    assert caller.resp[:room] == b"\x11" * 16 + bytes(room - 16)


def test_iv_is_never_used_twice(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """AES-GCM: success, BUSY, fallback, INVALID_LEN, a restarted driver: no number covers two pages."""

    def once(command: int = SNP_GET_EXT_REPORT, *, mark: int) -> None:
        caller.req[0] = mark
        host.ioctl(driver, caller, command)

    once(mark=1)
    host.busy(3)
    once(SNP_GET_REPORT, mark=2)
    host.too_small(1)
    host.honest()
    once(mark=3)
    host.reply(0, INVALID_LEN)
    once(SNP_GET_REPORT, mark=4)
    program = driver.ioctl(host.cpu, SNP_GET_REPORT, caller.argument, caller.memory)
    next(program)
    host.vmgexit(host.cpu)
    program.close()
    driver = host.driver()
    once(SNP_GET_DERIVED_KEY, mark=5)
    covered: dict[int, bytes] = {}
    for page in host.pages:
        (seqno,) = struct.unpack_from("<Q", page, 0x20)
        assert covered.setdefault(seqno, page) == page
        MessageKey(host.keys[0]).open(page, struct.unpack_from("<H", page, 0x36)[0])
    assert sorted(covered) == [1, 3, 5, 7, 9, 11]


def test_refused_access_is_the_processors(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """A nested page fault is not an errno; afterwards the cut-off exchange counts as failed."""
    host.memory.shared_pages.discard(RESPONSE)
    with pytest.raises(GuestAccessFault):
        host.ioctl(driver, caller)
    host.memory.shared_pages.add(RESPONSE)
    assert host.ioctl(driver, caller) == -errno.ENOTTY
    assert host.wiped()
    assert host.stored() == 2
