"""Runs wrapped: what programs do with configfs-tsm, one function per way; prints what it got."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__: list[str] = []

REPORT = Path("/sys/kernel/config/tsm/report")
INBLOB = bytes(range(64))


def outcome(work: Callable[[], object]) -> str:
    try:
        result = work()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return result.hex() if isinstance(result, bytes) else str(result)


def put(path: Path, data: bytes) -> int:
    """As Go's os.WriteFile: 0x80241, mode 0220, one write."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o220)
    try:
        return os.write(descriptor, data)
    finally:
        os.close(descriptor)


def get(path: Path, size: int = 512) -> bytes:
    """As Go's os.ReadFile: fstat, reads until the end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = max(size, os.fstat(descriptor).st_size + 1)
        return b"".join(iter(lambda: os.read(descriptor, size), b""))
    finally:
        os.close(descriptor)


def mapped(descriptor: int) -> None:
    """Map a page; Python's own mmap duplicates the descriptor first."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4)
    if libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0) == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")


def go() -> dict[str, str]:
    """The system calls of go-configfs-tsm as go-sev-guest uses it."""
    found: dict[str, str] = {"directory": str(REPORT.is_dir())}
    for name in ("probe", "entry"):
        os.mkdir(REPORT / name, 0o700)  # noqa: PTH102
        found[f"{name} provider"] = get(REPORT / name / "provider").decode()
    entry = REPORT / "entry"
    found["baseline"] = get(entry / "generation").decode()
    put(entry / "inblob", INBLOB)
    put(entry / "privlevel", b"1")
    for name in ("auxblob", "outblob", "provider"):
        found[name] = get(entry / name).hex()
        found[f"generation after {name}"] = get(entry / "generation").decode()
    found["unlink"] = outcome(lambda: os.unlink(entry))  # noqa: PTH108
    found["rmdir"] = outcome(lambda: os.rmdir(entry))  # noqa: PTH106
    found["left"] = str(os.listdir(REPORT))  # noqa: PTH208
    return found


def descriptors() -> dict[str, str]:
    """Calls on open attributes."""
    entry = REPORT / "d"
    entry.mkdir()
    put(entry / "inblob", INBLOB)
    text = os.open(entry / "provider", os.O_RDONLY)
    blob = os.open(entry / "outblob", os.O_RDONLY)
    level = os.open(entry / "privlevel", os.O_WRONLY)
    inblob = os.open(entry / "inblob", os.O_WRONLY)
    epoll = select.epoll()
    one, two = bytearray(4), bytearray(100)
    return {
        "pread": outcome(lambda: os.pread(text, 3, 4)),
        "readv": outcome(lambda: os.readv(text, [one, two])),
        "readv got": bytes(one + two[:6]).hex(),
        "readv none": outcome(lambda: os.readv(text, [])),
        "read at the end": outcome(lambda: os.read(text, 10)),
        "lseek text": outcome(lambda: os.lseek(text, -4, os.SEEK_END)),
        "lseek negative": outcome(lambda: os.lseek(text, -1, os.SEEK_SET)),
        "lseek blob": outcome(lambda: os.lseek(blob, 0, os.SEEK_CUR)),
        "write to a reader": outcome(lambda: os.write(text, b"x")),
        "read from a writer": outcome(lambda: os.read(level, 1)),
        "bad level": outcome(lambda: os.write(level, b"9")),
        "large level": outcome(lambda: os.write(level, b"4294967296")),
        "level": outcome(lambda: os.writev(level, [b"0x", b"3\n"])),
        "no bytes": outcome(lambda: os.write(inblob, b"")),
        "65 bytes": outcome(lambda: os.write(inblob, bytes(65))),
        "pwrite": outcome(lambda: os.pwrite(inblob, b"end", 61)),
        "mmap": outcome(lambda: mapped(text)),
        "epoll blob": outcome(lambda: epoll.register(blob)),
        "epoll inblob": outcome(lambda: epoll.register(inblob)),
        "poll": str(select.select([blob, text], [inblob], [], 0)[1] == [inblob]),
        "ioctl": outcome(lambda: fcntl.ioctl(blob, 0x5401, bytes(64))),
        "regular": oct(os.fstat(inblob).st_mode),
        "size of text": str(os.fstat(text).st_size),
        "fcntl": str(fcntl.fcntl(blob, fcntl.F_GETFL) & os.O_ACCMODE),
        "generation before the close": get(entry / "generation").decode(),
        "close": outcome(lambda: os.close(inblob)),
        "generation after it": get(entry / "generation").decode(),
    }


def paths() -> dict[str, str]:
    """Calls with paths."""
    entry = REPORT / "p"
    entry.mkdir()
    folder = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)

    def through() -> bytes:
        return os.read(os.open("provider", os.O_RDONLY, dir_fd=folder), 100)

    def relative() -> bytes:
        os.fchdir(folder)
        try:
            return Path("provider").read_bytes()
        finally:
            os.chdir("/")

    return {
        "wrong direction": outcome(lambda: os.open(entry / "outblob", os.O_WRONLY)),
        "both directions": outcome(lambda: os.open(entry / "inblob", os.O_RDWR)),
        "new file": outcome(lambda: os.open(entry / "new", os.O_WRONLY | os.O_CREAT)),
        "no file": outcome(lambda: os.open(entry / "new", os.O_WRONLY)),
        "exclusive": outcome(lambda: os.open(entry / "inblob", os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
        "mkdir again": outcome(entry.mkdir),
        "mkdir inside": outcome((entry / "x").mkdir),
        "mkdir above": outcome((REPORT.parent / "x").mkdir),
        "rmdir report": outcome(REPORT.rmdir),
        "unlink attribute": outcome((entry / "inblob").unlink),
        "rmdir attribute": outcome((entry / "inblob").rmdir),
        "stat": oct((entry / "outblob").stat().st_mode),
        "through a directory": outcome(through),
        "relative": outcome(relative),
        "listed": " ".join(sorted(os.listdir(entry))),  # noqa: PTH208
        "platform device": str(Path("/sys/devices/platform/sev-guest").is_dir()),
        "chdir": outcome(lambda: os.chdir(entry)),
        "xattr": outcome(lambda: os.getxattr(entry, "user.x")),
    }


def redirections() -> dict[str, str]:
    """Descriptors that leave the reserved range."""
    entry = REPORT / "s"
    entry.mkdir()
    put(entry / "inblob", INBLOB)
    with (entry / "outblob").open("rb") as blob:
        child = subprocess.run(["cat"], stdin=blob, capture_output=True, check=False)
    many = [os.open(entry / "provider", os.O_RDONLY) for _ in range(70)]
    with (entry / "privlevel").open("wb") as level:
        subprocess.run(["sh", "-c", "echo 2"], stdout=level, check=False)
    found = {
        "child": child.stdout.hex(),
        "beyond the range": " ".join(sorted({os.read(each, 100).decode().strip() for each in many})),
        "written by a child": get(entry / "generation").decode(),
        "level": get(entry / "outblob")[64:66].hex(),
    }
    for each in many:
        os.close(each)
    fresh = REPORT / "t"
    fresh.mkdir()
    unread = os.open(fresh / "outblob", os.O_RDONLY)
    return found | {"dup of what cannot be read": outcome(lambda: os.dup(unread))}


def interrupted() -> dict[str, str]:
    """Timer signals while directories come and go: each call is carried out once."""
    return _come_and_go(300, every_s=0.0003)


def called_away() -> dict[str, str]:
    """The same with signals from somebody else."""
    return _come_and_go(50, every_s=0)


def _come_and_go(turns: int, *, every_s: float) -> dict[str, str]:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)  # SA_RESTART
    signal.setitimer(signal.ITIMER_REAL, every_s, every_s)
    wrong = []
    for number in range(turns):
        entry = REPORT / f"i{number}"
        made = outcome(entry.mkdir)
        put(entry / "privlevel", b"1")
        generation = get(entry / "generation")
        removed = outcome(entry.rmdir)
        if (made, generation, removed) != ("None", b"1\n", "None"):
            wrong.append(f"{made} {generation!r} {removed}")
    signal.setitimer(signal.ITIMER_REAL, 0, 0)
    return {"wrong": "\n".join(wrong)}


def threads() -> dict[str, str]:
    """An entry each, all at once."""
    wrong: list[str] = []

    def one(number: int) -> None:
        entry = REPORT / f"thread{number}"
        for turn in range(10):
            entry.mkdir()
            inblob = bytes([number, turn]) * 32
            put(entry / "inblob", inblob)
            if get(entry / "outblob")[:64] != inblob[::-1] or get(entry / "generation") != b"1\n":
                wrong.append(entry.name)
            entry.rmdir()

    each = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    return {"wrong": str(wrong), "left": str(os.listdir(REPORT))}  # noqa: PTH208


def slow() -> dict[str, str]:
    """While a report is made, other calls with paths go on."""
    entry = REPORT / "slow"
    entry.mkdir()
    put(entry / "inblob", INBLOB)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(get(entry / "outblob")))
    reader.start()
    gate = Path(sys.argv[2])
    while not (gate / "entered").exists():
        time.sleep(0.001)
    for _ in range(20):
        (REPORT / "other").mkdir()
        (REPORT / "other").rmdir()
    found = {"answered first": str(bool(got))}
    (gate / "open").touch()
    reader.join()
    return found | {"read": str(len(got[0]))}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
