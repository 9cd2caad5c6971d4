"""All vCPUs at once, against a scripted KVM; and device exits of the run loop."""

from __future__ import annotations

import errno
import queue
import re
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import ExitReason, MpState
from swsnp.vmm import threads
from swsnp.vmm.config import VmConfig
from swsnp.vmm.launch import RunningVm, launch
from swsnp.vmm.stop import GuestShutdown, Idle, PoweredOff, PowerSwitch, TimedOut, UnhandledExit

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.vmm.fake_host import FakeHost

MEMORY = 1 << 20
IDLE = Idle(MpState.HALTED)


class Recorder:
    """A bus that answers 0x21 and switches off at port 0xF4."""

    def __init__(self, power: PowerSwitch) -> None:
        self.power = power
        self.seen: list[tuple[str, int, int, int]] = []

    def port_in(self, port: int, size: int) -> int:
        self.seen.append(("in", port, size, 0))
        return 0x21 + len(self.seen)

    def port_out(self, port: int, size: int, value: int) -> None:
        self.seen.append(("out", port, size, value))
        if port == 0xF4:
            self.power.press("exit port", value)

    def memory_read(self, gpa: int, size: int) -> int:
        self.seen.append(("read", gpa, size, 0))
        return 0x1122334455667788 & (1 << 8 * size) - 1

    def memory_write(self, gpa: int, size: int, value: int) -> None:
        self.seen.append(("write", gpa, size, value))


def start(host: FakeHost, vcpus: int = 1) -> tuple[RunningVm, Recorder]:
    power = PowerSwitch()
    bus = Recorder(power)
    config = VmConfig(name="vm", memory_size=MEMORY, vcpus=vcpus)
    return launch(host, config, (), bus=bus, power=power), bus


def port(direction: int, number: int, data: bytes, size: int = 1) -> Callable[[memoryview], int]:
    def run(area: memoryview) -> int:
        struct.pack_into("<I", area, 8, ExitReason.IO)
        struct.pack_into("<BBHIQ", area, 32, direction, size, number, len(data) // size, 4096)
        area[4096 : 4096 + len(data)] = data
        return 0

    return run


def mmio(gpa: int, size: int, data: bytes | None = None) -> Callable[[memoryview], int]:
    def run(area: memoryview) -> int:
        struct.pack_into("<I", area, 8, ExitReason.MMIO)
        content = (data or b"").ljust(8, b"\0")
        struct.pack_into("<Q8sIB", area, 32, gpa, content, size, data is not None)
        return 0

    return run


def shutdown(area: memoryview) -> int:
    struct.pack_into("<I", area, 8, ExitReason.SHUTDOWN)
    return 0


def interrupted(area: memoryview) -> int:
    return -errno.EINTR


def until_interrupted(host: FakeHost) -> Callable[[memoryview], int]:
    """A vCPU that goes on until somebody interrupts one."""
    release = threading.Event()
    host.on_interrupt = lambda _: release.set()

    def waits(area: memoryview) -> int:
        release.wait(10)
        return -errno.EINTR

    return waits


def keep(found: list[bytes], offset: int, size: int) -> Callable[[memoryview], int]:
    """What lies in the vCPU's memory at the next KVM_RUN."""

    def run(area: memoryview) -> int:
        found.append(bytes(area[offset : offset + size]))
        return shutdown(area)

    return run


def test_ports(host: FakeHost) -> None:
    """Linux, KVM_EXIT_IO: each item of a string form is an access of its own, in order."""
    vm, bus = start(host)
    found: list[bytes] = []
    host.runs[0] = [port(1, 0x3F8, b"AB"), port(1, 0x80, b"\x34\x12", 2), port(0, 0x3FD, b"..")]
    host.runs[0].append(keep(found, 4096, 2))
    assert vm.run() == GuestShutdown()
    assert bus.seen == [
        ("out", 0x3F8, 1, 0x41),
        ("out", 0x3F8, 1, 0x42),
        ("out", 0x80, 2, 0x1234),
        ("in", 0x3FD, 1, 0),
        ("in", 0x3FD, 1, 0),
    ]
    assert found == [b"\x25\x26"]


def test_device_memory(host: FakeHost) -> None:
    """Linux, KVM_EXIT_MMIO: what is read goes where KVM looks for it."""
    vm, bus = start(host)
    found: list[bytes] = []
    host.runs[0] = [mmio(0xD0000004, 4, b"\1\2\3\4"), mmio(0xD0000000, 8), keep(found, 40, 8)]
    assert vm.run() == GuestShutdown()
    assert bus.seen == [("write", 0xD0000004, 4, 0x04030201), ("read", 0xD0000000, 8, 0)]
    assert found == [(0x1122334455667788).to_bytes(8, "little")]


def test_power_switch(host: FakeHost) -> None:
    """A device that switches off ends the run at once, with the guest's status."""
    vm, _ = start(host)
    host.runs[0] = [port(1, 0xF4, b"\x2a")]
    assert vm.run() == PoweredOff("exit port", 0x2A)


def test_without_a_bus(host: FakeHost) -> None:
    """No devices: an access to one ends the run and is named."""
    vm = launch(host, VmConfig(name="vm", memory_size=MEMORY), ())
    host.runs[0] = [port(1, 0x3F8, b"A")]
    stop = vm.run()
    assert isinstance(stop, UnhandledExit)
    assert stop.exit_reason == ExitReason.IO


def test_interrupt(host: FakeHost) -> None:
    """An interrupted run loop comes back although its guest could go on; it runs again after `resume`."""
    vm, _ = start(host)
    host.mp_states[0] = MpState.RUNNABLE
    vm.interrupt(0)
    host.runs[0] = [interrupted]
    assert vm.run() == Idle(MpState.RUNNABLE)
    assert [host.vcpus[fd][0] for fd in host.interrupted] == [0]


def test_boot_processor_ends_it(host: FakeHost) -> None:
    """The boot processor's stop is the VM's; a processor that waits is interrupted."""
    vm, _ = start(host, vcpus=2)
    started = threading.Event()

    def waits(area: memoryview) -> int:
        started.set()
        ended.wait(10)
        return -errno.EINTR

    def first(area: memoryview) -> int:
        started.wait(10)
        return shutdown(area)

    ended = threading.Event()
    host.mp_states[1] = MpState.UNINITIALIZED
    host.runs[0], host.runs[1] = [first], [waits]
    host.on_interrupt = lambda _: ended.set()
    assert vm.run_all() == GuestShutdown()
    assert ended.is_set()


def test_other_processors_end(host: FakeHost) -> None:
    """Any other vCPU's end ends the VM too, but not that it is idle."""
    vm, _ = start(host, vcpus=3)
    host.runs[0], host.runs[1], host.runs[2] = [until_interrupted(host)], [], [shutdown]
    assert vm.run_all() == GuestShutdown()


def test_timeout(host: FakeHost) -> None:
    """After its time a VM is stopped; the next run starts afresh."""
    vm, _ = start(host)
    host.runs[0] = [until_interrupted(host)]
    stop = vm.run_all(0.05)
    assert stop == TimedOut(0.05)
    assert isinstance(stop, TimedOut)
    (place,) = stop.threads
    assert re.fullmatch(r"swsnp\.vmm\.run\.VcpuRunner\.run, line \d+", place), (
        "where it was, not where it ended"
    )
    assert vm.run_all() == IDLE


def test_timeout_after_a_thread_has_ended(host: FakeHost) -> None:
    """A vCPU that is idle for good has no thread any more, while another goes on."""
    vm, _ = start(host, vcpus=2)
    host.runs[0], host.runs[1] = [until_interrupted(host)], []
    stop = vm.run_all(0.2)
    assert isinstance(stop, TimedOut)
    assert stop.threads[1] == "no place of ours: it has ended"


def test_timeout_counts_from_the_start() -> None:
    """A vCPU that becomes idle for good does not give the others more time."""
    clock, waits = [100.0], list[float]()

    class Stops:
        def get(self, timeout: float) -> tuple[int, Idle]:
            waits.append(timeout)
            clock[0] += 2
            if len(waits) > 3:
                raise queue.Empty
            return len(waits), IDLE

    stop = threads._first_end(Stops(), 5, lambda: clock[0])  # type: ignore[arg-type]
    assert stop == TimedOut(5)
    assert waits == [5, 3, 1, 0]


def test_errors_come_out(host: FakeHost) -> None:
    """What a vCPU's thread raises is raised where all are waited for."""
    vm, _ = start(host)

    def fails(area: memoryview) -> int:
        raise LookupError("broken")

    host.runs[0] = [fails]
    with pytest.raises(LookupError, match="broken"):
        vm.run_all()
