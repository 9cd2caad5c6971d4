"""KVM_RUN and the memory it shares with userspace. Source: Linux, kvm_main.c and x86.c."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode
from swsnp.abi.kvm import ExitReason, Ioctl, KvmRunPage, MpState, VmType
from swsnp.hardware import NestedPageFault, ProcessorError, Shutdown, Vmgexit
from swsnp.hypervisor.psp_driver import DriverResult

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

NEW_VM_TYPES = [VmType.SEV, VmType.SEV_ES, VmType.SNP]


def certs_exit(world: MakeWorld, profile: str = "linux-7.2") -> World:
    """A VM whose vCPU has just left for certificates."""
    vm = world(profile, enable=True)
    vm.message(5)
    assert vm.ask_run(ExitCode.EXT_GUEST_REQUEST, vm.REQUEST, vm.RESPONSE, rax=vm.DATA, rbx=4) == 0
    return vm


@pytest.mark.parametrize("arg", [1, bytearray(8)])
def test_argument_must_be_zero(world: MakeWorld, arg: int | bytearray) -> None:
    """KVM_RUN with an argument: -EINVAL, nothing is touched."""
    vm = world()
    vm.poke(14, 0xFFFF, 16)
    assert vm.vcpu.ioctl(Ioctl.KVM_RUN, arg) == -errno.EINVAL
    assert vm.u32(14) & 0xFFFF == 0xFFFF
    assert vm.processor.entries == 0


@pytest.mark.parametrize("request_", [Ioctl.KVM_RUN, Ioctl.KVM_GET_MP_STATE, 0x1234])
def test_dead_vm(world: MakeWorld, request_: int) -> None:
    """A bugged VM: every ioctl of its vCPUs is -EIO, before any argument is looked at."""
    vm = world()
    vm.vm.bugged = True
    assert vm.vcpu.ioctl(request_, 99) == -errno.EIO


def test_vm_dies_while_the_guest_runs(world: MakeWorld) -> None:
    """A VM that is bugged while its vCPU runs is not entered again: -EIO."""
    vm = world()
    vm.ask(ExitCode.HV_FEATURES)
    vm.processor.before.append(lambda: setattr(vm.vm, "bugged", True))
    assert vm.run() == -errno.EIO
    assert vm.processor.entries == 1


def test_unknown_ioctl(world: MakeWorld) -> None:
    """Requests that a vCPU does not know: -ENOTTY."""
    assert world().vcpu.ioctl(Ioctl.KVM_CREATE_VCPU, 0) == -errno.ENOTTY


@pytest.mark.parametrize("arg", [0, 4096, bytearray(3), bytearray(5)])
def test_mp_state_bad_buffer(world: MakeWorld, arg: int | bytearray) -> None:
    """KVM_GET_MP_STATE into memory that is not the structure: -EFAULT."""
    assert world().vcpu.ioctl(Ioctl.KVM_GET_MP_STATE, arg) == -errno.EFAULT


def test_mp_states(world: MakeWorld) -> None:
    """The boot processor is runnable, others are uninitialized; a guest that halts is halted."""
    vm = world()
    other = vm.add_vcpu(1)
    state = bytearray(4)
    assert vm.mp_state == MpState.RUNNABLE
    assert other.ioctl(Ioctl.KVM_GET_MP_STATE, state) == 0
    assert state == b"\x01\0\0\0"
    assert vm.run() == -errno.EINTR
    assert vm.exit_reason == ExitReason.INTR
    assert vm.mp_state == MpState.HALTED


def test_halted_vcpu_runs_again(world: MakeWorld) -> None:
    """After a halt the next KVM_RUN enters the guest again: it may have got something to do."""
    vm = world()
    vm.run()
    vm.processor.exits.append(Shutdown("end"))
    assert vm.run() == 0
    assert vm.exit_reason == ExitReason.SHUTDOWN
    assert vm.mp_state == MpState.RUNNABLE


def test_flags_are_cleared(world: MakeWorld) -> None:
    """`flags` := 0 at every start, also when the guest is not entered."""
    vm = world()
    vm.poke(14, 0xFFFF, 16)
    vm.immediate_exit(1)
    assert vm.run() == -errno.EINTR
    assert vm.u32(14) & 0xFFFF == 0


def test_immediate_exit_leaves_exit_reason(world: MakeWorld) -> None:
    """immediate_exit without a completion: -EINTR, the guest does not run, exit_reason is the one before."""
    vm = world()
    vm.poke(8, 43, 32)
    vm.immediate_exit(1)
    assert vm.run() == -errno.EINTR
    assert vm.exit_reason == 43
    assert vm.processor.entries == 0
    assert vm.area[1] == 1, "userspace clears it, not KVM"


def test_immediate_exit_is_sampled_once(world: MakeWorld) -> None:
    """A write to immediate_exit while KVM_RUN is under way does not affect that call."""
    vm = certs_exit(world)
    vm.driver.during = lambda: vm.immediate_exit(1)
    vm.answer_certs(0)
    assert vm.resumed(vm.run())
    assert vm.processor.entries == 2


def test_uninitialized_ap(world: MakeWorld) -> None:
    """An AP before its start: -EINTR; with immediate_exit too, but then exit_reason stays."""
    vm = world()
    vm.vcpu = vm.add_vcpu(1)
    vm.poke(8, 77, 32)
    vm.poke(14, 0xFFFF, 16)
    vm.immediate_exit(1)
    assert vm.run() == -errno.EINTR
    assert vm.exit_reason == 77
    assert vm.u32(14) & 0xFFFF == 0
    vm.immediate_exit(0)
    vm.poke(288, 1, 64)  # not looked at before the AP is started
    assert vm.run() == -errno.EINTR
    assert vm.exit_reason == ExitReason.INTR
    assert vm.processor.entries == 0


@pytest.mark.parametrize("offset", [288, 296])
@pytest.mark.parametrize(
    ("vm_type", "value", "refused"),
    [
        (VmType.SNP, 1, True),
        (VmType.SEV_ES, 4, True),
        (VmType.SEV, 7, False),
        (VmType.DEFAULT, 7, False),
        (VmType.DEFAULT, 8, True),
    ],
)
def test_sync_regs(world: MakeWorld, offset: int, vm_type: int, value: int, refused: bool) -> None:
    """kvm_valid_regs and kvm_dirty_regs: no bit is allowed once the register state is protected."""
    vm = world(vm_type=vm_type)
    vm.poke(offset, value, 64)
    assert (vm.run() == -errno.EINVAL) is refused
    assert (vm.processor.entries == 0) is refused


def test_sync_regs_come_before_the_completion(world: MakeWorld) -> None:
    """Bad sync registers: -EINVAL, and the pending completion is still there for the next KVM_RUN."""
    vm = certs_exit(world)
    vm.poke(288, 1, 64)
    assert vm.run() == -errno.EINVAL
    assert vm.driver.issued == []
    vm.poke(288, 0, 64)
    assert vm.resumed(vm.run())
    assert len(vm.driver.issued) == 1


@pytest.mark.parametrize("vm_type", NEW_VM_TYPES)
def test_init2_is_needed(world: MakeWorld, vm_type: int) -> None:
    """KVM_RUN before KVM_SEV_INIT2 for a type that needs it: -EINVAL, after the test for immediate_exit."""
    vm = world(vm_type=vm_type)
    vm.vm.sev = None
    assert vm.run() == -errno.EINVAL
    vm.immediate_exit(1)
    assert vm.run() == -errno.EINTR
    assert vm.processor.entries == 0


def test_run_loop_starts_with_unknown(world: MakeWorld) -> None:
    """exit_reason := 0 when KVM begins to run the guest: an error later leaves it so."""
    vm = world()
    vm.poke(8, 43, 32)
    assert vm.ask_run(ExitCode.UNSUPPORTED_EVENT) == -errno.EINVAL
    assert vm.exit_reason == ExitReason.UNKNOWN


@pytest.mark.parametrize(("profile", "reason"), [("linux-6.12", 0xFFFFFFFF), ("linux-7.2", (1 << 64) - 1)])
def test_unmeasured_vcpu(world: MakeWorld, profile: str, reason: int) -> None:
    """A vCPU whose VMSA the firmware never got fails at entry (the reason is UNVERIFIED)."""
    vm = world(profile)
    vm.vcpu.measured = False
    assert vm.run() == 0
    assert vm.exit_reason == ExitReason.FAIL_ENTRY
    assert vm.u64(32) == reason
    assert vm.u32(40) == 0
    assert vm.processor.entries == 0


@pytest.mark.parametrize(("private", "flags"), [(True, 8), (False, 0)])
def test_memory_fault(world: MakeWorld, private: bool, flags: int) -> None:
    """KVM_EXIT_MEMORY_FAULT comes with -EFAULT: page address, size 4096, flag bit 3 for a private access."""
    vm = world()
    vm.processor.exits.append(NestedPageFault(0x7123, private=private, write=True))
    assert vm.run() == -errno.EFAULT
    assert vm.exit_reason == ExitReason.MEMORY_FAULT
    assert (vm.u64(32), vm.u64(40), vm.u64(48)) == (flags, 0x7000, 4096)


def test_shutdown(world: MakeWorld) -> None:
    """Shutdown intercept: KVM_EXIT_SHUTDOWN, result 0, no payload."""
    vm = world()
    vm.area[32:64] = b"\x5a" * 32
    vm.processor.exits.append(Shutdown("triple fault"))
    assert vm.run() == 0
    assert vm.exit_reason == ExitReason.SHUTDOWN
    assert vm.area[32:64] == b"\x5a" * 32


def test_internal_error(world: MakeWorld) -> None:
    """KVM_EXIT_INTERNAL_ERROR: suberror at 32, no data, result 0; only these members are written."""
    vm = world()
    vm.area[32:64] = b"\x5a" * 32
    vm.processor.exits.append(ProcessorError(3, "emulation"))
    assert vm.run() == 0
    assert vm.exit_reason == ExitReason.INTERNAL_ERROR
    assert (vm.u32(32), vm.u32(36)) == (3, 0)
    assert vm.area[40:64] == b"\x5a" * 24


def test_shared_area(world: MakeWorld) -> None:
    """The vCPU mapping has 12,288 bytes and begins with struct kvm_run."""
    vm = world()
    assert len(vm.area) == 12288
    assert KvmRunPage.parse(vm.area[:2352]).exit_reason == 0


# Completions


def test_completion_runs_before_immediate_exit(world: MakeWorld) -> None:
    """immediate_exit: exactly one firmware request, then -EINTR; no guest progress, exit_reason unchanged."""
    vm = certs_exit(world)
    vm.answer_certs(0)
    vm.immediate_exit(1)
    assert vm.run() == -errno.EINTR
    assert vm.exit_reason == ExitReason.SNP_REQ_CERTS
    assert len(vm.driver.issued) == 1
    assert vm.processor.entries == 1
    assert vm.response() == vm.driver.fill
    assert vm.valid & 1 << 63 == 0, "registers go back only at the next entry"
    assert vm.run() == -errno.EINTR
    assert len(vm.driver.issued) == 1, "the completion is consumed"
    vm.immediate_exit(0)
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)


@pytest.mark.parametrize("error", [-errno.EBUSY, -errno.ETIMEDOUT, -errno.ENODEV])
def test_completion_error_beats_immediate_exit(world: MakeWorld, error: int) -> None:
    """An error of the completion is KVM_RUN's result, also with immediate_exit."""
    vm = certs_exit(world)
    vm.driver.results.append(DriverResult(error, 0))
    vm.immediate_exit(1)
    assert vm.run() == error
    assert vm.exit_reason == ExitReason.SNP_REQ_CERTS


def test_failed_completion_is_consumed(world: MakeWorld) -> None:
    """Unsupported `ret`: -EINVAL; another KVM_RUN resumes the guest with success that never was."""
    vm = certs_exit(world)
    vm.answer_certs(0x16)
    assert vm.run() == -errno.EINVAL
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)
    assert vm.driver.issued == []
    assert vm.response() == bytes(4096)


def test_one_thread_runs_a_vcpu(world: MakeWorld) -> None:
    """A second KVM_RUN on the same vCPU waits for the first one's end."""
    vm = world()
    inside, go_on = threading.Event(), threading.Event()
    overlap: list[int] = []

    def guest() -> None:
        overlap.append(1)
        inside.set()
        assert go_on.wait(10)
        overlap.append(-1)

    vm.processor.before.extend([guest, guest])
    threads = [threading.Thread(target=vm.run) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert inside.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert overlap == [1, -1, 1, -1]


def test_registers_go_back_at_entry(world: MakeWorld) -> None:
    """A reply has bits 63, 97, 98, 99, 115, 116 set and bit 114 clear; RAX..RDX are those of the event."""
    vm = world()
    assert vm.resumed(vm.ask_run(ExitCode.HV_FEATURES, rax=1, rbx=2, rcx=3, rdx=4))
    assert vm.valid == sum(1 << bit for bit in (63, 97, 98, 99, 115, 116))
    assert [vm.get(offset) for offset in (0x1F8, 0x318, 0x308, 0x310)] == [1, 2, 3, 4]


def test_vmgexit_without_sev(world: MakeWorld) -> None:
    """A VM without SEV answers, should a processor leave so: no version is offered."""
    vm = world(vm_type=VmType.DEFAULT)
    vm.vm.sev = None
    vm.processor.ghcb_msr = 2
    vm.processor.exits.append(Vmgexit())
    assert vm.resumed(vm.run())
    assert vm.processor.ghcb_msr == 0x0000000133000001
