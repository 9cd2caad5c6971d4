"""Start a program under a filter and get the filter's listener.

The child puts itself under the filter, passes the listener back over a socket and executes the program.
(Fetching the descriptor from outside needs pidfd_getfd, which container profiles refuse.) From fork to exec
the child makes system calls only: other threads of this process may hold locks that nobody will ever release
in the child.
"""

from __future__ import annotations

import _socket
import errno
import os
import signal
import struct
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from swsnp.errors import HostError
from swsnp.front.wrap import seccomp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from swsnp.front.wrap.arch import Architecture

__all__ = ["Plan", "Started", "candidates", "fork_under_filter", "reserved_descriptors", "start"]

_READY: Final = b"ready"
_INT: Final = struct.Struct("<i")
_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126
# Python ignores these for itself; a program expects the default
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)
_SELECT_LIMIT: Final = 1024


class Plan(NamedTuple):
    """What to start.

    Attributes:
        argv: the program and its arguments.
        environ: its environment.
        arch: of this process.
        program: the filter.
        killable: ask for WAIT_KILLABLE_RECV.
        ignored: signals that were ignored before the supervisor took them over, and stay so.
        handled: signals that the supervisor took over.
    """

    argv: Sequence[str]
    environ: Mapping[str, str]
    arch: Architecture
    program: bytes
    killable: bool
    ignored: frozenset[int]
    handled: tuple[int, ...]


class Started(NamedTuple):
    """A program that runs, and the listener of its filter."""

    pid: int
    listener: int


def reserved_descriptors(soft_limit: int) -> range:
    """The numbers that device descriptors get.

    They end where select() does or, when that is lower, at the program's limit, so that programs, which count
    from below, hardly ever meet them.

    Args:
        soft_limit: RLIMIT_NOFILE; negative is unlimited.

    Returns:
        64 numbers (960 to 1023 as a rule), fewer under a limit below 512.
    """
    stop = min(soft_limit, _SELECT_LIMIT) if soft_limit >= 0 else _SELECT_LIMIT
    return range(stop - min(64, max(1, stop // 8)), stop)


def candidates(program: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The paths to try, in order: the program itself when it has a slash, else along PATH."""
    if "/" in program:
        return (program,)
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    return tuple(os.path.join(folder or ".", program) for folder in folders)  # noqa: PTH118


def fork_under_filter(
    arch: Architecture, program: bytes, *, killable: bool, act: Callable[[], NoReturn]
) -> Started:
    """Fork a child that puts itself under a filter and then calls `act`.

    Args:
        arch: of this process.
        program: the filter; it must notify the first thing that `act` does with files.
        killable: ask for WAIT_KILLABLE_RECV.
        act: runs in the child, makes system calls only and does not return.

    Raises:
        HostError: this host, or the filter that we are under already, does not permit it.
    """
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            _enter_filter(arch, program, theirs, killable=killable)
            act()
        finally:
            os._exit(_NOT_EXECUTABLE)
    theirs.close()
    try:
        message, ancillary, _, _ = ours.recvmsg(len(_READY), _socket.CMSG_SPACE(_INT.size))
    finally:
        ours.close()
    if not ancillary:
        os.waitpid(pid, 0)
        raise seccomp.explain(_INT.unpack(message)[0] if len(message) == _INT.size else errno.EPROTO)
    started = Started(pid, _INT.unpack_from(ancillary[0][2])[0])
    os.set_inheritable(started.listener, False)
    _require_memory(started)
    return started


def _enter_filter(arch: Architecture, program: bytes, link: _socket.socket, *, killable: bool) -> None:
    """In the child: install the filter and send its listener, or the errno that refused it."""
    try:
        seccomp.keep_privileges_down()
        listener = seccomp.install(arch, program, killable=killable)
    except OSError as error:
        link.send(_INT.pack(error.errno or errno.EPROTO))
        os._exit(_NOT_EXECUTABLE)
    link.sendmsg([_READY], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _INT.pack(listener))])
    os.close(listener)
    link.close()


def _require_memory(started: Started) -> None:
    """Check that the child's memory is within reach.

    It still runs our own program: its first call with a path, be it the exec, waits until it is served.
    """
    try:
        os.close(os.open(f"/proc/{started.pid}/mem", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        os.kill(started.pid, signal.SIGKILL)
        os.close(started.listener)
        os.waitpid(started.pid, 0)
        raise HostError(
            f"/proc/{started.pid}/mem: {error.strerror}: the memory of programs we start is out of reach; "
            "remedy: mount /proc; set kernel.yama.ptrace_scope to 0 or 1"
        ) from error


def start(plan: Plan) -> Started:
    """Fork, filter, execute.

    The caller has blocked the signals of `plan.handled`; the child lets them through again. A program that
    cannot be executed ends with status 127 when it was not found and 126 otherwise, and says why, as under a
    shell.

    Raises:
        HostError: this host, or the filter that we are under already, does not permit it.
    """
    paths = candidates(plan.argv[0], plan.environ)
    argv, environ = list(plan.argv), dict(plan.environ)

    def execute() -> NoReturn:
        for number in (*plan.handled, *_IGNORED_BY_PYTHON):
            signal.signal(number, signal.SIG_IGN if number in plan.ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, plan.handled)
        code = _execute(paths, argv, environ)
        text = f"swsnp: {argv[0]}: {'not found' if code == errno.ENOENT else os.strerror(code)}\n"
        os.write(2, text.encode(errors="surrogateescape"))
        os._exit(_NOT_FOUND if code == errno.ENOENT else _NOT_EXECUTABLE)

    return fork_under_filter(plan.arch, plan.program, killable=plan.killable, act=execute)


def _execute(paths: tuple[str, ...], argv: list[str], environ: dict[str, str]) -> int:
    """Try each path; returns the errno that says most when none could be executed."""
    refused = errno.ENOENT
    for path in paths:
        try:
            os.execve(path, argv, environ)  # noqa: S606
        except OSError as error:
            code = error.errno or errno.EPROTO
            if code not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                return code
            if code == errno.EACCES:
                refused = code
    return refused
