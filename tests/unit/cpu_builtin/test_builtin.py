"""The built-in processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.cpu.builtin import BuiltinProcessor, MemorySlot
from swsnp.errors import UsageError
from swsnp.hardware import GuestAccessFault, Halt, NestedPageFault, Vmgexit

if TYPE_CHECKING:
    from collections.abc import Generator

FAULT = NestedPageFault(0x7000, True, True)


class Memory:
    """Only refuses."""

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        raise GuestAccessFault(FAULT)

    def write(self, gpa: int, data: bytes | bytearray | memoryview, *, private: bool) -> None:
        raise GuestAccessFault(FAULT)

    def pvalidate(self, gpa: int, *, validate: bool) -> tuple[int, bool]:
        return 0, False

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool) -> int:
        return 0

    def slots(self) -> tuple[MemorySlot, ...]:
        return ()


@pytest.fixture
def cpu() -> BuiltinProcessor:
    return BuiltinProcessor(Memory())


def _ask_twice(cpu: BuiltinProcessor) -> Generator[None, None, list[int]]:
    seen = [cpu.ghcb_msr]
    for request in (0x002, 0x080):
        cpu.ghcb_msr = request
        yield
        seen.append(cpu.ghcb_msr)
    return seen


def test_yield_is_vmgexit_and_both_sides_write_the_msr(cpu: BuiltinProcessor) -> None:
    """docs/architecture.md: `run` reports Vmgexit at a yield; the MSR carries request and reply."""
    cpu.ghcb_msr = 0x0002000133000001
    cpu.start(_ask_twice(cpu))
    assert cpu.run() == Vmgexit()
    assert cpu.ghcb_msr == 0x002
    cpu.ghcb_msr = 0x111
    assert cpu.run() == Vmgexit()
    assert cpu.ghcb_msr == 0x080
    cpu.ghcb_msr = 0x222
    assert cpu.run() == Halt()
    assert cpu.result() == [0x0002000133000001, 0x111, 0x222]
    assert cpu.run() == Halt()
    assert cpu.result() == [0x0002000133000001, 0x111, 0x222]


def test_a_vcpu_without_program_halts(cpu: BuiltinProcessor) -> None:
    """Entering a vCPU that has no program is HLT."""
    assert cpu.run() == Halt()


def test_one_program_at_a_time(cpu: BuiltinProcessor) -> None:
    """A second start is refused before the first program has run, and while it runs; not after its end."""
    cpu.start(_ask_twice(cpu))
    with pytest.raises(UsageError, match="a program is running"):
        cpu.start(_ask_twice(cpu))
    cpu.run()
    with pytest.raises(UsageError, match="a program is running"):
        cpu.start(_ask_twice(cpu))
    cpu.run()
    assert cpu.run() == Halt()
    cpu.start(_ask_twice(cpu))
    assert cpu.run() == Vmgexit()


def test_no_result_before_the_end(cpu: BuiltinProcessor) -> None:
    """`result` belongs to a program that has ended since the last start."""
    with pytest.raises(UsageError, match="no result"):
        cpu.result()
    for _ in range(2):
        cpu.start(_ask_twice(cpu))
        with pytest.raises(UsageError, match="no result"):
            cpu.result()
        while cpu.run() == Vmgexit():
            with pytest.raises(UsageError, match="no result"):
                cpu.result()
        assert len(cpu.result()) == 3


def test_a_refused_access_is_the_exit_it_carries_and_ends_the_program(cpu: BuiltinProcessor) -> None:
    """AMD 24593: a refused access leaves the guest; a generator cannot restart it, so the program ends."""

    def program() -> Generator[None, None, None]:
        yield
        cpu.memory.write(0x7000, b"x", private=True)

    cpu.start(program())
    assert cpu.run() == Vmgexit()
    assert cpu.run() == FAULT
    assert cpu.run() == Halt()
    with pytest.raises(GuestAccessFault) as caught:
        cpu.result()
    assert caught.value.reason == FAULT
    cpu.start(_ask_twice(cpu))


def test_an_error_of_the_program_is_halt_and_raised_by_result(cpu: BuiltinProcessor) -> None:
    """docs/architecture.md: what the ended program returned, or its exception."""

    def program() -> Generator[None, None, None]:
        yield
        raise ZeroDivisionError("of the guest")

    cpu.start(program())
    assert cpu.run() == Vmgexit()
    assert cpu.run() == Halt()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="of the guest"):
            cpu.result()


def test_an_interrupt_of_the_host_is_not_swallowed(cpu: BuiltinProcessor) -> None:
    """KeyboardInterrupt is not the guest's: it passes `run`, and the program is over."""

    def program() -> Generator[None, None, None]:
        raise KeyboardInterrupt
        yield

    cpu.start(program())
    with pytest.raises(KeyboardInterrupt):
        cpu.run()
    assert cpu.run() == Halt()
    with pytest.raises(KeyboardInterrupt):
        cpu.result()


def test_an_abandoned_program_lets_go_of_what_it_holds(cpu: BuiltinProcessor) -> None:
    """A VM that ends under a program closes it; the vCPU is free again, without a result."""
    held: list[str] = []

    def program() -> Generator[None, None, None]:
        held.append("lock")
        try:
            yield
        finally:
            held.remove("lock")

    cpu.abandon()
    cpu.start(program())
    assert cpu.run() == Vmgexit()
    assert held == ["lock"]
    cpu.abandon()
    assert held == []
    assert cpu.run() == Halt()
    with pytest.raises(UsageError, match="abandoned"):
        cpu.result()
    cpu.start(_ask_twice(cpu))
