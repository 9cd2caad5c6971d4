"""`swsnp vm -kernel`: files are judged before the host, and every end has its exit code and words."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.cli.conftest import vm

from swsnp.cli import main
from swsnp.cpu.plain_kvm import Verdict, probe, probe_for_linux
from swsnp.machine import Machine
from swsnp.measure.direct_boot import LAYOUT
from swsnp.testing.tiny_kernel import GOOD, bz_image, elf_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Skip

    from swsnp.machine.kernel_vm import KernelVm

VMGEXIT = "f3 0f 01 d9"


def code(tmp_path: Path, text: str) -> str:
    path = tmp_path / "code"
    path.write_bytes(bz_image(elf_image(bytes.fromhex(text))))
    return str(path)


def test_wrong_files(tmp_path: Path, kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 and the file's name, before the host is looked at."""
    wrong = tmp_path / "wrong"
    wrong.write_bytes(bytes(2048))
    bad_map = tmp_path / "map"
    bad_map.write_text("ffffffff81000000 T _text\nnonsense\n")
    for arguments, text in (
        (["-kernel", str(wrong)], f"{wrong}: not a bzImage"),
        (["-kernel", "/nowhere/k"], "/nowhere/k: cannot be read"),
        (["-kernel", kernel, "-initrd", "/nowhere/i"], "/nowhere/i: cannot be read"),
        (["-kernel", kernel, "--system-map", "/nowhere/m"], "/nowhere/m: cannot be read"),
        (["-kernel", kernel, "--system-map", str(bad_map)], f"{bad_map}: line 2: wanted address"),
    ):
        assert vm(*arguments) == 3
        assert text in capsys.readouterr().err


def test_host_that_cannot(
    kernel: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 4 with the reason and the remedy."""
    verdict = Verdict(usable=False, reason="/dev/kvm: lacks POPCNT", remedy="another host")
    monkeypatch.setattr("swsnp.cli.vm_kernel.probe_for_linux", lambda: verdict)
    assert vm("-kernel", kernel) == 4
    assert "/dev/kvm: lacks POPCNT; remedy: another host" in capsys.readouterr().err


def test_probe_tells_hosts_apart(cannot_run: Skip) -> None:
    """A KVM that runs five instructions may still lack what Linux needs; then it says which came first."""
    tiny = probe()
    if not tiny.usable:
        cannot_run(tiny.reason, tiny.remedy, avoidable=False)
    verdict = probe_for_linux()
    assert verdict.usable or ("lacks instructions that Linux needs" in verdict.reason and verdict.remedy)


@pytest.mark.usefixtures("any_kvm")
def test_guest_status(kernel: str, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """The exit code is the guest's own; its console comes out as it is, and into the log."""
    log, stats, trace = tmp_path / "log", tmp_path / "stats", tmp_path / "trace"
    arguments = ("-append", "hello, kernel", "-m", "32M", "-serial", f"file:{log}", "-no-reboot")
    assert vm("-kernel", kernel, *arguments, "--stats", str(stats), "--trace", str(trace)) == GOOD
    assert capsysbinary.readouterr().out == b"hello, kernel\n"
    assert log.read_bytes() == b"hello, kernel\n"
    found = json.loads(stats.read_text())
    assert (found["stop"], found["status"], found["rewritten"]) == ("PoweredOff", GOOD, 6)
    seconds = found["seconds"]
    assert 0 < seconds["launched"] <= seconds["console"]
    lines = trace.read_text().splitlines()
    assert any(each.startswith("vCPU 0: PortAccess at 0x") for each in lines)
    assert any("GHCB MSR PSC_REQ" in each for each in lines)


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize("model", ["EPYC-Milan-v2", "EPYC-Genoa", "EPYC-Turin"])
def test_cpu_model(model: str, kernel: str, tmp_path: Path) -> None:
    """Each part takes the CPUID page of the host that guests run on; the measurement knows the model."""
    stats = tmp_path / "stats"
    assert vm("-kernel", kernel, "-m", "32M", "-cpu", model, "-append", "x", "--stats", str(stats)) == GOOD
    assert json.loads(stats.read_text())["measurement"]


@pytest.mark.usefixtures("any_kvm")
def test_symbols(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Addresses have names where System.map is given."""
    names = tmp_path / "System.map"
    names.write_text("0000000001000000 T startup_64\n")
    path = code(tmp_path, f"90 90 0f 0b {VMGEXIT}")
    assert vm("-kernel", path, "-m", "32M", "--system-map", str(names)) == 1
    assert "the guest triple-faulted (vCPU 0 at 0x1000002 (startup_64+0x2))" in capsys.readouterr().err


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        (f"0f 0b {VMGEXIT}", [], "the guest triple-faulted"),
        (f"eb fe {VMGEXIT}", ["--timeout", "0.3"], "the guest was stopped after 0.3 s"),
        (
            f"b9 30 01 01 c0 b8 00 11 02 00 31 d2 0f 30 {VMGEXIT}",
            [],
            "the guest asked to be terminated: set 1 (Linux), code 2: PVALIDATE failed",
        ),
        (f"b8 00 00 00 d0 8b 00 {VMGEXIT}", ["-smp", "1"], "triple-faulted"),
    ],
)
def test_bad_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: list[str], words: str
) -> None:
    """Exit code 1, and why the guest ended."""
    assert vm("-kernel", code(tmp_path, text), "-m", "32M", *arguments) == 1
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize("snp", [True, False])
def test_timeout_tells_of_every_vcpu(snp: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A guest that sleeps for ever is told from one that runs, and a vCPU from its thread."""
    path = code(tmp_path, f"fa f4 {VMGEXIT}")  # cli; hlt
    machine = () if snp else ("-machine", "q35")
    assert vm("-kernel", path, "-m", "32M", "-smp", "2", "--timeout", "0.5", *machine) == 1
    first, second = (line for line in capsys.readouterr().err.splitlines() if "its thread was in" in line)
    assert first.startswith("swsnp vm: vCPU 0: halted, interrupts off, pending none, in service none, timer")
    assert "; its thread was in swsnp.cpu.plain_kvm.host.LinuxKvm.ioctl, line " in first
    assert second.startswith("swsnp vm: vCPU 1: uninitialized, interrupts off, pending none")
    kept_by = "hypervisor.startup.Startup.sleep" if snp else "cpu.plain_kvm.host.LinuxKvm.ioctl"
    assert f"; its thread was in swsnp.{kept_by}, line " in second


@pytest.mark.usefixtures("any_kvm")
def test_reset(tmp_path: Path) -> None:
    """QEMU, -no-reboot: a reset ends the VM, with exit code 0."""
    path = code(tmp_path, f"b0 fe e6 64 {VMGEXIT}")
    assert vm("-kernel", path, "-m", "32M", "-no-reboot") == 0


@pytest.mark.usefixtures("any_kvm")
def test_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Without -no-reboot a reset starts the kernel again, on the same machine."""
    path = code(tmp_path, f"66 ba f8 03 b0 41 ee b0 0a ee b0 fe e6 64 {VMGEXIT}")
    boots = []
    launch = Machine.launch_kernel

    def counted(*arguments: Any, **named: Any) -> KernelVm:
        boots.append(1)
        if len(boots) == 3:
            raise KeyboardInterrupt
        return launch(*arguments, **named)

    monkeypatch.setattr(Machine, "launch_kernel", counted)
    assert vm("-kernel", path, "-m", "32M") == 130
    assert capsysbinary.readouterr().out == b"A\nA\n"


class Interrupts:
    """A terminal where ^A x is typed at once, or a ^C for the whole command."""

    quits = True

    def __init__(self, receive: object, interrupt: Callable[[], None], descriptor: int) -> None:
        kill = partial(signal.pthread_kill, threading.main_thread().ident or 0, signal.SIGINT)
        self._timer = threading.Timer(0.1, interrupt if self.quits else kill)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.join()


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize(("quits", "status"), [(True, 0), (False, 130)])
def test_interrupted(quits: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu(1): ^A x ends the guest, and that is well; an interrupt of the command is one."""
    monkeypatch.setattr(Interrupts, "quits", quits)
    monkeypatch.setattr("swsnp.cli.vm_input.Terminal", Interrupts)
    stats = tmp_path / "stats"
    with open(os.devnull) as nothing:  # noqa: PTH123  # pytest's own has no descriptor
        monkeypatch.setattr(sys, "stdin", nothing)
        path = code(tmp_path, f"eb fe {VMGEXIT}")
        assert vm("-kernel", path, "-m", "32M", "--timeout", "20", "--stats", str(stats)) == status
    if quits:
        found = json.loads(stats.read_text())
        assert (found["stop"], found["status"]) == ("PoweredOff", 0)


@pytest.mark.usefixtures("any_kvm")
def test_nothing_stays_open(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that cannot have its log is closed; it holds the host's KVM and its memory."""
    happened: list[str] = []
    launch = Machine.launch_kernel

    def noted(*arguments: Any, **named: Any) -> KernelVm:
        vm = launch(*arguments, **named)
        close = vm.close

        def closing() -> None:
            happened.append("closed")
            close()

        monkeypatch.setattr(vm, "close", closing)
        happened.append("opened")
        return vm

    monkeypatch.setattr(Machine, "launch_kernel", noted)
    assert vm("-kernel", kernel, "-m", "32M", "-serial", f"file:{tmp_path}/no/log") == 2
    assert happened == ["opened", "closed"]


@pytest.mark.usefixtures("any_kvm")
def test_wrong_options(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2: another C-bit position than the host's, too little memory, unwritable files."""
    machine = ("-machine", "q35,confidential-guest-support=s", "-object", "sev-snp-guest,id=s,cbitpos=3")
    for arguments, text in (
        (machine, "property 'cbitpos': got 3, wanted this host's"),
        (("-m", "8M"), "-m: got 0x800000 bytes below 4 GiB, wanted at least"),
        (("-serial", f"file:{tmp_path}/no/log"), "log: cannot be written"),
        (("-no-reboot", "--trace", f"{tmp_path}/no/trace"), "trace: cannot be written"),
    ):
        assert vm("-kernel", kernel, *arguments) == 2
        assert text in capsys.readouterr().err


@pytest.mark.usefixtures("any_kvm")
@pytest.mark.parametrize("more", [[], ["-smp", "3", "-cpu", "EPYC-Turin"]])
def test_measurement(
    kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    """What `swsnp measure kernel` computes from the same options is what was launched."""
    stats, initrd = tmp_path / "stats", tmp_path / "initrd"
    initrd.write_bytes(b"some files")
    same = ["-kernel", kernel, "-initrd", str(initrd), "-append", "a b,c", "-m", "32M", *more]
    assert vm(*same, "-no-reboot", "--stats", str(stats)) == GOOD
    found = json.loads(stats.read_text())
    capsys.readouterr()
    assert main(["measure", "kernel", "--cbitpos", str(found["cbitpos"]), *same]) == 0
    assert capsys.readouterr().out == found["measurement"] + "\n"
    assert main(["measure", "kernel", "--json", "--cbitpos", "51", *same]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["measurement"] != found["measurement"]
    assert other["layout"] == LAYOUT


def test_measure_explains(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part that is launched, in order, then the digest."""
    assert main(["measure", "kernel", "--explain", "--cbitpos", "51", "-kernel", kernel]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["0x0000000000", "7", "pages", "NORMAL", "zeros"]
    assert lines[1].split() == ["0x0000007000", "1", "pages", "NORMAL", "boot", "parameters"]
    assert any("SECRETS" in each for each in lines)
    assert len(lines[-1]) == 96


WANTED = "measure kernel: wanted -kernel, and no -bios"
FIRMWARE = (
    *("--cbitpos", "51", "-cpu", "EPYC-Milan", "-machine", "q35,confidential-guest-support=s"),
    *("-object", "sev-snp-guest,id=s,cbitpos=51,reduced-phys-bits=1,kernel-hashes="),
)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--cbitpos", "51", "-bios", "b", "-kernel", "k"], 2, ""),
        ([*FIRMWARE[:-1], f"{FIRMWARE[-1]}on", "-bios", "b", "-kernel", "k"], 2, WANTED),
        ([*FIRMWARE[:-1], f"{FIRMWARE[-1]}off"], 2, WANTED),
        (["--cbitpos", "5", "-kernel", "KERNEL"], 2, "--cbitpos: got 5, wanted 32..51"),
        (["--cbitpos", "31", "-kernel", "KERNEL"], 2, "--cbitpos: got 31, wanted 32..51"),
        (["--cbitpos", "52", "-kernel", "KERNEL"], 2, "--cbitpos: got 52, wanted 32..51"),
        (["--cbitpos", "32", "-kernel", "/nowhere/k"], 3, "/nowhere/k: cannot be read"),
        (["--cbitpos", "51", "-kernel", "k", "-cpu", "EPYC-Milan-vx"], 2, "whose CPUID signature is known"),
        (["--cbitpos", "51", "-kernel", "/nowhere/k"], 3, "/nowhere/k: cannot be read"),
        (["--cbitpos", "51", "-kernel", "KERNEL", "-initrd", "/nowhere/i"], 3, "/nowhere/i: cannot be read"),
        (["--cbitpos", "51"], 2, ""),
        (
            [
                *("--cbitpos", "51", "-kernel", "KERNEL", "-object", "sev-snp-guest,id=s,cbitpos=39"),
                *("-machine", "q35,confidential-guest-support=s"),
            ],
            2,
            "--cbitpos: got 51, and cbitpos=39 in the object; give one",
        ),
    ],
)
def test_measure_refuses(
    kernel: str, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, text: str
) -> None:
    """Wrong options and files are named, as `swsnp vm` names them."""
    assert (
        main(["measure", "kernel", *(kernel if each == "KERNEL" else each for each in arguments)]) == status
    )
    assert text in capsys.readouterr().err


def test_kernel_configuration(kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3 with file, option, got and wanted, before the host is looked at."""
    config = tmp_path / "config"
    config.write_text("CONFIG_AMD_MEM_ENCRYPT=y\n# CONFIG_SEV_GUEST is not set\n")
    assert vm("-kernel", kernel, "--kernel-config", str(config)) == 3
    assert f"{config}: CONFIG_SEV_GUEST: got n, wanted y or m" in capsys.readouterr().err


def test_no_kernel_configuration(
    kernel: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is none that is said, and the boot goes on (here: to the host, which cannot)."""
    verdict = Verdict(usable=False, reason="no", remedy="none")
    monkeypatch.setattr("swsnp.cli.vm_kernel.probe_for_linux", lambda: verdict)
    assert vm("-kernel", kernel) == 4
    assert "its configuration was not checked" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--kernel-config", "--save-root", "--trace"])
def test_ordinary_guest_has_no_reports(option: str, kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What only SNP guests have is refused, not ignored."""
    assert vm("-kernel", kernel, "-machine", "q35", option, "file") == 2
    assert f"{option}: wanted an SNP guest" in capsys.readouterr().err


@pytest.mark.usefixtures("any_kvm")
def test_ordinary_guest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As QEMU: -machine without confidential-guest-support is a guest without SNP."""
    stats = tmp_path / "stats"
    arguments = ("-m", "32M", "-machine", "q35", "--stats", str(stats))
    assert vm("-kernel", code(tmp_path, f"b0 09 e6 f4 {VMGEXIT}"), *arguments) == 9
    assert not capsys.readouterr().err
    found = json.loads(stats.read_text())
    assert (found["snp"], found["measurement"], found["cbitpos"], found["entries"]) == (
        False,
        None,
        None,
        [1],
    )
    assert found["seconds"]["ended"] >= found["seconds"]["launched"]
