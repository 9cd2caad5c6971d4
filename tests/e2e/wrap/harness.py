"""A program of its own: `harness.py [OPTIONS] -- PROGRAM ARGS` wraps a program around a made-up device.

The device answers SNP_GET_REPORT from the request's bytes and records every call.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from swsnp.abi.sev_guest import SNP_GET_REPORT
from swsnp.errors import HostError
from swsnp.front import wrap
from swsnp.front.wrap.doctor import prerequisites
from swsnp.front.wrap.supervisor import Supervisor
from swsnp.front.wrap.tree import device_tree, guest_tree
from swsnp.guest.caller import CallerFault
from swsnp.guest.tsm import ConfigfsTsm
from swsnp.guest.tsm_report import Blobs
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.front.wrap.calls import Answer
    from swsnp.front.wrap.replay import LostAnswers
    from swsnp.front.wrap.supervisor import _Job
    from swsnp.guest.caller import CallerMemory
    from swsnp.guest.tsm_report import ReportInput

__all__ = ["AUXBLOB", "FakeDevice", "FakeProvider", "outblob_for", "report_for"]

AUXBLOB = b"certificates" * 400

_PATIENCE = 45
"""Seconds: less than what a test waits for its program."""

ARGUMENT = struct.Struct("<B7xQQQ")


def report_for(user_data: bytes) -> bytes:
    """The 4000 bytes that the device answers to 64 bytes of user data."""
    return (user_data[::-1] + user_data).ljust(4000, b"\xa5")


class Gate:
    """What a slow device waits for: it leaves `entered` in a folder, and goes on once `open` is there."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def wait(self) -> None:
        if self._folder is None:
            return
        (self._folder / "entered").touch()
        for _ in range(_PATIENCE * 1000):
            if (self._folder / "open").exists():
                return
            time.sleep(0.001)
        raise RuntimeError("nobody opened the gate")


class CallsAway(Supervisor):
    """Has a signal call the program away from every call that is carried out once, before its answer goes."""

    def _repeatable(self, job: _Job, work: Callable[[CallerMemory], Answer], lost: LostAnswers) -> None:
        def interrupted(caller: CallerMemory) -> Answer:
            answer = work(caller)
            if isinstance(answer, int):
                os.kill(job.notification.tid, signal.SIGALRM)
                while self._listener.valid(job.notification.id):
                    time.sleep(0.0005)
            return answer

        super()._repeatable(job, interrupted, lost)


class FakeDevice:
    """Answers from the request alone; records (command, msg_version, result)."""

    def __init__(self, *, gate: Gate, fail: bool = False) -> None:
        self.gate = gate
        self.fail = fail
        self.calls: list[tuple[int, int, int]] = []
        self.requests: list[str] = []
        self._lock = threading.Lock()

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        version, result = -1, -errno.EFAULT
        try:
            version, request, response, _ = ARGUMENT.unpack(caller.read(argument, 32))
            result = self._answer(command, argument, version, request, response, caller)
        except CallerFault:
            result = -errno.EFAULT
        with self._lock:
            self.calls.append((command, version, result))
        return result

    def _answer(
        self, command: int, argument: int, version: int, request: int, response: int, caller: CallerMemory
    ) -> int:
        if self.fail:
            raise RuntimeError("made to fail")
        if version == 0:
            return -errno.EINVAL
        if command != SNP_GET_REPORT:
            caller.write(argument + 24, struct.pack("<Q", 0xFF))
            return -errno.ENOTTY
        if not request or not response:
            return -errno.EINVAL
        user_data = caller.read(request, 96)[:64]
        with self._lock:
            self.requests.append(user_data.hex())
        if version == 2:  # write back and fail in one call
            caller.write(argument + 24, struct.pack("<Q", 1 << 32))
            return -errno.EIO
        if version == 4:
            return 4
        self.gate.wait()
        caller.write(response, report_for(user_data))
        return 0


def outblob_for(inblob: bytes, privlevel: int, number: int) -> bytes:
    """What configfs-tsm answers to the `number`th request, 1,184 bytes."""
    return (inblob[::-1] + bytes([privlevel, number & 0xFF])).ljust(1184, b"\xa5")


class FakeProvider:
    """Makes reports from the input alone; a service attribute or a short inblob is EINVAL, as ever."""

    name, privlevel_floor, services = "sev_guest", 0, False

    def __init__(self, *, gate: Gate, fail: int = 0) -> None:
        self.gate, self.fail, self.reports = gate, fail, 0

    def report_new(self, given: ReportInput) -> Blobs:
        if len(given.inblob) != 64:
            raise TsmError(errno.EINVAL)
        self.reports += 1
        self.gate.wait()
        if self.fail:
            raise TsmError(self.fail)
        return Blobs(outblob=outblob_for(given.inblob, given.privlevel, self.reports), auxblob=AUXBLOB)


def main() -> int:
    """Returns what the program returned."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path)
    parser.add_argument("--gate", type=Path, help="folder: reports wait until there is `open` in it")
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--not-killable", action="store_true", help="as on kernels before 5.19")
    parser.add_argument("--lose", action="store_true", help="a signal for every call before its answer")
    parser.add_argument("--no-process-vm", action="store_true", help="as under profiles that refuse it")
    parser.add_argument("--tsm", action="store_true", help="with configfs-tsm")
    parser.add_argument("--tsm-errno", type=int, default=0)
    parser.add_argument("program", nargs="+")
    options = parser.parse_args()
    logging.basicConfig(format="LOG %(levelname)s %(message)s")
    gate = Gate(options.gate)
    device = FakeDevice(gate=gate, fail=options.fail)
    tsm = None
    if options.tsm:
        tsm = ConfigfsTsm()
        tsm.register(FakeProvider(gate=gate, fail=options.tsm_errno))
    try:
        if options.not_killable or options.no_process_vm:
            arch, features = prerequisites()
            features = features._replace(killable=features.killable and not options.not_killable)
            tree = device_tree(device) if tsm is None else guest_tree(device, tsm)
            kind = CallsAway if options.lose else Supervisor
            supervisor = kind(tree, arch=arch, features=features, process_vm=not options.no_process_vm)
            status = supervisor.run(options.program, os.environ)
            tree.close()
        else:
            status = wrap.run(options.program, device, tsm=tsm)
    except HostError as error:
        print(f"HostError: {error}", file=sys.stderr)
        return 4
    if options.log:
        options.log.write_text(json.dumps({"calls": device.calls, "requests": device.requests}))
    return status


if __name__ == "__main__":
    sys.exit(main())
