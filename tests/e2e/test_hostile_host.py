"""Every hostile host against the built-in guest: the program gets the documented errno, the key its fate."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from swsnp.guest.driver import K_A, K_B, K_C, DriverGeneration
from swsnp.machine import Machine
from swsnp.testing import (
    HOSTILE_HOST,
    Departure,
    FakeClock,
    HostCase,
    HostileHost,
    HostOutcome,
    ProgramSaw,
    ask_report,
    attacks,
    play_host,
    served,
)

CASES = pytest.mark.parametrize("case", HOSTILE_HOST, ids=str)
WIPED = ProgramSaw(result=-errno.ENOTTY, key_kept=False)


@CASES
@pytest.mark.parametrize("profile", ["linux-6.12", "linux-7.2"])
def test_hostile_host(case: HostCase, profile: str) -> None:
    """What Linux's boot code and sev-guest driver do with such a host; see `case.rule`."""
    assert play_host(case, Machine(profile=profile, clock=FakeClock())) == case.expected


@CASES
@pytest.mark.parametrize("generation", [K_A, K_B, K_C], ids=lambda each: each.name)
def test_every_generation_of_the_driver(case: HostCase, generation: DriverGeneration) -> None:
    """The generations differ in what they write back once the key is gone, and in nothing else here."""

    def as_written(outcome: HostOutcome) -> HostOutcome:
        return replace(WIPED, exitinfo2=0xFF) if outcome == WIPED and generation is K_B else outcome

    machine = Machine(clock=FakeClock(), generation=generation)
    assert play_host(case, machine) == tuple(as_written(each) for each in case.expected)


@pytest.mark.parametrize(("times", "pauses"), [(1, 1), (31, 31), (None, 31)])
def test_pauses(times: int | None, pauses: int) -> None:
    """BUSY: a pause of 2 s each time, and none begins more than 60 s after the first send."""
    clock = FakeClock()
    with Machine(clock=clock).create_vm(certs=None) as vm:
        vm.boot()
        with HostileHost(attacks.Busy(times)).between(vm):
            ask_report(vm)
    assert clock.slept == [2] * pauses


def test_busy_resends_the_same_bytes() -> None:
    """What leaves the guest under one number is one page, however often the host asks for it."""
    sent: list[bytes] = []

    class Watch(attacks.Busy):
        def left(self, departure: Departure) -> bool:
            if departure.is_guest_request:
                sent.append(departure.read(departure.info1, 4096))
            return super().left(departure)

    with Machine(clock=FakeClock()).create_vm(certs=None) as vm:
        vm.boot()
        with HostileHost(Watch(5)).between(vm):
            assert ask_report(vm) == served()
    assert len(sent) == 6
    assert len(set(sent)) == 1


def test_an_answer_of_another_vm() -> None:
    """Two guests of one chip: an answer swapped between them opens in neither."""
    machine = Machine(clock=FakeClock())
    seen = attacks.Record()
    with machine.create_vm(certs=None) as one, machine.create_vm(certs=None) as two:
        one.boot()
        two.boot()
        with HostileHost(seen).between(one):
            ask_report(one)
        with HostileHost(attacks.ReplayResponse(seen.responses[0])).between(two):
            assert ask_report(two) == ProgramSaw(result=-errno.EBADMSG, key_kept=False)
        assert ask_report(one) == served()


def test_a_request_of_another_vm() -> None:
    """A message of one guest, given to the firmware for another, is refused: BAD_MEASUREMENT."""
    machine = Machine(clock=FakeClock())
    seen = attacks.Record()
    with machine.create_vm(certs=None) as one, machine.create_vm(certs=None) as two:
        one.boot()
        two.boot()
        with HostileHost(seen).between(one):
            ask_report(one)
        with HostileHost(attacks.ReplayRequest(seen.requests[0])).between(two):
            assert ask_report(two) == ProgramSaw(result=-errno.EIO, exitinfo2=0x0B, key_kept=False)


def test_another_vmpck_lives_on() -> None:
    """A wiped key is one key: a driver bound to another VMPCK of the same guest still attests."""
    machine = Machine(clock=FakeClock())
    with machine.create_vm(certs=None, vmpck_id=1) as vm:
        booted = vm.boot()
        with HostileHost(attacks.Reply(2, 5)).between(vm):
            assert ask_report(vm).result == 2
        assert booted.secrets.slot(1).key() is None
        assert all(booted.secrets.slot(each).key() is not None for each in (0, 2, 3))
