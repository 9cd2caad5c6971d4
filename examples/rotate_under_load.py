"""Change certificates and firmware together while guests attest: under the lock nobody sees a mismatch.

Reason 3 of the series for asking userspace: a VMM holds the blob's shared lock from reading it until the
firmware has signed, an operator holds the exclusive one while he changes blob and firmware, and the kernel
needs no mechanism of its own. With --without-lock the operator does not ask, and commits at the worst moment:
between the certificates of a request and its signature.

Exit status: 0 when every report matched the table that came with it, 1 when one did not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from swsnp import HostError, Machine
from swsnp.abi.psp_sev import SEV_ISSUE_CMD, SevIssueCmd, SevUserCommand
from swsnp.abi.snp_report import AttestationReport, TcbVersion
from swsnp.trace import CertsRead, TraceEvent
from swsnp.verify import Roots, verify
from swsnp.vmm.certs import BlobFile, exclusive_lock

if TYPE_CHECKING:
    from datetime import datetime

    from swsnp import VirtualMachine

PATIENCE_S = 60.0
REPORTS_BETWEEN = 3


class Operator:
    """Updates the host; speaks to the firmware through /dev/sev."""

    def __init__(self, machine: Machine, blob: Path, *, takes_lock: bool) -> None:
        self.had_to_wait = 0
        self._machine, self._blob, self._takes_lock = machine, blob, takes_lock
        self._task = machine.kernel.task("operator")
        self._sev = self._task.open("/dev/sev")

    def at_the_worst_moment(self) -> None:
        """A request has its certificates, and not yet its signature."""
        if not self._takes_lock:
            self._change()
            return
        try:
            with exclusive_lock(self._blob, timeout_s=0):
                self._change()
        except HostError:  # somebody's request holds the blob
            self.had_to_wait += 1

    def afterwards(self) -> None:
        """The same, with patience."""
        if self._takes_lock:
            with exclusive_lock(self._blob, timeout_s=PATIENCE_S):
                self._change()

    def _change(self) -> None:
        """New microcode runs and is committed; the certificate of its TCB takes the old one's place."""
        machine, chip = self._machine, self._machine.chip
        levels = chip.reported_tcb.decode(machine.product)
        levels["microcode"] += 1
        chip.update(
            current_tcb=TcbVersion.encode(machine.product, **levels),
            current_version=chip.variables.current_version,
        )
        command = bytearray(bytes(SevIssueCmd(cmd=SevUserCommand.SNP_COMMIT)))
        if result := self._task.ioctl(self._sev, SEV_ISSUE_CMD, command):
            raise OSError(-result, "SNP_COMMIT")
        fresh = self._blob.with_suffix(".new")
        fresh.write_bytes(machine.certificate_table())
        fresh.replace(self._blob)


@dataclass
class Guest:
    """A VM whose program attests without end."""

    vm: VirtualMachine
    reports: int = 0
    mismatches: int = 0
    failed_checks: set[str] = field(default_factory=set)
    tcbs: set[int] = field(default_factory=set)

    def attest(self, roots: Roots, at: datetime) -> None:
        """One report, judged by the table that came with it."""
        nonce = f"{self.vm.name} {self.reports}".encode().ljust(64, b"\0")
        answer = self.vm.extended_report(nonce)
        verdict = verify(answer.report, table=answer.certs, roots=roots, at=at, report_data=nonce)
        self.mismatches += not verdict.passed
        self.failed_checks.update(each.check for each in verdict.failures)
        self.tcbs.add(AttestationReport.parse(answer.report).reported_tcb)
        self.reports += 1


class Load:
    """Guests that attest in threads until the block ends."""

    def __init__(self, guests: list[Guest], roots: Roots, at: datetime) -> None:
        self._guests, self._roots, self._at = guests, roots, at
        self._progress = threading.Condition()
        self._stop = False

    def run(self, guest: Guest) -> None:
        """A thread's work."""
        while not self._stop:
            try:
                guest.attest(self._roots, self._at)
            except BaseException:
                self.stop()
                raise
            with self._progress:
                self._progress.notify_all()

    def stop(self) -> None:
        """Let the threads end."""
        self._stop = True
        with self._progress:
            self._progress.notify_all()

    def wait(self) -> None:
        """Until every guest has some reports more."""
        goals = [guest.reports + REPORTS_BETWEEN for guest in self._guests]

        def reached() -> bool:
            return self._stop or all(g.reports >= n for g, n in zip(self._guests, goals, strict=True))

        with self._progress:
            if not self._progress.wait_for(reached, PATIENCE_S):
                raise TimeoutError("the guests do not get on")


def run(guest_count: int, rotations: int, *, profile: str, lock: bool) -> dict[str, Any]:
    """Rotate under load; what was seen."""
    machine = Machine(profile=profile)
    roots, at = Roots.of(machine.root_certificate), machine.now()
    orders: SimpleQueue[None] = SimpleQueue()
    done: SimpleQueue[Exception | None] = SimpleQueue()
    with ExitStack() as cleanup:
        blob = Path(cleanup.enter_context(tempfile.TemporaryDirectory())) / "certs.blob"
        blob.write_bytes(machine.certificate_table())
        operator = Operator(machine, blob, takes_lock=lock)
        source = BlobFile(blob, timeout_s=PATIENCE_S)
        guests = [Guest(cleanup.enter_context(machine.create_vm(certs=source))) for _ in range(guest_count)]

        def worst_moment(event: TraceEvent) -> None:
            if isinstance(event, CertsRead):
                try:
                    orders.get_nowait()
                except Empty:
                    return
                try:
                    operator.at_the_worst_moment()
                except Exception as error:
                    done.put(error)
                else:
                    done.put(None)

        for guest in guests:
            guest.vm.boot()
        load = Load(guests, roots, at)
        with machine.trace.listen(worst_moment), ThreadPoolExecutor(guest_count) as pool:
            running = [pool.submit(load.run, guest) for guest in guests]
            try:
                for _ in range(rotations):
                    load.wait()
                    orders.put(None)
                    if (error := done.get(timeout=PATIENCE_S)) is not None:
                        raise error
                    operator.afterwards()
                load.wait()
            finally:
                load.stop()
            for each in running:
                each.result()
    mismatches = sum(guest.mismatches for guest in guests)
    return {
        "held": mismatches == 0,
        "lock": lock,
        "rotations": rotations,
        "operator_had_to_wait": operator.had_to_wait,
        "reports": sum(guest.reports for guest in guests),
        "mismatches": mismatches,
        "failed_checks": sorted(set().union(*(guest.failed_checks for guest in guests))),
        "tcbs_seen": [len(guest.tcbs) for guest in guests],
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--guests", type=int, default=3, help="VMs that attest (default: %(default)s)")
    parser.add_argument("--rotations", type=int, default=5, help="how often (default: %(default)s)")
    parser.add_argument("--profile", default="linux-7.2", help="which KVM (default: %(default)s)")
    parser.add_argument("--without-lock", action="store_true", help="the operator does not ask")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    options = parser.parse_args()
    result = run(options.guests, options.rotations, profile=options.profile, lock=not options.without_lock)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            "{rotations} rotations, {reports} reports, {mismatches} mismatches; "
            "the operator had to wait {operator_had_to_wait} times".format(**result)
        )
        failed = ", ".join(result["failed_checks"])
        print("held" if result["held"] else f"did not hold: the verifier's checks {failed} failed")
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
