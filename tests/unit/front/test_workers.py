"""The threads that device calls run in."""

from __future__ import annotations

import threading
from queue import SimpleQueue

from swsnp.front.wrap.workers import Workers


def test_jobs_run_beside_each_other_up_to_a_number() -> None:
    """Two jobs that wait for one another end; a third waits until a thread is free."""
    meeting = threading.Barrier(2, timeout=5)
    done: SimpleQueue[int] = SimpleQueue()
    gate = threading.Event()

    def work(job: int) -> None:
        if job < 2:
            meeting.wait()
        elif job < 4:
            gate.wait(5)
        done.put(job)

    workers = Workers(work, most=2)
    workers.put(0)
    workers.put(1)
    assert {done.get(timeout=5), done.get(timeout=5)} == {0, 1}
    for job in (2, 3, 4):
        workers.put(job)
    assert done.empty()
    assert not workers.stop()
    gate.set()
    assert {done.get(timeout=5) for _ in range(3)} == {2, 3, 4}


def test_a_free_thread_is_used_again() -> None:
    """One job at a time needs one thread."""
    names: SimpleQueue[int] = SimpleQueue()
    ended = threading.Semaphore(0)

    def work(_: int) -> None:
        names.put(threading.get_ident())
        ended.release()

    workers = Workers(work, most=8)
    seen = set()
    for job in range(5):
        workers.put(job)
        seen.add(names.get(timeout=5))
        while workers._unfinished:  # the thread counts down after the job
            pass
    assert len(seen) == 1
    assert workers.stop()


def test_nothing_was_ever_done() -> None:
    """A program may never ask the device."""
    assert Workers(lambda _: None).stop()
