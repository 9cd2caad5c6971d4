"""One vCPU's run loop: KVM_RUN, and what its exits ask of a VMM.

`exit_reason` is looked at only when KVM_RUN returned 0, or -EFAULT for KVM_EXIT_MEMORY_FAULT; after any other
result it still shows an earlier exit.

Source: Linux, Documentation/virt/kvm/api.rst, "The kvm_run structure".
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.ghcb import MsrCode, TerminateRequest
from swsnp.abi.kvm import (
    EXIT_UNION,
    MAP_GPA_RANGE,
    ExitMemoryFault,
    ExitMmio,
    ExitReason,
    ExitSystemEvent,
    Ioctl,
    MapGpaRange,
    MemoryAttribute,
    MpState,
    RunOffset,
    SystemEvent,
)
from swsnp.vmm.dialect import NO_CERT_EXIT
from swsnp.vmm.host import PAGE, errno_name
from swsnp.vmm.ram import Broken, Converted, Refused
from swsnp.vmm.stop import (
    EntryFailed,
    GuestShutdown,
    Idle,
    InternalError,
    PowerSwitch,
    RunFailed,
    StopReason,
    Terminated,
    UnhandledExit,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.vmm.certs import CertificateService
    from swsnp.vmm.ram import Conversion

__all__ = ["ConvertibleMemory", "IoBus", "VcpuHost", "VcpuRunner"]

_INTERRUPTED: Final = -errno.EINTR
_GO_ON: Final = (_INTERRUPTED, -errno.EAGAIN)
_FAULT: Final = -errno.EFAULT
_RUN: Final = int(Ioctl.KVM_RUN)
_GET_MP_STATE: Final = int(Ioctl.KVM_GET_MP_STATE)
_IMMEDIATE_EXIT: Final = int(RunOffset.IMMEDIATE_EXIT)
_EXIT_REASON: Final = int(RunOffset.EXIT_REASON)
_RUNNABLE: Final = int(MpState.RUNNABLE)
_IDLE: Final = Idle(MpState.HALTED)
_EXIT_NAMES: Final = {int(each): each.name for each in ExitReason}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_FAIL_ENTRY: Final = struct.Struct("<QI")  # hardware_entry_failure_reason, cpu
_INTERNAL: Final = struct.Struct("<II16Q")  # suberror, ndata, data
_MSR_CODE_MASK: Final = 0xFFF
_ENCRYPTED: Final = int(MapGpaRange.ENCRYPTED)
_HYPERCALL: Final = struct.Struct("<QQQQ")  # nr, args[0..2]
_PORT: Final = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
_MMIO: Final = struct.Struct("<Q8sIB")  # phys_addr, data, len, is_write
_MMIO_DATA: Final = EXIT_UNION + ExitMmio.offset_of("data")

# What an operator looks at first, by errno of KVM_RUN
_HINTS: Final = {
    errno.EBADF: "the descriptor of /dev/sev given at launch is closed or is another file now",
    errno.EBUSY: "the secure processor was given up after an earlier timeout",
    errno.ETIMEDOUT: "the secure processor did not answer",
    errno.ENODEV: "there is no secure processor",
    errno.EIO: "the VM is dead, or a request page has no memory behind it",
    errno.EINVAL: "the VM was not launched, or KVM refused a completion",
    errno.EFAULT: "the guest touched memory that is not there",
}


class IoBus(Protocol):
    """The devices of a VM; `size` is 1, 2 or 4 bytes at a port, up to 8 in memory."""

    def port_in(self, port: int, size: int) -> int:
        """Read a port."""
        ...

    def port_out(self, port: int, size: int, value: int) -> None:
        """Write a port."""
        ...

    def memory_read(self, gpa: int, size: int) -> int:
        """Read a device's memory."""
        ...

    def memory_write(self, gpa: int, size: int, value: int) -> None:
        """Write a device's memory."""
        ...


class VcpuHost(Protocol):
    """What a run loop asks of the host; see `host.HostKernel`."""

    def ioctl(self, fd: int, request: int, arg: int | bytearray | memoryview = 0) -> int:
        """A result, or -errno."""
        ...

    def interrupt_vcpu(self, fd: int) -> None:
        """KVM_RUN, this one or the next, ends with -EINTR."""
        ...


class ConvertibleMemory(Protocol):
    """The guest's memory; see `ram.GuestRam`."""

    def convert(self, gpa: int, npages: int, *, private: bool) -> Conversion:
        """Give pages the state that the guest assumes."""
        ...


class VcpuRunner:
    """Runs one vCPU until there is something to tell.

    Args:
        host: the host kernel.
        vcpu: the vCPU's id.
        fd: its descriptor.
        run_area: its mapping; `struct kvm_run` is at the start.
        ram: the VM's memory.
        certificates: answers certificate exits; None when the exit was not enabled.
        bus: the devices; None: there are none, and KVM_EXIT_IO and KVM_EXIT_MMIO end the run.
        power: what devices switch the VM off with.
    """

    def __init__(
        self,
        host: VcpuHost,
        *,
        vcpu: int,
        fd: int,
        run_area: memoryview,
        ram: ConvertibleMemory,
        certificates: CertificateService | None,
        bus: IoBus | None = None,
        power: PowerSwitch | None = None,
    ) -> None:
        self.vcpu = vcpu
        self._host, self._power = host, power or PowerSwitch()
        self._leave = False
        self._ioctl, self._fd, self._run, self._ram = host.ioctl, fd, run_area, ram
        self._certificates = certificates
        dialect = NO_CERT_EXIT if certificates is None else certificates.dialect
        self._certificate_exit, self._asks_for_certificates = dialect.exit_reason, dialect.is_request
        self._mp_state = bytearray(4)
        self._exits: dict[int, Callable[[], StopReason | None]] = {
            ExitReason.HYPERCALL: self._hypercall,
            ExitReason.SYSTEM_EVENT: self._system_event,
            ExitReason.SHUTDOWN: GuestShutdown,
            ExitReason.FAIL_ENTRY: self._fail_entry,
            ExitReason.INTERNAL_ERROR: self._internal_error,
        }
        if bus is not None:
            self._bus = bus
            self._exits |= {ExitReason.IO: self._port, ExitReason.MMIO: self._mmio}

    def interrupt(self) -> None:
        """Make `run` come back with `Idle`, until `resume`; any thread may ask."""
        self._leave = True
        self._run[_IMMEDIATE_EXIT] = 1
        self._host.interrupt_vcpu(self._fd)

    def resume(self) -> None:
        """Let `run` run again after `interrupt`."""
        self._leave = False

    def run(self) -> StopReason:
        """Run guest code until the guest is idle, ended, or cannot go on."""
        ioctl, fd = self._ioctl, self._fd
        while True:
            result = ioctl(fd, _RUN, 0)
            if result in _GO_ON:
                stop = self._interrupted()
            elif result == 0:
                stop = self._dispatch()
            else:
                stop = self._error(result)
            if stop is not None:
                return stop

    def _interrupted(self) -> StopReason | None:
        self._run[_IMMEDIATE_EXIT] = 0
        result = self._ioctl(self._fd, _GET_MP_STATE, self._mp_state)
        if result < 0:
            return RunFailed(-result, f"KVM_GET_MP_STATE: {errno_name(result)}")
        (state,) = _U32.unpack(self._mp_state)
        if state == _RUNNABLE and not self._leave:
            return None
        return _IDLE if state == MpState.HALTED else Idle(state)

    def _dispatch(self) -> StopReason | None:
        """Handle the exit that KVM_RUN reported with 0, and those that completions report in turn."""
        result = 0
        while result == 0:
            reason = self._exit_reason()
            if reason == self._certificate_exit and self._asks_for_certificates(self._run):
                result = self._serve_certificates()
            else:
                handler = self._exits.get(reason)
                return self._unhandled(reason) if handler is None else handler()
        return None if result == _INTERRUPTED else self._failed(result)

    def _exit_reason(self) -> int:
        reason: int = _U32.unpack_from(self._run, _EXIT_REASON)[0]
        return reason

    # --- certificates ---------------------------------------------------------------------------------------

    def _serve_certificates(self) -> int:
        """Answer the exit, and keep the blob until the firmware was asked.

        With `immediate_exit` set KVM completes the exit, which sends the guest's message to the firmware, and
        returns before any guest code runs. The blob is released after that call whatever it returned.

        Returns:
            -EINTR to go on with the guest, 0 when KVM_RUN reported another exit, or KVM_RUN's error.
        """
        assert self._certificates is not None  # noqa: S101  # asked for just before
        blob = self._certificates.answer(self._run, self.vcpu)
        if blob is None:
            return _INTERRUPTED  # an error: the firmware is not called, the next KVM_RUN tells the guest
        try:
            self._run[_IMMEDIATE_EXIT] = 1
            return self._ioctl(self._fd, _RUN, 0)
        finally:
            self._run[_IMMEDIATE_EXIT] = 0
            blob.release()

    # --- page states ----------------------------------------------------------------------------------------

    def _hypercall(self) -> StopReason | None:
        """KVM_HC_MAP_GPA_RANGE. KVM takes `hypercall.ret` as a positive number: 0, EINVAL or EAGAIN."""
        number, gpa, npages, attributes = _HYPERCALL.unpack_from(self._run, EXIT_UNION)
        if number != MAP_GPA_RANGE:
            return UnhandledExit(ExitReason.HYPERCALL, f"hypercall {number}, wanted {MAP_GPA_RANGE}")
        private = bool(attributes & _ENCRYPTED)
        match self._ram.convert(gpa, npages, private=private):
            case Converted():
                answer = 0
            case Refused(errno=error):
                answer = error
            case Broken(errno=error, step=step):
                return RunFailed(error, f"page state change of {npages} pages at {gpa:#x}: {step}")
        _U64.pack_into(self._run, RunOffset.HYPERCALL_RET, answer)
        return None

    def _memory_fault(self) -> StopReason | None:
        """An access that did not match the page's state: give the page the state that the guest assumes."""
        fault = ExitMemoryFault.parse_at(self._run, EXIT_UNION)
        if fault.flags & ~MemoryAttribute.PRIVATE:
            return RunFailed(errno.EFAULT, f"memory fault at {fault.gpa:#x}: unknown flags {fault.flags:#x}")
        private = bool(fault.flags & MemoryAttribute.PRIVATE)
        kind = "private" if private else "shared"
        where = f"{kind} access to {fault.size} bytes at {fault.gpa:#x}"
        if fault.size % PAGE:
            return RunFailed(errno.EFAULT, f"{where}: size is not in pages")
        match self._ram.convert(fault.gpa, fault.size // PAGE, private=private):
            case Converted(in_memory=True):
                return None
            case Converted() | Refused(errno=errno.EINVAL):
                return RunFailed(errno.EFAULT, f"{where}: no memory there")  # would fault again for ever
            case Refused():
                return None
            case Broken(errno=number, step=step):
                return RunFailed(number, f"{where}: {step}")

    # --- devices --------------------------------------------------------------------------------------------

    def _port(self) -> StopReason | None:
        direction, size, port, count, offset = _PORT.unpack_from(self._run, EXIT_UNION)
        run, bus = self._run, self._bus
        for at in range(offset, offset + size * count, size):
            if direction:
                bus.port_out(port, size, int.from_bytes(run[at : at + size], "little"))
            else:
                run[at : at + size] = bus.port_in(port, size).to_bytes(size, "little")
        return self._power.pressed

    def _mmio(self) -> StopReason | None:
        gpa, data, length, is_write = _MMIO.unpack_from(self._run, EXIT_UNION)
        if is_write:
            self._bus.memory_write(gpa, length, int.from_bytes(data[:length], "little"))
        else:
            value = self._bus.memory_read(gpa, length)
            self._run[_MMIO_DATA : _MMIO_DATA + length] = value.to_bytes(length, "little")
        return self._power.pressed

    # --- the end --------------------------------------------------------------------------------------------

    def _system_event(self) -> StopReason:
        event = ExitSystemEvent.parse_at(self._run, EXIT_UNION)
        if event.type != SystemEvent.SEV_TERM:
            return UnhandledExit(ExitReason.SYSTEM_EVENT, f"event type {event.type}, data {event.data[0]:#x}")
        if event.ndata < 1:
            return UnhandledExit(ExitReason.SYSTEM_EVENT, "SEV_TERM without the GHCB MSR")
        return self._terminated(event.data[0])

    @staticmethod
    def _terminated(ghcb_msr: int) -> Terminated:
        """Decode a termination by MSR; one by TERM_REQUEST leaves its reason to KVM's log only.

        The event's exit info 1 cannot be read back: KVM writes its reply's zeros over it before it looks at
        the event (arch/x86/kvm/svm/sev.c, sev_handle_vmgexit).
        """
        if ghcb_msr & _MSR_CODE_MASK != MsrCode.TERM_REQ:
            return Terminated(None, None, ghcb_msr)
        word = TerminateRequest(ghcb_msr)
        return Terminated(word.reason_set, word.reason_code, ghcb_msr)

    def _fail_entry(self) -> StopReason:
        return EntryFailed(*_FAIL_ENTRY.unpack_from(self._run, EXIT_UNION))

    def _internal_error(self) -> StopReason:
        suberror, ndata, *data = _INTERNAL.unpack_from(self._run, EXIT_UNION)
        return InternalError(suberror, tuple(data[:ndata]))

    def _unhandled(self, reason: int) -> StopReason:
        return UnhandledExit(reason, f"exit {reason} ({_EXIT_NAMES.get(reason, 'unknown to this VMM')})")

    def _error(self, result: int) -> StopReason | None:
        if result == _FAULT and self._exit_reason() == ExitReason.MEMORY_FAULT:
            return self._memory_fault()
        return self._failed(result)

    def _failed(self, result: int) -> StopReason:
        hint = _HINTS.get(-result)
        return RunFailed(-result, f"KVM_RUN: {errno_name(result)}" + (f": {hint}" if hint else ""))
