"""Which way of wrapping programs works on this host, and why another does not."""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from swsnp.abi.sev_guest import DEVICE
from swsnp.errors import HostError
from swsnp.front.wrap.arch import ARCHITECTURES, this_architecture
from swsnp.front.wrap.bpf import build_filter

if TYPE_CHECKING:
    from swsnp.front.wrap.arch import Architecture
    from swsnp.front.wrap.seccomp import Features, Listener

__all__ = ["Verdict", "examine", "prerequisites", "require"]

_PATIENCE_MS: Final = 5000
_NO_DESCRIPTORS: Final = range(0xFFFF_FFF0, 0xFFFF_FFF0)


class Verdict(NamedTuple):
    """Whether one backend works here.

    Attributes:
        backend: "seccomp".
        usable: whether it does.
        reason: what is missing; empty when it works.
        remedy: what to do about it; empty when it works.
        features: what the kernel has; None when it does not work.
    """

    backend: str
    usable: bool
    reason: str = ""
    remedy: str = ""
    features: Features | None = None


def prerequisites() -> tuple[Architecture, Features]:
    """What can be said without starting anything.

    Raises:
        HostError: another system or architecture, or a kernel without user notification.
    """
    if sys.platform != "linux":
        raise HostError(f"this is {sys.platform}; remedy: use Linux, in a virtual machine or a container")
    arch = this_architecture()
    if arch is None or sys.maxsize < 1 << 32:
        found = f"this is {os.uname().machine} with {sys.maxsize.bit_length() + 1}-bit Python"
        raise HostError(f"{found}; remedy: use 64 bit on one of: {', '.join(ARCHITECTURES)}")
    from swsnp.front.wrap import seccomp  # asks libc for what only Linux has

    features = seccomp.probe(arch)
    if not features.listener:
        raise seccomp.no_user_notification()
    return arch, features


def examine() -> Verdict:
    """Try the whole way once: filter, notification, memory, descriptor. Takes a child and milliseconds."""
    try:
        arch, features = prerequisites()
        _trial(arch, features)
    except HostError as error:
        reason, _, remedy = str(error).partition("; remedy: ")
        return Verdict("seccomp", False, reason, remedy)
    return Verdict("seccomp", True, features=features)


def require() -> None:
    """Return when the seccomp backend works here.

    Raises:
        HostError: it does not.
    """
    verdict = examine()
    if not verdict.usable:
        raise HostError(f"{verdict.reason}; remedy: {verdict.remedy}")


def _trial(arch: Architecture, features: Features) -> None:
    """Let a child open the device's path and hand it `/dev/null`; raises HostError."""
    from swsnp.front.wrap.launch import fork_under_filter
    from swsnp.front.wrap.seccomp import Listener

    started = fork_under_filter(
        arch, build_filter(arch, _NO_DESCRIPTORS), killable=features.killable, act=_open_it
    )
    status = -1
    try:
        listener = Listener(started.listener, features.notif_size)
        _serve_one(listener, arch)
        status = os.waitpid(started.pid, 0)[1]
    finally:
        os.close(started.listener)
        if status == -1:
            os.kill(started.pid, signal.SIGKILL)
            os.waitpid(started.pid, 0)
    if status != 0:
        raise HostError(
            "a trial program was not given the descriptor that was sent to it; remedy: use Linux 5.9 or newer"
        )


def _open_it() -> NoReturn:
    """The trial program."""
    mode = os.fstat(os.open(DEVICE, os.O_RDWR)).st_mode
    os._exit(0 if stat.S_ISCHR(mode) else 1)


def _serve_one(listener: Listener, arch: Architecture) -> None:
    from swsnp.front.wrap.handles import NullDevice
    from swsnp.front.wrap.memory import TargetMemory, process_vm_works

    poll = select.poll()
    poll.register(listener.descriptor, select.POLLIN)
    notification = listener.receive() if poll.poll(_PATIENCE_MS) else None
    if notification is None:
        raise HostError("a filter was installed but never asked; remedy: use Linux 5.9 or newer")
    memory = TargetMemory(notification.tid, process_vm=process_vm_works())
    path = memory.read_path(notification.args[0 if notification.nr == arch.calls.get("open") else 1])
    if path != DEVICE.encode():
        raise HostError(f"a program asked for {DEVICE} and {path!r} was read; remedy: report this")
    descriptor = NullDevice().open(os.O_RDWR)
    try:
        listener.inject(notification.id, descriptor)
    finally:
        os.close(descriptor)
