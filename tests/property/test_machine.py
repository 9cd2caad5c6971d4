"""The whole machine: any requests over several VMs, kernels and driver generations."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from tests.property.steps import CountedMachine, machine_test
from tests.unit.guest.conftest import FakeClock

from swsnp.abi.sev_guest import SNP_GET_REPORT, SnpDerivedKeyReq
from swsnp.abi.snp_command import Command, FirmwareStatus
from swsnp.abi.snp_report import AttestationReport
from swsnp.guest.caller import BufferMemory
from swsnp.guest.driver import K_A, K_B, K_C
from swsnp.hypervisor.profiles import PROFILES
from swsnp.machine import Machine
from swsnp.machine.answers import GuestStopped, IoctlFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.guest.generation import DriverGeneration
    from swsnp.machine import VirtualMachine

NO_CERTS, SOME, MUCH = bytes(24), b"\xc5" * 5000, b"\xc7" * 0x4001


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or the refusal that it raises."""
    try:
        return call()
    except (IoctlFailed, GuestStopped) as refusal:
        return refusal


class Running:
    """A VM and what the reference knows of it."""

    def __init__(self, vm: VirtualMachine, vmpck: int, certs: bytes) -> None:
        self.vm, self.vmpck, self.certs = vm, vmpck, certs
        self.usable = True
        self.alive = True  # False: stopped, or out of step with the firmware
        self.report_id = b""
        self.seqno = 0


class WholeMachine(CountedMachine):
    """A report holds its own request's data; counters are even; the driver lives until a wiping event."""

    @initialize(
        profile=st.sampled_from(sorted(PROFILES)),
        generation=st.sampled_from([K_A, K_B, K_C]),
        seed=st.integers(0, 255),
    )
    def power_on(self, profile: str, generation: DriverGeneration, seed: int) -> None:
        self.machine = Machine(seed=bytes([seed]), profile=profile, generation=generation, clock=FakeClock())
        self.profile = self.machine.profile
        self.running: list[Running] = []
        self.report_ids: set[bytes] = set()
        self.injected = 0  # status of the next guest request

    def teardown(self) -> None:
        super().teardown()
        for each in getattr(self, "running", []):
            each.vm.close()

    def choose(self, n: int) -> Running | None:
        return self.running[n % len(self.running)] if self.running else None

    # operators

    @rule(
        certs=st.sampled_from([None, NO_CERTS, SOME, MUCH]),
        vcpus=st.integers(1, 2),
        vmpck=st.integers(0, 3),
        host_data=st.integers(0, 255),
    )
    def vm_starts(self, certs: bytes | None, vcpus: int, vmpck: int, host_data: int) -> None:
        if len(self.running) == 3:
            return
        vm = self.machine.create_vm(
            certs=certs, vcpus=vcpus, vmpck_id=vmpck, host_data=bytes([host_data]) * 32
        )
        vm.boot()
        served = certs if certs is not None and self.profile.cert_exit is not None else NO_CERTS
        self.running.append(Running(vm, vmpck, served))

    @rule(n=st.integers(0, 2), sure=st.integers(0, 5))
    def vm_ends(self, n: int, sure: int) -> None:
        if (one := self.choose(n)) is not None and sure == 0:
            one.vm.close()
            self.running.remove(one)

    @rule(status=st.sampled_from([0, 0, 0, FirmwareStatus.INVALID_PARAM, FirmwareStatus.AEAD_OFLOW, 0x1234]))
    def firmware_will_refuse(self, status: int) -> None:
        """The next guest request of any VM; 0 takes that back."""
        self.machine.mailbox.inject(Command.SNP_GUEST_REQUEST, status, 1 if status else 0)
        self.injected = status

    # programs

    def request(self, one: Running, call: Callable[[], Any]) -> Any:
        """Make a call; its value, or None when it was refused as the reference says."""
        injected = self.injected
        if not one.alive:
            return None
        if not one.usable:
            refused = attempt(call)
            assert isinstance(refused, IoctlFailed)
            assert refused.errno == errno.ENOTTY
            return None
        self.injected = 0
        one.seqno += 2
        value = attempt(call)
        if isinstance(value, IoctlFailed):
            assert (value.errno, value.exitinfo2 & 0xFFFFFFFF) == (errno.EIO, injected)
            one.usable = False
            return None
        if isinstance(value, GuestStopped):
            # the series' first version hands every firmware error to the VMM
            assert injected
            assert self.profile.firmware_errors.name == "ALL_TO_VMM"
            one.alive = one.usable = False
            return None
        assert not injected
        return value

    @rule(n=st.integers(0, 2), data=st.binary(min_size=1, max_size=64), vmpl=st.integers(0, 4))
    def program_wants_a_report(self, n: int, data: bytes, vmpl: int) -> None:
        if (one := self.choose(n)) is None:
            return
        data = data.ljust(64, b"\0")
        answer = self.request(one, lambda: one.vm.report(data, vmpl=vmpl))
        if answer is not None:
            self.check_report(one, answer, data, vmpl)

    @rule(
        n=st.integers(0, 2),
        mark=st.integers(0, 255),
        pages=st.sampled_from([0, 1, 2, 3, 4, 4]),
    )
    def program_wants_certificates_too(self, n: int, mark: int, pages: int) -> None:
        """Too small a buffer is no wiping event: the message was sent once more without certificates."""
        if (one := self.choose(n)) is None:
            return
        data = bytes([mark]) * 64
        served = self.profile.cert_exit is not None
        if one.usable and one.alive and served and len(one.certs) > pages << 12 and one.certs != NO_CERTS:
            self.too_small(one, data, pages)
            return
        if one.certs == NO_CERTS and pages == 0 and served and one.usable:
            return  # 24 zero bytes into nothing: whether they are asked for depends on how the VM was made
        answer = self.request(one, lambda: one.vm.extended_report(data, certs_size=pages << 12))
        if answer is not None:
            self.check_report(one, answer, data, 0)
            assert answer.certs == (one.certs + bytes(pages << 12))[: pages << 12]

    def too_small(self, one: Running, data: bytes, pages: int) -> None:
        injected, self.injected = self.injected, 0
        one.seqno += 2
        found = attempt(lambda: one.vm.extended_report(data, certs_size=pages << 12))
        if isinstance(found, GuestStopped):
            assert injected
            one.alive = one.usable = False
            return
        assert isinstance(found, IoctlFailed), "certificates fitted that do not fit"
        assert (found.errno, found.exitinfo2) == (errno.EIO, 1 << 32)
        # a firmware error of the repetition goes unseen, and the firmware then waits for another number
        one.alive = one.alive and not injected

    @rule(n=st.integers(0, 2), vmpl=st.integers(0, 4), select=st.integers(0, 0xFF))
    def program_wants_a_key(self, n: int, vmpl: int, select: int) -> None:
        """Twice the same request gives twice the same key."""
        if (one := self.choose(n)) is None:
            return
        wanted = SnpDerivedKeyReq(vmpl=vmpl, guest_field_select=select)
        first = self.request(one, lambda: one.vm.derived_key(wanted))
        second = self.request(one, lambda: one.vm.derived_key(wanted))
        if first is not None and second is not None:
            assert first == second
            assert any(first.derived_key) == (first.status == 0)
            assert (first.status == 0) <= (vmpl >= one.vmpck)

    @rule(n=st.integers(0, 2), what=st.sampled_from(["version", "command", "argument"]))
    def program_is_wrong(self, n: int, what: str) -> None:
        """Nothing leaves the guest."""
        if (one := self.choose(n)) is None or not one.alive:
            return
        caller = BufferMemory()
        argument = caller.place(bytearray(32))
        command = 0xC0205399 if what == "command" else SNP_GET_REPORT
        result = one.vm.ioctl(command, 0x10 if what == "argument" else argument, caller)
        assert result in (-errno.EINVAL, -errno.EFAULT, -errno.ENOTTY)

    def check_report(self, one: Running, answer: Any, data: bytes, vmpl: int) -> None:
        allowed = one.vmpck <= vmpl <= 3
        assert answer.status == (0 if allowed else FirmwareStatus.INVALID_PARAM)
        if not allowed:
            assert not any(answer.report)
            return
        report = AttestationReport.parse(answer.report)
        assert (report.report_data, report.vmpl) == (data, vmpl)
        assert report.host_data == one.vm.config.host_data
        assert report.chip_id == self.machine.chip.chip_id
        if not one.report_id:
            assert report.report_id not in self.report_ids
            one.report_id = report.report_id
            self.report_ids.add(report.report_id)
        assert report.report_id == one.report_id

    # always

    @invariant()
    def drivers_live_until_a_wiping_event(self) -> None:
        for one in self.running:
            if one.alive and one.vm.driver is not None:
                assert one.vm.driver.usable == one.usable

    @invariant()
    def counters_are_even_and_in_step(self) -> None:
        """The firmware's count is the guest's, as long as every message was answered."""
        guests = list(self.machine.mailbox.platform.guests.values())
        counts = [tuple(guest.message_counts) for guest in guests]
        assert all(count % 2 == 0 for each in counts for count in each)
        assert len(guests) == len(self.running)
        for one, guest in zip(self.running, guests, strict=True):
            if one.usable and one.alive:
                assert guest.message_counts[one.vmpck] == one.seqno
                assert sum(guest.message_counts) == one.seqno


TestWholeMachine = machine_test(WholeMachine, steps=6_000, per_run=50)
