"""What running a guest needs of the rest of KVM, and of the processor: no more than is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping

    from swsnp.hardware import GuestExit, SystemMemory
    from swsnp.hypervisor.profiles import Profile
    from swsnp.hypervisor.psp_driver import DescriptorTable, DriverResult
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.trace import Trace

__all__ = [
    "FirmwareDriver",
    "HostMemory",
    "MachineCodeProcessor",
    "Processor",
    "SevContext",
    "VirtualMachine",
]


class Processor(Protocol):
    """What runs the guest's code for one vCPU."""

    ghcb_msr: int
    """MSR 0xC0010130; both sides write it."""

    def run(self) -> GuestExit:
        """Run guest code until it leaves, and say why."""
        ...


@runtime_checkable
class MachineCodeProcessor(Processor, Protocol):
    """A processor whose guest is machine code: it starts from a VMSA, touches devices, is interrupted."""

    @property
    def rip(self) -> int:
        """Where the guest was left."""
        ...

    def load(self, vmsa: bytes) -> None:
        """Take the registers of a VMSA page; the next `run` goes on from them."""
        ...

    def complete(self, data: bytes) -> None:
        """Give what was read to the access that the last `run` left with; nothing for a write."""
        ...

    def interrupt(self) -> None:
        """Make `run` return soon, this one or the next; any thread may ask."""
        ...


class HostMemory(Protocol):
    """Guest memory through the memslots' user mapping: the host's own accesses, in guest addresses.

    Every access raises BusError where no memslot is, or where the host may not write.
    """

    def host_read(self, gpa: int, size: int) -> bytes:
        """Copy `size` bytes out."""
        ...

    def host_write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` in."""
        ...

    def host_view(self, gpa: int, size: int) -> memoryview:
        """A writable window inside one page that stays good while the guest runs."""
        ...

    def host_page_address(self, gpa: int) -> int:
        """System address of the page that the mapping has at `gpa`."""
        ...

    def private_page_address(self, gpa: int) -> int:
        """System address of the guest_memfd page at `gpa`."""
        ...


class FirmwareDriver(Protocol):
    """The kernel's driver of the secure processor."""

    @property
    def memory(self) -> SystemMemory:
        """The machine's memory."""
        ...

    def issue_by_fd(self, task: DescriptorTable, fd: int, command: int, buffer: bytes) -> DriverResult:
        """Run a firmware command for a process that names an open /dev/sev."""
        ...

    def make_firmware(self, spa: int) -> int:
        """Put a page into the Firmware state: 0 or -errno."""
        ...

    def reclaim(self, spa: int) -> int:
        """Take a page back from the firmware and make it shared: 0 or -errno."""
        ...


class SevContext(Protocol):
    """What a VM has of SEV after KVM_SEV_INIT2; see `launch.SevState`."""

    @property
    def vmsa_features(self) -> int:
        """SEV features of every VMSA."""
        ...

    @property
    def ghcb_version(self) -> int:
        """Highest GHCB protocol offered."""
        ...

    @property
    def gctx(self) -> int | None:
        """System address of the guest context page."""
        ...

    @property
    def sev_fd(self) -> int:
        """Number of the descriptor of /dev/sev given at LAUNCH_START."""
        ...

    @property
    def request_page(self) -> int:
        """System address of the bounce page for requests."""
        ...

    @property
    def response_page(self) -> int:
        """System address of the bounce page for responses."""
        ...

    @property
    def request_mutex(self) -> threading.Lock:
        """Held over one guest request."""
        ...

    ap_jump_table: int
    """What the guest gave as its AP jump table."""


class VirtualMachine(Protocol):
    """What a vCPU needs of its VM; see `vm.Vm`."""

    @property
    def name(self) -> str:
        """For logs and trace events."""
        ...

    @property
    def profile(self) -> Profile:
        """Which KVM this is."""
        ...

    @property
    def memory(self) -> HostMemory:
        """The guest's memory."""
        ...

    @property
    def trace(self) -> Trace:
        """Where events go."""
        ...

    @property
    def driver(self) -> FirmwareDriver:
        """The way to the firmware."""
        ...

    @property
    def task(self) -> DescriptorTable:
        """The process that runs the VM."""
        ...

    @property
    def vm_type(self) -> int:
        """As given to KVM_CREATE_VM."""
        ...

    @property
    def bugged(self) -> bool:
        """The VM is dead."""
        ...

    @property
    def sev(self) -> SevContext | None:
        """None before KVM_SEV_INIT2."""
        ...

    @property
    def exit_hypercall_mask(self) -> int:
        """Hypercalls that userspace takes (KVM_CAP_EXIT_HYPERCALL)."""
        ...

    @property
    def coco_mask(self) -> int:
        """Exits that userspace takes (KVM_CAP_EXIT_COCO)."""
        ...

    @property
    def req_certs(self) -> bool:
        """Whether userspace takes certificate exits (KVM_SEV_SNP_ENABLE_REQ_CERTS)."""
        ...

    @property
    def vcpus(self) -> Mapping[int, Vcpu]:
        """All vCPUs by their ids."""
        ...
