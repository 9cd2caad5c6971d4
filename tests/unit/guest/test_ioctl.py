"""The common part of the ioctl: order of checks, errno, what is written back; three generations."""

from __future__ import annotations

import errno
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.sev_guest import SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT, SNP_GET_REPORT
from swsnp.guest.boot import boot_ap
from swsnp.guest.caller import CallerFault
from swsnp.guest.driver import (
    K_A,
    K_B,
    K_C,
    OWN_VMPL,
    DriverGeneration,
    ProbeError,
    SecretsNotMapped,
    SevGuestDriver,
    VmpckEmpty,
    VmpckIdOutOfRange,
)
from swsnp.trace import IoctlCalled, IoctlReturned, MessageOpened, MessageSealed, Trace

if TYPE_CHECKING:
    from tests.unit.guest.conftest import Caller, FakeCpu, ScriptedHost

MARK = 0x1122334455667788
TCGETS = 0x5401
COMMANDS = [SNP_GET_REPORT, SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT]


@pytest.fixture(params=[K_A, K_B, K_C], ids=["K-A", "K-B", "K-C"])
def generation(request: pytest.FixtureRequest) -> DriverGeneration:
    made: DriverGeneration = request.param
    return made


@pytest.fixture
def driver(host: ScriptedHost, generation: DriverGeneration) -> SevGuestDriver:
    return host.driver(generation=generation)


# success


@pytest.mark.parametrize("command", COMMANDS)
def test_success_leaves_the_structure_alone(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int
) -> None:
    """Linux: exitinfo2 0 is not written back, so the caller still sees every byte it put there."""
    before = bytes(caller.arg)
    assert host.ioctl(driver, caller, command) == 0
    assert caller.arg == before
    assert caller.exitinfo2 == MARK
    assert (host.stored(), host.firmware.counters[0]) == (2, 2)


# rows 1 to 5


@pytest.mark.parametrize("command", [*COMMANDS, TCGETS, 0])
def test_unreadable_argument(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int
) -> None:
    """Linux: the 32 bytes are read before the command number is looked at: EFAULT for any command."""
    caller.memory.unmap(caller.argument)
    assert host.ioctl(driver, caller, command) == -errno.EFAULT
    assert host.events == []


def test_argument_one_byte_short(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: all 32 bytes have to be readable."""
    caller.memory.unmap(caller.argument)
    caller.memory.map(caller.argument, caller.arg[:31])
    assert host.ioctl(driver, caller) == -errno.EFAULT


@pytest.mark.parametrize("command", [*COMMANDS, TCGETS])
def test_message_version_zero(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int
) -> None:
    """Linux: msg_version 0 is EINVAL before command and key are looked at; nothing is written back."""
    caller.set(msg_version=0)
    before = bytes(caller.arg)
    assert host.ioctl(driver, caller, command) == -errno.EINVAL
    assert caller.arg == before
    assert (host.stored(), host.events) == (0, [])


def test_only_the_lowest_byte_of_the_version_counts(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """Linux: a client that writes version 256 as 32 bits is seen as version 0."""
    caller.arg[0:4] = struct.pack("<I", 256)
    assert host.ioctl(driver, caller) == -errno.EINVAL
    caller.arg[0:4] = struct.pack("<I", 0xFFFFFF01)
    assert host.ioctl(driver, caller) == 0
    assert host.firmware.seen[0].msg_version == 1


@pytest.mark.parametrize("command", [TCGETS, 0, 0xC0205303, 0xC0205300 | 1 << 32])
def test_unknown_command(host: ScriptedHost, driver: SevGuestDriver, caller: Caller, command: int) -> None:
    """Linux: ENOTTY, and exitinfo2 FFh is written back, even to isatty()."""
    before = bytes(caller.arg)
    assert host.ioctl(driver, caller, command) == -errno.ENOTTY
    assert caller.arg == before[:0x18] + b"\xff" + bytes(7)
    assert (host.stored(), host.events) == (0, [])


def test_unknown_command_on_a_wiped_key(
    host: ScriptedHost, driver: SevGuestDriver, generation: DriverGeneration, caller: Caller
) -> None:
    """Linux up to 6.12 looks at the key before the command, and writes nothing back; later kernels do."""
    driver._channel.wipe()
    assert host.ioctl(driver, caller, TCGETS) == -errno.ENOTTY
    assert caller.exitinfo2 == (MARK if generation is K_A else 0xFF)


@pytest.mark.parametrize("command", COMMANDS)
def test_wiped_key(
    host: ScriptedHost, driver: SevGuestDriver, generation: DriverGeneration, caller: Caller, command: int
) -> None:
    """Linux, empty VMPCK: ENOTTY; exitinfo2 K-A not written, K-B FFh, K-C 0 and so not written."""
    driver._channel.wipe()
    assert host.ioctl(driver, caller, command) == -errno.ENOTTY
    assert caller.exitinfo2 == (0xFF if generation is K_B else MARK)
    assert host.events == []


def test_wiped_key_and_null_pointers(
    host: ScriptedHost, driver: SevGuestDriver, generation: DriverGeneration, caller: Caller
) -> None:
    """Linux from 6.13 on looks at the key only in the exchange: bad arguments come first."""
    driver._channel.wipe()
    caller.set(req=0)
    assert host.ioctl(driver, caller) == (-errno.ENOTTY if generation is K_A else -errno.EINVAL)


@pytest.mark.parametrize("command", COMMANDS)
def test_counter_exhausted(
    host: ScriptedHost, driver: SevGuestDriver, generation: DriverGeneration, caller: Caller, command: int
) -> None:
    """Linux, counter overflow: EIO, no VMGEXIT, key kept; exitinfo2 FFh before K-C, not written in K-C."""
    host.store(0xFFFFFFFE)
    assert host.ioctl(driver, caller, command) == -errno.EIO
    assert caller.exitinfo2 == (MARK if generation is K_C else 0xFF)
    assert host.events == []
    assert not host.wiped()
    assert host.stored() == 0xFFFFFFFE


def test_last_number(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: stored FFFFFFFDh still allows one request, with FFFFFFFEh."""
    host.store(0xFFFFFFFD)
    host.firmware.counters[0] = 0xFFFFFFFD
    assert host.ioctl(driver, caller) == 0
    assert host.firmware.seen[0].msg_seqno == 0xFFFFFFFE
    assert host.ioctl(driver, caller) == -errno.EIO
    assert not host.wiped()


# write-back


def test_write_back_failure(host: ScriptedHost, driver: SevGuestDriver, caller: Caller) -> None:
    """Linux: when exitinfo2 cannot be written back the result is EFAULT, whatever it was."""
    caller.memory.unmap(caller.argument)
    caller.memory.map(caller.argument, caller.arg, writable=False)
    assert host.ioctl(driver, caller, TCGETS) == -errno.EFAULT
    assert host.ioctl(driver, caller) == 0  # success writes nothing back
    host.reply(0, 0x16)
    assert host.ioctl(driver, caller) == -errno.EFAULT
    assert host.wiped()


def test_write_back_is_the_whole_structure(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """Linux copies all 32 bytes back as it read them: changes made meanwhile are lost, padding survives."""
    before = bytes(caller.arg)

    def meanwhile(_: object) -> tuple[int, int]:
        caller.arg[:] = b"\x77" * 32
        return 0, 0xFFFFFFFF_00000000

    host.plan.append(meanwhile)
    assert host.ioctl(driver, caller) == -errno.EIO
    assert caller.arg == before[:0x18] + struct.pack("<Q", 0xFFFFFFFF_00000000)


# probe


def test_default_key_is_that_of_the_own_privilege_level(host: ScriptedHost) -> None:
    """Linux 6.11 and later: vmpck_id -1 means the guest's VMPL."""
    assert host.driver().vmpck_id == 0
    struct.pack_into("<QQQIB", host.memory.private, 0x1140, 0, 0x1000, 0, 1, 2)
    assert host.driver(vmpck_id=OWN_VMPL).vmpck_id == 2


def test_chosen_key_is_used(host: ScriptedHost, caller: Caller) -> None:
    """Linux, module parameter vmpck_id: the header names that key, and its counter moves."""
    driver = host.driver(vmpck_id=3)
    assert host.ioctl(driver, caller) == 0
    assert host.firmware.seen[0].msg_vmpck == 3
    assert [host.stored(n) for n in range(4)] == [0, 0, 0, 2]


@pytest.mark.parametrize("vmpck_id", [-2, 4, 255])
def test_probe_no_such_key(host: ScriptedHost, vmpck_id: int) -> None:
    """Linux, probe: vmpck_id outside 0..3 is EINVAL."""
    with pytest.raises(VmpckIdOutOfRange) as caught:
        host.driver(vmpck_id=vmpck_id)
    assert caught.value.errno == errno.EINVAL


def test_probe_empty_key(host: ScriptedHost) -> None:
    """Linux, probe: an all-zero key is EINVAL; the others still work."""
    host.memory.private[0x1040:0x1060] = bytes(32)
    with pytest.raises(VmpckEmpty, match="VMPCK1") as caught:
        host.driver(vmpck_id=1)
    assert caught.value.errno == errno.EINVAL
    assert host.driver(vmpck_id=0).usable


def test_probe_no_secrets_page(host: ScriptedHost) -> None:
    """Linux, probe: without a secrets page there is no device (ENODEV)."""
    guest = host.boot()
    guest.secrets.gpa = 0
    with pytest.raises(SecretsNotMapped) as caught:
        SevGuestDriver(guest)
    assert caught.value.errno == errno.ENODEV
    assert isinstance(caught.value, ProbeError)


# one mutex


def test_two_threads_are_serialised(
    host: ScriptedHost, driver: SevGuestDriver, make_caller: type[Caller], second_cpu: FakeCpu
) -> None:
    """Linux: one mutex per guest, so that a second request cannot be sealed while one is outstanding."""
    guest = driver._guest
    host.run(boot_ap(second_cpu, guest, vcpu=1), second_cpu)
    first, second = make_caller(), make_caller()
    called = threading.Event()
    order: list[str] = []

    class Signals:
        def read(self, address: int, size: int) -> bytes:
            called.set()
            return second.memory.read(address, size)

        def write(self, address: int, data: bytes) -> None:
            second.memory.write(address, data)

    def other() -> None:
        program = driver.ioctl(second_cpu, SNP_GET_REPORT, second.argument, Signals())
        order.append(f"second {host.run(program, second_cpu)}")

    program = driver.ioctl(host.cpu, SNP_GET_REPORT, first.argument, first.memory)
    next(program)
    thread = threading.Thread(target=other)
    thread.start()
    assert called.wait(10)
    host.vmgexit(host.cpu)
    with pytest.raises(StopIteration) as end:
        next(program)
    order.insert(0, f"first {end.value.value}")
    thread.join(10)
    assert order == ["first 0", "second 0"]
    assert [header.msg_seqno for header in host.firmware.seen] == [1, 3]
    assert not host.wiped()


def test_a_program_that_is_given_up_frees_the_mutex(
    host: ScriptedHost, driver: SevGuestDriver, caller: Caller
) -> None:
    """An exchange that was cut off counts as failed: its number is not used again and the key is wiped."""
    program = driver.ioctl(host.cpu, SNP_GET_REPORT, caller.argument, caller.memory)
    next(program)
    program.close()
    assert host.stored() == 2
    assert host.ioctl(driver, caller) == -errno.ENOTTY
    assert host.wiped()
    assert host.pages == []


# trace


def test_trace(host: ScriptedHost, caller: Caller, generation: DriverGeneration) -> None:
    """Trace: called, sealed, opened, returned; no content."""
    trace = Trace()
    driver = host.driver(generation=generation, trace=trace, vm="vm0")
    events: list[object] = []
    with trace.listen(events.append):
        host.ioctl(driver, caller)
        host.ioctl(driver, caller, TCGETS)
        caller.set(msg_version=0)
        host.ioctl(driver, caller)
        caller.memory.unmap(caller.argument)
        host.ioctl(driver, caller)
    report = SNP_GET_REPORT
    assert events == [
        IoctlCalled(vm="vm0", command=report, msg_version=1),
        MessageSealed(by="guest", vmpck=0, seqno=1, msg_type=5, payload_size=96),
        MessageOpened(by="guest", vmpck=0, seqno=2, msg_type=6, payload_size=1216),
        IoctlReturned(vm="vm0", command=report, result=0, exitinfo2=0),
        IoctlCalled(vm="vm0", command=TCGETS, msg_version=1),
        IoctlReturned(vm="vm0", command=TCGETS, result=-errno.ENOTTY, exitinfo2=0xFF),
        IoctlCalled(vm="vm0", command=report, msg_version=0),
        IoctlReturned(vm="vm0", command=report, result=-errno.EINVAL, exitinfo2=0xFF),
        IoctlReturned(vm="vm0", command=report, result=-errno.EFAULT, exitinfo2=0xFF),
    ]


def test_caller_fault_is_not_a_guest_fault() -> None:
    """CallerFault is the driver's to answer; only the guest's own accesses leave the guest."""
    assert not issubclass(CallerFault, (OSError, MemoryError))
