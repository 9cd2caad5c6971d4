"""The harnesses: they end what does not end, say what happened, and notice what is wrong."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from swsnp.abi.ghcb import ExitCode, MsrCode
from swsnp.hypervisor import guest_request
from swsnp.hypervisor.outcomes import RESUMED
from swsnp.hypervisor.vmgexit import GhcbEvent
from swsnp.machine import GuestStopped, IoctlFailed, Machine
from swsnp.testing import (
    HOSTILE_GUEST,
    HOSTILE_HOST,
    HOSTILE_OPERATOR,
    Answer,
    Attack,
    Case,
    Departure,
    FakeClock,
    Held,
    HostileHost,
    ProgramSaw,
    RawGuest,
    Replied,
    RunError,
    Running,
    StillRunning,
    Unanswered,
    ask_report,
    attacks,
    everywhere,
    firmware_status,
    limited,
    play,
    served,
    with_exit,
)

if TYPE_CHECKING:
    from collections.abc import Generator


def _program(exits: int, closed: list[str]) -> Generator[None, None, int]:
    try:
        for _ in range(exits):
            yield
        return exits
    finally:
        closed.append("closed")


@pytest.mark.parametrize("exits", [0, 1, 5])
def test_a_program_within_its_budget_returns_its_value(exits: int) -> None:
    """`limited` changes nothing about a program that ends."""
    closed: list[str] = []
    program = limited(_program(exits, closed), 5)
    for _ in range(exits):
        next(program)
    with pytest.raises(StopIteration) as ended:
        next(program)
    assert ended.value.value == exits
    assert closed == ["closed"]


def test_a_program_beyond_its_budget_ends() -> None:
    """One exit more than allowed: StillRunning with the number, and the program is closed."""
    closed: list[str] = []
    program = limited(_program(6, closed), 5)
    for _ in range(5):
        next(program)
    with pytest.raises(StillRunning, match="still running after 5 exits") as caught:
        next(program)
    assert caught.value.exits == 5
    assert closed == ["closed"]


def test_an_abandoned_program_is_closed() -> None:
    """Who closes the limited program closes the one inside."""
    closed: list[str] = []
    program = limited(_program(6, closed), 5)
    next(program)
    program.close()
    assert closed == ["closed"]


@pytest.mark.parametrize("catalogue", [HOSTILE_GUEST, HOSTILE_HOST, HOSTILE_OPERATOR], ids=len)
def test_catalogues(catalogue: tuple[Any, ...]) -> None:
    """Names are unique and are what a test id shows; every case names its rule."""
    names = [each.name for each in catalogue]
    assert len(set(names)) == len(names)
    assert [str(each) for each in catalogue] == names
    assert all(each.rule and each.expected for each in catalogue)


def test_expectations_by_profile() -> None:
    """The helpers fill exactly the profiles that can meet a case."""
    seen = Replied(info1=0, info2=0x16)
    assert set(everywhere(seen)) == {"coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"}
    assert set(with_exit(v1=seen, l72=seen)) == {"coco-v1", "coco-v1-revised", "linux-7.2"}
    status = firmware_status(0x16, seen)
    assert status["coco-v1"] == RunError(errno.EIO)
    assert status["coco-v1-revised"] == Replied(info1=0, info2=0x8000_0000_0000_0016)


@pytest.mark.parametrize(
    ("target", "name", "wrong"),
    [
        (guest_request, "_check_pages", lambda *_: None),
        (guest_request, "_EMPTY_TABLE", b"\x01" * 24),
        (guest_request, "_NO_ACCESS", RESUMED),
        (GhcbEvent, "write_back", lambda _: None),
    ],
    ids=["pages-unchecked", "table-not-empty", "no-access-is-success", "registers-not-given-back"],
)
def test_the_catalogue_notices(target: object, name: str, wrong: object) -> None:
    """A hypervisor with one rule broken gives other results than those expected."""
    machines = {name: Machine(profile=name) for name in ("coco-v1", "linux-6.12", "linux-7.2")}
    with patch.object(target, name, wrong):
        differ = [
            case.name
            for case in HOSTILE_GUEST
            if case.name.startswith(("request", "plain", "data", "rbx", "short"))
            for profile, machine in machines.items()
            if profile in case.expected and play(case, machine) != case.expected[profile]
        ]
    assert differ


def _quiet(guest: RawGuest) -> Generator[None, None, Unanswered]:
    del guest
    yield from ()
    return Unanswered()


def test_a_case_of_ones_own() -> None:
    """`Case` and `play` are for users too; a bug in the program is the test's to see."""
    machine = Machine()
    case = Case(name="quiet", rule="nothing happens", program=_quiet, expected=everywhere(Unanswered()))
    assert play(case, machine) == Unanswered()

    def broken(guest: RawGuest) -> Generator[None, None, Unanswered]:
        yield from _quiet(guest)
        raise ValueError("my test is wrong")

    wrong = Case(name="broken", rule="-", program=broken, expected=everywhere(Unanswered()))
    with pytest.raises(ValueError, match="my test is wrong"):
        play(wrong, machine)


def test_held_is_not_an_end() -> None:
    """A vCPU that KVM keeps is told apart from a program that ended."""

    def hold(guest: RawGuest) -> Generator[None, None, Unanswered]:
        guest.ask(ExitCode.AP_HLT_LOOP)
        yield
        return Unanswered()

    assert play(Case(name="hold", rule="-", program=hold, expected={}), Machine()) == Held()


def test_running_shows_how_long() -> None:
    """A loop is shown with the exits it made; they take no part in comparisons."""
    case = next(each for each in HOSTILE_GUEST if each.name == "ghcb-endless-events")
    seen = play(case, Machine(), budget=7)
    assert seen == Running()
    assert isinstance(seen, Running)
    assert seen.exits == 7


def test_an_honest_host_changes_nothing() -> None:
    """The base attack passes everything on: boot, plain and extended requests."""
    machine = Machine()
    with machine.create_vm(certs=b"certs") as vm, HostileHost(Attack()).between(vm) as host:
        vm.boot()
        assert ask_report(vm) == served()
        assert host.exits == 1
        assert ask_report(vm, certs_size=0x1000) == served(b"certs", size=0x1000)
        too_small = ProgramSaw(result=-errno.EIO, exitinfo2=1 << 32, certs_len=0x1000)
        assert ask_report(vm, certs_size=0) == too_small


def test_after_the_block_the_host_is_honest() -> None:
    """Leaving the block takes everything back, whether the guest booted inside it or before."""
    machine = Machine(clock=FakeClock())
    with machine.create_vm(certs=None) as vm:
        with HostileHost(attacks.Flicker()).between(vm):
            vm.boot()
        assert "start" not in vars(vm.vcpus[0])
        assert ask_report(vm) == served()
        with HostileHost(attacks.Reply(2, 5)).between(vm), pytest.raises(IoctlFailed):
            vm.report(bytes(64))
        with pytest.raises(IoctlFailed) as wiped:
            vm.report(bytes(64))
    assert wiped.value.errno == errno.ENOTTY


def test_a_stalled_boot_is_shown() -> None:
    """A host that makes no progress on page states: Linux asks for ever, the harness says so."""
    with Machine().create_vm(certs=None) as vm:
        with (
            HostileHost(attacks.Stall(), budget=50).between(vm) as host,
            pytest.raises(StillRunning) as caught,
        ):
            vm.boot()
        assert (caught.value.exits, host.exits) == (50, 50)
        assert vm.execute(0, _program(1, [])) == 1  # the vCPU is free again


def test_the_driver_is_free_after_its_budget() -> None:
    """A request that was cut off gives the driver's mutex back; its key is wiped by the next one."""
    machine = Machine(clock=FakeClock())
    with machine.create_vm(certs=None) as vm:
        vm.boot()
        with HostileHost(attacks.Busy(), budget=3).between(vm), pytest.raises(StillRunning):
            vm.report(bytes(64))
        assert ask_report(vm) == ProgramSaw(result=-errno.ENOTTY, key_kept=False)


def test_a_host_beyond_memory_reads_zeros() -> None:
    """An attack that reaches where no shared memory is reads zeros and writes nothing."""
    seen: list[bytes] = []

    class Reach(Attack):
        def left(self, departure: Departure) -> bool:
            departure.write(0x7F_FFFF_F000, b"x")
            seen.append(departure.read(0x7F_FFFF_F000, 4))
            return False

    with Machine().create_vm(certs=None) as vm, HostileHost(Reach()).between(vm):
        vm.boot()
        assert vm.report(bytes(64)).status == 0
    assert set(seen) == {bytes(4)}


def test_a_double_fetch_is_caught() -> None:
    """A guest that reads its response twice gets another one the second time."""
    with Machine().create_vm(certs=None) as vm, HostileHost(attacks.Flicker()).between(vm):
        vm.boot()
        memory = vm.vcpus[0].memory
        once = memory.read

        def twice(gpa: int, size: int, *, private: bool) -> bytes:
            if size == 4096:
                once(gpa, size, private=private)
            return once(gpa, size, private=private)

        with patch.object(memory, "read", twice):
            assert ask_report(vm) == ProgramSaw(result=-errno.EBADMSG, key_kept=False)


def test_what_a_program_sees() -> None:
    """`ask_report` tells untouched memory from zeros."""
    with Machine(profile="linux-6.12").create_vm(certs=None) as vm:
        vm.boot()
        plain, extended = ask_report(vm), ask_report(vm, certs_size=0x2000)
    assert (plain.exitinfo2, plain.certs, plain.answer) == (None, None, Answer.OPENED)
    assert extended.certs == bytes(0x2000)


def test_a_guest_that_ends_is_not_an_answer() -> None:
    """A guest that ended under attack raises, as it would for a program."""
    attack = attacks.LyingMsr(MsrCode.SEV_INFO_REQ, 0)
    with Machine().create_vm(certs=None) as vm, HostileHost(attack).between(vm), pytest.raises(GuestStopped):
        vm.boot()
