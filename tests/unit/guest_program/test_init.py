"""The machine code of a guest's first program: run here as far as it may be, and as a whole by a real kernel.

The kernel is an unpacked Debian package's, which tools/real-guest-files has left; QEMU emulates a processor.
"""

from __future__ import annotations

import fcntl
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from tests.unit.guest_program.emulated import command_of, package_of, qemu_status
from tests.unit.guest_program.emulated import run as run_kernel

from swsnp.vmm.guest_init import (
    _RAX,
    INIT_FAILED,
    NOT_EXECUTED,
    InitPlan,
    _Code,
    _failures,
    _open,
    _say,
    _terminals,
)
from swsnp.vmm.initramfs import prepare_program
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip

WRITE, OPEN, EXECVE, EXIT, FCNTL = 1, 2, 59, 60, 72


def run(code: _Code, tmp_path: Path) -> subprocess.CompletedProcess[bytes]:
    """Execute it on this host."""
    path = tmp_path / "program"
    path.write_bytes(code.linked())
    path.chmod(0o755)
    return subprocess.run([path], capture_output=True, timeout=30, check=False)


def says(text: bytes, status: int) -> bytes:
    """A static program."""
    code = _Code()
    code.call(WRITE, 1, code.data(text), len(text))
    code.call(EXIT, status)
    return code.linked()


def test_system_calls(tmp_path: Path) -> None:
    """System V ABI, x86-64: number and arguments in their registers, strings where they are said to be."""
    path = tmp_path / "says"
    path.write_bytes(says(b"one\n\0\xff", 7))
    path.chmod(0o755)
    done = subprocess.run([path], capture_output=True, timeout=30, check=False)
    assert (done.stdout, done.returncode) == (b"one\n\0\xff", 7)


def test_arguments_and_environment(tmp_path: Path) -> None:
    """execve(2): tables of strings that end with a null pointer; bytes of any kind pass."""
    code = _Code()
    argv = code.table(["sh", "-c", 'printf %s-%s-%s "$1" "$2" "$NAME"; exit 3', "x", "a b", "\udcff"])
    code.call(EXECVE, code.text("/bin/sh"), argv, code.table(["NAME=value"]))
    done = run(code, tmp_path)
    assert (done.stdout, done.returncode) == (b"a b-\xff-value", 3)


def test_failure_is_named(tmp_path: Path) -> None:
    """What failed and its errno, in three digits; what does not fail says nothing."""
    code = _Code()
    code.call(OPEN, code.text("/"), 0)
    code.must("open /")
    code.call(OPEN, code.text("/none/such"), 0)
    code.must("open /none/such")
    code.label("end")
    code.call(EXIT, 1)
    _failures(code)
    code._data += bytes(8)
    done = run(code, tmp_path)
    assert done.stderr.startswith(b"swsnp init: open /none/such: errno 002\n")


@pytest.mark.parametrize(("number", "digits"), [(1, b"001"), (95, b"095"), (123, b"123")])
def test_digits(tmp_path: Path, number: int, digits: bytes) -> None:
    """The number is -rax."""
    code = _Code()
    code.move(0, -number)
    _say(code, b"errno ")
    code.call(EXIT, 0)
    assert run(code, tmp_path).stderr == b"errno " + digits + b"\n"


@pytest.mark.parametrize("before", ["nothing", "no device"])
def test_file_that_comes_late(tmp_path: Path, before: str) -> None:
    """A port comes a moment after its module, its name before its device: it is opened when it is there."""
    late = tmp_path / "late"
    if before == "no device":
        with socket.socket(socket.AF_UNIX) as without_device:  # whose name gives ENXIO, too
            without_device.bind(str(late))
    code = _Code()
    _open(code, str(late), waits=True)
    code.must("open it")
    code.emit("48 89 C7")  # mov rdi, rax
    code.call(WRITE, 1, code.data(b"opened"), 6)
    code.label("end")
    code.call(EXIT, 7)
    _failures(code)
    (tmp_path / "program").write_bytes(code.linked())
    (tmp_path / "program").chmod(0o755)
    with subprocess.Popen([tmp_path / "program"], stdout=subprocess.PIPE) as process:
        time.sleep(0.1)
        assert process.poll() is None
        (tmp_path / "file").touch()
        (tmp_path / "file").replace(late)
        assert process.communicate(timeout=30)[0] == b"opened"
        assert process.returncode == 7


@pytest.mark.parametrize(
    ("name", "waits", "number"),
    [("none", True, 2), ("none", False, 2), ("socket", True, 6), ("file/none", True, 20)],
)
def test_file_that_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, waits: bool, number: int
) -> None:
    """It is not waited for for ever, and what is wrong otherwise not at all."""
    monkeypatch.setattr("swsnp.vmm.guest_init._TRIES", 3 if number < 20 else 1 << 30)
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX) as without_device:
        without_device.bind(str(tmp_path / "socket"))
    code = _Code()
    _open(code, str(tmp_path / name), waits=waits)
    code.must("open it")
    code.label("end")
    code.call(EXIT, 1)
    _failures(code)
    assert run(code, tmp_path).stderr.startswith(b"swsnp init: open it: errno %03d\n" % number)


def starts(tmp_path: Path, plan: InitPlan) -> _Code:
    """The part that opens input and output; what follows writes a word and ends."""
    code = _Code()
    _terminals(code, plan)
    code.call(WRITE, 1, code.data(b"said"), 4)
    code.label("end")
    code.call(EXIT, 7)
    _failures(code)
    return code


def test_ports_of_a_program(tmp_path: Path) -> None:
    """Each is opened, and a byte in the input's tells the host that the guest knows that it is open."""
    for name in ("input", "output"):
        (tmp_path / name).touch()
    plan = InitPlan(input=str(tmp_path / "input"), output=str(tmp_path / "output"), by_ports=True)
    assert run(starts(tmp_path, plan), tmp_path).returncode == 7
    assert [(tmp_path / name).read_bytes() for name in ("input", "output")] == [b"\0", b"said"]


def test_program_gets_no_other_descriptors(tmp_path: Path) -> None:
    """What was opened for standard input and output is closed when the program starts: FD_CLOEXEC, 1."""
    for number in (3, 4):
        code = _Code()
        _terminals(code, InitPlan(input="/dev/null", output="/dev/zero", by_ports=True))
        code.call(FCNTL, number, fcntl.F_GETFD)
        code.emit("48 89 C7")  # mov rdi, rax
        code.move(_RAX, EXIT)
        code.emit("0F 05")
        code.label("end")
        code.call(EXIT, 7)
        _failures(code)
        assert run(code, tmp_path).returncode == fcntl.FD_CLOEXEC


def test_ports_that_come_late(tmp_path: Path) -> None:
    """Input and output are waited for, in this order."""
    plan = InitPlan(input=str(tmp_path / "input"), output=str(tmp_path / "output"), by_ports=True)
    (tmp_path / "program").write_bytes(starts(tmp_path, plan).linked())
    (tmp_path / "program").chmod(0o755)
    with subprocess.Popen([tmp_path / "program"]) as process:
        for name in ("input", "output"):
            time.sleep(0.05)
            assert process.poll() is None
            (tmp_path / name).touch()
        assert process.wait(30) == 7


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (InitPlan(input="/dev/full", output="/dev/null", by_ports=True), "write to /dev/full: errno 028"),
        (InitPlan(input="/none", output="/dev/null"), "open /none: errno 002"),
        (InitPlan(output="/none"), "open /none: errno 002"),
        (InitPlan(output="/dev/null"), "set /dev/null, the second serial port: errno 025"),
    ],
)
def test_input_or_output_that_fails(tmp_path: Path, plan: InitPlan, text: str) -> None:
    """What it was, and its errno."""
    assert run(starts(tmp_path, plan), tmp_path).stderr.decode().startswith(f"swsnp init: {text}\n")


# A real kernel


@pytest.fixture(scope="module")
def kernel(cannot_run: Skip) -> Path:
    """An unpacked kernel package with its modules."""
    return package_of("debian-13", cannot_run)


def boot(
    package: Path, tmp_path: Path, program: bytes, modules: tuple[str, ...] = ()
) -> tuple[int, bytes, bytes]:
    """Exit status, output and console of a program that a kernel runs."""
    (tmp_path / "program").write_bytes(program)
    found = find_modules(package, modules)
    made = prepare_program([str(tmp_path / "program")], modules=found)
    done = run_kernel(command_of(package, tmp_path, made, ""))
    return done.returncode, (tmp_path / "output").read_bytes(), done.stdout


@pytest.mark.slow
def test_program_runs(kernel: Path, tmp_path: Path) -> None:
    """Output comes byte for byte, without the kernel's lines, and the status is the program's."""
    everything = bytes(range(256))
    status, output, _ = boot(kernel, tmp_path, says(everything, 42), ("configfs",))
    assert (status, output) == (qemu_status(42), everything)


@pytest.mark.slow
def test_program_dies(kernel: Path, tmp_path: Path) -> None:
    """A program that a signal ends has 128 and its number: SIGILL, 4."""
    code = _Code()
    code.emit("0F 0B")
    assert boot(kernel, tmp_path, code.linked())[0] == qemu_status(128 + 4)


@pytest.mark.slow
def test_program_cannot_be_executed(kernel: Path, tmp_path: Path) -> None:
    """execve(2) refuses an object file: 127, and the console says why."""
    raw = bytearray(says(b"", 0))
    raw[16:18] = (1).to_bytes(2, "little")  # ET_REL: no program
    status, _, console = boot(kernel, tmp_path, bytes(raw))
    assert status == qemu_status(NOT_EXECUTED)
    assert b"swsnp init: execute /bin/program: errno 008" in console


@pytest.mark.slow
def test_module_does_not_load(kernel: Path, tmp_path: Path) -> None:
    """sev-guest finds no platform device on a processor without SNP: the guest ends with 125 and says why."""
    status, _, console = boot(kernel, tmp_path, says(b"never", 0), ("sev-guest",))
    assert status == qemu_status(INIT_FAILED)
    assert b"sev_guest.ko: errno 019" in console
