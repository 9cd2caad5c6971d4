"""Many VMs in one process: what they cost in memory, and how fast they attest at the same time.

`python -m bench.scale` prints the figures of memory as JSON. `bench.run` starts it so, since memory has to be
measured in a process that has done nothing else. `python -m bench.scale ENGINE SECONDS` prints the row of 64
vCPU threads; `bench.run` starts it so with the interpreter that `make free-threaded` builds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.jobs import ENGINES, REPORT_BODY, RESPONSE_SIZE, plain
from swsnp import Machine
from swsnp.abi.snp_report import REPORT_SIZE, SIGNED_SIZE
from swsnp.crypto.ecdsa import SigningKey, verify
from swsnp.vmm.config import VmConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.crypto.ecdsa import Engine
    from swsnp.machine import VirtualMachine

__all__ = ["free_threaded_row", "memory_rows", "threads_row"]

FREE_THREADED: Final = Path("build/free-threaded/venv/bin/python")
"""CPython without its interpreter lock, where `make free-threaded` has made it."""

_VMS: Final = 16
_VCPUS: Final = 4
_TURNS: Final = 8
_FURTHER: Final = 100
_GUEST_MEMORY: Final = 4 << 30
_MIB: Final = 1 << 20
_TOUCHED: Final = 14 * 4096
"""What a booted guest has touched: ten pages of its own, VMSA, context, request and response page."""
_REPORT: Final = slice(32, 32 + REPORT_SIZE)
_BARE: Final = """
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
print(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
"""


def _rss() -> float:
    """Resident memory of this process, MiB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def _row(
    job: str, value: float, floor: float, unit: str, goal: str, library: str = "cryptography"
) -> dict[str, object]:
    figures = {"value": round(value, 2), "floor": round(floor, 2), "ratio": round(value / floor, 3)}
    own = round(value - floor, 2)
    return {
        "job": job,
        **figures,
        "own": own,
        "spread": "",
        "unit": unit,
        "library": library,
        "goal": goal,
    }


# Memory


def _measure_memory() -> dict[str, float]:
    """MiB of this process with one booted VM, and of each further one of 4 GiB."""
    machine = Machine()
    with ExitStack() as stack:
        for number in range(_FURTHER + 1):
            config = VmConfig(name=f"vm{number}", memory_size=_GUEST_MEMORY)
            stack.enter_context(machine.create_vm(config=config)).boot()
            if number == 0:
                one = _rss()
        return {"one": one, "further": (_rss() - one) / _FURTHER}


def memory_rows() -> list[dict[str, object]]:
    """Two rows: a process with one VM, held against one with only the library; a further idle VM."""
    run = [sys.executable, "-m", "bench.scale"]
    figures = json.loads(subprocess.run(run, check=True, capture_output=True).stdout)
    bare = subprocess.run([sys.executable, "-c", _BARE], check=True, capture_output=True).stdout
    return [
        _row("scale/one-vm", figures["one"], int(bare) / 1024, "MiB", "<= 60 MiB"),
        _row("scale/idle-vm-4gib", figures["further"], _TOUCHED / _MIB, "MiB", "<= 2 MiB"),
    ]


# Threads


def _rate(calls: list[Callable[[], object]], seconds: float) -> float:
    """Calls a second, each callable in a thread of its own until the time is over."""
    counts = [0] * len(calls)
    end = time.perf_counter() + seconds

    def work(index: int) -> None:
        call = calls[index]
        while time.perf_counter() < end:
            call()
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def threads_row(seconds: float, engine: Engine) -> dict[str, object]:
    """64 vCPU threads over 16 VMs, every report verified afterwards.

    The floor is the signatures of `cryptography`, which lets the interpreter lock go, whoever signs here.

    Attesting and signing alone take turns; the figures are the best turns.

    Args:
        seconds: how long to attest in all.
        engine: who signs the reports.

    Raises:
        RuntimeError: a report whose signature is wrong.
    """
    machine = Machine(engine=engine)
    signing_key = SigningKey.from_scalar(0x1234567)
    reports: list[bytes] = []
    attested, signed = [], []
    with ExitStack() as stack:
        calls: list[Callable[[], object]] = []
        for _ in range(_VMS):
            vm = stack.enter_context(machine.create_vm(certs=None, vcpus=_VCPUS))
            vm.boot()
            calls += [_keeping(vm, reports) for _ in range(_VCPUS)]
        signers: list[Callable[[], object]] = [lambda: signing_key.sign(REPORT_BODY)] * (os.cpu_count() or 1)
        for _ in range(_TURNS):
            attested.append(_rate(calls, seconds / _TURNS))
            signed.append(_rate(signers, seconds / _TURNS / 2))
    x, y = machine.chip.vcek_public_point(machine.chip.reported_tcb)
    if not all(verify(each[:SIGNED_SIZE], each[SIGNED_SIZE:], x=x, y=y) for each in reports):
        raise RuntimeError("a report is not signed by the chip")
    return _row("scale/64-vcpus", max(attested), max(signed), "1/s", "ratio >= 0.9", engine)


def free_threaded_row(seconds: float, engine: Engine) -> dict[str, object]:
    """`threads_row` by the interpreter without the lock; `FREE_THREADED` has to be there."""
    run = [str(FREE_THREADED), "-m", "bench.scale", engine, str(seconds)]
    row: dict[str, object] = json.loads(subprocess.run(run, check=True, capture_output=True).stdout)
    return {**row, "library": f"{engine}, no lock"}


def _keeping(vm: VirtualMachine, reports: list[bytes]) -> Callable[[], None]:
    """A program that asks for a report and keeps it."""
    response = bytearray(RESPONSE_SIZE)
    request = plain(vm, response)

    def run() -> None:
        request()
        reports.append(bytes(response[_REPORT]))

    return run


def main(arguments: list[str]) -> None:
    """Print figures as JSON; see the module's text."""
    if not arguments:
        json.dump(_measure_memory(), sys.stdout)
        return
    engine, seconds = arguments
    if engine not in ENGINES:
        raise SystemExit(f"engine: got {engine!r}, wanted one of {', '.join(ENGINES)}")
    json.dump(threads_row(float(seconds), engine), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
