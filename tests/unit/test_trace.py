"""Trace events: free when nobody listens, in order when somebody does."""

from __future__ import annotations

from swsnp.machine import Machine
from swsnp.trace import (
    FirmwareCommand,
    GuestReplied,
    MsrProtocol,
    PageStateChange,
    RunEnded,
    Trace,
    TraceEvent,
    Vmgexit,
)


def test_nobody_listens() -> None:
    """Without a listener there is nothing to call."""
    assert Trace().emit is None
    assert Trace().emit_exit is None


def test_single_exits() -> None:
    """They cost nothing unless a listener wants them, and reach only those that do."""
    trace = Trace()
    few: list[TraceEvent] = []
    many: list[TraceEvent] = []
    event = RunEnded(vm="vm", vcpu=0, result=0, exit_reason=2)
    with trace.listen(few.append, exits=False):
        assert trace.emit is not None
        assert trace.emit_exit is None
        with trace.listen(many.append):
            assert trace.emit_exit is not None
            trace.emit_exit(event)
        assert trace.emit_exit is None
    assert (few, many) == ([], [event])


def test_what_a_boot_has_thousands_of() -> None:
    """Conversions and requests in the MSR are single exits, too: who does not want those has none made."""
    machine = Machine()
    few: list[TraceEvent] = []
    many: list[TraceEvent] = []
    with machine.trace.listen(few.append, exits=False):
        with machine.create_vm() as vm:
            vm.boot()
        with machine.trace.listen(many.append), machine.create_vm() as vm:
            vm.boot()
    exits = MsrProtocol, PageStateChange, GuestReplied
    assert all(any(isinstance(each, kind) for each in many) for kind in exits)
    assert not any(isinstance(each, exits) for each in few)
    assert any(isinstance(each, Vmgexit) for each in few)


def test_listeners_come_and_go() -> None:
    """Every listener gets every event of its block, and none after it."""
    trace = Trace()
    first: list[TraceEvent] = []
    second: list[TraceEvent] = []
    event = FirmwareCommand(command=0x94, status=0)
    with trace.listen(first.append):
        with trace.listen(second.append):
            assert trace.emit is not None
            trace.emit(event)
        assert trace.emit is not None
        trace.emit(event)
    assert trace.emit is None
    assert (first, second) == ([event, event], [event])
