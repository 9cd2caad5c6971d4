"""The host's KVM as this processor needs it: small enough that a test can stand in for it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import signal
from functools import cache
from typing import Final, Protocol

from swsnp.abi.kvm import Ioctl
from swsnp.errors import HostError

__all__ = ["DEVICE", "HostKvm", "LinuxKvm", "address_of", "checked_ioctl"]

DEVICE: Final = "/dev/kvm"
_KICK: Final = signal.SIGURG
"""Ignored by default: a process that never listened for it is not ended by it."""
_MREMAP_MAYMOVE: Final = 1
_MREMAP_FIXED: Final = 2
_INT_MAX: Final = (1 << 31) - 1
_KVM_RUN: Final = int(Ioctl.KVM_RUN)


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

    def interrupt(self, thread: int) -> None:
        """Make a thread of this process come out of KVM_RUN; its number is `threading.get_ident`'s."""
        ...

    def alias(self, source: int, size: int, target: int) -> None:
        """Show the pages at `source`, which are shareable, at `target` too, in place of what was there."""
        ...


@cache
def _libc() -> ctypes.CDLL:
    """The C library; loading it takes longer than a call."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
    return libc


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
        # From Python 3.14 on fcntl tries again after EINTR, by which KVM_RUN says that it was interrupted:
        # with IMMEDIATE_EXIT set it never comes back. And fcntl takes a C int only.
        if isinstance(argument, int) and (request == _KVM_RUN or argument > _INT_MAX):
            result = _libc().ioctl(fd, request, argument)
            if result < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            return int(result)
        return fcntl.ioctl(fd, request, argument)

    def map(self, fd: int, size: int) -> memoryview:
        """As `HostKvm`."""
        return memoryview(mmap.mmap(fd, size))

    def interrupt(self, thread: int) -> None:
        """As `HostKvm`; before `listen_for_interrupts` nothing happens, since the signal is ignored."""
        signal.pthread_kill(thread, _KICK)

    @staticmethod
    def listen_for_interrupts() -> None:
        """Let `interrupt` work; to be called in the main thread (Python's rule for signal handlers)."""
        signal.signal(_KICK, lambda *_: None)

    def alias(self, source: int, size: int, target: int) -> None:
        """As `HostKvm`: mremap(2) with an old size of 0 maps the same pages once more."""
        if _libc().mremap(source, 0, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, target) != target:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


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
