"""Serve the calls of one wrapped program and its descendants until the last of them has ended.

One thread takes notifications and answers calls with paths; calls of the device go to workers, because the
device may take its time while other threads of the program open files. This is a test harness, not a sandbox:
a program can change a path between our look at it and the kernel's, and deceives nobody but itself.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import signal
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from swsnp.errors import UsageError
from swsnp.front.wrap import seccomp
from swsnp.front.wrap.bpf import AT_FDCWD, build_filter
from swsnp.front.wrap.calls import (
    CARRY_ON,
    ON_DESCRIPTOR,
    ON_PATH,
    DescriptorCall,
    HandOver,
    PathCall,
    about_descriptor,
)
from swsnp.front.wrap.handles import free_descriptor
from swsnp.front.wrap.launch import Plan, reserved_descriptors, start
from swsnp.front.wrap.memory import Caller, Targets
from swsnp.front.wrap.paths import Resolver, signed
from swsnp.front.wrap.replay import LostAnswers, Transcript
from swsnp.front.wrap.workers import Workers
from swsnp.guest.caller import CallerFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from swsnp.front.device import SevGuestDevice
    from swsnp.front.wrap.arch import Architecture
    from swsnp.front.wrap.calls import Answer, PathHandler
    from swsnp.front.wrap.memory import TargetMemory
    from swsnp.front.wrap.seccomp import Features, Notification
    from swsnp.front.wrap.tree import VirtualTree
    from swsnp.guest.caller import CallerMemory

__all__ = ["Supervisor"]

_logger = logging.getLogger(__name__)

_OUTLIVED = (signal.SIGINT, signal.SIGQUIT)
"""The terminal sends these to the program as well; the supervisor serves it to its end."""
_FORWARDED = (signal.SIGTERM, signal.SIGHUP)
_HANDLED = (*_OUTLIVED, *_FORWARDED, signal.SIGCHLD)


class _Job(NamedTuple):
    """A call that a worker answers; `work` is None for ioctl."""

    notification: Notification
    memory: TargetMemory
    work: Callable[[CallerMemory], Answer] | None = None


class Supervisor:
    """Runs one program; until `run` returns, this process's signals and all of its children are its own."""

    def __init__(
        self, tree: VirtualTree, *, arch: Architecture, features: Features, process_vm: bool
    ) -> None:
        """A supervisor.

        Args:
            tree: the files that the program shall see.
            arch: of this process.
            features: what the kernel has; without `killable`, lost answers are kept and played back.
            process_vm: whether process_vm_readv may be used.
        """
        self._tree = tree
        self._arch = arch
        self._features = features
        self._resolver = Resolver(tree.prefixes)
        self._targets = Targets(process_vm=process_vm)
        self._workers = Workers(self._in_worker)
        self._lost = None if features.killable else LostAnswers()
        self._on_path = {arch.calls[name]: each for name, each in ON_PATH.items() if name in arch.calls}
        self._on_descriptor = {
            arch.calls[name]: each for name, each in ON_DESCRIPTOR.items() if name in arch.calls
        }
        self._reserved = range(0)
        self._listener: seccomp.Listener
        self._child = 0
        self._status: int | None = None
        self._stop = -1
        self._out_of_reach: set[int] = set()

    # start and end

    def run(self, argv: Sequence[str], environ: Mapping[str, str]) -> int:
        """Run a program and serve it, its descendants and its daemons until the last has ended.

        Args:
            argv: the program, looked for along PATH, and its arguments.
            environ: its environment.

        Returns:
            The program's exit status; 128 + N when signal N ended it; 127 or 126 when it could not be
            executed.

        Raises:
            HostError: this host does not permit it.
            UsageError: no program, or not the main thread (which alone gets signals).
        """
        if not argv:
            raise UsageError("run: got no program, wanted argv[0]")
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "run: called in a thread, wanted the main thread, which signals are delivered to"
            )
        self._reserved = reserved_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        seccomp.set_subreaper(True)
        try:
            restore = self._start(argv, environ)
            try:
                self._serve()
            finally:
                self._end(restore)
        finally:
            seccomp.set_subreaper(False)
            os.close(self._stop)
        if self._status is None:
            self._status = os.waitpid(self._child, 0)[1]
        code = os.waitstatus_to_exitcode(self._status)
        return code if code >= 0 else 128 - code

    def _start(self, argv: Sequence[str], environ: Mapping[str, str]) -> dict[int, Any]:
        """Start the program and take over the signals; returns how they were handled before."""
        before = {number: signal.getsignal(number) for number in _HANDLED}
        plan = Plan(
            argv=argv,
            environ=environ,
            arch=self._arch,
            program=build_filter(self._arch, self._reserved),
            killable=self._features.killable,
            ignored=frozenset(number for number, handler in before.items() if handler is signal.SIG_IGN),
            handled=_HANDLED,
        )
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            started = start(plan)
            self._child = started.pid
            self._listener = seccomp.Listener(started.listener, self._features.notif_size)
            for number in _OUTLIVED:
                signal.signal(number, signal.SIG_IGN)
            for number in _FORWARDED:
                signal.signal(number, self._forward)
            signal.signal(signal.SIGCHLD, self._reap)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        return {number: handler for number, handler in before.items() if handler is not None}

    def _end(self, restore: dict[int, Any]) -> None:
        """Give the signals back and let go of the listener."""
        if self._workers.stop():
            self._listener.close()  # else a worker may still answer, and the number must not become another's
        for number, handler in restore.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: object) -> None:
        """Pass a signal on to the program; when it has ended, leave what it left behind."""
        if self._status is None:
            try:
                os.kill(self._child, number)
            except ProcessLookupError:
                pass  # came while `_reap` was at it
            else:
                return
        os.eventfd_write(self._stop, 1)

    def _reap(self, _number: int = 0, _frame: object = None) -> None:
        """Collect ended children, adopted daemons too: before Linux 6.11 a zombie still holds the filter."""
        for pid, status in _ended_children():
            if pid == self._child:
                self._status = status

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._listener.descriptor, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            for descriptor, events in poll.poll():
                if descriptor == self._stop:
                    _logger.warning(
                        "stopped by a signal; processes that %d left behind lose their files", self._child
                    )
                    return
                if not events & select.POLLIN:
                    return  # POLLHUP: nobody is under the filter any more
                self._take()

    # one notification

    def _take(self) -> None:
        notification = self._listener.receive()
        if notification is None:
            return
        try:
            self._dispatch(notification)
        except Exception:
            self._fail(notification)

    def _fail(self, notification: Notification) -> None:
        """Whatever went wrong here must not leave the program waiting."""
        _logger.exception("call %d of thread %d failed here", notification.nr, notification.tid)
        self._listener.answer(notification.id, -errno.EIO)

    def _dispatch(self, notification: Notification) -> None:
        number = notification.nr
        handler = self._on_path.get(number)
        if handler is not None:
            self._path_call(notification, handler)
        elif number == self._arch.calls["ioctl"]:
            self._workers.put(_Job(notification, self._targets.get(notification.tid)))
        elif number in self._on_descriptor:
            self._descriptor_call(notification)
        else:  # an exec: the thread gets another memory
            self._targets.forget()
            self._listener.carry_on(notification.id)

    def _path_call(self, notification: Notification, handler: PathHandler) -> None:
        tid, args = notification.tid, notification.args
        memory = self._targets.get(tid)
        path = self._read_path(memory, args[handler.path])
        if path is None:
            self._listener.carry_on(notification.id)
            return
        dirfd = AT_FDCWD if handler.dirfd is None else signed(args[handler.dirfd])
        resolved = self._resolver.resolve(tid, dirfd, path)
        if resolved is not None and self._tree.covers(resolved):
            self._virtual_path_call(notification, handler, memory, resolved, path)
        elif about_descriptor(handler, args, path):
            self._descriptor_call(notification)
        else:
            self._listener.carry_on(notification.id)

    def _virtual_path_call(
        self,
        notification: Notification,
        handler: PathHandler,
        memory: TargetMemory,
        resolved: bytes,
        path: bytes,
    ) -> None:
        def work(caller: CallerMemory) -> Answer:
            return handler.handle(PathCall(resolved, notification.args, self._tree, caller, self._arch))

        if handler.once and self._lost is not None:

            def work_on_this_path(caller: CallerMemory) -> Answer:
                # another path at the same address is another call
                caller.read(notification.args[handler.path], len(path) + 1)
                return _outcome(lambda: work(caller))

            self._repeatable(_Job(notification, memory), work_on_this_path, self._lost)
        else:
            self._finish(notification, lambda: work(self._caller(notification, memory)))

    def _read_path(self, memory: TargetMemory, address: int) -> bytes | None:
        """The path at `address`; None when the kernel shall look at it."""
        if not address:
            return b""  # stat calls take a null pointer for an empty path (6.11)
        try:
            return memory.read_path(address)
        except CallerFault:
            return None
        except (FileNotFoundError, ProcessLookupError):
            return None  # killed meanwhile
        except OSError as error:
            if memory.tid not in self._out_of_reach:
                self._out_of_reach.add(memory.tid)
                _logger.warning(
                    "thread %d sees the real system: its memory cannot be read (%s); "
                    "is its program readable and not set-id?",
                    memory.tid,
                    error.strerror,
                )
            return None

    def _descriptor_call(self, notification: Notification) -> None:
        handler = self._on_descriptor[notification.nr]
        behind = self._tree.behind(notification.tid, signed(notification.args[handler.at]))
        if behind is None:
            self._listener.carry_on(notification.id)
            return

        def work(caller: CallerMemory) -> Answer:
            return handler.handle(DescriptorCall(*behind, notification.args, caller, self._arch))

        memory = self._targets.get(notification.tid)
        if behind[0].waits:
            self._workers.put(_Job(notification, memory, work))
        else:
            self._finish(notification, lambda: work(self._caller(notification, memory)))

    def _caller(self, notification: Notification, memory: TargetMemory) -> Caller:
        return Caller(memory, lambda: self._listener.valid(notification.id))

    def _finish(self, notification: Notification, work: Callable[[], Answer]) -> None:
        self._send(notification, _outcome(work))

    def _send(self, notification: Notification, answer: Answer) -> None:
        if answer is CARRY_ON:
            self._listener.carry_on(notification.id)
        elif isinstance(answer, HandOver):
            self._hand_over(notification, answer)
        else:
            self._listener.answer(notification.id, answer)

    def _hand_over(self, notification: Notification, opened: HandOver) -> None:
        at = free_descriptor(notification.tid, self._reserved) if opened.reserved else None
        if (at is None and opened.outside is not None) or not self._inject(notification, opened, at):
            memory = self._targets.get(notification.tid)
            self._workers.put(_Job(notification, memory, lambda _: opened.placed_outside()))

    def _inject(self, notification: Notification, opened: HandOver, at: int | None) -> bool:
        """Give the program its descriptor, or the errno; False when it lowered its limit below `at`."""
        try:
            self._listener.inject(notification.id, opened.source, at=at, cloexec=opened.cloexec)
        except OSError as error:
            if at is not None and error.errno == errno.EBADF:
                return False
            self._listener.answer(notification.id, -(error.errno or errno.EIO))
        os.close(opened.source)
        return True

    # what may take its time, in a worker

    def _in_worker(self, job: _Job) -> None:
        notification, work = job.notification, job.work
        try:
            if work is None:
                self._device_call(job)
            elif self._lost is None:
                self._finish(notification, lambda: work(self._caller(notification, job.memory)))
            else:
                self._repeatable(job, lambda caller: _outcome(lambda: work(caller)), self._lost)
        except Exception:
            self._fail(notification)

    def _device_call(self, job: _Job) -> None:
        notification = job.notification
        behind = self._tree.behind(notification.tid, signed(notification.args[0]))
        if behind is None:
            self._listener.carry_on(notification.id)
        elif (device := behind[0].device) is None:
            self._listener.answer(notification.id, -errno.ENOTTY)
        elif self._lost is None:
            caller = self._caller(notification, job.memory)
            self._listener.answer(notification.id, _ioctl(device, notification, caller))
        else:
            self._repeatable(job, lambda caller: _ioctl(device, notification, caller), self._lost)

    def _repeatable(self, job: _Job, work: Callable[[CallerMemory], Answer], lost: LostAnswers) -> None:
        """Do the work once, however often signals make the program repeat the call."""
        notification = job.notification
        key = (notification.tid, notification.nr, notification.args)

        def waits() -> bool:
            return self._listener.valid(notification.id)

        with lost.turn(notification.tid):
            if not waits():
                return  # called away before anything was done
            finished = lost.play_back(key, job.memory, waits)
            if finished is None:
                transcript = Transcript(job.memory, waits)
                answer = work(transcript)
                if not isinstance(answer, int):
                    self._send(notification, answer)
                    return
                finished = transcript.finish(answer)
            if not self._listener.answer(notification.id, finished.result):
                lost.keep(key, finished)


def _outcome(work: Callable[[], Answer]) -> Answer:
    try:
        return work()
    except CallerFault:
        return -errno.EFAULT
    except OSError as error:
        return -(error.errno or errno.EIO)


def _ioctl(device: SevGuestDevice, notification: Notification, caller: CallerMemory) -> int:
    return device.ioctl(notification.args[1] & 0xFFFF_FFFF, notification.args[2], caller)


def _ended_children() -> Iterator[tuple[int, int]]:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status
