"""All vCPUs of a VM at once: a thread each, until one of them says that the VM has ended."""

from __future__ import annotations

import queue
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import MpState
from swsnp.vmm.stop import Idle, StopReason, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swsnp.vmm.run import VcpuRunner

__all__ = ["run_all"]

_HALTED: Final = MpState.HALTED
_OURS: Final = "swsnp."
_PATIENCE_S: Final = 0.5
"""How often a thread that has to end is interrupted again, should it have missed the first time."""


def run_all(
    runners: Sequence[VcpuRunner],
    timeout_s: float | None = None,
    *,
    monotonic: Callable[[], float] = time.monotonic,
) -> StopReason:
    """Run every vCPU until the VM has come to an end.

    It ends with the boot processor's stop, or with any vCPU's other than being idle. A vCPU that was not
    started, or is held, waits in KVM_RUN.

    Args:
        runners: by vCPU number.
        timeout_s: after so many seconds the VM is stopped; None: never.
        monotonic: the clock that they are measured with.

    Returns:
        Why it ended; `TimedOut` after `timeout_s`.
    """
    stops: queue.SimpleQueue[tuple[int, StopReason | BaseException]] = queue.SimpleQueue()
    ending = threading.Event()

    def work(runner: VcpuRunner) -> None:
        try:
            while True:
                stop = runner.run()
                if ending.is_set() or not isinstance(stop, Idle) or stop.mp_state == _HALTED:
                    break
        except BaseException as error:  # reported by the thread that waits for all
            stops.put((runner.vcpu, error))
        else:
            stops.put((runner.vcpu, stop))

    threads = [
        threading.Thread(target=work, args=(runner,), name=f"vCPU {runner.vcpu}", daemon=True)
        for runner in runners
    ]
    for thread in threads:
        thread.start()
    try:
        stop = _first_end(stops, timeout_s, monotonic)
        if isinstance(stop, TimedOut):  # before they are interrupted
            return replace(stop, threads=tuple(map(_place, threads)))
        return stop
    finally:
        ending.set()
        for thread, runner in zip(threads, runners, strict=True):
            while thread.is_alive():
                runner.interrupt()
                thread.join(_PATIENCE_S)
            runner.resume()


def _place(thread: threading.Thread) -> str:
    """The innermost place of ours where a thread is: what it called there keeps it."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith(_OURS):
        frame = frame.f_back
    if frame is None:
        return "no place of ours: it has ended"
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}, line {frame.f_lineno}"


def _first_end(
    stops: queue.SimpleQueue[tuple[int, StopReason | BaseException]],
    timeout_s: float | None,
    monotonic: Callable[[], float],
) -> StopReason:
    end = None if timeout_s is None else monotonic() + timeout_s
    while True:
        try:
            vcpu, stop = stops.get(timeout=None if end is None else max(0, end - monotonic()))
        except queue.Empty:
            return TimedOut(timeout_s or 0)
        if isinstance(stop, BaseException):
            raise stop
        if vcpu == 0 or not isinstance(stop, Idle):
            return stop
