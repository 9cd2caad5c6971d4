"""Every hostile guest against every KVM, and a storm of them: nobody else is harmed."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.ghcb import ExitCode, GhcbField, MsrCode
from swsnp.hardware.exits import GuestAccessFault
from swsnp.machine import GuestStopped, Machine
from swsnp.testing import HOSTILE_GUEST, OUTSIDE, Case, RawGuest, Replied, limited, play

if TYPE_CHECKING:
    from collections.abc import Generator

    from swsnp.machine import VirtualMachine

PROFILES = ("coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2")
PAIRS = [(case, name) for case in HOSTILE_GUEST for name in PROFILES if name in case.expected]
CODES = (
    ExitCode.GUEST_REQUEST,
    ExitCode.EXT_GUEST_REQUEST,
    ExitCode.PSC,
    ExitCode.HV_FEATURES,
    ExitCode.NMI_COMPLETE,
)


@pytest.fixture(scope="module")
def machines() -> dict[str, Machine]:
    """One machine per KVM: what a case leaves behind would show in those after it."""
    return {name: Machine(profile=name) for name in PROFILES}


@pytest.mark.parametrize(("case", "profile"), PAIRS, ids=lambda each: str(each))
def test_hostile_guest(case: Case, profile: str, machines: dict[str, Machine]) -> None:
    """The documented result and no other (kvm.c, svm/sev.c, GHCB 2.0, the series); see `case.rule`."""
    assert play(case, machines[profile]) == case.expected[profile]


@pytest.mark.parametrize("profile", PROFILES)
def test_neighbours_are_unharmed(profile: str) -> None:
    """Two VMs share the chip and nothing else: one attests before and after whatever the other does."""
    machine = Machine(profile=profile)
    with machine.create_vm("honest", certs=b"honest") as honest:
        honest.boot()
        for case in HOSTILE_GUEST:
            if profile in case.expected:
                play(case, machine)
                assert honest.report(bytes(64)).status == 0, case.name


def test_endless_guests_leave_others_their_turn() -> None:
    """A guest that never stops asking holds up no other VM (KVM throttles nothing)."""
    machine = Machine()
    ended = threading.Event()

    def endless(guest: RawGuest) -> Generator[None, None, Replied]:
        while not ended.is_set():
            guest.ask(ExitCode.HV_FEATURES)
            yield
        return Replied(info1=0, info2=0)

    with machine.create_vm(certs=None) as hostile, machine.create_vm(certs=None) as honest:
        booted = hostile.boot()
        honest.boot()
        program = endless(RawGuest(hostile.vcpus[0], booted))
        thread = threading.Thread(target=hostile.execute, args=(0, program))
        thread.start()
        try:
            for _ in range(20):
                assert honest.report(bytes(64)).status == 0
            assert thread.is_alive()
        finally:
            ended.set()
            thread.join(30)
        assert not thread.is_alive()


def _storm(guest: RawGuest, chance: random.Random) -> Generator[None, None, Any]:
    """Random requests, page state changes and registrations over the guest's own pages."""
    layout = guest.booted.layout
    unused = (guest.spare, guest.spare + 4096, OUTSIDE)
    pages = (*layout.shared_pages(), *layout.ghcb_pages, layout.secrets_page, *unused)
    for _ in range(60):
        page = chance.choice(pages)
        try:
            match chance.randrange(6):
                case 0:
                    yield from guest.msr(chance.randrange(4) << 52 | page | MsrCode.PSC_REQ)
                case 1:
                    yield from guest.msr(page | MsrCode.REGISTER_GPA_REQ)
                case 2:
                    guest.cpu.memory.pvalidate(page, validate=chance.random() < 0.5)
                case 3:
                    guest.poke(page, bytes(guest.message()))
                case 4:
                    guest.poke(guest.ghcb + GhcbField.SHARED_BUFFER, chance.randbytes(64))
                case _:
                    guest.ask(
                        chance.choice(CODES),
                        info1=chance.choice(pages),
                        info2=chance.choice(pages),
                        rax=chance.choice(pages),
                        rbx=chance.choice((0, 1, 4, 1 << 40)),
                        scratch=guest.ghcb + chance.choice((0x800, 0x900, 0xFE8)),
                    )
                    yield
        except GuestAccessFault:
            continue  # this page is not the guest's to touch just now
    return None


@pytest.mark.parametrize("profile", PROFILES)
def test_storm(profile: str) -> None:
    """Three vCPUs in three threads do whatever they like: every run ends, none by an error of ours."""
    machine = Machine(profile=profile)
    errors: list[BaseException] = []

    def work(vm: VirtualMachine, vcpu: int, booted: Any) -> None:
        chance = random.Random(vcpu)
        for _ in range(15):
            try:
                vm.execute(vcpu, limited(_storm(RawGuest(vm.vcpus[vcpu], booted, vcpu), chance), 500))
            except (GuestStopped, GuestAccessFault):
                continue
            except BaseException as error:
                errors.append(error)
                return

    with machine.create_vm(certs=b"x" * 5000, vcpus=3) as vm, machine.create_vm(certs=None) as honest:
        booted = vm.boot()
        honest.boot()
        threads = [threading.Thread(target=work, args=(vm, vcpu, booted), daemon=True) for vcpu in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert errors == []
        assert honest.report(bytes(64)).status == 0
