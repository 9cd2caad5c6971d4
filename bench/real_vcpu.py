"""A report request whose VMGEXIT a real vCPU executes, against the in-process request and the bare exit.

The guest's driver is the same Python on both sides. On the one, each of its VMGEXITs is executed by machine
code on the host's `/dev/kvm`, over the guest's own memory. On the other, KVM_RUN is called for the same
instruction, and nothing is made of the exit. The difference is what `PlainKvmProcessor` itself costs.
"""

from __future__ import annotations

import fcntl
from functools import partial
from typing import TYPE_CHECKING, Final

from bench.jobs import ENGINES, Job, plain
from swsnp import Machine
from swsnp.abi.kvm import Ioctl
from swsnp.cpu.plain_kvm import (
    FlatStart,
    HostVm,
    LinuxKvm,
    PlainKvmProcessor,
    boot_pages,
    c_bit_position,
    probe,
)
from swsnp.hardware.exits import Vmgexit
from swsnp.hardware.memory import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import ExitStack

    from swsnp.cpu.builtin import BuiltinProcessor
    from swsnp.hardware.exits import GuestExit
    from swsnp.machine import VirtualMachine

__all__ = ["bare_exit", "real_vcpu_jobs"]

_TABLES: Final = 0x40_0000
_CODE_GPA: Final = 0x40_8000
_CODE: Final = bytes.fromhex(
    "f3 0f 01 d9"  # vmgexit
    "eb fa"  # jmp back to it
)
_KVM_RUN: Final = int(Ioctl.KVM_RUN)


def real_vcpu_jobs(stack: ExitStack) -> Iterator[Job]:
    """One per signer; none where the host's KVM runs no guests."""
    if not probe().usable:
        return
    for engine in ENGINES:
        machine = Machine(engine=engine)
        real, modelled = (stack.enter_context(machine.create_vm()) for _ in range(2))
        for vm in (real, modelled):
            vm.boot()
        processor = _looping(real.vcpus[0])
        stack.callback(processor.close)
        real.vcpus[0].run = _through(real.vcpus[0].run, processor)  # type: ignore[method-assign]
        floor = _both(plain(modelled), bare_exit(stack, modelled))
        yield Job("request/real-vcpu", engine, plain(real), floor, "ratio <= 1.2")


def bare_exit(stack: ExitStack, vm: VirtualMachine) -> Callable[[], object]:
    """KVM_RUN for a VMGEXIT of which nothing is made; the guest of `vm` has booted."""
    host = _Counted()
    bare = _looping(vm.vcpus[0], host)
    stack.callback(bare.close)
    bare.run()
    return partial(fcntl.ioctl, host.vcpu, _KVM_RUN)


class _Counted(LinuxKvm):
    """The host's KVM, which remembers the descriptor that KVM_RUN was called on."""

    vcpu = -1

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        if request == _KVM_RUN:
            self.vcpu = fd
        return super().ioctl(fd, request, argument)


def _looping(guest: BuiltinProcessor, host: LinuxKvm | None = None) -> PlainKvmProcessor:
    """A vCPU in an endless loop of VMGEXITs, in the memory of a guest that is a Python program."""
    host, memory = host or LinuxKvm(), guest.memory
    tables = boot_pages(_TABLES, c_bit=c_bit_position(host))
    for gpa, data in ((_TABLES, tables), (_CODE_GPA, _CODE)):
        for page in range(gpa, gpa + len(data), PAGE):
            memory.pvalidate(page, validate=True)
        memory.write(gpa, data, private=True)
    vm = HostVm(host, memory, [range(_CODE_GPA, _CODE_GPA + len(_CODE))])  # type: ignore[arg-type]
    return PlainKvmProcessor(vm, memory, start=FlatStart(entry=_CODE_GPA, tables=_TABLES))  # type: ignore[arg-type]


def _through(modelled: Callable[[], GuestExit], real: PlainKvmProcessor) -> Callable[[], GuestExit]:
    """The program runs to its next VMGEXIT, which is then executed."""

    def run() -> GuestExit:
        left = modelled()
        if isinstance(left, Vmgexit) and real.run() != left:
            raise RuntimeError(f"the vCPU left otherwise: {real.last_error}")
        return left

    return run


def _both(request: Callable[[], None], leave: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        leave()
        request()

    return run
