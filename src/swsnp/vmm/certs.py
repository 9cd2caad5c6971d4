"""Certificates for guests: where they come from, and the answer to one certificate exit.

A source hands out the blob together with what keeps it valid (for a file, its lock). The run loop keeps that
until the firmware has signed, so that an updater who respects the lock cannot change the key between the two.
The blob is opaque: its bytes go to the guest as they are.

Source: GHCB 2.0, "SNP Extended Guest Request"; Linux, Documentation/virt/kvm/api.rst, KVM_EXIT_SNP_REQ_CERTS.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from swsnp.certs.ofd_lock import RETRY_S, exclusive_lock, same_file, try_lock, unlock_and_close
from swsnp.hardware.memory import BusError
from swsnp.trace import CertsRead
from swsnp.vmm.host import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.trace import Trace
    from swsnp.vmm.dialect import Dialect
    from swsnp.vmm.ram import GuestRam

__all__ = [
    "Acquired",
    "Blob",
    "BlobFile",
    "BytesSource",
    "CallableSource",
    "CertificateService",
    "CertificateSource",
    "Failed",
    "Retry",
    "TooLarge",
    "exclusive_lock",
    "pages_for",
]

_logger = logging.getLogger(__name__)
DEFAULT_TIMEOUT_S: Final = 0.1
"""QEMU's default of `certs-timeout`."""


def pages_for(size: int) -> int:
    """Pages that `size` bytes need; 0 for none."""
    return -(-size // PAGE)


def _nothing_held() -> None:
    """Release of a blob that holds no lock."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Certificates, valid until `release` is called; call it exactly once."""

    data: bytes = field(repr=False)
    release: Callable[[], None] = field(default=_nothing_held, repr=False)


@dataclass(frozen=True, slots=True)
class TooLarge:
    """There are certificates, `size` bytes of them, but the guest offered less room. Nothing is held."""

    size: int


@dataclass(frozen=True, slots=True)
class Retry:
    """Not now: an updater holds the file. Nothing is held."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no certificates until an operator acts. Nothing is held."""

    reason: str


Acquired: TypeAlias = Blob | TooLarge | Retry | Failed


class CertificateSource(Protocol):
    """Where one VM's certificates come from. vCPUs call it at the same time; it keeps nothing per request."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    def acquire(self, room: int, *, least_wait_s: float = 0.0) -> Acquired:
        """Look for certificates.

        Args:
            room: bytes that the guest offers.
            least_wait_s: keep trying at least this long before `Retry`, whatever the source's own patience.
        """
        ...


class BlobFile:
    """A file in the GHCB's table format, read afresh for every request under a shared lock.

    Args:
        path: a regular file; symbolic links are followed.
        timeout_s: how long a request waits while an updater holds the file.
        sleep: how to wait.
        monotonic: the clock that `timeout_s` is measured with.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        self.timeout_s = timeout_s
        self._sleep, self._monotonic = sleep, monotonic

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def acquire(self, room: int, *, least_wait_s: float = 0.0) -> Acquired:
        """Open, lock and read the file; see `CertificateSource.acquire`.

        An attempt starts over when an updater holds the lock, or the path names another file by the time the
        lock is ours, or the file shrinks under the lock; all of it within the deadline.
        """
        deadline = self._monotonic() + max(self.timeout_s, least_wait_s)
        while isinstance(attempt := self._attempt(room), Retry):
            left = deadline - self._monotonic()
            if left <= 0:
                break
            self._sleep(min(RETRY_S, left))
        return attempt

    def _attempt(self, room: int) -> Acquired:
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its other end
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            return Failed(f"{self.path}: cannot be opened: {error.strerror}")
        attempt: Acquired = Failed(f"{self.path}: not looked at")
        try:
            attempt = self._locked_content(fd, room)
        except OSError as error:
            attempt = Failed(f"{self.path}: cannot be locked and read: {error.strerror}")
        finally:
            if not isinstance(attempt, Blob):
                os.close(fd)
        return attempt

    def _locked_content(self, fd: int, room: int) -> Acquired:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return Failed(f"{self.path}: not a regular file")
        if not try_lock(fd, fcntl.F_RDLCK):
            return Retry(f"{self.path}: locked by an updater")
        if not same_file(fd, self.path):
            return Retry(f"{self.path}: replaced while it was being locked")
        size = os.fstat(fd).st_size
        if size > room:
            return TooLarge(size)
        data = _read_exactly(fd, size)
        if len(data) < size:
            return Retry(f"{self.path}: shrank from {size} to {len(data)} bytes under the lock")
        return Blob(data, partial(unlock_and_close, fd))


def _read_exactly(fd: int, size: int) -> bytes:
    """`size` bytes from the file's start; fewer only where the file ends."""
    data = os.pread(fd, size, 0)
    while len(data) < size and (more := os.pread(fd, size - len(data), len(data))):
        data += more
    return data


class CallableSource:
    """Certificates from a Python callable; an exception, or anything but bytes, is a failure."""

    def __init__(self, function: Callable[[], bytes], *, name: str = "callable") -> None:
        self._function = function
        self.name = name

    def acquire(self, room: int, *, least_wait_s: float = 0.0) -> Acquired:
        """Call it once; see `CertificateSource.acquire`. There is nothing to wait for."""
        del least_wait_s
        try:
            data = self._function()
        except Exception as error:  # whatever a caller's code raises, the guest has to be answered
            _logger.debug("certificate callable %s failed", self.name, exc_info=True)
            return Failed(f"{self.name}: {type(error).__name__}: {error}")
        if not isinstance(data, bytes | bytearray | memoryview):
            return Failed(f"{self.name}: got {type(data).__name__}, wanted bytes")
        return TooLarge(len(data)) if len(data) > room else Blob(bytes(data))


class BytesSource:
    """The same certificates for every request; 24 zero bytes are an empty table."""

    def __init__(self, data: bytes, *, name: str = "bytes") -> None:
        self._blob = Blob(bytes(data))
        self.name = name

    def acquire(self, room: int, *, least_wait_s: float = 0.0) -> Acquired:
        """See `CertificateSource.acquire`. There is nothing to wait for."""
        del least_wait_s
        size = len(self._blob.data)
        return TooLarge(size) if size > room else self._blob


class CertificateService:
    """Answers the certificate exits of one VM, in its kernel's dialect; nothing is kept between requests.

    Args:
        source: where the certificates come from.
        dialect: how this kernel speaks; one that has an exit.
        ram: the VM's memory.
        vm: the VM's name, for the trace.
        trace: where `CertsRead` goes.
    """

    def __init__(
        self, source: CertificateSource, dialect: Dialect, ram: GuestRam, *, vm: str, trace: Trace
    ) -> None:
        self.dialect = dialect
        self._source, self._ram, self._vm, self._trace = source, ram, vm, trace
        self._last_trouble = ""

    def answer(self, run: memoryview, vcpu: int) -> Blob | None:
        """Put the answer to a certificate exit into `kvm_run`.

        Returns:
            The blob that was written to the guest: hold it until KVM_RUN has returned, then release it. None
            when the answer is an error, for which the firmware is not called.
        """
        gpa, npages = self.dialect.request(run)
        found = self._source.acquire(npages * PAGE, least_wait_s=self.dialect.least_wait_s)
        if not isinstance(found, Blob):
            self._tell(run, vcpu, found)
            return None
        try:
            delivered = self._deliver(found, gpa)
            self._tell(run, vcpu, delivered)
        except BaseException:
            found.release()
            raise
        if isinstance(delivered, Blob):
            return delivered
        found.release()
        return None

    def _tell(self, run: memoryview, vcpu: int, found: Acquired) -> None:
        """Put the answer into `kvm_run`, and into the trace."""
        size, ret = self._put(run, found)
        if (emit := self._trace.emit) is not None:
            _, shown = self.dialect.request(run)
            source = self._source.name
            emit(CertsRead(vm=self._vm, vcpu=vcpu, source=source, size=size, npages=shown, ret=ret))

    def _deliver(self, blob: Blob, gpa: int) -> Blob | Failed:
        try:
            self._ram.write(gpa, blob.data)
        except BusError as error:
            return Failed(f"certificate buffer: {error}")
        return blob

    def _put(self, run: memoryview, found: Acquired) -> tuple[int, int]:
        """Write `ret` (and `npages`); the blob's size and the `ret` written."""
        match found:
            case Blob(data=data):
                self.dialect.put_result(run, 0)
                return len(data), 0
            case TooLarge(size=size) if self.dialect.put_needed(run, pages_for(size)):
                return size, self.dialect.too_small
            case TooLarge(size=size):
                return size, self._refuse(run, f"{size} bytes of certificates do not fit any npages")
            case Retry(reason=reason) if self.dialect.retry is not None:
                self.dialect.put_result(run, self.dialect.retry)
                return 0, self.dialect.retry
            case Retry(reason=reason) | Failed(reason=reason):
                return 0, self._refuse(run, reason)

    def _refuse(self, run: memoryview, reason: str) -> int:
        # A guest can ask as often as it likes: the same trouble is told once
        if reason != self._last_trouble:
            self._last_trouble = reason
            _logger.warning("%s: no certificates for the guest: %s", self._vm, reason)
        self.dialect.put_result(run, self.dialect.failure)
        return self.dialect.failure
