"""A vCPU of the host's KVM that runs real machine code of an SNP guest.

To hypervisor, VMM and firmware it is a processor as any other: the GHCB MSR, and why the guest was left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from swsnp.abi.ghcb import GHCB_MSR, SEV_STATUS_MSR
from swsnp.abi.kvm import EXIT_UNION, ExitIo, ExitMmio, ExitReason, Ioctl, RunOffset
from swsnp.abi.record import Record
from swsnp.cpu.plain_kvm.host import LinuxKvm, checked_ioctl
from swsnp.cpu.plain_kvm.ioctls import (
    HostIoctl,
    InternalError,
    KvmExitInternalError,
    KvmExitMsr,
    KvmRegs,
    KvmSregs,
    KvmTranslation,
)
from swsnp.cpu.plain_kvm.rewrite import Site
from swsnp.cpu.plain_kvm.vm import SYSCFG_MSR, HostVm
from swsnp.hardware.exits import GuestAccessFault, GuestExit, Halt, ProcessorError, Shutdown, Vmgexit
from swsnp.hardware.rmp import PvalidateCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from swsnp.cpu.plain_kvm.host import HostKvm
    from swsnp.cpu.plain_kvm.memory import GuestPhysicalMemory

__all__ = ["PlainKvmProcessor", "Start"]

_R = TypeVar("_R", bound=Record)

_SEV_STATUS: Final = 7
"""SEV, SEV-ES and SNP active."""
_SYSCFG: Final = 1 << 23
"""MemEncryptionModEn."""
_EXIT_DATA: Final = EXIT_UNION + 8
_MSR_VALUE: Final = EXIT_UNION + 16
_OUT: Final = 1
_PAGE_4K: Final = 0
_PAGE_2M: Final = 1
_ERROR_BYTES: Final = 15

_CF, _PF, _AF, _ZF, _SF, _OF = (1 << bit for bit in (0, 2, 4, 6, 7, 11))
_STATUS_FLAGS: Final = _CF | _PF | _AF | _ZF | _SF | _OF


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
        memory: the guest's memory as the hypervisor hands it out.
        start: registers at the first instruction.
        executable: ranges of GPAs that hold code with VMGEXIT, PVALIDATE or RMPADJUST in it; private memory.
        host: the host's KVM.

    Raises:
        HostError: the host cannot do it.

    Attributes:
        ghcb_msr: MSR 0xC0010130; guest code reaches it by RDMSR and WRMSR.
    """

    def __init__(
        self,
        memory: GuestPhysicalMemory,
        *,
        start: Start,
        executable: Iterable[range] = (),
        host: HostKvm | None = None,
    ) -> None:
        self.ghcb_msr = 0
        self._memory = memory
        self._host = host if host is not None else LinuxKvm()
        self._vm = HostVm(self._host, memory, tuple(executable))
        self._unfinished: Callable[[], None] | None = None
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
            self._vcpu, self._run = self._vm.create_vcpu(0)
            reset = self._get(HostIoctl.KVM_GET_SREGS, KvmSregs)
            self._set(HostIoctl.KVM_SET_SREGS, start.sregs(reset, self._vm.c_bit))
            self._set(HostIoctl.KVM_SET_REGS, start.regs())
        except BaseException:
            self._vm.close()
            raise

    @property
    def sites(self) -> dict[int, Site]:
        """What was rewritten where, by GPA; empty before the first run."""
        return dict(self._vm.rewrites.sites)

    def rewrite(self, code: range) -> int:
        """Rewrite code that appeared after the first run; see `HostVm.rewrite`."""
        return self._vm.rewrite(code)

    def regs(self) -> KvmRegs:
        """The general registers, for people and tests."""
        return self._get(HostIoctl.KVM_GET_REGS, KvmRegs)

    def close(self) -> None:
        """Give the host's descriptors back; the guest cannot run any more."""
        self._vm.close()

    def run(self) -> GuestExit:
        """Run guest code until it leaves.

        An instruction that an access fault interrupted is tried again by the next `run`.

        Raises:
            HostError: the host's KVM refused what this processor needs beside running code.
        """
        self._vm.prepare()
        try:
            while True:
                if self._unfinished is not None:
                    self._unfinished()
                    self._unfinished = None
                if (left := self._enter()) is not None:
                    return left
        except GuestAccessFault as fault:
            return fault.reason

    def _enter(self) -> GuestExit | None:
        """One KVM_RUN; None when the guest can go on."""
        try:
            self._host.ioctl(self._vcpu, Ioctl.KVM_RUN)
        except InterruptedError:
            return None
        except OSError as error:
            return self._error(0, f"KVM_RUN: {error.strerror or error}")
        reason = int.from_bytes(self._run[RunOffset.EXIT_REASON : RunOffset.EXIT_REASON + 4], "little")
        handler = self._exits.get(reason)
        if handler is None:
            return self._error(InternalError.UNEXPECTED_EXIT_REASON, f"exit reason {reason}")
        return handler()

    # exits

    def _io(self) -> GuestExit | None:
        io = self._exit(ExitIo)
        if io.direction == _OUT and io.size == 1:
            if io.port == Site.VMGEXIT:
                return Vmgexit()
            if io.port == Site.PVALIDATE:
                self._unfinished = self._pvalidate
                return None
            if io.port == Site.RMPADJUST:
                self._unfinished = self._rmpadjust
                return None
        direction = "OUT to" if io.direction == _OUT else "IN from"
        return self._error(
            InternalError.UNEXPECTED_EXIT_REASON, f"{direction} port {io.port:#x}: no device answers"
        )

    def _mmio(self) -> None:
        """An access where no slot is: the memory's own check decides, and may allow it by now."""
        mmio = self._exit(ExitMmio)
        gpa, private = self._vm.planes.split(mmio.phys_addr)

        def access() -> None:
            if mmio.is_write:
                self._memory.write(gpa, mmio.data[: mmio.len], private=private)
            else:
                data = self._memory.read(gpa, mmio.len, private=private)
                self._run[_EXIT_DATA : _EXIT_DATA + mmio.len] = data

        self._unfinished = access

    def _rdmsr(self) -> None:
        msr = self._exit(KvmExitMsr)
        values = {GHCB_MSR: self.ghcb_msr, SEV_STATUS_MSR: _SEV_STATUS, SYSCFG_MSR: _SYSCFG}
        value = values.get(msr.index)
        self._run[EXIT_UNION] = value is None
        self._run[_MSR_VALUE : _MSR_VALUE + 8] = (value or 0).to_bytes(8, "little")

    def _wrmsr(self) -> None:
        msr = self._exit(KvmExitMsr)
        if msr.index == GHCB_MSR:
            self.ghcb_msr = msr.data
        self._run[EXIT_UNION] = msr.index != GHCB_MSR  # SEV_STATUS is read-only: #GP

    def _internal_error(self) -> GuestExit:
        return self._error(self._exit(KvmExitInternalError).suberror, "KVM_EXIT_INTERNAL_ERROR")

    def _error(self, suberror: int, what: str) -> ProcessorError:
        """What happened, and where: RIP with the bytes there, as they were before rewriting."""
        rip = self.regs().rip
        return ProcessorError(suberror, f"{what}; RIP {rip:#x}: {self._code_at(rip)}")

    # the instructions of SNP

    def _pvalidate(self) -> None:
        """PVALIDATE: RAX is the linear address, ECX the page size, EDX[0] the new state."""
        regs = self.regs()
        size = regs.rcx & 0xFFFFFFFF
        code, carry = (
            self._memory.pvalidate(self._page_of(regs.rax, "PVALIDATE"), validate=bool(regs.rdx & 1))
            if size == _PAGE_4K
            else (_refused_size(size), False)
        )
        self._finish(regs, code, carry=carry)

    def _rmpadjust(self) -> None:
        """RMPADJUST: RAX is the linear address, RCX the page size, RDX VMPL, permissions and VMSA bit."""
        regs = self.regs()
        size = regs.rcx & 0xFFFFFFFF
        code = (
            self._memory.rmpadjust(
                self._page_of(regs.rax, "RMPADJUST"),
                vmpl=regs.rdx & 0xFF,
                permissions=regs.rdx >> 8 & 0xFF,
                vmsa=bool(regs.rdx >> 16 & 1),
            )
            if size == _PAGE_4K
            else _refused_size(size)
        )
        self._finish(regs, code, carry=False)  # UNVERIFIED: RMPADJUST clears CF

    def _finish(self, regs: KvmRegs, code: int, *, carry: bool) -> None:
        """Return code in EAX and the flags that follow from it; KVM itself steps over the OUT."""
        parity = _PF if (code & 0xFF).bit_count() % 2 == 0 else 0
        flags = parity | (0 if code else _ZF) | (_CF if carry else 0)
        self._set(HostIoctl.KVM_SET_REGS, regs.but(rax=code, rflags=regs.rflags & ~_STATUS_FLAGS | flags))

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
        argument = bytearray(bytes(KvmTranslation(linear_address=linear)))
        checked_ioctl(self._host, self._vcpu, HostIoctl.KVM_TRANSLATE, argument)
        found = KvmTranslation.parse(argument)
        return found.physical_address if found.valid else None

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

    def _get(self, request: HostIoctl, kind: type[_R]) -> _R:
        argument = bytearray(kind.SIZE)
        checked_ioctl(self._host, self._vcpu, request, argument)
        return kind.parse(argument)

    def _set(self, request: HostIoctl, state: Record) -> None:
        checked_ioctl(self._host, self._vcpu, request, bytearray(bytes(state)))


def _refused_size(size: int) -> int:
    """The code for a page size other than 4 KiB: the guest's memory has RMP entries of 4 KiB only."""
    return PvalidateCode.FAIL_SIZEMISMATCH if size == _PAGE_2M else PvalidateCode.FAIL_INPUT
