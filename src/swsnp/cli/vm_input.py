"""`swsnp vm -kernel …`: where the standard input goes while a guest runs.

It goes where the standard output comes from: to the guest's console or a port; with `--exec` to the program,
unless it is a terminal.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from swsnp.cli.vm_terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from swsnp.cli.vm_devices import VmDevices

__all__ = ["console_input", "program_input"]


def console_input(
    devices: VmDevices, serial: Callable[[bytes], None], quit_guest: Callable[[], None]
) -> AbstractContextManager[object]:
    """Standard input for a guest that has a console, while the block runs.

    Args:
        devices: the port that has the standard output, if there is one.
        serial: takes what is typed otherwise.
        quit_guest: called from another thread after ^A x.
    """
    if (fd := _descriptor()) is None:
        return nullcontext()
    if (port := devices.stdio) is None:
        return Terminal(serial, quit_guest, fd)
    # keys must not wait for a guest that does not read, or nobody would see ^A x
    receive = partial(port.receive, wait=not os.isatty(fd))
    return Terminal(receive, quit_guest, fd, release=port.stop)


def program_input(devices: VmDevices, quit_guest: Callable[[], None]) -> AbstractContextManager[object]:
    """Standard input for the program of --exec, while the block runs; a terminal stays the user's.

    Where it cannot get there, and something is there to be read, stderr tells.
    """
    fd, end = _descriptor(), devices.input
    if end is None:
        if fd is not None and _holds_bytes(fd):
            print(
                "swsnp vm: the program gets nothing of the standard input: that takes a port, -chardev "
                "stdio,id=io -device virtio-serial-device -device virtserialport,chardev=io",
                file=sys.stderr,
            )
        return nullcontext()
    if fd is None or os.isatty(fd):
        end.finish()
        return nullcontext()
    return Terminal(end.give, quit_guest, fd, at_end=end.finish, release=end.close)


def _descriptor() -> int | None:
    """Standard input's; None where there is none."""
    if sys.stdin is None or sys.stdin.closed:
        return None
    try:
        return sys.stdin.fileno()
    except (OSError, ValueError):  # what stands for it has no descriptor
        return None


def _holds_bytes(fd: int) -> bool:
    """Whether a file, pipe or socket has some left: FIONREAD, ioctl_fionread(2)."""
    try:
        count = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    except OSError:  # a device that does not tell, /dev/null among them
        return False
    return not os.isatty(fd) and struct.unpack("i", count)[0] > 0
