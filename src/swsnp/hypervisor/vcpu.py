"""One vCPU of KVM: KVM_RUN in the kernel's order, and what leaves and enters the guest.

Source: Linux, virt/kvm/kvm_main.c (kvm_vcpu_ioctl), arch/x86/kvm/x86.c (kvm_arch_vcpu_ioctl_run).
"""

from __future__ import annotations

import errno
import logging
import threading
from typing import TYPE_CHECKING, Final, assert_never

from swsnp import trace
from swsnp.abi.kvm import ExitReason, Ioctl, KvmMpState, MpState, VmType
from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
from swsnp.hardware import (
    Halt,
    Interrupted,
    MmioAccess,
    NestedPageFault,
    PortAccess,
    ProcessorError,
    Shutdown,
    Vmgexit,
)
from swsnp.hypervisor import device_io, guest_request, instructions, msr_protocol, page_state, vmgexit
from swsnp.hypervisor.kvm_run import KvmRun
from swsnp.hypervisor.msrs import Msrs
from swsnp.hypervisor.neighbours import MachineCodeProcessor, Processor
from swsnp.hypervisor.outcomes import (
    RESUMED,
    AccessWanted,
    CertsWanted,
    EntryFailed,
    GuestHalted,
    GuestResumed,
    GuestShutdown,
    HypercallWanted,
    InternalError,
    Kicked,
    MapGpaRange,
    MemoryFault,
    MmioWanted,
    PortIoWanted,
    ResetHold,
    Terminated,
    VmmErrno,
    WaitsForSipi,
)
from swsnp.hypervisor.registers import Registers
from swsnp.hypervisor.scratch import write_outside
from swsnp.hypervisor.startup import Startup

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.record import Record
    from swsnp.hardware import GuestExit
    from swsnp.hardware.time_slices import TimeSlices
    from swsnp.hypervisor.neighbours import VirtualMachine
    from swsnp.hypervisor.outcomes import Departure, Outcome, UserspaceWanted
    from swsnp.hypervisor.vmgexit import GhcbEvent

__all__ = ["Processor", "Vcpu"]

_logger = logging.getLogger(__name__)

_EINVAL: Final = -errno.EINVAL
_KVM_RUN: Final = int(Ioctl.KVM_RUN)
_RUNNABLE: Final = MpState.RUNNABLE
_PAGE: Final = 4096
_REGISTERS: Final[dict[int, type[Record]]] = {
    Ioctl.KVM_GET_REGS: KvmRegs,
    Ioctl.KVM_SET_REGS: KvmRegs,
    Ioctl.KVM_GET_SREGS: KvmSregs,
    Ioctl.KVM_SET_SREGS: KvmSregs,
}
_SYNC_REGS: Final = 0b111
"""Register sets that userspace may sync: none of a VM whose state is protected."""
_NEEDS_INIT2: Final = frozenset({VmType.SEV, VmType.SEV_ES, VmType.SNP})
_PROTECTED: Final = frozenset({VmType.SEV_ES, VmType.SNP})
_MP_STATE_AFTER: Final[dict[type, int]] = {
    GuestHalted: MpState.HALTED,
    ResetHold: MpState.AP_RESET_HOLD,
}


def _no_cpuid(_: int) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0)


class Vcpu:
    """A vCPU and the memory it shares with userspace.

    Args:
        vm: its VM.
        vcpu_id: also its APIC id; 0 is the boot processor, the others wait for AP creation.
        processor: what runs the guest's code.
        cbit: number of the page table bit that says private.
        cpuid: leaf to EAX, EBX, ECX, EDX (sub-leaf 0), for the MSR protocol.
        gpa_bits: width of guest physical addresses.
        signature: CPUID Fn1 EAX, in RDX at reset.
        host_cpus: on one of which it runs; None: whenever its thread does, and so if it runs machine code,
            since KVM itself finds a processor for that.
    """

    def __init__(
        self,
        vm: VirtualMachine,
        vcpu_id: int,
        processor: Processor,
        *,
        cbit: int,
        cpuid: Callable[[int], tuple[int, int, int, int]] = _no_cpuid,
        gpa_bits: int = 48,
        signature: int = 0,
        host_cpus: TimeSlices | None = None,
    ) -> None:
        self.vm = vm
        self.id = vcpu_id
        self.processor = processor
        self.cpuid = cpuid
        self.gpa_bits = gpa_bits
        self.run = KvmRun()
        self.run_area = self.run.memory
        self.registers = Registers(signature)
        self.measured = False
        """The VMSA was measured: the register state is protected."""
        self.mp_state: int = MpState.UNINITIALIZED if vcpu_id else MpState.RUNNABLE
        self.event: GhcbEvent | None = None
        """The event whose registers go back into its GHCB at the next entry: mapped until then."""
        self.registered_ghcb: int | None = None
        self._cbit = cbit
        self.mutex = threading.Lock()
        """One ioctl on the vCPU at a time."""
        self._pending: UserspaceWanted | None = None
        self._machine_code = processor if isinstance(processor, MachineCodeProcessor) else None
        self._host_cpus = host_cpus if self._machine_code is None else None
        self._vmsa_page: int | None = None
        self._load_due = False
        self.startup = Startup(self)
        self.msrs = Msrs(self)
        if vm.sev is not None:
            processor.ghcb_msr = self.sev_info()

    @property
    def vmsa_page(self) -> int | None:
        """System address of the VMSA page; machine code starts from its registers at the next entry."""
        return self._vmsa_page

    @vmsa_page.setter
    def vmsa_page(self, address: int | None) -> None:
        self._vmsa_page = address
        self._load_due = address is not None and self._machine_code is not None

    @property
    def waits(self) -> bool:
        """Whether KVM_RUN sleeps until the vCPU is started: one that runs machine code has its own thread."""
        return self._machine_code is not None

    def interrupt(self) -> None:
        """A signal to the thread that is in KVM_RUN, or will be next: it ends with -EINTR."""
        self.startup.disturb()
        if self._machine_code is not None:
            self._machine_code.interrupt()

    def sev_info(self) -> int:
        """GHCB MSR value at reset, and the reply to the SEV information request."""
        sev = self.vm.sev
        return msr_protocol.sev_info(sev.ghcb_version if sev is not None else 0, self._cbit)

    def answer_msr(self, request: int, reply: int) -> None:
        """Put the reply to a request of the MSR protocol into the GHCB MSR."""
        self.processor.ghcb_msr = reply
        if (emit := self.vm.trace.emit_exit) is not None:
            emit(trace.MsrProtocol(vm=self.vm.name, vcpu=self.id, request=request, reply=reply))

    def ioctl(self, request: int, arg: int | bytearray | memoryview) -> int:
        """An ioctl on the vCPU's descriptor: KVM_RUN, and what gets or sets its state.

        A second thread waits until the first one's ioctl is over.

        Args:
            request: KVM's number.
            arg: 0 for KVM_RUN; the structure's bytes otherwise.

        Returns:
            0 or -errno: -EIO for a VM that is dead, -ENOTTY for other requests.
        """
        if self.vm.bugged:
            return -errno.EIO
        with self.mutex:
            if request == _KVM_RUN:
                result = self._run(arg)
                if (emit := self.vm.trace.emit_exit) is not None:
                    reason = self.run.exit_reason
                    emit(trace.RunEnded(vm=self.vm.name, vcpu=self.id, result=result, exit_reason=reason))
                return result
            if request == Ioctl.KVM_GET_MP_STATE:
                return self._get_mp_state(arg)
            if request == Ioctl.KVM_SET_MP_STATE:
                return self._set_mp_state(arg)
            return self._registers_ioctl(request, arg)

    def _registers_ioctl(self, request: int, arg: int | bytearray | memoryview) -> int:
        """KVM_GET_REGS and its neighbours: -EINVAL once the state is protected."""
        kind = _REGISTERS.get(request)
        if kind is None:
            return -errno.ENOTTY
        if isinstance(arg, int) or len(arg) != kind.SIZE:
            return -errno.EFAULT
        if self.measured:
            return _EINVAL
        registers = self.registers
        match request:
            case Ioctl.KVM_GET_REGS:
                arg[:] = bytes(registers.get_regs())
            case Ioctl.KVM_SET_REGS:
                registers.set_regs(KvmRegs.parse(arg))
            case Ioctl.KVM_GET_SREGS:
                arg[:] = bytes(registers.get_sregs())
            case _:
                registers.set_sregs(KvmSregs.parse(arg))
        return 0

    def _get_mp_state(self, arg: int | bytearray | memoryview) -> int:
        if isinstance(arg, int) or len(arg) != KvmMpState.SIZE:
            return -errno.EFAULT
        arg[:] = self.mp_state.to_bytes(KvmMpState.SIZE, "little")
        return 0

    def _set_mp_state(self, arg: int | bytearray | memoryview) -> int:
        if isinstance(arg, int) or len(arg) != KvmMpState.SIZE:
            return -errno.EFAULT
        return self.startup.set_mp_state(KvmMpState.parse(arg).mp_state)

    # KVM_RUN

    def _run(self, arg: int | bytearray | memoryview) -> int:
        """KVM_RUN up to the run loop; the numbered steps are the kernel's."""
        vm, run = self.vm, self.run
        if arg != 0:
            return _EINVAL
        wants_to_run = not run.immediate_exit  # 1. once: what userspace writes later counts next time
        run.clear_flags()  # 2.
        if self.mp_state == MpState.UNINITIALIZED:  # 3.
            return self._wait_for_start(wants_to_run=wants_to_run)
        if synced := run.sync_regs():  # 4.
            allowed = 0 if vm.vm_type in _PROTECTED else _SYNC_REGS
            if synced & ~allowed:
                return _EINVAL
        if (cpus := self._host_cpus) is None:
            return self._on_a_processor(wants_to_run=wants_to_run)
        cpus.enter()
        try:
            return self._on_a_processor(wants_to_run=wants_to_run)
        finally:
            cpus.pause()

    def _on_a_processor(self, *, wants_to_run: bool) -> int:
        """What KVM_RUN does with a processor of the host's."""
        vm, run = self.vm, self.run
        if (pending := self._pending) is not None:  # 5. consumed even when it fails
            self._pending = None
            outcome = self._complete(pending)
            if not isinstance(outcome, GuestResumed):
                return self._leave(outcome)
        if not wants_to_run:  # 6. exit_reason still tells the exit before
            return -errno.EINTR
        if vm.sev is None and vm.vm_type in _NEEDS_INIT2:  # 7.
            return _EINVAL
        run.exit_reason = ExitReason.UNKNOWN  # 8.
        return self._loop()

    def _wait_for_start(self, *, wants_to_run: bool) -> int:
        """An AP that was never started sleeps; without a thread of its own it ends as if by a signal."""
        if not wants_to_run:
            return -errno.EINTR
        if self.waits:
            self.startup.sleep()
        if self.startup.wake():
            return -errno.EAGAIN
        self.run.exit_reason = ExitReason.INTR
        return -errno.EINTR

    def _complete(self, pending: UserspaceWanted) -> Outcome:
        run = self.run
        match pending:  # what a kernel's boot has thousands of comes first
            case AccessWanted(access=access):
                return self._complete_access(access)
            case MapGpaRange():
                ret = run.hypercall_ret()
                self._tell_completion(ExitReason.HYPERCALL, ret)
                return page_state.complete(self, pending, ret)
            case CertsWanted():
                ret = run.certs_ret(pending.layout)
                self._tell_completion(pending.layout.exit_reason, ret)
                return guest_request.complete(self, pending, ret)
            case HypercallWanted():
                ret = run.hypercall_ret()
                self._tell_completion(ExitReason.HYPERCALL, ret)
                return instructions.complete_hypercall(pending, ret)
            case PortIoWanted():
                self._tell_completion(ExitReason.IO, 0)
                return device_io.complete_port_io(self, pending)
            case MmioWanted():
                self._tell_completion(ExitReason.MMIO, 0)
                return device_io.complete_mmio(self, pending)
            case unreachable:
                assert_never(unreachable)

    def _complete_access(self, access: PortAccess | MmioAccess) -> Outcome:
        """Hand the processor what userspace read for it."""
        if self._machine_code is not None:
            run = self.run
            if isinstance(access, MmioAccess):
                self._machine_code.complete(run.mmio_data(access.size) if access.data is None else b"")
            else:
                self._machine_code.complete(run.pio_data(access.size * access.count) if access.read else b"")
        return RESUMED

    def _tell_completion(self, exit_reason: int, ret: int) -> None:
        if (emit := self.vm.trace.emit_exit) is not None:
            emit(trace.CompletionTaken(vm=self.vm.name, vcpu=self.id, exit_reason=exit_reason, ret=ret))

    def _loop(self) -> int:
        """Enter the guest until something leaves to userspace."""
        vm, processor, startup = self.vm, self.processor, self.startup
        while True:
            if vm.bugged:
                return -errno.EIO
            if startup.pending and (barred := startup.before_entry()) is not None:
                return self._leave(barred)
            if not self.measured and vm.vm_type in _PROTECTED:
                # UNVERIFIED: what VMRUN says of a VMSA that was never given to the firmware.
                return self._leave(EntryFailed(vm.profile.no_vmsa_reason))
            self.mp_state = _RUNNABLE
            if self.event is not None:
                self._reply(self.event)
            if self._load_due:
                self._load()
            guest_exit = processor.run()
            if self._machine_code is not None and (emit := vm.trace.emit_exit) is not None:
                rip = self._machine_code.rip
                emit(trace.GuestLeft(vm=vm.name, vcpu=self.id, rip=rip, exit=type(guest_exit).__name__))
            if not isinstance(guest_exit, Vmgexit):
                return self._leave(self._other_exit(guest_exit))
            outcome = vmgexit.handle(self)
            if not isinstance(outcome, GuestResumed):
                return self._leave(outcome)

    def _load(self) -> None:
        """Give the processor the registers of its VMSA page."""
        self._load_due = False
        if self._machine_code is not None and self._vmsa_page is not None:
            self._machine_code.load(self.vm.driver.memory.read(self._vmsa_page, _PAGE))

    def _reply(self, event: GhcbEvent) -> None:
        """Give the registers of the last event back, just before the guest goes on."""
        self.event = None
        event.write_back()
        if event.outside is not None:
            write_outside(self, *event.outside)
        if (emit := self.vm.trace.emit_exit) is not None:
            emit(
                trace.GuestReplied(
                    vm=self.vm.name,
                    vcpu=self.id,
                    info1=event.reply_info1,
                    info2=event.reply_info2,
                    rbx=event.rbx,
                )
            )

    def _other_exit(self, guest_exit: GuestExit) -> Departure:
        match guest_exit:
            case PortAccess() | MmioAccess():
                return AccessWanted(guest_exit)
            case Interrupted():
                return Kicked()
            case Halt():
                return GuestHalted()
            case NestedPageFault(gpa=gpa, private=private):
                return MemoryFault(gpa, private)
            case Shutdown(reason=reason):
                return GuestShutdown(reason)
            case ProcessorError(suberror=suberror, reason=reason):
                return InternalError(suberror, reason)
            case Vmgexit():
                raise AssertionError("handled by the loop")
            case unreachable:
                assert_never(unreachable)

    def _leave(self, outcome: Departure) -> int:
        """Fill `kvm_run` and give the ioctl's result."""
        run, profile = self.run, self.vm.profile
        match outcome:  # in the order of `_complete`
            case AccessWanted(access=access):
                self._pending = outcome
                self._put_access(access)
            case MapGpaRange(gpa=gpa, npages=npages, private=private, page_size=page_size):
                self._pending = outcome
                preset = profile.hypercall_ret_preset
                run.put_map_gpa_range(gpa, npages, private=private, page_size=page_size, preset_ret=preset)
            case CertsWanted():
                self._pending = outcome
                guest_request.put_certs_exit(self, outcome)
            case HypercallWanted(args=args):
                self._pending = outcome
                run.put_guest_hypercall(args, preset_ret=profile.hypercall_ret_preset)
            case PortIoWanted(read=read, size=size, port=port, count=count, data=data):
                self._pending = outcome
                run.put_port_io(read=read, size=size, port=port, count=count, data=data)
            case MmioWanted(gpa=gpa, write=write, buffer=buffer, length=length):
                self._pending = outcome
                run.put_mmio(gpa, length, bytes(buffer[:length]) if write else None)
            case Terminated(ghcb_msr=msr):
                run.put_termination(msr)
            case MemoryFault(gpa=gpa, private=private):
                run.put_memory_fault(gpa, private=private)
                return -errno.EFAULT
            case GuestHalted() | ResetHold() | WaitsForSipi() | Kicked():
                self.mp_state = _MP_STATE_AFTER.get(type(outcome), self.mp_state)
                run.exit_reason = ExitReason.INTR
                return -errno.EINTR
            case GuestShutdown(reason=reason):
                _logger.info("%s vCPU %d: shutdown: %s", self.vm.name, self.id, reason)
                run.exit_reason = ExitReason.SHUTDOWN
            case InternalError(suberror=suberror, reason=reason, data=numbers):
                _logger.error("%s vCPU %d: internal error %d: %s", self.vm.name, self.id, suberror, reason)
                run.put_internal_error(suberror, numbers)
            case EntryFailed(reason=reason):
                run.put_fail_entry(reason)
            case VmmErrno(errno=error):
                return error
            case unreachable:
                assert_never(unreachable)
        return 0

    def _put_access(self, access: PortAccess | MmioAccess) -> None:
        run = self.run
        if isinstance(access, MmioAccess):
            run.put_mmio(access.gpa, access.size, access.data)
            return
        run.put_port_io(
            read=access.read, size=access.size, port=access.port, count=access.count, data=access.data
        )
