"""What starts, holds and ends a vCPU: AP creation, INIT and SIPI, AP reset hold, KVM_SET_MP_STATE.

Source: AMD 56421 (GHCB 2.0), SNP AP creation and AP reset hold; Linux, arch/x86/kvm/svm/sev.c
(sev_snp_init_protected_guest_state, sev_vcpu_deliver_sipi_vector) and arch/x86/kvm/lapic.c
(kvm_apic_accept_events).
"""

from __future__ import annotations

import errno
import logging
import threading
from enum import Enum
from typing import TYPE_CHECKING, Final

from swsnp import trace
from swsnp.abi.ghcb import MsrCode
from swsnp.abi.kvm import MpState
from swsnp.hardware import BusError
from swsnp.hypervisor.outcomes import EntryFailed, GuestHalted, WaitsForSipi

if TYPE_CHECKING:
    from swsnp.hypervisor.ap_creation import NewVmsa
    from swsnp.hypervisor.outcomes import Departure
    from swsnp.hypervisor.vcpu import Vcpu

__all__ = ["Hold", "Startup"]

_logger = logging.getLogger(__name__)

_WOKEN: Final = 1
_STATES: Final = frozenset(int(each) for each in MpState)


class Hold(Enum):
    """How a vCPU asked to be held until a SIPI."""

    NONE = "not held"
    PAGE = "AP_HLT_LOOP event"
    MSR = "AP reset hold request in the MSR"


class Startup:
    """One vCPU's way into the guest. Other vCPUs' threads signal; its own thread takes what was signalled."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.pending = False
        """There is something to look at before the next entry."""
        self._vcpu = vcpu
        self._lock = threading.Lock()
        self._new_vmsa: NewVmsa | None = None
        self._init = self._sipi = False
        self._had_first_sipi = False
        self._hold = Hold.NONE
        self._without_vmsa = False
        self._alarm = threading.Event()

    # Signals

    def disturb(self) -> None:
        """Wake the vCPU's thread if it sleeps, or keep it from falling asleep the next time."""
        self._alarm.set()

    def sleep(self) -> None:
        """Wait until something was signalled, or the thread was disturbed."""
        self._alarm.wait()
        self._alarm.clear()

    def ask_new_vmsa(self, new: NewVmsa) -> None:
        """Run from another VMSA page from the next entry on, or from the next INIT on."""
        with self._lock:
            self._new_vmsa = new
            self.pending = True
        self._alarm.set()

    def signal_init(self) -> None:
        """INIT: the vCPU waits for a SIPI; a VMSA that was created on INIT is taken."""
        with self._lock:
            self._init = True
            self.pending = True
        self._alarm.set()

    def signal_sipi(self) -> None:
        """Start-up: a vCPU that waits for it becomes runnable; the vector is the guest's own business."""
        with self._lock:
            self._sipi = True
            self.pending = True
        self._alarm.set()

    def hold(self, how: Hold) -> None:
        """The guest asked to be held: the reply says 0 unless a SIPI comes before the next entry."""
        with self._lock:
            self._hold = how
            self.pending = True

    def set_mp_state(self, state: int) -> int:
        """KVM_SET_MP_STATE: 0, or -EINVAL for a state that there is not."""
        if state not in _STATES:
            return -errno.EINVAL
        with self._lock:
            if state == MpState.SIPI_RECEIVED:
                self._sipi = True
            self.pending = True
        self._vcpu.mp_state = MpState.INIT_RECEIVED if state == MpState.SIPI_RECEIVED else state
        return 0

    # Before an entry

    def wake(self) -> bool:
        """What an uninitialized vCPU wakes up for: whether anything came."""
        if not self.pending:
            return False
        before = self._vcpu.mp_state
        self._take_new_vmsa(init=False)
        self._accept_signals()
        return self._vcpu.mp_state != before

    def before_entry(self) -> Departure | None:
        """Take what was signalled, then say why the guest cannot be entered, or None."""
        vcpu = self._vcpu
        self._take_new_vmsa(init=False)
        self._accept_signals()
        if vcpu.mp_state == MpState.INIT_RECEIVED:
            return WaitsForSipi()
        if self._without_vmsa:
            if vcpu.mp_state != MpState.RUNNABLE:
                return GuestHalted()
            return EntryFailed(vcpu.vm.profile.no_vmsa_reason)
        with self._lock:
            self._hold = Hold.NONE
            new = self._new_vmsa
            self.pending = self._init or self._sipi or (new is not None and not new.on_init)
        return None

    def _accept_signals(self) -> None:
        vcpu = self._vcpu
        with self._lock:
            init, sipi = self._init, self._sipi
            self._init = self._sipi = False
        if init:
            self._take_new_vmsa(init=True)
            vcpu.mp_state = MpState.INIT_RECEIVED if vcpu.id else MpState.RUNNABLE
        if sipi and vcpu.mp_state == MpState.INIT_RECEIVED:
            self._deliver_sipi()
            vcpu.mp_state = MpState.RUNNABLE

    def _deliver_sipi(self) -> None:
        """The first SIPI starts the vCPU as the VMM set it up; later ones are the reply to a hold."""
        vcpu = self._vcpu
        if not self._had_first_sipi:
            self._had_first_sipi = True
        elif self._hold is Hold.PAGE and vcpu.event is not None:
            vcpu.event.answer(_WOKEN)
        elif self._hold is Hold.MSR:
            vcpu.answer_msr(vcpu.processor.ghcb_msr, _WOKEN << 12 | MsrCode.AP_RESET_HOLD_RESP)

    def _take_new_vmsa(self, *, init: bool) -> None:
        with self._lock:
            new = self._new_vmsa
            if new is None or (new.on_init and not init):
                return
            self._new_vmsa = None
        self._use_vmsa(new)

    def _use_vmsa(self, new: NewVmsa) -> None:
        """Run from another VMSA page; without one the vCPU is offline."""
        vcpu = self._vcpu
        vcpu.mp_state, vcpu.vmsa_page, self._without_vmsa = MpState.HALTED, None, True
        if new.gpa is None:
            return
        try:
            vcpu.vmsa_page = vcpu.vm.memory.private_page_address(new.gpa)
        except BusError:
            _logger.warning("%s vCPU %d: no private page for a VMSA at %#x", vcpu.vm.name, vcpu.id, new.gpa)
            return
        vcpu.mp_state, self._without_vmsa = MpState.RUNNABLE, False
        if (emit := vcpu.vm.trace.emit) is not None:
            emit(trace.ApStarted(vm=vcpu.vm.name, vcpu=vcpu.id, vmsa_gpa=new.gpa))
