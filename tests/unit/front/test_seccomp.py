"""The numbers of user notification against the kernel's headers, and what a listener makes of refusals."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from swsnp.front.wrap import bpf, seccomp
from swsnp.front.wrap.seccomp import Listener

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip

HEADER_SAYS = """
#include <stdio.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#define P(name) printf(#name " %lx\\n", (unsigned long)(name))
int main(void)
{
    P(SECCOMP_IOCTL_NOTIF_RECV); P(SECCOMP_IOCTL_NOTIF_SEND); P(SECCOMP_IOCTL_NOTIF_ID_VALID);
    P(SECCOMP_IOCTL_NOTIF_ADDFD); P(SECCOMP_RET_USER_NOTIF); P(SECCOMP_RET_ALLOW); P(SECCOMP_RET_ERRNO);
    P(SECCOMP_FILTER_FLAG_NEW_LISTENER); P(SECCOMP_USER_NOTIF_FLAG_CONTINUE); P(SECCOMP_ADDFD_FLAG_SETFD);
    P(AUDIT_ARCH_X86_64); P(AUDIT_ARCH_AARCH64);
    P(sizeof(struct seccomp_notif)); P(sizeof(struct seccomp_notif_resp));
    P(sizeof(struct seccomp_notif_addfd));
}
"""


def test_numbers_of_the_header(tmp_path: Path, cannot_run: Skip) -> None:
    """include/uapi/linux/seccomp.h and audit.h."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        cannot_run("no C compiler", "install gcc")
    source, program = tmp_path / "numbers.c", tmp_path / "numbers"
    source.write_text(HEADER_SAYS)
    subprocess.run([compiler, "-o", program, source], check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    real = {name: int(value, 16) for name, value in (line.rsplit(" ", 1) for line in lines)}
    assert real == {
        "SECCOMP_IOCTL_NOTIF_RECV": seccomp._NOTIF_RECV,
        "SECCOMP_IOCTL_NOTIF_SEND": seccomp._NOTIF_SEND,
        "SECCOMP_IOCTL_NOTIF_ID_VALID": seccomp._NOTIF_ID_VALID,
        "SECCOMP_IOCTL_NOTIF_ADDFD": seccomp._NOTIF_ADDFD,
        "SECCOMP_RET_USER_NOTIF": bpf.NOTIFY,
        "SECCOMP_RET_ALLOW": bpf.ALLOW,
        "SECCOMP_RET_ERRNO": bpf.refuse(0),
        "SECCOMP_FILTER_FLAG_NEW_LISTENER": seccomp._FLAG_NEW_LISTENER,
        "SECCOMP_USER_NOTIF_FLAG_CONTINUE": seccomp._RESPONSE_CONTINUE,
        "SECCOMP_ADDFD_FLAG_SETFD": seccomp._ADDFD_SETFD,
        "AUDIT_ARCH_X86_64": 0xC000003E,
        "AUDIT_ARCH_AARCH64": 0xC00000B7,
        "sizeof(struct seccomp_notif)": seccomp._NOTIF.size,
        "sizeof(struct seccomp_notif_resp)": seccomp._RESPONSE.size,
        "sizeof(struct seccomp_notif_addfd)": seccomp._ADDFD.size,
    }


class Kernel:
    """Answers the listener's ioctls from a list of errno values, 0 for success; remembers what was asked."""

    def __init__(self, *results: int) -> None:
        self.results = list(results)
        self.asked: list[tuple[int, bytes]] = []

    def ioctl(self, descriptor: int, request: int, argument: bytes | bytearray | int = 0) -> int:
        self.asked.append((request, bytes(argument) if not isinstance(argument, int) else b""))
        code = self.results.pop(0)
        if code:
            raise OSError(code, os.strerror(code))
        return 33


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(0)
    monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
    return made


@pytest.fixture
def listener(kernel: Kernel) -> Listener:
    made = Listener(99)
    kernel.asked.clear()
    return made


@pytest.mark.parametrize(("code", "synchronous"), [(0, True), (errno.EINVAL, False), (errno.ENOTTY, False)])
def test_sync_wake_up_is_tried(kernel: Kernel, code: int, synchronous: bool) -> None:
    """SECCOMP_IOCTL_NOTIF_SET_FLAGS came with Linux 6.6; without it everything still works."""
    kernel.results = [code]
    assert Listener(99).sync_wake_up is synchronous
    assert kernel.asked[0][0] == 0x40082104


def test_other_errors_of_set_flags_are_not_hidden(kernel: Kernel) -> None:
    """A listener that is none is a mistake of ours."""
    kernel.results = [errno.EBADF]
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        Listener(99)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EINTR])
def test_receive_of_a_call_that_is_gone(kernel: Kernel, listener: Listener, code: int) -> None:
    """seccomp_unotify(2): the thread was killed or interrupted before the notification was taken."""
    kernel.results = [code]
    assert listener.receive() is None
    kernel.results = [errno.EFAULT]
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
        listener.receive()


def test_answers(kernel: Kernel, listener: Listener) -> None:
    """Struct seccomp_notif_resp: id, val, error (negative), flags; False when nobody waits."""
    kernel.results = [0, 0, 0, errno.ENOENT, 0, errno.ENOENT]
    assert listener.answer(7, 5)
    assert listener.answer(7, -errno.EIO)
    assert listener.carry_on(7)
    assert not listener.answer(7, 0)
    assert listener.valid(7)
    assert not listener.valid(7)
    assert [argument for _, argument in kernel.asked[:3]] == [
        struct.pack("<QqiI", 7, 5, 0, 0),
        struct.pack("<QqiI", 7, 0, -5, 0),
        struct.pack("<QqiI", 7, 0, 0, 1),
    ]


def test_inject_in_one_step(kernel: Kernel, listener: Listener) -> None:
    """SECCOMP_ADDFD_FLAG_SEND answers the call with the descriptor (5.14)."""
    kernel.results = [0, 0]
    assert listener.inject(7, 4)
    assert listener.inject(7, 4, at=960, cloexec=True)
    assert kernel.asked == [
        (0x40182103, struct.pack("<QIIII", 7, 2, 4, 0, 0)),
        (0x40182103, struct.pack("<QIIII", 7, 3, 4, 960, os.O_CLOEXEC)),
    ]


def test_inject_in_two_steps(kernel: Kernel, listener: Listener) -> None:
    """Before 5.14 the flag is EINVAL: the number that ADDFD returns is sent, and the flag not tried again."""
    kernel.results = [errno.EINVAL, 0, 0, 0, 0]
    assert listener.inject(7, 4, at=960)
    assert listener.inject(8, 4)
    assert kernel.asked[1:] == [
        (0x40182103, struct.pack("<QIIII", 7, 1, 4, 960, 0)),
        (0xC0182101, struct.pack("<QqiI", 7, 33, 0, 0)),
        (0x40182103, struct.pack("<QIIII", 8, 0, 4, 0, 0)),
        (0xC0182101, struct.pack("<QqiI", 8, 33, 0, 0)),
    ]


def test_inject_that_fails(kernel: Kernel, listener: Listener) -> None:
    """ENOENT: nobody waits. Anything else is the program's to know: EMFILE, or EBADF beyond its limit."""
    kernel.results = [errno.ENOENT, errno.EMFILE, errno.EBADF]
    assert not listener.inject(7, 4)
    for code in (errno.EMFILE, errno.EBADF):
        with pytest.raises(OSError, match=os.strerror(code)):
            listener.inject(7, 4)
