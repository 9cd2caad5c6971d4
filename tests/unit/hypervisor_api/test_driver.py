"""The driver of the secure processor and /dev/sev."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.psp_sev import SEV_ISSUE_CMD, SevIssueCmd, SevUserCommand, SevUserDataGetId2
from swsnp.abi.snp_command import (
    Command,
    Config,
    ConfigFlags,
    FirmwareStatus,
    InitEx,
    PlatformStatusBuffer,
    VlekLoad,
)
from swsnp.hardware import PageState, Rmp, SystemMemory
from swsnp.hypervisor.psp_driver import PspDriver

if TYPE_CHECKING:
    from tests.unit.hypervisor_api.conftest import Machine, MakeMachine

PAGE = 4096
ENODEV, EBUSY, ETIMEDOUT, EBADF = -errno.ENODEV, -errno.EBUSY, -errno.ETIMEDOUT, -errno.EBADF
EIO, EINVAL, EFAULT = -errno.EIO, -errno.EINVAL, -errno.EFAULT


# Results of a command


def test_no_device() -> None:
    """Driver: no secure processor is -ENODEV without a status."""
    memory = SystemMemory()
    driver = PspDriver(None, memory=memory, rmp=Rmp())
    assert not driver.present
    assert driver.issue(Command.SNP_COMMIT) == (ENODEV, 0)
    assert driver.issue_answered(Command.GET_ID, bytes(16), 0) == ((ENODEV, 0), bytes(16))


def test_timeout(machine: Machine) -> None:
    """Driver: no answer is -ETIMEDOUT once, then the processor is dead for everybody: -EBUSY."""
    machine.chip.answer(Command.SNP_COMMIT, TimeoutError())
    driver = machine.host.driver
    assert driver.issue(Command.SNP_COMMIT) == (ETIMEDOUT, 0)
    assert driver.dead
    count = len(machine.chip.commands)
    assert driver.issue(Command.SNP_COMMIT) == (EBUSY, 0)
    assert driver.issue_by_fd(machine.task, machine.sev, Command.SNP_COMMIT, b"") == (EBUSY, 0)
    assert driver.issue_answered(Command.GET_ID, bytes(16), 0)[0] == (EBUSY, 0)
    assert len(machine.chip.commands) == count


@pytest.mark.parametrize(
    ("status", "result"), [(0, (0, 0)), (0x16, (EIO, 0x16)), (0x27, (EIO, 0x27)), (0x10027, (EIO, 0x27))]
)
def test_status(machine: Machine, status: int, result: tuple[int, int]) -> None:
    """Driver: status 0 is success, another -EIO with its low 16 bits."""
    machine.chip.answer(Command.SNP_COMMIT, status)
    assert machine.host.driver.issue(Command.SNP_COMMIT) == result


def test_descriptor_of_the_caller(machine: Machine) -> None:
    """Driver: -EBADF for a closed number or a file that is not /dev/sev; nothing reaches the firmware."""
    driver, task = machine.host.driver, machine.task
    count = len(machine.chip.commands)
    for fd in (99, machine.kvm, -1):
        assert driver.issue_by_fd(task, fd, Command.SNP_COMMIT, b"") == (EBADF, 0)
    assert len(machine.chip.commands) == count
    assert driver.issue_by_fd(task, machine.sev, Command.SNP_COMMIT, b"\4") == (0, 0)
    task.close(machine.sev)
    assert driver.issue_by_fd(task, machine.sev, Command.SNP_COMMIT, b"") == (EBADF, 0)
    assert task.open("/dev/kvm") == machine.sev  # the number is used again, by another file
    assert driver.issue_by_fd(task, machine.sev, Command.SNP_COMMIT, b"") == (EBADF, 0)


def test_command_buffer(machine: Machine) -> None:
    """Driver: the buffer lies in a page of the driver's own."""
    machine.host.driver.issue(Command.SNP_CONFIG, bytes(range(64)))
    assert machine.chip.commands[-1] == (Command.SNP_CONFIG, bytes(range(64)))


# Initialisation


def test_initialise(machine: Machine) -> None:
    """Driver: SNP_INIT_EX with a fresh RMP, then SNP_DF_FLUSH, at the host's start and once."""
    machine.host.driver.initialise()
    commands = [command for command, _ in machine.chip.commands]
    assert commands[:2] == [Command.SNP_INIT_EX, Command.SNP_DF_FLUSH]
    assert commands.count(Command.SNP_INIT_EX) == 1
    sent = InitEx.parse(machine.chip.issued(Command.SNP_INIT_EX)[0])
    assert (sent.flags, sent.list_paddr, sent.max_snp_asid) == (1, 0, 0)
    assert machine.host.driver.initialised


def test_host_without_snp(boot: MakeMachine) -> None:
    """A host without SNP neither initialises the firmware nor changes the RMP."""
    machine = boot(snp_enabled=False)
    assert machine.chip.commands == []
    driver = machine.host.driver
    page = machine.memory.allocate_page()
    assert driver.make_firmware(page) == ENODEV
    assert driver.make_private(page, gpa=0, asid=1, immutable=True) == ENODEV
    assert driver.make_shared(page) == ENODEV
    assert driver.allocate_firmware_page() is None


@pytest.mark.parametrize("command", [Command.SNP_INIT_EX, Command.SNP_DF_FLUSH])
def test_initialise_fails(boot: MakeMachine, command: Command) -> None:
    """Driver: a refused initialisation is reported and may be tried again."""
    machine = boot(prepare=lambda chip: chip.answer(command, 1, 1))
    assert not machine.host.driver.initialised
    assert machine.host.driver.initialise() == (EIO, 1)
    assert machine.host.driver.initialise() == (0, 0)


@pytest.mark.parametrize("command", [Command.SNP_PLATFORM_STATUS, Command.SNP_FEATURE_INFO])
def test_policy_bits_unknown(boot: MakeMachine, command: Command) -> None:
    """Driver: a firmware that does not say what it has, has the old policy bits."""

    def prepare(chip: Any) -> None:
        chip.feature_ecx = 0x3C
        chip.answer(command, FirmwareStatus.INVALID_PARAM)

    assert boot(prepare=prepare).host.driver.policy_bits == 0x1FFFFF


# Page states


def test_page_states(machine: Machine) -> None:
    """RMPUPDATE to Firmware, Pre-Guest and Guest-Invalid; -EFAULT where the entry is immutable."""
    driver, rmp = machine.host.driver, machine.rmp
    page = machine.memory.allocate_page()
    assert driver.make_private(page, gpa=0x5000, asid=3, immutable=False) == 0
    assert rmp.state(page) is PageState.GUEST_INVALID
    assert driver.make_private(page, gpa=0x5000, asid=3, immutable=True) == 0
    assert rmp.state(page) is PageState.PRE_GUEST
    assert (rmp[page].gpa, rmp[page].asid) == (0x5000, 3)
    for refused in (
        driver.make_shared(page),
        driver.make_firmware(page),
        driver.make_private(page, gpa=0, asid=1, immutable=False),
    ):
        assert refused == -errno.EFAULT
    assert driver.reclaim(page) == 0
    assert rmp.state(page) is PageState.HYPERVISOR
    assert driver.make_firmware(page) == 0
    assert rmp.state(page) is PageState.FIRMWARE


def test_reclaim_fails(machine: Machine) -> None:
    """Driver: a page not given back, or not made shared after that, is lost: -EIO, counted, never freed."""
    driver = machine.host.driver
    first, second = driver.allocate_firmware_page(), driver.allocate_firmware_page()
    assert first is not None
    assert second is not None
    machine.chip.answer(Command.SNP_PAGE_RECLAIM, FirmwareStatus.INVALID_PAGE_SIZE)
    assert driver.reclaim(first) == EIO
    machine.chip._effect = lambda *_: None  # type: ignore[method-assign]  # success without effect
    assert driver.reclaim(second) == EIO
    assert driver.leaked == [first, second]
    driver.free_page(first)
    assert first not in [machine.memory.allocate_page() for _ in range(600)]


# /dev/sev


def _issue(machine: Machine, command: int, data: int = 0) -> tuple[int, int]:
    arg = bytearray(bytes(SevIssueCmd(cmd=command, data=data, error=0xEEEE)))
    result = machine.task.ioctl(machine.sev, SEV_ISSUE_CMD, arg)
    return result, SevIssueCmd.parse(arg).error


def test_sev_requests(machine: Machine) -> None:
    """/dev/sev: another request -EINVAL, unreadable argument -EFAULT, unknown command -EINVAL."""
    assert machine.task.ioctl(machine.sev, 0xAE80, 0) == EINVAL
    assert machine.task.ioctl(machine.sev, SEV_ISSUE_CMD, 0x1000) == EFAULT
    assert machine.task.ioctl(machine.sev, SEV_ISSUE_CMD, bytearray(15)) == EFAULT
    for command in (0, 7, 13, 0xFFFFFFFF):
        assert _issue(machine, command)[0] == EINVAL


def test_sev_without_device(boot: MakeMachine) -> None:
    """/dev/sev held open when the processor is gone: -ENODEV."""
    machine = boot()
    machine.host.driver._mailbox = None
    assert _issue(machine, SevUserCommand.SNP_COMMIT)[0] == ENODEV


def test_platform_status(machine: Machine) -> None:
    """SNP_PLATFORM_STATUS: 32 bytes to the caller, through a page that is the firmware's meanwhile."""
    states: list[PageState] = []
    effect = machine.chip._effect

    def look(command: int, raw: bytes, buffer: int) -> None:
        if command == Command.SNP_PLATFORM_STATUS:
            states.append(machine.rmp.state(int.from_bytes(raw[:8], "little")))
        effect(command, raw, buffer)

    machine.chip._effect = look  # type: ignore[method-assign]
    at = machine.task.allocate(PAGE)
    assert _issue(machine, SevUserCommand.SNP_PLATFORM_STATUS, at) == (0, 0)
    status = PlatformStatusBuffer.parse(machine.task.read(at, 32))
    assert (status.api_major, status.api_minor, status.state) == (1, 58, 1)
    assert states == [PageState.FIRMWARE]
    assert machine.rmp._entries == {}
    assert _issue(machine, SevUserCommand.SNP_PLATFORM_STATUS, 0)[0] == EINVAL
    assert _issue(machine, SevUserCommand.SNP_PLATFORM_STATUS, 0x1000)[0] == EFAULT
    machine.chip.answer(Command.SNP_PLATFORM_STATUS, FirmwareStatus.INVALID_PAGE_STATE)
    assert _issue(machine, SevUserCommand.SNP_PLATFORM_STATUS, at) == (EIO, FirmwareStatus.INVALID_PAGE_STATE)


def test_commit(machine: Machine) -> None:
    """SNP_COMMIT: a buffer with length 4."""
    assert _issue(machine, SevUserCommand.SNP_COMMIT) == (0, 0)
    assert machine.chip.commands[-1][1][:4] == b"\4\0\0\0"
    machine.chip.answer(Command.SNP_COMMIT, FirmwareStatus.INVALID_PLATFORM_STATE)
    assert _issue(machine, SevUserCommand.SNP_COMMIT) == (EIO, FirmwareStatus.INVALID_PLATFORM_STATE)


def test_set_config(machine: Machine) -> None:
    """SNP_SET_CONFIG: 64 bytes as they are; no pointer -EINVAL, a bad one -EFAULT."""
    config = Config(flags=ConfigFlags(3), reserved_0c=b"\1" * 52)
    assert _issue(machine, SevUserCommand.SNP_SET_CONFIG, machine.put(config)) == (0, 0)
    assert machine.chip.commands[-1] == (Command.SNP_CONFIG, bytes(config))
    assert _issue(machine, SevUserCommand.SNP_SET_CONFIG, 0)[0] == EINVAL
    assert _issue(machine, SevUserCommand.SNP_SET_CONFIG, 0x1000)[0] == EFAULT
    machine.chip.answer(Command.SNP_CONFIG, FirmwareStatus.INVALID_PARAM)
    assert _issue(machine, SevUserCommand.SNP_SET_CONFIG, machine.put(config)) == (EIO, 0x16)


def test_vlek_load(machine: Machine) -> None:
    """SNP_VLEK_LOAD: the hashstick is copied to a page of the kernel's; lengths and version are checked."""
    stick = machine.put(b"s" * 432)
    wanted = VlekLoad(length=16, vlek_wrapped_paddr=stick)
    seen: list[bytes] = []

    def look(command: int, raw: bytes, buffer: int) -> None:
        seen.append(machine.memory.read(VlekLoad.parse_at(raw, 0).vlek_wrapped_paddr, 433))

    machine.chip._effect = look  # type: ignore[method-assign]
    assert _issue(machine, SevUserCommand.SNP_VLEK_LOAD, machine.put(wanted)) == (0, 0)
    assert seen == [b"s" * 432 + b"\0"]
    for bad, result in (
        (wanted.but(length=15), EINVAL),
        (wanted.but(vlek_wrapped_version=1), EINVAL),
        (wanted.but(vlek_wrapped_paddr=0x1000), EFAULT),
    ):
        assert _issue(machine, SevUserCommand.SNP_VLEK_LOAD, machine.put(bad))[0] == result
    assert _issue(machine, SevUserCommand.SNP_VLEK_LOAD, 0)[0] == EINVAL
    assert _issue(machine, SevUserCommand.SNP_VLEK_LOAD, 0x1000)[0] == EFAULT


@pytest.mark.parametrize("command", [10, 11, 12])
def test_settings_need_snp(boot: MakeMachine, command: int) -> None:
    """/dev/sev: COMMIT, SET_CONFIG and VLEK_LOAD are -EINVAL while SNP is not initialised."""
    machine = boot(snp_enabled=False)
    assert _issue(machine, command, machine.put(bytes(64)))[0] == EINVAL
    assert machine.chip.commands == []


def test_get_id2(machine: Machine) -> None:
    """SEV_GET_ID2: the id goes to `address`, its length to `length`; both pages are lent to the firmware."""
    states: list[PageState] = []
    effect = machine.chip._effect

    def look(command: int, raw: bytes, buffer: int) -> None:
        if command == Command.GET_ID:
            states.extend(machine.rmp.state(page) for page in (buffer, int.from_bytes(raw[:8], "little")))
        effect(command, raw, buffer)

    machine.chip._effect = look  # type: ignore[method-assign]
    target = machine.task.allocate(PAGE)
    at = machine.put(SevUserDataGetId2(address=target, length=128))
    assert _issue(machine, SevUserCommand.SEV_GET_ID2, at) == (0, 0)
    assert SevUserDataGetId2.parse(machine.task.read(at, 12)).length == 64
    assert machine.task.read(target, 65) == b"\xa5" * 64 + b"\0"
    assert states == [PageState.FIRMWARE, PageState.FIRMWARE]
    assert machine.rmp._entries == {}


def test_get_id2_length(machine: Machine) -> None:
    """SEV_GET_ID2 with length 0: -EIO, INVALID_LENGTH, and the length that it takes."""

    def refuse(command: int, buffer: int) -> int:
        if command != Command.GET_ID:
            return original(command, buffer)
        machine.memory.write(buffer + 8, (64).to_bytes(4, "little"))
        return FirmwareStatus.INVALID_LENGTH

    original = machine.chip.command
    machine.chip.command = refuse  # type: ignore[method-assign]
    at = machine.put(SevUserDataGetId2())
    assert _issue(machine, SevUserCommand.SEV_GET_ID2, at) == (EIO, FirmwareStatus.INVALID_LENGTH)
    assert SevUserDataGetId2.parse(machine.task.read(at, 12)).length == 64


def test_get_id2_pointers(machine: Machine) -> None:
    """SEV_GET_ID2: bad pointers -EFAULT; a size that the kernel would not allocate -ENOMEM."""
    assert _issue(machine, SevUserCommand.SEV_GET_ID2, 0)[0] == EFAULT
    bad = machine.put(SevUserDataGetId2(address=0x1000, length=64))
    assert _issue(machine, SevUserCommand.SEV_GET_ID2, bad)[0] == EFAULT
    huge = machine.put(SevUserDataGetId2(address=0x1000, length=1 << 31))
    assert _issue(machine, SevUserCommand.SEV_GET_ID2, huge)[0] == -errno.ENOMEM


def test_get_id_times_out(machine: Machine) -> None:
    """Pages that a dead processor may still write are lost."""
    machine.chip.answer(Command.GET_ID, TimeoutError())
    at = machine.put(SevUserDataGetId2(address=machine.task.allocate(PAGE), length=64))
    assert _issue(machine, SevUserCommand.SEV_GET_ID2, at)[0] == ETIMEDOUT
    assert len(machine.host.driver.leaked) == 2
