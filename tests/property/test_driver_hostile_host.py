"""The whole sev-guest driver, with several vCPUs, commands and reloads, against a host that does anything."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from tests.property.steps import CountedMachine, machine_test
from tests.unit.guest.conftest import MARK, REQUEST, Caller, FakeClock, FakeCpu, ScriptedHost

from swsnp.abi.sev_guest import (
    EXITINFO2_UNSET,
    NO_FW_CALL,
    SNP_GET_DERIVED_KEY,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
)
from swsnp.guest.boot import boot_ap
from swsnp.guest.driver import K_A, K_B, K_C, SevGuestDriver, VmpckEmpty

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.guest.conftest import GhcbEvent

    from swsnp.guest.generation import DriverGeneration

BUSY, INVALID_LEN, GENERIC = 2 << 32, 1 << 32, 0xFFFFFFFF << 32
COMMANDS = [SNP_GET_REPORT, SNP_GET_EXT_REPORT, SNP_GET_EXT_REPORT, SNP_GET_DERIVED_KEY]
# What the host does to one VMGEXIT; those of the first line do not end the exchange
GOING_ON = ["busy", "busy", "too small"]
ENDING = [
    *["honest"] * 8,
    "busy for ever",
    "status",
    "generic",
    "exception",
    "malformed",
    "silence",
    "replay",
    "garble",
    "reflect",
]
PLANS = st.tuples(st.lists(st.sampled_from(GOING_ON), max_size=2), st.sampled_from(ENDING))
AUTHENTICATED = [*range(16), *range(0x20, 0x28), *range(0x30, 0x60 + 32)]
EXCEPTION = 1 << 31 | 3 << 8 | 13  # #GP as the GHCB document prints it
KEPT, WIPED = True, False


class DriverMachine(CountedMachine):
    """No sequence number ever covers two plaintexts; the key goes with a wiping event and only then."""

    @initialize(
        stored=st.sampled_from([0, 0, 2, 0x7FFFFFFE, 0xFFFFFFF6, 0xFFFFFFFA]),
        generation=st.sampled_from([K_A, K_B, K_C]),
    )
    def guest_boots(self, stored: int, generation: DriverGeneration) -> None:
        self.host, self.clock = ScriptedHost(), FakeClock()
        self.host.certs = b"\xc5" * 0x3000
        self.guest = self.host.boot()
        self.cpus = [self.host.cpu, FakeCpu(self.host.memory)]
        self.host.run(boot_ap(self.cpus[1], self.guest, vcpu=1), self.cpus[1])
        self.generation = generation
        self.next = [stored + 1] * 4  # by VMPCK
        for vmpck in range(4):
            self.host.store(stored, vmpck)
            self.host.firmware.counters[vmpck] = stored
        self.alive = [True] * 4
        self.covered: dict[tuple[int, int], bytes] = {}
        self.answers: list[bytes] = []
        self.vmpck = 0
        self.driver = self.bind(0)

    def bind(self, vmpck: int) -> SevGuestDriver:
        return SevGuestDriver(self.guest, vmpck_id=vmpck, generation=self.generation, clock=self.clock)

    # the host

    def step(self, name: str, bit: int) -> Callable[[GhcbEvent], tuple[int, int]]:
        def act(event: GhcbEvent) -> tuple[int, int]:
            memory = self.host.memory.shared
            page = bytes(memory[REQUEST : REQUEST + 4096])
            (seqno,), vmpck = struct.unpack_from("<Q", page, 0x20), page[0x3C]
            # whatever reaches shared memory under a number is the same for ever
            assert self.covered.setdefault((vmpck, seqno), page) == page
            reply = self.act(name, event, page, bit)
            if name == "honest" and reply == (0, 0):
                self.answers.append(bytes(memory[event.info2 : event.info2 + 4096]))
            return reply

        return act

    def act(self, name: str, event: GhcbEvent, page: bytes, bit: int) -> tuple[int, int]:
        host, response = self.host, event.info2
        match name:
            case "busy" | "busy for ever":
                return 0, BUSY
            case "too small":
                host._put(0x318, 5)
                return 0, INVALID_LEN
            case "status":
                return 0, 0x16
            case "generic":
                return 0, GENERIC
            case "exception":
                return 1, EXCEPTION
            case "malformed":
                return 2, 5
            case "replay" if self.answers:
                host.memory.shared[response : response + 4096] = self.answers[bit % len(self.answers)]
                return 0, 0
            case "reflect":
                host.memory.shared[response : response + 4096] = page
                return 0, 0
            case "silence" | "replay":
                return 0, 0
        reply = host._honest(event)
        if name == "garble" and reply == (0, 0):
            host.memory.shared[response + AUTHENTICATED[bit % len(AUTHENTICATED)]] ^= 1 << bit % 8
        return reply

    # the reference: Linux, snp_send_guest_request and its callers

    def expected(self, command: int, plan: list[str], certs: int) -> tuple[int, int, bool]:
        """The result, exitinfo2 (0: not written back) and whether the key is kept."""
        extended, too_small = command == SNP_GET_EXT_REPORT, False
        in_step = self.host.firmware.counters[self.vmpck] + 1 == self.next[self.vmpck]
        for name in plan:
            if name == "busy":
                continue
            if name == "too small" or (name == "honest" and extended and not too_small and certs < 3):
                if extended and not too_small:
                    too_small = True
                    continue
                return -errno.EIO, INVALID_LEN, KEPT
            break
        if too_small:
            match name:
                case "busy for ever":
                    return -errno.ETIMEDOUT, INVALID_LEN, WIPED
                case "exception":
                    return 4, INVALID_LEN, WIPED
                case "malformed":
                    return 2, INVALID_LEN, WIPED
            return -errno.EIO, INVALID_LEN, KEPT
        match name:
            case "honest" if in_step:
                return 0, 0, KEPT
            case "honest" | "garble" if not in_step:
                return -errno.EIO, 0x1D, WIPED
            case "busy for ever":
                return -errno.ETIMEDOUT, BUSY, WIPED
            case "status":
                return -errno.EIO, 0x16, WIPED
            case "generic":
                return -errno.EIO, GENERIC, WIPED
            case "exception":
                return 4, NO_FW_CALL, WIPED
            case "malformed":
                return 2, NO_FW_CALL, WIPED
        return -errno.EBADMSG, 0, WIPED  # silence, replay, garble, reflect

    # the programs in the guest

    @rule(
        command=st.sampled_from(COMMANDS),
        cpu=st.integers(0, 1),
        plan=PLANS,
        certs=st.sampled_from([0, 2, 3, 4]),
        mark=st.integers(0, 255),
        bit=st.integers(0, 255),
    )
    def program_asks(
        self, command: int, cpu: int, plan: tuple[list[str], str], certs: int, mark: int, bit: int
    ) -> None:
        steps = [*plan[0], plan[1]]
        if plan[1] == "garble" and command == SNP_GET_EXT_REPORT and certs < 3:
            steps[-1] = "honest"  # the host is too small first: nothing to garble
        caller = Caller(certs=certs << 12)
        caller.req[:1] = bytes([mark])
        silent = not self.driver.usable
        exhausted = not silent and self.next[self.vmpck] >= 0xFFFFFFFF
        events = len(self.host.events)
        wanted, info, kept = self.expected(command, steps, certs)
        # a step that answers "too small" by itself is followed by the same step once more
        self.host.plan.clear()
        self.host.plan.extend(self.step(name, bit) for name in steps)
        self.host.plan.extend(self.step(steps[-1], bit) for _ in range(40))
        program = self.driver.ioctl(self.cpus[cpu], command, caller.argument, caller.memory)
        result = self.host.run(program, self.cpus[cpu])
        self.host.plan.clear()
        if silent:
            assert result == -errno.ENOTTY
            assert len(self.host.events) == events
            return
        if exhausted:
            assert result == -errno.EIO
            assert len(self.host.events) == events
            assert self.driver.usable
            return
        assert (result, caller.exitinfo2, self.driver.usable) == (wanted, info or MARK, kept), steps
        self.next[self.vmpck] += 2
        self.alive[self.vmpck] = kept
        if result == 0:
            assert caller.resp[0x20] == mark or command == SNP_GET_DERIVED_KEY
            assert command != SNP_GET_DERIVED_KEY or caller.resp[32] == mark

    @rule(
        command=st.sampled_from([SNP_GET_REPORT, SNP_GET_EXT_REPORT, SNP_GET_DERIVED_KEY, 0, 0xC0205303]),
        wrong=st.sampled_from(["version", "req", "resp", "argument", "command", "certs"]),
    )
    def program_asks_wrongly(self, command: int, wrong: str) -> None:
        """Arguments are judged before anything is sealed: no number is used up."""
        caller = Caller(certs=0x1000)
        argument = caller.argument
        if wrong == "version":
            caller.set(msg_version=0)
        elif wrong == "req":
            caller.set(req=0x50)
        elif wrong == "resp":
            caller.set(resp=0)
        elif wrong == "argument":
            argument = 0x40
        elif wrong == "command":
            command = 0xC0205399
        elif command == SNP_GET_EXT_REPORT:
            caller.offer(caller.certs_address, 0x1001)
        else:
            return
        events, stored = len(self.host.events), self.host.stored(self.vmpck)
        result = self.host.run(self.driver.ioctl(self.cpus[0], command, argument, caller.memory))
        assert result in (-errno.EINVAL, -errno.EFAULT, -errno.ENOTTY)
        assert (events, stored) == (len(self.host.events), self.host.stored(self.vmpck))
        early = self.generation.key_before_command and not self.driver.usable
        untold = early or wrong in ("argument", "version")
        assert caller.exitinfo2 == (MARK if untold else EXITINFO2_UNSET)

    @rule(command=st.sampled_from(COMMANDS), cpu=st.integers(0, 1), exits=st.integers(0, 2))
    def program_dies_while_it_waits(self, command: int, cpu: int, exits: int) -> None:
        """At a VMGEXIT: its number is used up, and the next program finds the key wiped."""
        if not self.driver.usable or self.next[self.vmpck] >= 0xFFFFFFFF:
            return
        caller = Caller(certs=0x3000)
        program = self.driver.ioctl(self.cpus[cpu], command, caller.argument, caller.memory)
        self.host.plan.extend([self.step("busy", 0)] * exits)
        next(program)
        for _ in range(exits):
            self.host.vmgexit(self.cpus[cpu])
            next(program)
        self.host.plan.clear()
        # the page in shared memory counts as sent
        page = bytes(self.host.memory.shared[REQUEST : REQUEST + 4096])
        (seqno,) = struct.unpack_from("<Q", page, 0x20)
        assert self.covered.setdefault((self.vmpck, seqno), page) == page
        program.close()
        self.next[self.vmpck] += 2
        caller = Caller()
        result = self.host.ioctl(self.driver, caller)
        assert result == -errno.ENOTTY
        assert self.host.wiped(self.vmpck)
        self.alive[self.vmpck] = False

    @rule(vmpck=st.integers(0, 3))
    def driver_is_loaded_again(self, vmpck: int) -> None:
        """With any key that is left; with one that is wiped it does not bind."""
        try:
            self.driver = self.bind(vmpck)
        except VmpckEmpty:
            assert not self.alive[vmpck]
        else:
            assert self.alive[vmpck]
            self.vmpck = vmpck

    @precondition(lambda self: not any(self.alive))
    @rule()
    def every_key_is_gone(self) -> None:
        """Nothing can be sent any more."""
        events = len(self.host.events)
        for command in COMMANDS:
            caller = Caller()
            assert self.host.ioctl(self.driver, caller, command) == -errno.ENOTTY
        assert len(self.host.events) == events

    # always

    @invariant()
    def numbers_are_odd_and_without_gaps(self) -> None:
        for vmpck in range(4):
            assert self.host.stored(vmpck) == self.next[vmpck] - 1
            assert self.next[vmpck] % 2 == 1

    @invariant()
    def keys_are_gone_where_they_must_be(self) -> None:
        """A wipe takes one key and leaves the others."""
        for vmpck in range(4):
            assert self.host.wiped(vmpck) == (not self.alive[vmpck])

    @invariant()
    def keys_never_reach_shared_memory(self) -> None:
        for key in self.host.keys:
            assert key not in self.host.memory.shared


TestDriver = machine_test(DriverMachine, steps=12_000)
