"""One vCPU under any order of guest events, answers of the VMM, and KVM_RUN calls."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from tests.property.steps import CountedMachine, machine_test
from tests.unit.hypervisor_run.conftest import World

from swsnp.abi.ghcb import GP_EXCEPTION, ExitCode, GhcbField, MsrCode, Reply, valid_mask
from swsnp.abi.kvm import EXIT_UNION, MAP_GPA_RANGE, ExitReason, Ioctl, RunOffset
from swsnp.hardware import Halt, NestedPageFault, ProcessorError, Shutdown
from swsnp.hypervisor.profiles import PROFILES
from swsnp.hypervisor.psp_driver import DriverResult
from swsnp.trace import CompletionTaken

if TYPE_CHECKING:
    from swsnp.trace import TraceEvent

SEV_FD, CLOSED_FD = World.SEV_FD, 99
REPLY_FIELDS = valid_mask(
    GhcbField.SW_EXIT_INFO_1,
    GhcbField.SW_EXIT_INFO_2,
    GhcbField.RAX,
    GhcbField.RCX,
    GhcbField.RDX,
    GhcbField.RBX,
)
EXITS = (
    ExitReason.HYPERCALL,
    ExitReason.SHUTDOWN,
    ExitReason.FAIL_ENTRY,
    ExitReason.INTERNAL_ERROR,
    ExitReason.SYSTEM_EVENT,
)
KNOWN_ERRNO = {
    errno.EINTR,
    errno.EINVAL,
    errno.EIO,
    errno.EFAULT,
    errno.EBADF,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
}
ADDRESSES = [World.REQUEST, World.RESPONSE, World.REQUEST, World.RESPONSE, World.DATA, 0x3008, World.UNMAPPED]
ANSWERS = [0, 0, 0, 1, 2, 4, 5, errno.ENOSPC, errno.EAGAIN, errno.EIO, errno.EINVAL, 7777, (1 << 64) - 5]
RESULTS = [
    DriverResult(0, 0),
    DriverResult(0, 0),
    DriverResult(-errno.EIO, 0x16),
    DriverResult(-errno.EIO, 0x1D),
    DriverResult(-errno.EBUSY, 0),
    DriverResult(-errno.ETIMEDOUT, 0),
]
address = st.sampled_from(ADDRESSES)
register = st.sampled_from([0, 1, 2, 4, 0x5000, 0x5001, 1 << 40])


class KvmRunMachine(CountedMachine):
    """What KVM promises its user whatever guest and user do.

    A completion is taken once, by the next KVM_RUN that gets that far. While one is due no guest code runs.
    exit_reason is written by exits only. Each guest request reaches the firmware at most once.
    """

    @initialize(profile=st.sampled_from(sorted(PROFILES)), enable=st.sampled_from([True, True, True, False]))
    def host_boots(self, profile: str, enable: bool) -> None:
        self.world = World(profile, enable=enable)
        self.profile = self.world.vm.profile
        self.cert_exit = self.profile.cert_exit
        self.due: str | None = None  # the completion that the next KVM_RUN takes
        self.events: list[TraceEvent] = []
        self.listening = self.world.vm.trace.listen(self.events.append)
        self.listening.__enter__()
        self.requests = 0  # guest requests that were made
        self.asked: dict[str, int] = {}  # registers of the request at the GHCB

    # the guest

    def ask(self, code: int, info1: int, info2: int, **registers: Any) -> None:
        if self.due or self.world.processor.exits:
            return  # a vCPU does one thing at a time
        self.asked = {"code": code, **{k: v for k, v in registers.items() if isinstance(v, int)}}
        self.world.ask(code, info1, info2, **registers)

    @rule(
        extended=st.booleans(),
        request=address,
        response=address,
        rax=register,
        rbx=register,
        msg_type=st.sampled_from([5, 5, 5, 3]),
        usage=st.sampled_from([0] * 7 + [1]),
        unmarked=st.sampled_from([()] * 7 + [(GhcbField.SW_EXIT_INFO_2,), (GhcbField.RBX,)]),
    )
    def guest_requests(
        self,
        extended: bool,
        request: int,
        response: int,
        rax: int,
        rbx: int,
        msg_type: int,
        usage: int,
        unmarked: tuple[int, ...],
    ) -> None:
        code = ExitCode.EXT_GUEST_REQUEST if extended else ExitCode.GUEST_REQUEST
        self.world.message(msg_type)
        self.ask(code, request, response, usage=usage, unmarked=unmarked, rax=rax, rbx=rbx, rcx=7, rdx=9)

    @rule(rbx=st.integers(1, 8), extended=st.sampled_from([True, True, True, False]))
    def guest_requests_rightly(self, rbx: int, extended: bool) -> None:
        self.guest_requests(extended, World.REQUEST, World.RESPONSE, World.DATA, rbx, 5, 0, ())

    @rule(
        words=st.lists(
            st.tuples(
                st.integers(0, 3), st.integers(0, 3), st.booleans(), st.sampled_from([0, 0, 0, 1, 512])
            ),
            max_size=4,
        ),
        header=st.sampled_from([None] * 6 + [(0, 252), (0, 253), (3, 1), (0xFFFF, 0xFFFF)]),
        scratch=st.sampled_from([0x1800] * 8 + [0, 0x1000, 0x1FE8, 0x5000, (1 << 64) - 1]),
    )
    def guest_changes_pages(
        self, words: list[tuple[int, int, bool, int]], header: tuple[int, int] | None, scratch: int
    ) -> None:
        if self.due or self.world.processor.exits:
            return
        buffer = struct.pack("<HHI", *(header or (0, max(len(words) - 1, 0))), 0)
        for frame, operation, large, done in words:
            word = done | (frame * 512 if large else frame) << 12 | operation << 52 | large << 56
            buffer += struct.pack("<Q", word)
        self.world.page[0x800 : 0x800 + len(buffer)] = buffer
        self.ask(ExitCode.PSC, 0, 0, scratch=scratch)

    @rule(
        code=st.one_of(st.sampled_from([int(each) for each in ExitCode]), st.integers(0, 1 << 32)),
        info1=st.sampled_from([0, 1, 2, 1 << 32, (1 << 64) - 1]),
        rax=register,
    )
    def guest_asks_for_anything(self, code: int, info1: int, rax: int) -> None:
        if code not in (ExitCode.GUEST_REQUEST, ExitCode.EXT_GUEST_REQUEST):
            self.ask(code, info1, 0, rax=rax, rbx=0, rcx=1, rdx=2, scratch=0x1800)

    @rule(
        code=st.one_of(st.sampled_from([int(each) for each in MsrCode]), st.integers(1, 0xFFF)),
        value=st.sampled_from([0, 0x1000, 1 << 52 | 0x5000, 2 << 52 | 0x5000, 3 << 52, 1 << 62]),
    )
    def guest_uses_the_msr(self, code: int, value: int) -> None:
        if not (self.due or self.world.processor.exits or code == MsrCode.REGISTER_GPA_REQ):
            self.asked = {}
            self.world.ask_vmgexit(value & ~0xFFF | code)

    @rule(gpa=st.sampled_from([0, 0x1000, 0x1008, 0x7000, World.UNMAPPED, 1 << 60]))
    def guest_moves_its_ghcb(self, gpa: int) -> None:
        """Without registering it."""
        if not (self.due or self.world.processor.exits):
            self.asked = {}
            self.world.ask_vmgexit(gpa)

    @rule(
        leave=st.sampled_from(
            [
                Halt(),
                NestedPageFault(0x5008, True, False),
                NestedPageFault(1 << 40, False, True),
                Shutdown("triple fault"),
                ProcessorError(3, "no"),
            ]
        )
    )
    def guest_leaves_otherwise(self, leave: Any) -> None:
        if not (self.due or self.world.processor.exits):
            self.asked = {}
            self.world.processor.exits.append(leave)

    # the host

    @rule(result=st.sampled_from(RESULTS))
    def firmware_will_answer(self, result: DriverResult) -> None:
        if len(self.world.driver.results) < 3:
            self.world.driver.results.append(result)

    @rule(closed=st.sampled_from([False, False, True]))
    def sev_descriptor_is_closed(self, closed: bool) -> None:
        assert self.world.sev is not None
        self.world.sev.sev_fd = CLOSED_FD if closed else SEV_FD

    # the VMM

    @rule(ret=st.sampled_from(ANSWERS), npages=st.integers(0, 9))
    def vmm_writes_an_answer(self, ret: int, npages: int) -> None:
        """For the exit that is due; also when none is, which nobody may notice."""
        if self.due == "certs":
            assert self.cert_exit is not None
            width = self.cert_exit.ret_width
            self.world.answer_certs(ret & ((1 << width) - 1), npages)
        else:
            self.world.poke(RunOffset.HYPERCALL_RET, ret, 64)

    @rule(value=st.sampled_from([0, 1, 1, 255]))
    def vmm_sets_immediate_exit(self, value: int) -> None:
        self.world.immediate_exit(value)

    @rule(valid=st.sampled_from([0, 0, 1, 8]), dirty=st.sampled_from([0, 0, 0, 2]))
    def vmm_wants_registers(self, valid: int, dirty: int) -> None:
        """kvm_valid_regs and kvm_dirty_regs: none may be synced with protected state."""
        self.world.poke(RunOffset.VALID_REGS, valid, 64)
        self.world.poke(RunOffset.DIRTY_REGS, dirty, 64)

    @rule(arg=st.sampled_from([1, -1, 1 << 40]))
    def run_with_an_argument(self, arg: int) -> None:
        """KVM_RUN takes none: -EINVAL, nothing happens."""
        before = bytes(self.world.area), self.world.processor.entries, len(self.world.driver.issued)
        assert self.world.vcpu.ioctl(Ioctl.KVM_RUN, arg) == -errno.EINVAL
        assert before == (bytes(self.world.area), self.world.processor.entries, len(self.world.driver.issued))

    @rule(again=st.integers(1, 3))
    def run(self, again: int) -> None:
        for _ in range(again):
            self.run_once()

    def run_once(self) -> None:
        """KVM_RUN, and everything that must hold of its result."""
        world = self.world
        immediate = world.area[RunOffset.IMMEDIATE_EXIT]
        synced = world.u64(RunOffset.VALID_REGS) | world.u64(RunOffset.DIRTY_REGS)
        before_reason, entries, issued = world.exit_reason, world.processor.entries, len(world.driver.issued)
        due, guest_event = self.due, bool(world.processor.exits)
        self.events.clear()
        result = world.run()
        entered = world.processor.entries > entries
        taken = [each for each in self.events if isinstance(each, CompletionTaken)]
        sent = len(world.driver.issued) - issued
        reason = world.exit_reason

        assert result == 0 or -result in KNOWN_ERRNO, result
        assert not any(world.area[RunOffset.FLAGS : RunOffset.FLAGS + 2])

        # a completion is taken once, and no guest code runs before it
        if synced:
            assert (result, entered, taken, sent) == (-errno.EINVAL, False, [], 0)
            assert reason == before_reason
            return
        assert len(taken) == (due is not None)
        if due is not None:
            self.due = None
        # the firmware is asked once for each request that gets that far
        assert sent <= (due == "certs") + guest_event
        if due == "hypercall" and not entered:
            assert sent == 0

        # immediate_exit: completed, yet not entered
        if immediate:
            assert not entered
            assert result < 0 or reason in (ExitReason.HYPERCALL, self.cert_reason)
            if result == -errno.EINTR:
                assert reason == before_reason
            if due is None:
                assert (result, sent) == (-errno.EINTR, 0)

        self.check_reason(result, reason, before_reason, entered=entered)
        if result == 0 and reason == ExitReason.HYPERCALL:
            self.due = "hypercall"
            assert world.u64(EXIT_UNION) == MAP_GPA_RANGE
        elif result == 0 and reason == self.cert_reason:
            self.due = "certs"
            assert sent == 0
        if entered:
            self.check_reply()

    @property
    def cert_reason(self) -> int:
        return -1 if self.cert_exit is None else int(self.cert_exit.exit_reason)

    def check_reason(self, result: int, reason: int, before: int, *, entered: bool) -> None:
        """exit_reason is the exit's with 0 and with -EFAULT, INTR after a halt; else it is stale."""
        if result == 0:
            assert reason in (*EXITS, self.cert_reason)
        elif result == -errno.EFAULT and reason == ExitReason.MEMORY_FAULT:
            assert entered
        elif entered:
            # the kernel sets UNKNOWN before it enters the guest
            assert reason in (ExitReason.UNKNOWN, ExitReason.INTR)
            assert (reason == ExitReason.INTR) == (result == -errno.EINTR)
        else:
            assert reason in (before, ExitReason.UNKNOWN)

    def check_reply(self) -> None:
        """The GHCB after a reply: which fields are marked, what they may say, which registers are kept."""
        world = self.world
        if world.valid & ~REPLY_FIELDS or not world.valid & valid_mask(GhcbField.RAX):
            return  # no reply has been given yet: the guest left for another reason
        info1, info2 = world.reply
        if not self.asked:
            return
        assert info1 & 0xFFFF_FFFF in (Reply.NO_ACTION, Reply.ISSUE_EXCEPTION, Reply.MALFORMED_INPUT)
        if info1 & 0xFFFF_FFFF == Reply.ISSUE_EXCEPTION:
            assert info2 == GP_EXCEPTION  # the one that KVM injects; Linux guests refuse others
            assert self.asked["code"] not in (ExitCode.GUEST_REQUEST, ExitCode.EXT_GUEST_REQUEST)
        elif info1 & 0xFFFF_FFFF == Reply.MALFORMED_INPUT:
            assert 1 <= info2 <= 6
        elif self.asked["code"] in (ExitCode.GUEST_REQUEST, ExitCode.EXT_GUEST_REQUEST):
            assert info2 >> 32 in (0, 1, 2, 0x80000000, 0xFFFFFFFF)
            assert info2 >> 32 != 1 or self.asked["code"] == ExitCode.EXT_GUEST_REQUEST

    # always

    @precondition(lambda self: self.due is not None)
    @rule()
    def nothing_runs_while_a_completion_is_due(self) -> None:
        """KVM_GET_MP_STATE and looking at the memory do not complete anything."""
        entries = self.world.processor.entries
        assert self.world.mp_state in (0, 3)
        assert self.world.processor.entries == entries

    @invariant()
    def what_the_firmware_got_came_from_this_vm(self) -> None:
        for each in self.world.driver.issued:
            assert (each.command, each.gctx) == (0x94, World.GCTX)
            assert each.request != each.response or self.profile.equal_request_pages_error is None

    @invariant()
    def response_pages_come_back(self) -> None:
        """A page that the firmware was given is the hypervisor's again, or was told to be lost."""
        if self.profile.request_pages.name == "GUEST" and self.profile.name != "coco-v1":
            assert len(self.world.driver.reclaimed) == len(self.world.driver.issued)


TestKvmRun = machine_test(KvmRunMachine, steps=27_000)
