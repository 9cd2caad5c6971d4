"""Wrapped programs that use configfs-tsm."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.e2e.wrap.harness import AUXBLOB, outblob_for

if TYPE_CHECKING:
    from tests.e2e.wrap.conftest import Wrapped

CLIENT = str(Path(__file__).parent / "tsm_client.py")
INBLOB = bytes(range(64))
REPORT = "/sys/kernel/config/tsm/report"

GO = {
    "directory": "True",
    "probe provider": "sev_guest\n",
    "entry provider": "sev_guest\n",
    "baseline": "0\n",
    "auxblob": AUXBLOB.hex(),
    "generation after auxblob": "2\n",
    "outblob": outblob_for(INBLOB, 1, 1).hex(),
    "generation after outblob": "2\n",
    "provider": b"sev_guest\n".hex(),
    "generation after provider": "2\n",
    "unlink": "EISDIR",
    "rmdir": "None",
    "left": "['probe']",
}
DESCRIPTORS = {
    "pread": b"gue".hex(),
    "readv": "10",
    "readv got": b"sev_guest\n".hex(),
    "readv none": "0",
    "read at the end": "",
    "lseek text": "4092",
    "lseek negative": "EINVAL",
    "lseek blob": "ESPIPE",
    "write to a reader": "EBADF",
    "read from a writer": "EBADF",
    "bad level": "EINVAL",
    "large level": "ERANGE",
    "level": "4",
    "no bytes": "EFAULT",
    "65 bytes": "EFBIG",
    "pwrite": "3",
    "mmap": "ENODEV",
    "epoll blob": "EPERM",
    "epoll inblob": "EPERM",
    "poll": "True",
    "ioctl": "ENOTTY",
    "regular": "0o100200",
    "size of text": "4096",
    "fcntl": "0",
    "generation before the close": "2\n",
    "close": "None",
    "generation after it": "3\n",
}
PATHS = {
    "wrong direction": "EACCES",
    "both directions": "EACCES",
    "new file": "EACCES",
    "no file": "ENOENT",
    "exclusive": "EEXIST",
    "mkdir again": "EEXIST",
    "mkdir inside": "EPERM",
    "mkdir above": "EPERM",
    "rmdir report": "EPERM",
    "unlink attribute": "EPERM",
    "rmdir attribute": "ENOTDIR",
    "stat": "0o100444",
    "through a directory": b"sev_guest\n".hex(),
    "relative": b"sev_guest\n".hex(),
    "listed": "auxblob generation inblob outblob privlevel privlevel_floor provider",
    "platform device": "True",
    "chdir": "EACCES",
    "xattr": "ENOTSUP",
}
REDIRECTIONS = {
    "child": outblob_for(INBLOB, 0, 1).hex(),
    "beyond the range": "sev_guest",
    "written by a child": "2\n",
    "level": "0202",
    "dup of what cannot be read": "EINVAL",
}
EXPECTED = {
    "go": GO,
    "descriptors": DESCRIPTORS,
    "paths": PATHS,
    "redirections": REDIRECTIONS,
    "interrupted": {"wrong": ""},
    "threads": {"wrong": "[]", "left": "[]"},
}


@pytest.mark.parametrize("mode", sorted(EXPECTED))
def test_clients(wrapped: Wrapped, mode: str) -> None:
    """Result by result what Linux answers: drivers/virt/coco/guest/report.c, fs/configfs."""
    ended = wrapped(sys.executable, CLIENT, mode, options=("--tsm",))
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out) == EXPECTED[mode]


@pytest.mark.parametrize("mode", ["go", "descriptors", "redirections"])
@pytest.mark.parametrize("option", ["--not-killable", "--no-process-vm"])
def test_on_other_hosts(wrapped: Wrapped, mode: str, option: str) -> None:
    """Kernels before 5.19, where calls are carried out once by other means; profiles without process_vm."""
    ended = wrapped(sys.executable, CLIENT, mode, options=("--tsm", option))
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out) == EXPECTED[mode]


def test_signals_before_linux_5_19(wrapped: Wrapped) -> None:
    """Answers that a signal takes away are played back; here one does from every call that changes something.

    Not those that a signal overtakes between our sending them and the program's waking up: the kernel says
    that they were delivered.
    """
    ended = wrapped(sys.executable, CLIENT, "called_away", options=("--tsm", "--not-killable", "--lose"))
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out) == {"wrong": ""}


def test_a_slow_report_does_not_hold_up_others(wrapped: Wrapped, tmp_path: Path) -> None:
    """Reports are made by workers."""
    options = ("--tsm", "--gate", str(tmp_path))
    ended = wrapped(sys.executable, CLIENT, "slow", str(tmp_path), options=options)
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out) == {"answered first": "False", "read": "1184"}


@pytest.mark.parametrize(
    ("script", "out"),
    [
        ("cat $R/r/provider $R/r/generation", "sev_guest\n0\n"),
        ("head -c 64 /dev/zero > $R/r/inblob; cat $R/r/generation; wc -c < $R/r/outblob", "1\n1184\n"),
        ("dd if=/dev/zero of=$R/r/inblob bs=64 count=1 status=none; cat $R/r/outblob | wc -c", "1184\n"),
        ("head -c 64 /dev/zero > $R/r/inblob; cp $R/r/auxblob $T; wc -c < $T", "4800\n"),
        ("head -c 64 /dev/zero > $T; cp $T $R/r/inblob; cat $R/r/outblob > $T; wc -c < $T", "1184\n"),
        ("echo 2 > $R/r/privlevel; echo 0x3 >> $R/r/privlevel; cat $R/r/generation", "2\n"),
        ("head -c 63 /dev/zero > $R/r/inblob; cat $R/r/outblob", "cat: R/r/outblob: Invalid argument\n"),
        ("head -c 100000 /dev/zero > $R/r/inblob; cat $R/r/generation", "1\n"),
        (
            "stat -c '%a %s %F' $R/r/inblob $R/r/generation",
            "200 0 regular empty file\n444 4096 regular file\n",
        ),
        ("rm $R/r/inblob", "rm: cannot remove 'R/r/inblob': Operation not permitted\n"),
        ("mkdir $R/r/x", "mkdir: cannot create directory 'R/r/x': Operation not permitted\n"),
        ("touch $R/x", "touch: cannot touch 'R/x': Permission denied\n"),
        ("ls $R; find $R | wc -l; ls -l $R/r | wc -l", "r\n9\n8\n"),
        ("test -f $R/r/inblob && test -d $R/r && ! test -e $R/r/x && echo yes", "yes\n"),
        ("exec 3< $R/r/provider; cat <&3", "sev_guest\n"),
        ("ulimit -n 100; cat $R/r/provider", "sev_guest\n"),
        ("ulimit -n 100; cat $R/r/outblob", "cat: R/r/outblob: Invalid argument\n"),
        ("for f in $R/*/generation; do cat $f; done", "0\n"),
        ("rm -rf $R/r 2>&1 | grep -c 'Operation not permitted'; rmdir $R/r; ls $R", "7\n"),
        ("test -d /sys/devices/platform/sev-guest && ls -a /sys/devices/platform/sev-guest", ".\n..\n"),
    ],
)
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_shell(wrapped: Wrapped, tmp_path: Path, shell: str, script: str, out: str) -> None:
    """What scripts do."""
    environment = ("LC_ALL=C", f"R={REPORT}", f"T={tmp_path}/copy")
    ended = wrapped("env", *environment, shell, "-c", f"{{ mkdir $R/r; {script}; }} 2>&1", options=("--tsm",))
    assert ended.out.replace(REPORT, "R") == out


@pytest.mark.parametrize(("shell", "text"), [("sh", "can't cd to"), ("bash", "Permission denied")])
def test_working_directory(wrapped: Wrapped, shell: str, text: str) -> None:
    """Nothing can change another process's working directory from outside: EACCES, not a wrong place."""
    ended = wrapped(shell, "-c", f"cd {REPORT}", options=("--tsm",))
    assert text in ended.err


@pytest.mark.parametrize("code", [errno.EIO, errno.ENXIO, errno.ETIMEDOUT, errno.ENOTTY])
def test_errno_of_a_request(wrapped: Wrapped, code: int) -> None:
    """It is the read's, whatever it is."""
    script = f"""
import os
os.mkdir("{REPORT}/r")
open("{REPORT}/r/inblob", "wb").write(bytes(64))
out = os.open("{REPORT}/r/outblob", os.O_RDONLY)
try:
    os.read(out, 1)
except OSError as error:
    print(error.errno)
"""
    ended = wrapped(sys.executable, "-c", script, options=("--tsm", "--tsm-errno", str(code)))
    assert ended.out == f"{code}\n"


def test_nothing_is_left(wrapped: Wrapped) -> None:
    """The private directory is gone when the program has ended, leaked entries or not."""
    script = f"import os; print(os.readlink('/proc/self/fd/%d' % os.open('{REPORT}', os.O_RDONLY)))"
    ended = wrapped(sys.executable, "-c", script, options=("--tsm",))
    root = Path(ended.out.strip()).parents[2]
    assert root.name.startswith("swsnp-")
    assert not root.exists()


def test_without_configfs(wrapped: Wrapped) -> None:
    """A tree of the device alone shows what the host has."""
    assert wrapped("test", "-e", REPORT).status == int(not Path(REPORT).exists())


def test_reports_of_the_machine(tmp_path: Path) -> None:
    """`swsnp run`: report and certificate table of a whole machine, byte for byte those of one request."""
    script = f"""
set -e
mkdir {REPORT}/r
head -c 64 /dev/zero | tr '\\0' 'x' > {REPORT}/r/inblob
echo 1 > {REPORT}/r/privlevel
cp {REPORT}/r/auxblob {REPORT}/r/outblob {tmp_path}
cat {REPORT}/r/provider {REPORT}/r/privlevel_floor {REPORT}/r/generation
rmdir {REPORT}/r
"""
    command = [sys.executable, "-m", "swsnp", "run", "--seed", "1", "--", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "sev_guest\n0\n2\n", "")
    report, table = (tmp_path / "outblob").read_bytes(), (tmp_path / "auxblob").read_bytes()
    assert (len(report), report[0x30], report[0x50:0x90]) == (1184, 1, b"x" * 64)
    ends = []
    for at in range(0, len(table), 24):
        if not any(table[at : at + 24]):
            break
        ends.append(sum(int.from_bytes(table[at + 16 + part : at + 20 + part], "little") for part in (0, 4)))
    assert max(ends) == len(table)
