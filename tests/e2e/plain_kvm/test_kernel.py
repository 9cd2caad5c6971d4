"""A kernel from its file to its exit status on the host's /dev/kvm, through every party."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from swsnp.cpu.plain_kvm import LinuxKvm
from swsnp.errors import UsageError
from swsnp.hardware.memory import PAGE
from swsnp.machine import Machine
from swsnp.machine.kernel_vm import KernelVm, host_processor
from swsnp.measure.kernel_image import parse_kernel
from swsnp.testing.tiny_kernel import DEVICE_GPA, GHCB_GPA, GOOD, bz_image, elf_image, tiny_kernel
from swsnp.trace import ApStarted, GuestLeft, PageStateChange, TraceEvent
from swsnp.vmm.config import VmConfig
from swsnp.vmm.devices.bus import Bus
from swsnp.vmm.devices.legacy import DebugExit
from swsnp.vmm.devices.serial import COM1, Serial16550
from swsnp.vmm.stop import GuestShutdown, PoweredOff, PowerSwitch, Terminated, TimedOut

MEMORY = 32 << 20


@dataclass
class Cell:
    """Device memory of eight bytes: the first four hold a number, the others keep what is written."""

    written: list[tuple[int, int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> int:
        return 0x1234

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


class Bench:
    """A machine, and one kernel after another on it."""

    def __init__(self) -> None:
        LinuxKvm.listen_for_interrupts()
        self.processor = host_processor()
        self.machine = Machine(processor=self.processor)
        self.console = bytearray()
        self.cell = Cell()
        self.events: list[TraceEvent] = []

    def launch(
        self, raw: bytes, cmdline: str = "hello", vcpus: int = 1, *, passable: bool = False
    ) -> KernelVm:
        bus, power = Bus(), PowerSwitch()
        c_bit = self.processor.c_bit
        vm = self.machine.launch_kernel(
            VmConfig(
                memory_size=MEMORY, vcpus=vcpus, cbitpos=c_bit, host_cbitpos=c_bit, passable_memory=passable
            ),
            parse_kernel(raw, "tiny"),
            bus=bus,
            power=power,
            cmdline=cmdline,
        )
        bus.attach_ports(COM1, Serial16550(vm.interrupt_line(4), self.console.extend))
        bus.attach_ports(range(0xF4, 0xF8), DebugExit(power))
        bus.attach_memory(range(DEVICE_GPA, DEVICE_GPA + 8), self.cell)
        return vm

    def boot(self, raw: bytes, cmdline: str = "hello", vcpus: int = 1, timeout_s: float = 30) -> object:
        with self.launch(raw, cmdline, vcpus) as vm, self.machine.trace.listen(self.events.append):
            return vm.run(timeout_s)


@pytest.fixture
def bench(c_bit: int) -> Bench:
    return Bench()


def test_kernel_runs(bench: Bench) -> None:
    """Console, device memory, PVALIDATE, page state change and registration from a bzImage's own code."""
    assert bench.boot(tiny_kernel(), "hello world") == PoweredOff("exit port", GOOD)
    assert bytes(bench.console) == b"hello world\n"
    assert bench.cell.written == [(4, 4, 0x1235)]
    changes = [each for each in bench.events if isinstance(each, PageStateChange)]
    assert [(each.gpa, each.npages, each.private) for each in changes] == [(GHCB_GPA, 1, False)]
    assert any(isinstance(each, GuestLeft) and each.exit == "PortAccess" for each in bench.events)


def test_second_processor(bench: Bench) -> None:
    """GHCB 2.0, SNP AP creation: the second vCPU starts from its VMSA in real mode, beside the first."""
    assert bench.boot(tiny_kernel(), "2 cpus", vcpus=2) == PoweredOff("exit port", GOOD)
    assert sorted(bytes(bench.console)) == sorted(b"2 cpus\nA\n")
    assert [each.vcpu for each in bench.events if isinstance(each, ApStarted)] == [1]


def test_measurement(bench: Bench) -> None:
    """AMD 56860: the firmware's launch digest is the one that is computed from the same parts."""
    with bench.launch(tiny_kernel(), "a command line", vcpus=2) as vm:
        (context,) = bench.machine.mailbox.platform.guests.values()
        assert context.ld == vm.measurement


def test_timeout(bench: Bench) -> None:
    """A guest in an endless loop is stopped, and the next one runs."""
    loop = elf_image(bytes.fromhex("eb fe f3 0f 01 d9"))
    assert bench.boot(bz_image(loop), timeout_s=0.3) == TimedOut(0.3)
    assert bench.boot(tiny_kernel()) == PoweredOff("exit port", GOOD)


def test_triple_fault(bench: Bench) -> None:
    """AMD 24593: an exception without an IDT is a shutdown."""
    assert bench.boot(bz_image(elf_image(bytes.fromhex("0f 0b f3 0f 01 d9")))) == GuestShutdown()


def test_memory_was_validated_before(bench: Bench) -> None:
    """Direct boot: the stub has validated all memory; a second PVALIDATE says so by the carry flag."""
    # mov eax, 0x200000; xor ecx, ecx; mov edx, 1; pvalidate; sbb eax, eax; out 0xf4, al
    code = "b8 00 00 20 00 31 c9 ba 01 00 00 00 f2 0f 01 ff 19 c0 e6 f4 f3 0f 01 d9"
    assert bench.boot(bz_image(elf_image(bytes.fromhex(code)))) == PoweredOff("exit port", 0xFF)


def test_terminates(bench: Bench) -> None:
    """GHCB 2.0: a termination request names set and code."""
    # mov ecx, 0xc0010130; mov eax, 0x00031100; xor edx, edx; wrmsr; vmgexit
    code = "b9 30 01 01 c0 b8 00 11 03 00 31 d2 0f 30 f3 0f 01 d9"
    assert bench.boot(bz_image(elf_image(bytes.fromhex(code)))) == Terminated(1, 3, 0x31100)


def test_garbage_in_the_msr(bench: Bench) -> None:
    """GHCB 2.0: an address without memory, then an unknown request: the guest goes on, nothing breaks."""
    # mov ecx, MSR; mov eax, 0xfffff000; mov edx, -1; wrmsr; vmgexit; mov eax, 0xfff; wrmsr; vmgexit
    code = (
        "b9 30 01 01 c0 b8 00 f0 ff ff ba ff ff ff ff 0f 30 f3 0f 01 d9 "
        "b8 ff 0f 00 00 0f 30 f3 0f 01 d9 b0 07 e6 f4"
    )
    assert bench.boot(bz_image(elf_image(bytes.fromhex(code)))) == PoweredOff("exit port", 7)


def test_ghcb_that_is_not_registered(bench: Bench) -> None:
    """Linux, sev_handle_vmgexit: an unregistered GHCB is refused; the guest's next request is served."""
    # mov eax, 0x300000; wrmsr; vmgexit; mov al, 7; out 0xf4, al
    code = "b9 30 01 01 c0 b8 00 00 30 00 31 d2 0f 30 f3 0f 01 d9 b0 07 e6 f4"
    stop = bench.boot(bz_image(elf_image(bytes.fromhex(code))))
    assert stop == PoweredOff("exit port", 7)


def test_no_processor() -> None:
    """A machine has to be told that its guests run on the host's processor."""
    with pytest.raises(UsageError, match="processor="):
        Machine().launch_kernel(
            VmConfig(), parse_kernel(tiny_kernel(), "tiny"), bus=Bus(), power=PowerSwitch()
        )


def test_only_the_shared_plane_can_be_passed(bench: Bench) -> None:
    """docs/adr/0020: who gets the descriptors sees what the guest has converted, and zeros elsewhere."""
    before = _memfds()
    with bench.launch(tiny_kernel(), "a secret command line", passable=True) as vm:
        ((gpa, size, fd),) = vm.ram.passable()
        assert (gpa, size, _memfds() - before) == (0, MEMORY, {os.fstat(fd).st_ino})
        assert vm.run(30) == PoweredOff("exit port", GOOD)
        vm.ram.write(
            GHCB_GPA, b"shared"
        )  # the guest reads that page and writes nothing to it once it is shared
        assert [at for at in range(0, size, PAGE) if any(os.pread(fd, PAGE, at))] == [GHCB_GPA]
    assert _memfds() == before


def _memfds() -> set[int]:
    """Files whose descriptors could give this process's memory away."""
    found = set()
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the folder's own
            if "memfd:" in str(each.readlink()):
                found.add(each.stat().st_ino)
    return found
