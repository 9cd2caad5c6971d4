"""The host kernel as this VMM sees it, and the small calls that every part of the VMM makes on it.

Everything the VMM does goes through `HostKernel`: descriptors, KVM's own request numbers and structures, and
the process's memory. The VMM knows nothing else of the machine below it.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.kvm import Ioctl, KvmDeviceAttr, KvmEnableCap

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "HostKernel",
    "PAGE",
    "check_extension",
    "device_attribute",
    "enable_capability",
    "errno_name",
    "temporary",
]

PAGE: Final = 4096
_GROUP_SEV: Final = 1  # KVM_X86_GRP_SEV
_NAMES: Final = {133: "EHWPOISON", **errno.errorcode}  # which Python knows since 3.14 only


class HostKernel(Protocol):
    """One process of the host: a descriptor table and an address space. Results are >= 0 or -errno."""

    def open(self, path: str) -> int:
        """Open a device; a descriptor, or -ENOENT."""
        ...

    def close(self, fd: int) -> int:
        """0, or -EBADF."""
        ...

    def ioctl(self, fd: int, request: int, arg: int | bytearray | memoryview = 0) -> int:
        """A structure is a `bytearray` of exactly its size, written back where KVM writes it back."""
        ...

    def map_vcpu(self, fd: int) -> memoryview:
        """The 12,288 bytes shared with KVM that `struct kvm_run` starts."""
        ...

    def interrupt_vcpu(self, fd: int) -> None:
        """A signal to the thread that runs a vCPU: KVM_RUN, this one or the next, ends with -EINTR."""
        ...

    def allocate(self, size: int, *, passable: bool = False) -> int:
        """Memory of zeros, anonymous or (`passable`) a memfd's; its user address, page aligned."""
        ...

    def memfd_of(self, address: int) -> int | None:
        """What passes a mapping of `allocate` to another process; None for anonymous memory."""
        ...

    def free(self, address: int) -> None:
        """Give memory of `allocate` back."""
        ...

    def read(self, address: int, size: int) -> bytes:
        """The process's own memory; raises BusError."""
        ...

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """The process's own memory; raises BusError."""
        ...

    def discard(self, address: int, size: int) -> int:
        """MADV_DONTNEED: the range reads as zeros again."""
        ...

    def discard_memfd(self, fd: int, offset: int, size: int) -> int:
        """Punch a hole into a guest_memfd."""
        ...


def errno_name(result: int) -> str:
    """`-11` reads `-EAGAIN`."""
    return f"-{_NAMES.get(-result, str(-result))}"


@contextmanager
def temporary(host: HostKernel, size: int) -> Iterator[int]:
    """Memory for the length of one call: its user address, in whole pages of zeros."""
    address = host.allocate(-(-size // PAGE) * PAGE)
    try:
        yield address
    finally:
        host.free(address)


def check_extension(host: HostKernel, fd: int, capability: int) -> int:
    """KVM_CHECK_EXTENSION: 0 when absent, else the capability's value; never an error."""
    return max(0, host.ioctl(fd, Ioctl.KVM_CHECK_EXTENSION, capability))


def enable_capability(host: HostKernel, vm_fd: int, capability: int, value: int) -> int:
    """KVM_ENABLE_CAP with `args[0]`; 0 or -errno."""
    request = KvmEnableCap(cap=capability, args=(value, 0, 0, 0))
    return host.ioctl(vm_fd, Ioctl.KVM_ENABLE_CAP, bytearray(bytes(request)))


def device_attribute(host: HostKernel, kvm_fd: int, attribute: int) -> int | None:
    """An attribute of KVM_X86_GRP_SEV on the system descriptor; None when this kernel does not know it."""
    with temporary(host, 8) as address:
        wanted = KvmDeviceAttr(group=_GROUP_SEV, attr=attribute, addr=address)
        if host.ioctl(kvm_fd, Ioctl.KVM_HAS_DEVICE_ATTR, bytearray(bytes(wanted))) < 0:
            return None
        if host.ioctl(kvm_fd, Ioctl.KVM_GET_DEVICE_ATTR, bytearray(bytes(wanted))) < 0:
            return None
        return int.from_bytes(host.read(address, 8), "little")
