"""A launched VM with the built-in guest inside."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Self

from swsnp.abi.ghcb import PAGE
from swsnp.abi.sev_guest import (
    EXT_GUEST_DATA_MAX,
    SNP_GET_DERIVED_KEY,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    SnpDerivedKeyReq,
    SnpDerivedKeyResp,
    SnpExtReportReq,
    SnpGuestRequestIoctl,
    SnpReportReq,
    SnpReportResp,
)
from swsnp.abi.snp_message import MsgKeyRsp, MsgReportRspHeader
from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.abi.vmsa import SevFeatures, Vmsa
from swsnp.cpu.builtin import BuiltinProcessor
from swsnp.errors import UsageError
from swsnp.guest.boot import BootedGuest, boot, boot_ap, place_vmsa, resume, resume_ap, start_ap
from swsnp.guest.caller import BufferMemory
from swsnp.guest.driver import OWN_VMPL, SevGuestDriver
from swsnp.machine.answers import Answer, ExtendedReport, GuestMoved, GuestStopped, IoctlFailed
from swsnp.machine.built_in import built_in_image, built_in_layout
from swsnp.machine.guest_waits import GuestClock, GuestMutex
from swsnp.machine.move import SavedVm, save_memory
from swsnp.vmm.launch import launch
from swsnp.vmm.ram import Converted
from swsnp.vmm.stop import Idle

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from swsnp.abi.snp_report import Product
    from swsnp.guest.boot import GuestLayout
    from swsnp.guest.caller import CallerMemory
    from swsnp.guest.driver import Clock, DriverGeneration
    from swsnp.hardware.time_slices import TimeSlices
    from swsnp.hypervisor.memory import NestedPaging
    from swsnp.hypervisor.neighbours import Processor
    from swsnp.hypervisor.task import HostTask
    from swsnp.machine.move import GuestContexts
    from swsnp.trace import Trace
    from swsnp.vmm.config import LaunchImage, VmConfig

__all__ = ["VirtualMachine"]

_GONE: Final = -1
"""In place of an idle vCPU: there will be none any more."""
_EMPTY_PAGE: Final = bytes(PAGE)


class VirtualMachine:
    """A launched VM with the built-in guest inside; a context manager that ends it."""

    def __init__(
        self,
        task: HostTask,
        config: VmConfig,
        *,
        makers: dict[str, Callable[[NestedPaging, int], Processor]],
        dialect: str,
        trace: Trace,
        generation: DriverGeneration,
        clock: Clock,
        processors: TimeSlices,
        contexts: GuestContexts,
        product: Product,
        vmpck_id: int = OWN_VMPL,
        image: LaunchImage | None = None,
        layout: tuple[GuestLayout, tuple[int, ...]] | None = None,
    ) -> None:
        """Launch; `Machine.create_vm` and `Machine.restore_vm` call this.

        Args:
            task: the VMM's process.
            config: the VM.
            makers: where the machine looks up who makes a VM's processors, by the VM's name.
            dialect: which certificate exit the kernel has, by its profile's name.
            trace: where events go.
            generation: which sev-guest driver the guest has.
            clock: for the driver's pauses.
            processors: the host's, of which a vCPU has one while it runs.
            contexts: for `save` and `resume`.
            product: the machine's.
            vmpck_id: the driver's module parameter.
            image: what is launched; the built-in guest by default.
            layout: where the guest keeps its pages; see `built_in_layout`, the default.
        """
        self.config, self.name = config, config.name
        self.layout, self._vmsa_pages = layout or built_in_layout(config.vcpus)
        end = max(self.layout.ghcb_pages + self._vmsa_pages) + PAGE
        if end > config.memory_size:
            raise UsageError(
                f"memory size: got {config.memory_size:#x}, wanted at least {end:#x} for {config.vcpus} vCPUs"
            )
        self._trace, self._generation, self._vmpck_id = trace, generation, vmpck_id
        self._clock, self._processors = clock, processors
        self._contexts, self._product = contexts, product
        self._memory: NestedPaging | None = None
        self._saving = threading.Lock()
        self.vcpus: dict[int, BuiltinProcessor] = {}
        self.driver: SevGuestDriver | None = None
        self._idle: SimpleQueue[int] = SimpleQueue()
        with ExitStack() as undo:
            undo.callback(task.exit)
            makers[self.name] = self._make_processor
            undo.callback(makers.pop, self.name)
            image = built_in_image(self.layout) if image is None else image
            wanted = dialect if config.certs is not None else None
            self._running = launch(task, config, image, dialect=wanted, trace=trace)
            undo.callback(self._running.close)
            self._undo = undo.pop_all()

    def _make_processor(self, memory: NestedPaging, vcpu: int) -> Processor:
        self._memory = memory
        self.vcpus[vcpu] = processor = BuiltinProcessor(memory)
        return processor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the VM: its guest context is decommissioned and its memory given back. Again is allowed."""
        self._undo.close()

    # Running guest code

    def execute(self, vcpu: int, program: Generator[None, None, Any]) -> Any:
        """Run a guest program on one idle vCPU in this thread; what it returns.

        Raises:
            GuestStopped: the guest or the VM ended before the program did.
            UsageError: the vCPU is running something.
        """
        processor = self.vcpus[vcpu]
        processor.start(program)
        try:
            stop = self._running.run(vcpu)
            if not isinstance(stop, Idle) or processor.busy:
                raise GuestStopped(self.name, stop)
        except BaseException:
            processor.abandon()  # what the program held in the guest is let go, as if its thread had died
            raise
        return processor.result()

    def boot(self) -> BootedGuest:
        """Boot the guest: its first vCPU through the GHCB protocol, the others by AP creation.

        Raises:
            GuestStopped: the guest ended instead.
        """
        first = self.vcpus[0]
        guest: BootedGuest = self.execute(0, boot(first, self.layout))
        for vcpu, vmsa_gpa in enumerate(self._vmsa_pages, 1):
            self.execute(0, self._start_ap(guest, vcpu, vmsa_gpa))
            self.execute(vcpu, boot_ap(self.vcpus[vcpu], guest, vcpu=vcpu))
        self._bind(guest)
        return guest

    def _bind(self, guest: BootedGuest) -> None:
        """The guest's driver finds its device; from now on every vCPU takes requests."""
        self._guest = guest
        self.driver = SevGuestDriver(
            guest,
            vmpck_id=self._vmpck_id,
            generation=self._generation,
            clock=GuestClock(self._clock, self._processors),
            trace=self._trace,
            vm=self.name,
            mutex=GuestMutex(self._processors),
        )
        for vcpu in self.vcpus:
            self._idle.put(vcpu)

    def _start_ap(self, guest: BootedGuest, vcpu: int, vmsa_gpa: int) -> Generator[None, None, None]:
        first = self.vcpus[0]
        place_vmsa(first, vmsa_gpa, bytes(Vmsa(sev_features=SevFeatures.of(snp_active=1))))
        yield from start_ap(first, guest.ghcbs[0], vcpu, vmsa_gpa)

    # Moving

    def save(self) -> SavedVm:
        """Take the VM off this machine; it ends here.

        Requests that are running come to their end first, with this machine's certificates and signature: a
        certificate exit that waits is completed, and nothing of it is saved. Requests that wait for a vCPU
        are not begun: `GuestMoved`.

        Raises:
            UsageError: not booted, saved already, or its driver has lost its key and can attest no more.
        """
        if self.driver is None or self._memory is None:
            raise UsageError(f"{self.name}: not booted, wanted boot() before it is saved")
        if not self._saving.acquire(blocking=False):
            raise UsageError(f"{self.name}: saved already")
        taken: list[int] = []
        try:
            taken.extend(self._idle.get() for _ in self.vcpus)
            if not self.driver.usable:
                raise UsageError(f"{self.name}: its message key is wiped; boot it anew instead of moving it")
            saved = SavedVm(
                product=self._product,
                config=replace(self.config, certs=None),
                ghcb_version=self._guest.version,
                generation=self._generation,
                vmpck_id=self._vmpck_id,
                layout=(self.layout, self._vmsa_pages),
                memory=save_memory(self._memory),
                context=self._contexts.save(self._memory.asid),
            )
        except BaseException:
            for vcpu in taken:
                self._idle.put(vcpu)
            self._saving.release()
            raise
        self._idle.put(_GONE)
        self.close()
        return saved

    def resume(self, saved: SavedVm) -> BootedGuest:
        """Go on as a guest that was saved; `Machine.restore_vm` calls this on what was launched from it.

        Raises:
            GuestStopped: the guest ended instead, as one that does not find its protocol version.
            UsageError: the chip did not take the guest's context.
        """
        assert self._memory is not None  # noqa: S101  # set when the launch made vCPUs
        self._contexts.replace(self._memory.asid, saved.context)
        for gpa in saved.memory.private:
            self._running.write(gpa, _EMPTY_PAGE)  # the launch read it from there; the host must not
        for gpa, npages in saved.memory.shared_ranges:
            done = self._running.convert(gpa, npages, private=False)
            if not isinstance(done, Converted):
                raise UsageError(f"{self.name}: {npages} pages at {gpa:#x} cannot be shared here: {done}")
        for gpa, page in saved.memory.shared.items():
            self._running.write(gpa, page)
        guest: BootedGuest = self.execute(0, resume(self.vcpus[0], self.layout, version=saved.ghcb_version))
        for vcpu, vmsa_gpa in enumerate(self._vmsa_pages, 1):
            self.execute(0, start_ap(self.vcpus[0], guest.ghcbs[0], vcpu, vmsa_gpa))
            self.execute(vcpu, resume_ap(self.vcpus[vcpu], guest, vcpu=vcpu))
        self._bind(guest)
        return guest

    # The device

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        """An ioctl of /dev/sev-guest by a program in the guest, run on a vCPU that is idle.

        Args:
            command: the request number.
            argument: address of the program's 32-byte structure.
            caller: the program's memory.

        Returns:
            0, a positive value, or -errno; what else the driver says, it writes into the program's memory.

        Raises:
            UsageError: the guest is not booted.
            GuestStopped: the guest or its VM ended; the program gets no answer.
            GuestMoved: the VM was saved before the call was begun.
        """
        if self.driver is None:
            raise UsageError(f"{self.name}: not booted, wanted boot() before the first ioctl")
        vcpu = self._idle.get()
        if vcpu < 0:
            self._idle.put(vcpu)  # for the next who waits
            raise GuestMoved(self.name)
        try:
            return int(self.execute(vcpu, self.driver.ioctl(self.vcpus[vcpu], command, argument, caller)))
        finally:
            self._idle.put(vcpu)

    def report(self, report_data: bytes, *, vmpl: int = 0, rsvd: bytes = bytes(28)) -> Answer:
        """SNP_GET_REPORT.

        Args:
            report_data: 64 bytes, bound into the report.
            vmpl: privilege level to report.
            rsvd: the request's reserved bytes; KEY_SEL is among them.

        Raises:
            IoctlFailed: the driver refused.
        """
        request = SnpReportReq(user_data=report_data, vmpl=vmpl, rsvd=rsvd)
        return Answer(**_report_of(self._call(SNP_GET_REPORT, request, SnpReportResp.SIZE)))

    def extended_report(
        self,
        report_data: bytes,
        *,
        vmpl: int = 0,
        rsvd: bytes = bytes(28),
        certs_size: int = EXT_GUEST_DATA_MAX,
    ) -> ExtendedReport:
        """SNP_GET_EXT_REPORT with a certificate buffer of `certs_size` bytes; the rest as `report`.

        Raises:
            IoctlFailed: the driver refused; exitinfo2 0x100000000 says that the buffer is too small.
        """
        caller = BufferMemory()
        certs = bytearray(certs_size)
        address = caller.place(certs) if certs_size else 0
        request = SnpExtReportReq(
            user_data=report_data, vmpl=vmpl, rsvd=rsvd, certs_address=address, certs_len=certs_size
        )
        response = self._call(SNP_GET_EXT_REPORT, request, SnpReportResp.SIZE, caller)
        return ExtendedReport(certs=bytes(certs), **_report_of(response))

    def derived_key(self, request: SnpDerivedKeyReq, *, msg_version: int = 1) -> MsgKeyRsp:
        """SNP_GET_DERIVED_KEY; a status other than 0 comes with a key of zeros.

        Raises:
            IoctlFailed: the driver refused.
        """
        response = self._call(SNP_GET_DERIVED_KEY, request, SnpDerivedKeyResp.SIZE, msg_version=msg_version)
        return MsgKeyRsp.parse(response)

    def _call(
        self,
        command: int,
        request: SnpReportReq | SnpExtReportReq | SnpDerivedKeyReq,
        response_size: int,
        caller: BufferMemory | None = None,
        *,
        msg_version: int = 1,
    ) -> bytearray:
        caller = caller or BufferMemory()
        response = bytearray(response_size)
        argument = bytearray(
            bytes(
                SnpGuestRequestIoctl(
                    msg_version=msg_version,
                    req_data=caller.place(bytes(request)),
                    resp_data=caller.place(response),
                )
            )
        )
        result = self.ioctl(command, caller.place(argument), caller)
        if result:
            raise IoctlFailed(result, SnpGuestRequestIoctl.parse(argument).exitinfo2)
        return response


def _report_of(response: bytearray) -> dict[str, Any]:
    header = MsgReportRspHeader.parse_at(response, 0)
    start = MsgReportRspHeader.SIZE
    return {"status": header.status, "report": bytes(response[start : start + REPORT_SIZE])}
