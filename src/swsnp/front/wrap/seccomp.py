"""Seccomp user notification: install a filter, take notifications, answer them.

Source: Linux, include/uapi/linux/seccomp.h, Documentation/userspace-api/seccomp_filter.rst;
    seccomp_unotify(2). Linux 5.9 is the oldest kernel that will do. What came later is probed by trying it,
    never by version numbers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.errors import HostError

if TYPE_CHECKING:
    from swsnp.front.wrap.arch import Architecture

__all__ = [
    "Features",
    "Listener",
    "Notification",
    "explain",
    "install",
    "keep_privileges_down",
    "no_user_notification",
    "probe",
    "set_subreaper",
]

_SET_MODE_FILTER: Final = 1
_GET_ACTION_AVAIL: Final = 2
_GET_NOTIF_SIZES: Final = 3
_FLAG_NEW_LISTENER: Final = 8
_FLAG_WAIT_KILLABLE_RECV: Final = 32
_RET_USER_NOTIF: Final = 0x7FC0_0000

_NOTIF_RECV: Final = 0xC050_2100
_NOTIF_SEND: Final = 0xC018_2101
_NOTIF_ID_VALID: Final = 0x4008_2102
_NOTIF_ADDFD: Final = 0x4018_2103
_NOTIF_SET_FLAGS: Final = 0x4008_2104
_RESPONSE_CONTINUE: Final = 1
_ADDFD_SETFD: Final = 1
_ADDFD_SEND: Final = 2
_SYNC_WAKE_UP: Final = 1

# Plain structs rather than records: these are read and written once per system call of the program.
_NOTIF: Final = struct.Struct("<QIIiIQ6Q")  # id, pid, flags, nr, arch, instruction_pointer, args[6]
_RESPONSE: Final = struct.Struct("<QqiI")  # id, val, error, flags
_ADDFD: Final = struct.Struct("<QIIII")  # id, flags, srcfd, newfd, newfd_flags
_ID: Final = struct.Struct("<Q")
_FPROG: Final = struct.Struct("<H6xQ")  # len, filter

_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NO_NEW_PRIVS: Final = 38

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = [ctypes.c_long] * 4
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.prctl.restype = ctypes.c_int


_REASONS: Final[dict[int, tuple[str, str]]] = {
    errno.EBUSY: (
        "this process is under a seccomp filter with a listener already (inside a wrapped program, or a "
        "container runtime's), and Linux permits one",
        "start it outside of that program or container",
    ),
    errno.EINVAL: (
        "this kernel, or what imitates one (gVisor), has no seccomp user notification",
        "use Linux 5.9 or newer, 5.19 recommended",
    ),
    errno.ENOSYS: ("this kernel has no seccomp filters", "use a kernel with CONFIG_SECCOMP_FILTER"),
    errno.EPERM: ("seccomp(2) is refused here", "use a container profile that permits seccomp"),
    errno.EACCES: ("seccomp(2) is refused here", "use a container profile that permits seccomp"),
}


class Features(NamedTuple):
    """What this kernel's user notification can do.

    Attributes:
        listener: a filter can have a listener at all (5.0).
        killable: WAIT_KILLABLE_RECV (5.19): a signal does not interrupt a call that was taken up.
        notif_size: bytes of `struct seccomp_notif` in this kernel; 80 so far.
    """

    listener: bool
    killable: bool
    notif_size: int = _NOTIF.size


class Notification(NamedTuple):
    """One call of the program, which waits for the answer.

    Attributes:
        id: names the notification in every answer.
        tid: the calling thread, in the supervisor's process namespace.
        nr: the call's number.
        args: six arguments, each as the 64-bit register had it.
    """

    id: int
    tid: int
    nr: int
    args: tuple[int, int, int, int, int, int]


def _seccomp(number: int, operation: int, flags: int, address: int) -> int:
    """The system call itself.

    Raises:
        OSError: with the kernel's errno.
    """
    result: int = _libc.syscall(number, operation, flags, address)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp operation {operation}, flags {flags:#x}: {os.strerror(code)}")
    return result


def _errno_of(number: int, operation: int, flags: int, address: int) -> int:
    try:
        _seccomp(number, operation, flags, address)
    except OSError as error:
        return error.errno or 0
    return 0


def probe(arch: Architecture) -> Features:
    """Try what this kernel knows, without installing anything.

    A filter at address 0 is refused with EFAULT when the flags are known and with EINVAL when they are not.
    """
    number = arch.calls["seccomp"]
    action = ctypes.c_uint32(_RET_USER_NOTIF)
    if _errno_of(number, _GET_ACTION_AVAIL, 0, ctypes.addressof(action)):
        return Features(listener=False, killable=False)
    listener = _errno_of(number, _SET_MODE_FILTER, _FLAG_NEW_LISTENER, 0) == errno.EFAULT
    flags = _FLAG_NEW_LISTENER | _FLAG_WAIT_KILLABLE_RECV
    killable = listener and _errno_of(number, _SET_MODE_FILTER, flags, 0) == errno.EFAULT
    sizes = (ctypes.c_uint16 * 3)()
    if not listener or _errno_of(number, _GET_NOTIF_SIZES, 0, ctypes.addressof(sizes)):
        return Features(listener=False, killable=False)
    return Features(listener=True, killable=killable, notif_size=max(_NOTIF.size, sizes[0]))


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


def keep_privileges_down() -> None:
    """PR_SET_NO_NEW_PRIVS: what an unprivileged process must set before it may install a filter."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def set_subreaper(on: bool) -> None:
    """PR_SET_CHILD_SUBREAPER: daemons of the program become our children, whose memory Yama lets us read."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def install(arch: Architecture, program: bytes, *, killable: bool) -> int:
    """Put the calling thread under a filter.

    Args:
        arch: of this process.
        program: from `bpf.build_filter`.
        killable: ask for WAIT_KILLABLE_RECV.

    Returns:
        The listener's descriptor.

    Raises:
        OSError: EBUSY under a filter that has a listener already; EINVAL without user notification.
    """
    code = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(_FPROG.pack(len(program) // 8, ctypes.addressof(code)))
    flags = _FLAG_NEW_LISTENER | (_FLAG_WAIT_KILLABLE_RECV if killable else 0)
    return _seccomp(arch.calls["seccomp"], _SET_MODE_FILTER, flags, ctypes.addressof(fprog))


def explain(code: int) -> HostError:
    """Why a filter could not be installed, from its errno."""
    reason, remedy = _REASONS.get(
        code, (f"the filter could not be installed: {os.strerror(code)}", "report this")
    )
    return HostError(f"{reason}; remedy: {remedy}")


def no_user_notification() -> HostError:
    """What `Features.listener` False means."""
    return explain(errno.EINVAL)


class Listener:
    """The supervisor's end of a filter. Methods may be called from any thread; `receive` from one at a time.

    An answer to a program that is gone, or that a signal called away, is lost: the methods then say False.
    """

    def __init__(self, descriptor: int, notif_size: int = _NOTIF.size) -> None:
        self.descriptor = descriptor
        self._buffer = bytearray(notif_size)
        self._zero = bytes(notif_size)
        self._sends_with_descriptor = True
        self.sync_wake_up = self._ask_for_sync_wake_up()

    def _ask_for_sync_wake_up(self) -> bool:
        """Have the processor handed over and back (6.6): 20 instead of up to 140 µs when loaded."""
        try:
            fcntl.ioctl(self.descriptor, _NOTIF_SET_FLAGS, _SYNC_WAKE_UP)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise
            return False
        return True

    def close(self) -> None:
        """Stop listening: from now on every notified call of the program ends with ENOSYS."""
        os.close(self.descriptor)

    def receive(self) -> Notification | None:
        """Take the next notification; None when its program went away meanwhile."""
        self._buffer[:] = self._zero  # the kernel refuses a buffer that is not zero
        try:
            fcntl.ioctl(self.descriptor, _NOTIF_RECV, self._buffer)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINTR):
                raise
            return None
        id_, tid, _, nr, _, _, *args = _NOTIF.unpack_from(self._buffer)
        return Notification(id_, tid, nr, tuple(args))

    def _send(self, response: bytes) -> bool:
        try:
            fcntl.ioctl(self.descriptor, _NOTIF_SEND, response)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def answer(self, notification: int, result: int) -> bool:
        """End the call with `result`: a value, or -errno."""
        if result < 0:
            return self._send(_RESPONSE.pack(notification, 0, result, 0))
        return self._send(_RESPONSE.pack(notification, result, 0, 0))

    def carry_on(self, notification: int) -> bool:
        """Let the kernel execute the call as if there were no filter."""
        return self._send(_RESPONSE.pack(notification, 0, 0, _RESPONSE_CONTINUE))

    def valid(self, notification: int) -> bool:
        """Whether the program still waits for this answer."""
        try:
            fcntl.ioctl(self.descriptor, _NOTIF_ID_VALID, _ID.pack(notification))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def inject(self, notification: int, source: int, *, at: int | None = None, cloexec: bool = False) -> bool:
        """Give the program a duplicate of our descriptor `source`; its number there is the call's result.

        Args:
            notification: the call to end.
            source: stays open here.
            at: the number to use; whatever has it is closed. None: the lowest free one.
            cloexec: set FD_CLOEXEC on the duplicate.

        Raises:
            OSError: the program cannot take it: EMFILE; EBADF when `at` is beyond its limit.
        """
        flags = _ADDFD_SETFD if at is not None else 0
        tail = (source, at or 0, os.O_CLOEXEC if cloexec else 0)
        try:
            if self._sends_with_descriptor:
                try:
                    fcntl.ioctl(
                        self.descriptor, _NOTIF_ADDFD, _ADDFD.pack(notification, flags | _ADDFD_SEND, *tail)
                    )
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._sends_with_descriptor = False  # before 5.14: two steps
                else:
                    return True
            request = bytearray(
                _ADDFD.pack(notification, flags, *tail)
            )  # mutable: ioctl then returns a number
            number = fcntl.ioctl(self.descriptor, _NOTIF_ADDFD, request)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return self.answer(notification, number)
