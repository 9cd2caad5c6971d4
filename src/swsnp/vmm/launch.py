"""Create, measure and launch a VM through KVM's SNP interface; the order is QEMU's.

1. open /dev/kvm and the SEV device; the kernel must offer SNP virtual machines
2. KVM_CREATE_VM, KVM_SEV_INIT2
3. KVM_ENABLE_CAP of KVM_CAP_EXIT_HYPERCALL, so that page state changes reach the VMM
4. the certificate exit, if the VM has certificates: upstream wants that before the first vCPU
5. KVM_SEV_SNP_LAUNCH_START
6. memory: shared mapping, guest_memfd, slot, and the private attribute on all of it
7. vCPUs, and the registers that they start with where they are not those after reset
8. KVM_SEV_SNP_LAUNCH_UPDATE for every page of the image, until nothing is left
9. KVM_SEV_SNP_LAUNCH_FINISH

Source: Linux, Documentation/virt/kvm/x86/amd-memory-encryption.rst.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Self, TypeVar

from swsnp.abi.kvm import (
    MAP_GPA_RANGE,
    Capability,
    Ioctl,
    KvmCreateGuestMemfd,
    KvmSevCmd,
    KvmSevInit,
    KvmSevSnpLaunchFinish,
    KvmSevSnpLaunchStart,
    KvmSevSnpLaunchUpdate,
    SevCommand,
    VmType,
)
from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
from swsnp.abi.record import Record
from swsnp.abi.snp_command import FirmwareStatus, PageType
from swsnp.abi.snp_launch import IdAuth
from swsnp.abi.snp_report import GuestPolicy
from swsnp.errors import UsageError
from swsnp.trace import Trace
from swsnp.vmm.certs import CertificateService
from swsnp.vmm.config import LaunchImage, LaunchPage, VmConfig, memory_map
from swsnp.vmm.dialect import NO_CERT_EXIT, Dialect, EnableBy, named, probe
from swsnp.vmm.host import PAGE, check_extension, enable_capability, temporary
from swsnp.vmm.launch_error import LaunchError
from swsnp.vmm.ram import GuestRam, RamSlot
from swsnp.vmm.run import VcpuRunner
from swsnp.vmm.threads import run_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swsnp.vmm.host import HostKernel
    from swsnp.vmm.ram import Conversion
    from swsnp.vmm.run import IoBus
    from swsnp.vmm.stop import PowerSwitch, StopReason

__all__ = ["LaunchError", "LaunchImage", "LaunchPage", "RunningVm", "VmConfig", "launch"]

_EIP_LOW: Final = 0xFFFF
_R = TypeVar("_R", bound=Record)
_EXIT_MAP_GPA_RANGE: Final = 1 << MAP_GPA_RANGE
_SET_ALL: Final = (Ioctl.KVM_SET_REGS, Ioctl.KVM_SET_SREGS)
_NO_PROGRESS_LIMIT: Final = 100


class RunningVm:
    """A launched VM. Each vCPU may have a thread of its own; one vCPU runs in one thread at a time."""

    def __init__(
        self, name: str, ram: GuestRam, runners: Sequence[VcpuRunner], dialect: Dialect, resources: ExitStack
    ) -> None:
        self.name = name
        self.dialect = dialect
        self._ram, self._runners, self._resources = ram, tuple(runners), resources

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def vcpus(self) -> int:
        """Number of vCPUs; 0 after `close`."""
        return len(self._runners)

    @property
    def ram(self) -> GuestRam:
        """The VM's memory, for devices."""
        return self._ram

    def interrupt(self, vcpu: int) -> None:
        """Make a vCPU's run loop look up: its KVM_RUN, this one or the next, ends. Any thread may ask."""
        self._runners[vcpu].interrupt()

    def run(self, vcpu: int = 0) -> StopReason:
        """Run a vCPU until its guest is idle, ended, or cannot go on.

        Raises:
            UsageError: no such vCPU, or the VM is closed.
        """
        if not 0 <= vcpu < len(self._runners):
            raise UsageError(f"{self.name}: vCPU {vcpu}, wanted one of {len(self._runners)} from 0")
        return self._runners[vcpu].run()

    def run_all(self, timeout_s: float | None = None) -> StopReason:
        """Run every vCPU in a thread of its own until the VM has come to an end; see `threads.run_all`."""
        return run_all(self._runners, timeout_s)

    def read(self, gpa: int, size: int) -> bytes:
        """Guest memory's shared side; BusError where there is none."""
        return self._ram.read(gpa, size)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Guest memory's shared side; BusError where there is none."""
        self._ram.write(gpa, data)

    def forget(self, gpa: int, size: int) -> None:
        """Throw away the shared side of pages that were launched from there; BusError as `read`."""
        self._ram.discard(gpa, size)

    def convert(self, gpa: int, npages: int, *, private: bool) -> Conversion:
        """Give pages the state that their guest assumes, as after a move; see `GuestRam.convert`."""
        return self._ram.convert(gpa, npages, private=private)

    def close(self) -> None:
        """Close every descriptor and give the memory back; no vCPU may be running. Again is allowed."""
        self._runners = ()
        self._resources.close()


def launch(
    host: HostKernel,
    config: VmConfig,
    image: LaunchImage,
    *,
    dialect: Dialect | str | None = None,
    trace: Trace | None = None,
    bus: IoBus | None = None,
    power: PowerSwitch | None = None,
) -> RunningVm:
    """Launch a VM; see the module's text for the steps.

    Args:
        host: the host kernel, as this process sees it.
        config: the VM.
        image: what is measured into it, in order.
        dialect: the kernel's certificate exit, or the kernel profile's name; None asks the kernel
            (`dialect.probe`).
        trace: where events go.
        bus: the devices; without any, an access to one ends the run.
        power: what devices switch the VM off with.

    Raises:
        LaunchError: a step failed. Nothing stays open.
        UsageError: an image that does not fit the memory, or an unknown dialect.
    """
    chosen = named(dialect) if isinstance(dialect, str) else dialect
    with ExitStack() as resources:
        steps = _Launch(host, config, chosen, trace or Trace(), resources)
        steps.bus, steps.power = bus, power
        return steps.run(image)


class _Launch:
    """The steps, with what they share."""

    def __init__(
        self, host: HostKernel, config: VmConfig, dialect: Dialect | None, trace: Trace, resources: ExitStack
    ) -> None:
        self._host, self._config, self._dialect, self._trace = host, config, dialect, trace
        self._resources = resources
        self._kvm_fd = self._vm_fd = self._sev_fd = -1
        self.bus: IoBus | None = None
        self.power: PowerSwitch | None = None

    def run(self, image: LaunchImage) -> RunningVm:
        areas = memory_map(self._config.memory_size, image)
        self._create_vm()
        self._sev(SevCommand.SEV_INIT2, bytes(KvmSevInit(vmsa_features=self._config.vmsa_features)))
        result = enable_capability(self._host, self._vm_fd, Capability.EXIT_HYPERCALL, _EXIT_MAP_GPA_RANGE)
        _check("KVM_ENABLE_CAP(EXIT_HYPERCALL)", result)
        dialect = self._enable_certificates()
        start = KvmSevSnpLaunchStart(policy=GuestPolicy(self._config.policy), gosvw=self._config.gosvw)
        self._sev(SevCommand.SNP_LAUNCH_START, bytes(start))
        ram = self._add_memory(areas)
        runners = self._create_vcpus(ram, dialect)
        for page in image:
            self._update(ram, page)
        self._finish()
        return RunningVm(self._config.name, ram, runners, dialect, self._resources.pop_all())

    # --- the VM ---------------------------------------------------------------------------------------------

    def _create_vm(self) -> None:
        self._kvm_fd = self._open("/dev/kvm")
        if not check_extension(self._host, self._kvm_fd, Capability.VM_TYPES) >> VmType.SNP & 1:
            raise LaunchError(
                "KVM_CHECK_EXTENSION(VM_TYPES)", 0, detail="this host offers no SNP virtual machines"
            )
        self._sev_fd = self._open(self._config.sev_device)
        vm_fd = self._host.ioctl(self._kvm_fd, Ioctl.KVM_CREATE_VM, VmType.SNP)
        self._vm_fd = self._keep("KVM_CREATE_VM", vm_fd)

    def _open(self, path: str) -> int:
        return self._keep(f"open {path}", self._host.open(path))

    def _keep(self, command: str, fd: int) -> int:
        """A new descriptor, closed with the VM."""
        _check(command, fd)
        self._resources.callback(self._host.close, fd)
        return fd

    def _enable_certificates(self) -> Dialect:
        """Switch the certificate exit on if this VM has certificates; the dialect that is then spoken."""
        if self._config.certs is None:
            return NO_CERT_EXIT
        dialect = self._dialect or probe(self._host, self._kvm_fd)
        match dialect.enable_by:
            case EnableBy.COMMAND:
                self._sev(SevCommand.SNP_ENABLE_REQ_CERTS)
            case EnableBy.CAPABILITY:
                self._enable_coco()
            case EnableBy.NOTHING:
                raise LaunchError("certificate exit", 0, detail=self._no_certificate_exit())
        return dialect

    def _enable_coco(self) -> None:
        step = "KVM_ENABLE_CAP(EXIT_COCO)"
        if not check_extension(self._host, self._vm_fd, Capability.EXIT_COCO) & 1:
            raise LaunchError(
                step, 0, detail="KVM_CHECK_EXTENSION(237) does not offer KVM_EXIT_COCO_REQ_CERTS"
            )
        _check(step, enable_capability(self._host, self._vm_fd, Capability.EXIT_COCO, 1))

    def _no_certificate_exit(self) -> str:
        text = (
            "the VM has certificates, but this kernel has no certificate exit; start it without certificates"
        )
        if self._dialect is None and check_extension(self._host, self._kvm_fd, Capability.EXIT_COCO):
            text += ", or, if the kernel is built from the June 2024 series, with dialect coco-v1 "
            text += "(capability 237 answers, but in other kernels it is X86_APIC_BUS_CYCLES_NS)"
        return text

    # --- memory and vCPUs -----------------------------------------------------------------------------------

    def _add_memory(self, areas: tuple[tuple[int, int], ...]) -> GuestRam:
        slots = tuple(self._add_slot(number, gpa, size) for number, (gpa, size) in enumerate(areas))
        ram = GuestRam(self._host, self._vm_fd, slots, self._config.name, self._trace)
        for slot in slots:
            _check("KVM_SET_MEMORY_ATTRIBUTES", ram.set_private(slot.gpa, slot.size, private=True))
        return ram

    def _add_slot(self, number: int, gpa: int, size: int) -> RamSlot:
        address = self._host.allocate(size, passable=self._config.passable_memory)
        self._resources.callback(self._host.free, address)
        wanted = bytearray(bytes(KvmCreateGuestMemfd(size=size)))
        memfd = self._host.ioctl(self._vm_fd, Ioctl.KVM_CREATE_GUEST_MEMFD, wanted)
        self._keep("KVM_CREATE_GUEST_MEMFD", memfd)
        slot = RamSlot(gpa=gpa, size=size, address=address, memfd=memfd)
        region = bytearray(bytes(slot.region(number)))
        result = self._host.ioctl(self._vm_fd, Ioctl.KVM_SET_USER_MEMORY_REGION2, region)
        _check("KVM_SET_USER_MEMORY_REGION2", result)
        return slot

    def _create_vcpus(self, ram: GuestRam, dialect: Dialect) -> list[VcpuRunner]:
        service = None
        if self._config.certs is not None:
            service = CertificateService(
                self._config.certs, dialect, ram, vm=self._config.name, trace=self._trace
            )
        return [self._create_vcpu(vcpu, ram, service) for vcpu in range(self._config.vcpus)]

    def _create_vcpu(self, vcpu: int, ram: GuestRam, service: CertificateService | None) -> VcpuRunner:
        fd = self._keep("KVM_CREATE_VCPU", self._host.ioctl(self._vm_fd, Ioctl.KVM_CREATE_VCPU, vcpu))
        self._set_registers(vcpu, fd)
        area = self._host.map_vcpu(fd)
        self._resources.callback(area.release)
        return VcpuRunner(
            self._host,
            vcpu=vcpu,
            fd=fd,
            run_area=area,
            ram=ram,
            certificates=service,
            bus=self.bus,
            power=self.power,
        )

    def _set_registers(self, vcpu: int, fd: int) -> None:
        """RDX at reset, and the start of application processors, as QEMU sets both before the launch ends.

        The boot processor of a direct boot starts with registers of its own.
        """
        if vcpu == 0 and self._config.start is not None:
            for request, state in zip(_SET_ALL, self._config.start, strict=True):
                _check(request.name, self._host.ioctl(fd, request, bytearray(bytes(state))))
            return
        signature, eip = self._config.cpu_signature, self._config.ap_reset_eip if vcpu else None
        if signature is None and eip is None:
            return
        regs = self._get(fd, Ioctl.KVM_GET_REGS, KvmRegs)
        if signature is not None:
            regs = regs.but(rdx=signature)
        if eip is not None:
            sregs = self._get(fd, Ioctl.KVM_GET_SREGS, KvmSregs)
            sregs = sregs.but(cs=sregs.cs.but(base=eip & ~_EIP_LOW))
            _check("KVM_SET_SREGS", self._host.ioctl(fd, Ioctl.KVM_SET_SREGS, bytearray(bytes(sregs))))
            regs = regs.but(rip=eip & _EIP_LOW)
        _check("KVM_SET_REGS", self._host.ioctl(fd, Ioctl.KVM_SET_REGS, bytearray(bytes(regs))))

    def _get(self, fd: int, request: Ioctl, kind: type[_R]) -> _R:
        buffer = bytearray(kind.SIZE)
        _check(request.name, self._host.ioctl(fd, request, buffer))
        return kind.parse(buffer)

    # --- measuring ------------------------------------------------------------------------------------------

    def _update(self, ram: GuestRam, page: LaunchPage) -> None:
        """LAUNCH_UPDATE until nothing is left: KVM may do part of the range and say 0."""
        uaddr = ram.user_address(page.gpa, len(page.data))
        if page.type is not PageType.ZERO:
            ram.write(page.gpa, page.data)
        todo = KvmSevSnpLaunchUpdate(
            gfn_start=page.gpa // PAGE, uaddr=uaddr, len=len(page.data), type=page.type
        )
        idle_calls = 0
        while todo.len:
            result, status, left = self._try_sev(SevCommand.SNP_LAUNCH_UPDATE, bytes(todo))
            if result < 0 and result != -errno.EAGAIN:
                raise self._update_error(page, result, status, todo.uaddr)
            done, todo = todo, KvmSevSnpLaunchUpdate.parse(left)
            idle_calls = idle_calls + 1 if todo.len == done.len else 0
            if idle_calls > _NO_PROGRESS_LIMIT:
                detail = f"no progress at {todo.gfn_start * PAGE:#x} in {idle_calls} calls"
                raise LaunchError("SNP_LAUNCH_UPDATE", result, status, detail=detail)
        if todo.gfn_start * PAGE != page.end:
            detail = f"ended at gpa {todo.gfn_start * PAGE:#x}, wanted {page.end:#x}"
            raise LaunchError("SNP_LAUNCH_UPDATE", 0, detail=detail)

    def _update_error(self, page: LaunchPage, result: int, status: int, uaddr: int) -> LaunchError:
        corrected = None
        if page.type is PageType.CPUID and status == FirmwareStatus.INVALID_PARAM:
            corrected = self._host.read(uaddr, PAGE)  # KVM puts the firmware's own values there
        return LaunchError("SNP_LAUNCH_UPDATE", result, status, corrected=corrected)

    def _finish(self) -> None:
        config = self._config
        with temporary(self._host, PAGE) as id_block, temporary(self._host, IdAuth.SIZE) as id_auth:
            self._host.write(id_block, config.id_block or b"")
            self._host.write(id_auth, config.id_auth or b"")  # KVM reads the whole page; the rest is zero
            finish = KvmSevSnpLaunchFinish(
                id_block_uaddr=id_block if config.id_block is not None else 0,
                id_auth_uaddr=id_auth if config.id_auth is not None else 0,
                id_block_en=config.id_block is not None,
                auth_key_en=config.author_key_enabled,
                vcek_disabled=config.vcek_disabled,
                host_data=config.host_data,
            )
            self._sev(SevCommand.SNP_LAUNCH_FINISH, bytes(finish))

    def _sev(self, command: SevCommand, payload: bytes = b"") -> None:
        result, status, _ = self._try_sev(command, payload)
        _check(command.name, result, status)

    def _try_sev(self, command: SevCommand, payload: bytes) -> tuple[int, int, bytes]:
        """KVM_MEMORY_ENCRYPT_OP: result of the ioctl, firmware status, and the payload as KVM left it."""
        with temporary(self._host, max(len(payload), 1)) as address:
            self._host.write(address, payload)
            data = address if payload else 0
            envelope = bytearray(bytes(KvmSevCmd(id=command, data=data, sev_fd=self._sev_fd)))
            result = self._host.ioctl(self._vm_fd, Ioctl.KVM_MEMORY_ENCRYPT_OP, envelope)
            return result, KvmSevCmd.parse(envelope).error, self._host.read(address, len(payload))


def _check(command: str, result: int, firmware_status: int = 0) -> None:
    if result < 0:
        raise LaunchError(command, result, firmware_status)
