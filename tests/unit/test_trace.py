"""Trace events: free when nobody listens, in order when somebody does."""

from __future__ import annotations

from swsnp.trace import FirmwareCommand, Trace, TraceEvent


def test_nobody_listens() -> None:
    """Without a listener there is nothing to call."""
    assert Trace().emit is None


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
