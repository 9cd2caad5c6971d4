"""The same VMM with a guest that has no SEV-SNP: what an SNP guest's cost is held against."""

from __future__ import annotations

import pytest
from tests.e2e.plain_kvm.test_kernel import MEMORY

from swsnp.cpu.plain_kvm import LinuxKvm
from swsnp.errors import UsageError
from swsnp.hardware.memory import BusError
from swsnp.machine.ordinary_vm import OrdinaryVm
from swsnp.measure.kernel_image import parse_kernel
from swsnp.testing.tiny_kernel import bz_image, elf_image
from swsnp.vmm.config import VmConfig
from swsnp.vmm.devices.bus import Bus
from swsnp.vmm.devices.legacy import DebugExit
from swsnp.vmm.devices.serial import COM1, Serial16550
from swsnp.vmm.stop import GuestShutdown, PoweredOff, PowerSwitch, TimedOut

VMGEXIT = "f3 0f 01 d9"
"""Kernels without it are refused; none of these guests gets there."""


class Bench:
    """One guest after another on the host's KVM."""

    def __init__(self) -> None:
        LinuxKvm.listen_for_interrupts()
        self.console = bytearray()

    def make(self, code: str, *, cmdline: str = "", vcpus: int = 1) -> OrdinaryVm:
        bus, power = Bus(), PowerSwitch()
        image = parse_kernel(bz_image(elf_image(bytes.fromhex(f"{code} {VMGEXIT}"))), "tiny")
        config = VmConfig(memory_size=MEMORY, vcpus=vcpus)
        vm = OrdinaryVm(config, image, host=LinuxKvm(), bus=bus, power=power, initrd=b"disk", cmdline=cmdline)
        bus.attach_ports(COM1, Serial16550(vm.interrupt_line(4), self.console.extend))
        bus.attach_ports(range(0xF4, 0xF8), DebugExit(power))
        return vm

    def boot(self, code: str, *, cmdline: str = "", vcpus: int = 1, timeout_s: float = 30) -> object:
        with self.make(code, cmdline=cmdline, vcpus=vcpus) as vm:
            return vm.run(timeout_s)


@pytest.fixture
def bench(c_bit: int) -> Bench:
    return Bench()


def test_ports(bench: Bench) -> None:
    """A line feed for the console, a byte for the exit port; there is no stub before the kernel."""
    with bench.make("ba f8 03 00 00 b0 0a ee b0 2a e6 f4") as vm:  # mov edx, 0x3f8; mov al, 10; out dx, al
        assert vm.run(30) == PoweredOff("exit port", 42)
        assert vm.processors[0].entries == 2
        assert not vm.processors[0].sites
        assert not vm.measurement
    assert bytes(bench.console) == b"\n"


def test_start(bench: Bench) -> None:
    """Linux, boot protocol: RSI names the boot parameters; there are no setup data, which SNP guests have."""
    # mov rax, [rsi+0x250] (setup_data); mov ebx, [rsi+0x228] (command line); or al, [rbx]; out 0xf4, al
    assert bench.boot("48 8b 86 50 02 00 00 8b 9e 28 02 00 00 0a 03 e6 f4", cmdline="*") == PoweredOff(
        "exit port", ord("*")
    )


def test_cpuid_has_no_encryption(bench: Bench) -> None:
    """AMD 24594, Fn8000_001F: an ordinary guest has neither SEV nor a C-bit."""
    # mov eax, 0x8000001f; xor ecx, ecx; cpuid; and eax, 0x1a; out 0xf4, al
    assert bench.boot("b8 1f 00 00 80 31 c9 0f a2 83 e0 1a e6 f4") == PoweredOff("exit port", 0)


def test_memory(bench: Bench) -> None:
    """One plane, which devices reach too."""
    with bench.make("c6 04 25 00 00 30 00 07 e6 f4") as vm:  # mov byte [0x300000], 7
        vm.run(30)
        assert vm.ram.read(0x300000, 1) == b"\7"
        vm.ram.write(0x300000, b"\1\2")
        assert vm.ram.read(0x300000, 2) == b"\1\2"
        with pytest.raises(BusError, match="no memory holds"):
            vm.ram.read(MEMORY, 1)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_timeout(bench: Bench, vcpus: int) -> None:
    """An endless loop is stopped, and a vCPU that nobody starts waits in the kernel meanwhile."""
    with bench.make("eb fe", vcpus=vcpus) as vm:
        assert vm.run(0.3) == TimedOut(0.3)
        assert vm.processors[0].rip == 0x100_0000


def test_triple_fault(bench: Bench) -> None:
    """AMD 24593: an exception without an IDT is a shutdown."""
    assert bench.boot("0f 0b") == GuestShutdown()


def test_too_little_memory(bench: Bench) -> None:
    """The same refusals as for an SNP guest."""
    with pytest.raises(UsageError, match="-m: got"):
        OrdinaryVm(
            VmConfig(memory_size=1 << 20),
            parse_kernel(bz_image(elf_image(bytes.fromhex(VMGEXIT))), "tiny"),
            host=LinuxKvm(),
            bus=Bus(),
            power=PowerSwitch(),
        )
