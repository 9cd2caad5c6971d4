"""The host's KVM as this processor needs it: small enough that a test can stand in for it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Final, Protocol

from swsnp.errors import HostError

__all__ = ["DEVICE", "HostKvm", "LinuxKvm", "address_of", "checked_ioctl"]

DEVICE: Final = "/dev/kvm"


class HostKvm(Protocol):
    """Opening, asking and mapping; every failure is an OSError."""

    def open(self) -> int:
        """A new descriptor of the KVM device."""
        ...

    def close(self, fd: int) -> None:
        """Close a descriptor that `open` or an ioctl gave."""
        ...

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """Ask KVM; a `bytearray` is the structure, changed in place where KVM answers in it."""
        ...

    def map(self, fd: int, size: int) -> memoryview:
        """The first `size` bytes of a vCPU descriptor, shared with KVM."""
        ...


class LinuxKvm:
    """The real one."""

    def __init__(self, device: str = DEVICE) -> None:
        self._device = device

    def open(self) -> int:
        """As `HostKvm`."""
        return os.open(self._device, os.O_RDWR | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """As `HostKvm`."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """As `HostKvm`."""
        return fcntl.ioctl(fd, request, argument)

    def map(self, fd: int, size: int) -> memoryview:
        """As `HostKvm`."""
        return memoryview(mmap.mmap(fd, size))


def address_of(view: memoryview | bytearray) -> int:
    """Where in this process a writable buffer begins; the caller keeps the buffer alive."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def checked_ioctl(host: HostKvm, fd: int, request: int, argument: int | bytearray = 0) -> int:
    """An ioctl that has to work.

    Raises:
        HostError: KVM refused; the text names the request and the error.
    """
    try:
        return host.ioctl(fd, request, argument)
    except OSError as error:
        name, why = getattr(request, "name", hex(request)), error.strerror or error
        raise HostError(f"{DEVICE}: {name}: {why}; remedy: the kernel log (dmesg) may say why") from error
