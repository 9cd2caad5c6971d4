"""What a wrapped C program gets from every call on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.e2e.wrap.harness import report_for

if TYPE_CHECKING:
    from tests.e2e.wrap.conftest import Build, Wrapped

PATHS = {
    # opens: the driver does not look at the access mode (Linux, drivers/virt/coco/sev-guest)
    "open O_RDONLY": "ok",
    "open O_WRONLY": "ok",
    "open O_RDWR": "ok",
    "open O_CREAT": "ok",
    "open O_EXCL": "EEXIST",
    "open O_DIRECTORY": "ENOTDIR",
    "open below": "ENOTDIR",
    "open slash": "ENOTDIR",
    "open longer name": "ENOENT",
    "open unplain": "ok",
    "open dirfd": "ok",
    "open bad dirfd": "EBADF",
    "open bad pointer": "EFAULT",
    "openat2": "ok",
    "openat2 larger": "ok",
    "openat2 small": "EINVAL",
    "openat2 mode": "EINVAL",
    "openat2 beneath": "EXDEV",
    "creat": "ok",
    # misc device, dynamic minor (drivers/char/misc.c), devtmpfs' default mode
    "stat": "20600 10:260 1",
    "lstat": "20600 10:260 1",
    "fstatat dirfd": "20600 10:260 1",
    "fstatat allowing empty": "20600 10:260 1",
    "stat slash": "ENOTDIR",
    "stat bad buffer": "EFAULT",
    "statx": "20600 10:260 1",
    "access F_OK": "ok",
    "access RW": "ok",
    "access X": "EACCES",
    "access mode 8": "EINVAL",
    "faccessat2": "ok",
    "readlink": "EINVAL",
    "readlinkat": "EINVAL",
    "getxattr": "ENODATA",
    "listxattr": "0",
    "llistxattr": "0",
    "mkdir": "EEXIST",
    "rmdir": "ENOTDIR",
    "unlink": "EACCES",
    "unlinkat dir": "ENOTDIR",
    "chdir": "ENOTDIR",
    "relative": "ok",
    # opens through a ring would pass the filter by
    "io_uring_setup": "ENOSYS",
}

DESCRIPTORS = {
    "fstat": "20600 10:260 1",
    "fstatat empty": "20600 10:260 1",
    "statx empty": "20600 10:260 1",
    "fstat bad buffer": "EFAULT",
    "fstat duplicate is a character device:": "1",
    # the driver has an ioctl operation only: fs/read_write.c, mm/mmap.c, fs/eventpoll.c, fs/select.c
    "read": "EINVAL",
    "read of writer": "EBADF",
    "readv": "EINVAL",
    "pread": "EINVAL",
    "write": "EINVAL",
    "write of reader": "EBADF",
    "writev": "EINVAL",
    "pwrite": "EINVAL",
    "lseek": "ESPIPE",
    "mmap": "ENODEV",
    "epoll": "EPERM",
    "poll": "1 0",
    "cloexec": "0 1",
    "access mode": "2 0",
}

IOCTLS = {
    "report": "0",
    "null argument": "EFAULT",
    "argument nowhere": "EFAULT",
    "argument not readable": "EFAULT",
    "version 0": "EINVAL",
    "request nowhere": "EFAULT",
    "request not readable": "EFAULT",
    "response nowhere": "EFAULT",
    "response read-only": "EFAULT",
    "response read-only untouched": "1",
    "response half read-only": "EFAULT",
    "response up to the page's end": "ok",
    "fails with write-back": "EIO",
    "exitinfo2": "100000000",
    "positive": "4",
    # every number reaches the device, since the 32 bytes are read before the number is looked at
    "unknown number": "ENOTTY",
    "exitinfo2 of unknown": "ff",
    "unknown number, null": "EFAULT",
    "TCGETS, zero": "EINVAL",
    "TCGETS": "ENOTTY",
    "TCGETS wrote": "ff00",
    "64-bit number": "ok",
    # and descriptors of other files never do
    "on /dev/null": "ENOTTY",
    "on a file": "ENOTTY",
    "not open": "EBADF",
    "negative": "EBADF",
    "not open, in the range": "EBADF",
    "closed": "EBADF",
    "foreign in the range": "0 0",
    "foreign in the range, ioctl": "ENOTTY",
    "open path": "EBADF",
}


def parsed(text: str, names: dict[str, str]) -> dict[str, str]:
    """The lines "name result", by the names that are expected; names may have blanks in them."""
    found = {}
    for line in text.splitlines():
        name = max((each for each in names if line.startswith(f"{each} ")), key=len, default=line)
        found[name] = line[len(name) + 1 :]
    return found


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("mode", ["paths", "descriptors", "ioctls"])
def test_every_call(wrapped: Wrapped, build: Build, mode: str, static: bool) -> None:
    """Result by result what Linux answers for this device; a static program has no loader to hook into."""
    expected = {"paths": PATHS, "descriptors": DESCRIPTORS, "ioctls": IOCTLS}[mode]
    ended = wrapped(build("probe", static=static), mode)
    assert parsed(ended.out, expected) == expected
    assert (ended.status, ended.err) == (0, "")


def test_where_process_vm_calls_are_refused(wrapped: Wrapped, build: Build) -> None:
    """Older container profiles: /proc/PID/mem serves instead, and page protection still counts."""
    ended = wrapped(build("probe"), "ioctls", options=("--no-process-vm",))
    assert parsed(ended.out, IOCTLS) == IOCTLS
    assert (ended.status, ended.err) == (0, "")


def test_the_device_sees_every_number_and_nothing_of_other_files(wrapped: Wrapped, build: Build) -> None:
    """Command numbers are the low 32 bits; results are the device's own."""
    ended = wrapped(build("probe"), "ioctls")
    assert [each[0] for each in ended.calls].count(0xC0205300) == 14
    assert (ord("S") << 8 | 99, 1, -25) in ended.calls
    assert (ord("S") << 8 | 99, -1, -14) in ended.calls
    assert (0x5401, 0, -22) in ended.calls
    assert (0x5401, 1, -25) in ended.calls
    assert len(ended.calls) == 18
    assert all(len(bytes.fromhex(each)) == 64 for each in ended.requests)


def test_a_device_that_fails_is_an_input_output_error(wrapped: Wrapped, build: Build) -> None:
    """An exception must become an answer: EIO for the program, a log line, and service goes on."""
    ended = wrapped(build("probe"), "ioctls", options=("--fail",))
    found = parsed(ended.out, IOCTLS)
    assert found["report"] == "5"
    assert found["unknown number"] == "EIO"
    assert found["null argument"] == "EFAULT"
    assert found["on a file"] == "ENOTTY"
    assert ended.status == 0
    assert "RuntimeError: made to fail" in ended.err


def test_the_expected_report_is_not_trivial() -> None:
    """The clients check each byte of this."""
    assert report_for(bytes(range(64)))[:3] == b"\x3f\x3e\x3d"
    assert len(report_for(bytes(64))) == 4000
