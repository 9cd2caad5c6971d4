"""A vCPU of the host's KVM that runs real machine code of an SNP guest.

To hypervisor, VMM and firmware it is a processor as any other: the GHCB MSR, and why the guest was left.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from swsnp.abi.ghcb import GHCB_MSR, SEV_STATUS_MSR
from swsnp.abi.kvm import EXIT_UNION, ExitMmio, ExitReason, Ioctl, KvmMpState, MpState, RunOffset
from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
from swsnp.abi.record import Record
from swsnp.abi.vmsa import Vmsa
from swsnp.abi.vmsa_registers import regs_of, sregs_of
from swsnp.cpu.plain_kvm.exit_times import ExitTimes
from swsnp.cpu.plain_kvm.host import checked_ioctl
from swsnp.cpu.plain_kvm.ioctls import (
    SYNC_GENERAL_REGS,
    HostIoctl,
    InternalError,
    KvmExitInternalError,
    KvmExitMsr,
    KvmTranslation,
)
from swsnp.cpu.plain_kvm.rewrite import Site
from swsnp.cpu.plain_kvm.vcpu_state import vcpu_state
from swsnp.cpu.plain_kvm.vm import SYSCFG_MSR, set_memory_types
from swsnp.hardware.exits import (
    GuestAccessFault,
    GuestExit,
    Halt,
    Interrupted,
    MmioAccess,
    PortAccess,
    ProcessorError,
    Shutdown,
    Vmgexit,
)
from swsnp.hardware.rmp import PvalidateCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.cpu.plain_kvm.memory import GuestPhysicalMemory
    from swsnp.cpu.plain_kvm.vcpu_state import VcpuState
    from swsnp.cpu.plain_kvm.vm import HostVm

__all__ = ["PlainKvmProcessor", "Start"]

_R = TypeVar("_R", bound=Record)

_SEV_STATUS: Final = 7
"""SEV, SEV-ES and SNP active."""
_SYSCFG: Final = 1 << 23
"""MemEncryptionModEn."""
_FIXED_MSRS: Final = {SEV_STATUS_MSR: _SEV_STATUS, SYSCFG_MSR: _SYSCFG}
_EXIT_DATA: Final = EXIT_UNION + 8
_MSR_INDEX: Final = EXIT_UNION + KvmExitMsr.offset_of("index")
_MSR: Final = struct.Struct("<IQ")  # index, data
_OUT: Final = 1
_PAGE_2M: Final = 1
_KVM_RUN: Final = int(Ioctl.KVM_RUN)
_VMGEXIT, _PVALIDATE, _RMPADJUST = _SITE_PORTS = tuple(int(each) for each in Site)
_OUT_SIZE: Final = 2
_LEFT_BY_VMGEXIT: Final = Vmgexit()
_KVM_TRANSLATE: Final = HostIoctl.KVM_TRANSLATE
_TRANSLATED: Final = struct.Struct("<QB")  # physical_address, valid
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_IO: Final = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
_SYNC_REGS: Final = 304
"""Where `struct kvm_regs` lies in `kvm_run` when the host's KVM shares it."""
_RAX_RCX_RDX: Final = struct.Struct("<Q8xQQ")
_RIP: Final = _SYNC_REGS + KvmRegs.offset_of("rip")
_RFLAGS: Final = _SYNC_REGS + KvmRegs.offset_of("rflags")
_RIP_RFLAGS: Final = struct.Struct("<QQ")
_ERROR_BYTES: Final = 15

_CF, _PF, _AF, _ZF, _SF, _OF = (1 << bit for bit in (0, 2, 4, 6, 7, 11))
_STATUS_FLAGS: Final = _CF | _PF | _AF | _ZF | _SF | _OF
_IF: Final = 1 << 9


class Start(Protocol):
    """The registers with which a guest starts; `longmode.FlatStart` is one."""

    def regs(self) -> KvmRegs:
        """General registers."""
        ...

    def sregs(self, reset: KvmSregs, c_bit: int) -> KvmSregs:
        """System registers, from those after reset."""
        ...


class PlainKvmProcessor:
    """The real kind of processor.

    Args:
        vm: its guest on the host's KVM; closed when the vCPU cannot be made.
        memory: the guest's memory as the hypervisor hands it out.
        vcpu: its number, also its APIC id.
        start: registers at the first instruction; None: `load` gives them.

    Raises:
        HostError: the host cannot do it.

    Attributes:
        ghcb_msr: MSR 0xC0010130; guest code reaches it by RDMSR and WRMSR.
        entries: how often the host's KVM was asked to run the guest.
        times: what its exits cost.
        last_error: what the last `ProcessorError` said, for people.
    """

    def __init__(
        self, vm: HostVm, memory: GuestPhysicalMemory, *, vcpu: int = 0, start: Start | None = None
    ) -> None:
        self.ghcb_msr = 0
        self.entries = 0
        self.times: Final = ExitTimes()
        self.last_error = ""
        self._memory = memory
        self._host = vm.host
        self._vm = vm
        self._unfinished: Callable[[], None] | None = None
        self._answer: tuple[int, int] | None = None
        self._thread: int | None = None
        self._sites: dict[int, int] = {}
        self._translation = bytearray(KvmTranslation.SIZE)
        self._behind_out = 0
        self._interrupted = False
        self._is_ap = vcpu > 0
        self._exits: Final[dict[int, Callable[[], GuestExit | None]]] = {
            ExitReason.IO: self._io,
            ExitReason.HLT: Halt,
            ExitReason.MMIO: self._mmio,
            ExitReason.SHUTDOWN: lambda: Shutdown("triple fault"),
            ExitReason.INTERNAL_ERROR: self._internal_error,
            ExitReason.X86_RDMSR: self._rdmsr,
            ExitReason.X86_WRMSR: self._wrmsr,
        }
        try:
            self._vcpu, self._run = self._vm.create_vcpu(vcpu)
            self._shares_registers = self._vm.shares_registers()
            if self._shares_registers:
                _U64.pack_into(self._run, RunOffset.VALID_REGS, SYNC_GENERAL_REGS)
            if start is not None:
                reset = self._get(Ioctl.KVM_GET_SREGS, KvmSregs)
                self._set(Ioctl.KVM_SET_SREGS, start.sregs(reset, self._vm.c_bit))
                self._set(Ioctl.KVM_SET_REGS, start.regs())
        except BaseException:
            self._vm.close()
            raise

    def load(self, vmsa: bytes) -> None:
        """Start from a VMSA page: registers and page attribute table, memory types as firmware leaves them.

        Debug and floating-point registers, XCR0 and the rest stay as after reset.
        """
        state = Vmsa.parse(vmsa)
        reset = self._get(Ioctl.KVM_GET_SREGS, KvmSregs)
        self._set(Ioctl.KVM_SET_SREGS, sregs_of(state, reset))
        self._set(Ioctl.KVM_SET_REGS, regs_of(state))
        if self._vm.whole_kernel:
            set_memory_types(self._host, self._vcpu, state.g_pat)
            if self._is_ap:
                runnable = KvmMpState(mp_state=MpState.RUNNABLE)
                self._set(Ioctl.KVM_SET_MP_STATE, runnable)
        self._unfinished = self._answer = None

    @property
    def sites(self) -> dict[int, Site]:
        """What was rewritten where, by GPA; empty before the first run."""
        return dict(self._vm.rewrites.sites)

    def rewrite(self, code: range) -> int:
        """Rewrite code that appeared after the first run; see `HostVm.rewrite`."""
        return self._vm.rewrite(code)

    @property
    def rip(self) -> int:
        """Where the guest was left."""
        if self._shares_registers:
            rip: int = _U64.unpack_from(self._run, _RIP)[0]
            return rip
        return self.regs().rip

    def regs(self) -> KvmRegs:
        """The general registers, for people and tests."""
        return self._get(Ioctl.KVM_GET_REGS, KvmRegs)

    def state(self) -> VcpuState:
        """What it waits for, for people; HostError where the host's KVM has no local APIC for it."""
        return vcpu_state(self._host, self._vcpu)

    def close(self) -> None:
        """Give the host's descriptors back; the guest cannot run any more."""
        self._vm.close()

    def interrupt(self) -> None:
        """Make `run` return `Interrupted`, this one or the next."""
        self._interrupted = True
        self._run[RunOffset.IMMEDIATE_EXIT] = 1
        if (thread := self._thread) is not None:
            self._host.interrupt(thread)

    def complete(self, data: bytes) -> None:
        """Give the access that the last `run` left with what was read, if it was a read."""
        if self._answer is not None:
            offset, size = self._answer
            self._run[offset : offset + size] = data
            self._answer = None

    def run(self) -> GuestExit:
        """Run guest code until it leaves.

        An instruction that an access fault interrupted is tried again by the next `run`.

        Raises:
            HostError: the host's KVM refused what this processor needs beside running code.
        """
        self._vm.prepare()
        self._thread = threading.get_ident()
        try:
            while True:
                if self._unfinished is not None:
                    self._unfinished()
                    self._unfinished = None
                if (left := self._enter()) is not None:
                    return left
        except GuestAccessFault as fault:
            return fault.reason
        finally:
            self._thread = None

    def _enter(self) -> GuestExit | None:
        """One KVM_RUN; None when the guest can go on."""
        self.entries += 1
        times = self.times
        times.enter()
        try:
            self._host.ioctl(self._vcpu, _KVM_RUN)
        except InterruptedError:
            times.left(-1)
            self._run[RunOffset.IMMEDIATE_EXIT] = 0
            if self._interrupted:
                self._interrupted = False
                return Interrupted()
            return None
        except BlockingIOError:  # EAGAIN: an AP that has not been started yet, or was just woken
            times.left(-1)
            return None
        except OSError as error:
            times.left(-1)
            return self._error(0, f"KVM_RUN: {error.strerror or error}")
        reason = _U32.unpack_from(self._run, RunOffset.EXIT_REASON)[0]
        times.left(reason)
        handler = self._exits.get(reason)
        if handler is None:
            return self._error(InternalError.UNEXPECTED_EXIT_REASON, f"exit reason {reason}")
        return handler()

    # exits

    def _io(self) -> GuestExit | None:
        direction, size, port, count, offset = _IO.unpack_from(self._run, EXIT_UNION)
        if port in _SITE_PORTS and direction == _OUT and size == 1 and self._at_site(port):
            if port == _VMGEXIT:
                self.times.call_it("vmgexit")
                return _LEFT_BY_VMGEXIT
            if port == _PVALIDATE:
                self.times.call_it("pvalidate")
                self._unfinished = self._pvalidate
                return None
            self.times.call_it("rmpadjust")
            self._unfinished = self._rmpadjust
            return None
        length = size * count
        if direction == _OUT:
            data = bytes(self._run[offset : offset + length])
            return PortAccess(read=False, size=size, port=port, count=count, data=data)
        self._answer = offset, length
        return PortAccess(read=True, size=size, port=port, count=count)

    def _at_site(self, port: int) -> bool:
        """Whether the guest is at an instruction that was replaced by this OUT, and not at one of its own.

        KVM leaves RIP at the OUT or, where it emulates, behind it. What was found for a kernel's address is
        kept, since it means the same in every address space: one in its half, or a low one while interrupts
        are off, where kernels run before that half is mapped and programs never do.
        """
        if self._shares_registers:
            rip, rflags = _RIP_RFLAGS.unpack_from(self._run, _RIP)
        else:
            regs = self.regs()
            rip, rflags = regs.rip, regs.rflags
        kernels = rip >> 63 or not rflags & _IF
        if kernels and self._sites.get(rip) == port:
            return True
        for behind in (self._behind_out, _OUT_SIZE - self._behind_out):  # as the last time, else the other
            address = self._translate(rip - behind)
            if address is None or self._vm.rewrites.sites.get(self._vm.planes.split(address)[0]) != port:
                continue
            self._behind_out = behind
            if kernels:
                self._sites[rip] = port
            return True
        return False

    def _mmio(self) -> GuestExit | None:
        """An access where no slot is: a device's, or one for the memory's own check, which may allow it."""
        mmio = self._exit(ExitMmio)
        gpa, private = self._vm.planes.split(mmio.phys_addr)
        if not private and not self._vm.planes.is_memory(gpa):
            if mmio.is_write:
                return MmioAccess(gpa, mmio.len, mmio.data[: mmio.len])
            self._answer = _EXIT_DATA, mmio.len
            return MmioAccess(gpa, mmio.len)

        def access() -> None:
            if mmio.is_write:
                self._memory.write(gpa, mmio.data[: mmio.len], private=private)
            else:
                data = self._memory.read(gpa, mmio.len, private=private)
                self._run[_EXIT_DATA : _EXIT_DATA + mmio.len] = data

        self._unfinished = access
        return None

    def _rdmsr(self) -> None:
        index, _ = _MSR.unpack_from(self._run, _MSR_INDEX)
        value = self.ghcb_msr if index == GHCB_MSR else _FIXED_MSRS.get(index)
        self._run[EXIT_UNION] = value is None
        _MSR.pack_into(self._run, _MSR_INDEX, index, value or 0)

    def _wrmsr(self) -> None:
        index, value = _MSR.unpack_from(self._run, _MSR_INDEX)
        if index == GHCB_MSR:
            self.ghcb_msr = value
        self._run[EXIT_UNION] = index != GHCB_MSR  # SEV_STATUS is read-only: #GP

    def _internal_error(self) -> GuestExit:
        return self._error(self._exit(KvmExitInternalError).suberror, "KVM_EXIT_INTERNAL_ERROR")

    def _error(self, suberror: int, what: str) -> ProcessorError:
        """What happened, and where: RIP with the bytes there, as they were before rewriting."""
        rip = self.regs().rip
        self.last_error = f"{what}; RIP {rip:#x}: {self._code_at(rip)}"
        return ProcessorError(suberror, self.last_error)

    # the instructions of SNP

    def _pvalidate(self) -> None:
        """PVALIDATE: RAX is the linear address, ECX the page size, EDX[0] the new state."""
        rax, rcx, rdx = self._operands()
        size = rcx & 0xFFFFFFFF
        if size > _PAGE_2M:
            self._finish(PvalidateCode.FAIL_INPUT, carry=False)
            return
        gpa = self._page_of(rax, "PVALIDATE")
        self._finish(*self._memory.pvalidate(gpa, validate=bool(rdx & 1), page_size=size))

    def _rmpadjust(self) -> None:
        """RMPADJUST: RAX is the linear address, RCX the page size, RDX VMPL, permissions and VMSA bit."""
        rax, rcx, rdx = self._operands()
        size = rcx & 0xFFFFFFFF
        if size > _PAGE_2M:
            self._finish(PvalidateCode.FAIL_INPUT, carry=False)
            return
        code = self._memory.rmpadjust(
            self._page_of(rax, "RMPADJUST"),
            vmpl=rdx & 0xFF,
            permissions=rdx >> 8 & 0xFF,
            vmsa=bool(rdx >> 16 & 1),
            page_size=size,
        )
        self._finish(code, carry=False)  # UNVERIFIED: RMPADJUST clears CF

    def _operands(self) -> tuple[int, int, int]:
        """RAX, RCX and RDX."""
        if self._shares_registers:
            rax, rcx, rdx = _RAX_RCX_RDX.unpack_from(self._run, _SYNC_REGS)
            return rax, rcx, rdx
        regs = self.regs()
        return regs.rax, regs.rcx, regs.rdx

    def _finish(self, code: int, carry: bool) -> None:
        """Return code in EAX and the flags that follow from it; KVM itself steps over the OUT."""
        parity = _PF if (code & 0xFF).bit_count() % 2 == 0 else 0
        flags = parity | (0 if code else _ZF) | (_CF if carry else 0)
        if self._shares_registers:
            run = self._run
            _U64.pack_into(run, _SYNC_REGS, code)
            old = _U64.unpack_from(run, _RFLAGS)[0]
            _U64.pack_into(run, _RFLAGS, old & ~_STATUS_FLAGS | flags)
            _U64.pack_into(run, RunOffset.DIRTY_REGS, SYNC_GENERAL_REGS)
            return
        regs = self.regs()
        self._set(Ioctl.KVM_SET_REGS, regs.but(rax=code, rflags=regs.rflags & ~_STATUS_FLAGS | flags))

    def _page_of(self, linear: int, instruction: str) -> int:
        """GPA of the page at a linear address.

        Raises:
            GuestAccessFault: nothing is mapped there; hardware would raise #PF, which is not done yet.
        """
        found = self._translate(linear)
        if found is None:
            reason = self._error(InternalError.SIMUL_EX, f"{instruction} of {linear:#x}: not mapped")
            raise GuestAccessFault(reason)
        return self._vm.planes.split(found)[0] & ~0xFFF

    # the vCPU's state

    def _translate(self, linear: int) -> int | None:
        """The physical address, C-bit included, by the guest's own page tables."""
        argument = self._translation
        _U64.pack_into(argument, 0, linear)
        checked_ioctl(self._host, self._vcpu, _KVM_TRANSLATE, argument)
        physical, valid = _TRANSLATED.unpack_from(argument, 8)
        return physical if valid else None

    def _code_at(self, rip: int) -> str:
        address = self._translate(rip)
        if address is None:
            return "not mapped"
        part = next(self._vm.planes.windows(address, _ERROR_BYTES), None)
        if part is None:
            return "no memory there"
        gpa, _ = self._vm.planes.split(part[0])
        return self._vm.rewrites.original(bytes(part[1]), gpa).hex(" ")

    def _exit(self, kind: type[_R]) -> _R:
        return kind.parse_at(self._run, EXIT_UNION)

    def _get(self, request: Ioctl, kind: type[_R]) -> _R:
        argument = bytearray(kind.SIZE)
        checked_ioctl(self._host, self._vcpu, request, argument)
        return kind.parse(argument)

    def _set(self, request: Ioctl, state: Record) -> None:
        checked_ioctl(self._host, self._vcpu, request, bytearray(bytes(state)))
