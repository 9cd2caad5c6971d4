"""Each guest its own key: VMs of one host with VCEK, VLEK A and VLEK B, each served its own certificates.

Reason 1 of the series for asking userspace: a certificate table belongs to a VM, and KVM knows nothing of it.
A chip holds one VLEK at a time. So the source of a VM's certificates takes the host's lock, loads the VLEK
that this guest's report is to be signed with, hands out the table that goes with it, and lets go when the
firmware has answered. Guests of the VCEK need no lock: they ask with KEY_SEL 1.

Exit status: 0 when every report matched the table that its guest got, 1 when one did not.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swsnp import Machine
from swsnp.abi.snp_message import KeySel
from swsnp.abi.snp_report import AttestationReport, SigningKey
from swsnp.trace import CertsRead, TraceEvent
from swsnp.verify import Policy, Roots, verify
from swsnp.vmm.certs import Acquired, Blob, Failed, Retry, TooLarge

if TYPE_CHECKING:
    from datetime import datetime

    from swsnp import VirtualMachine
    from swsnp.machine import Vlek

PATIENCE_S = 10.0


class VlekSource:
    """One VM's certificates, together with the VLEK that they are of."""

    def __init__(self, machine: Machine, vlek: Vlek, chip_is_mine: threading.Lock) -> None:
        self.name = vlek.csp_id
        self._machine, self._vlek, self._lock = machine, vlek, chip_is_mine

    def acquire(self, room: int, *, least_wait_s: float = 0.0) -> Acquired:
        """See `swsnp.vmm.certs.CertificateSource`: what is returned is held until the firmware has signed."""
        table = self._vlek.table
        if len(table) > room:
            return TooLarge(len(table))
        if not self._lock.acquire(timeout=max(PATIENCE_S, least_wait_s)):
            return Retry("another guest's request has the chip")
        try:
            self._machine.load_vlek(self._vlek)
        except Exception as error:  # the guest has to be answered whatever went wrong
            self._lock.release()
            return Failed(f"{self.name}: {error}")
        return Blob(table, self._lock.release)


class CarelessSource(VlekSource):
    """Lets go at once: nothing keeps the VLEK loaded until the firmware has signed."""

    def acquire(self, room: int, *, least_wait_s: float = 0.0) -> Acquired:
        """As above, but the lock is free again before the request goes to the firmware."""
        found = super().acquire(room, least_wait_s=least_wait_s)
        if not isinstance(found, Blob):
            return found
        found.release()
        return Blob(found.data)


@dataclass
class Guest:
    """A VM, and what its reports should be."""

    vm: VirtualMachine
    key: SigningKey
    csp_id: str
    reports: int = 0
    mismatches: int = 0

    def attest(self, requests: int, roots: Roots, at: datetime) -> None:
        """Attest again and again, judging every report by the table that came with it."""
        key_sel = KeySel.VLEK if self.csp_id else KeySel.VCEK
        for number in range(requests):
            nonce = f"{self.vm.name} {number}".encode().ljust(64, b"\0")
            answer = self.vm.extended_report(nonce, rsvd=key_sel.to_bytes(28, "little"))
            verdict = verify(
                answer.report,
                table=answer.certs,
                roots=roots,
                at=at,
                report_data=nonce,
                policy=Policy(csp_ids=[self.csp_id] if self.csp_id else []),
            )
            signer = AttestationReport.parse(answer.report).signer_info.signing_key
            self.reports += 1
            self.mismatches += not (verdict.passed and signer == self.key)


def run(requests: int, *, profile: str, lock: bool) -> dict[str, Any]:
    """Start three VMs, let their guests attest in threads, and count what does not match."""
    machine = Machine(profile=profile)
    first, second = machine.vlek("CN=provider-a.example"), machine.vlek("CN=provider-b.example")
    chip_is_mine = threading.Lock()
    source = VlekSource if lock else CarelessSource
    guests = [
        Guest(machine.create_vm("vcek"), SigningKey.VCEK, ""),
        *(
            Guest(
                machine.create_vm(vlek.csp_id, certs=source(machine, vlek, chip_is_mine)),
                SigningKey.VLEK,
                vlek.csp_id,
            )
            for vlek in (first, second)
        ),
    ]

    def another_guest_asks(event: TraceEvent) -> None:
        """Between certificates and signature; with the lock, no source can load anything here."""
        if isinstance(event, CertsRead) and event.source == first.csp_id:
            machine.load_vlek(second)

    roots, at = Roots.of(machine.root_certificate), machine.now()
    with ExitStack() as cleanup:
        for guest in guests:
            cleanup.enter_context(guest.vm)
            guest.vm.boot()
        if not lock:
            cleanup.enter_context(machine.trace.listen(another_guest_asks))
        with ThreadPoolExecutor(len(guests)) as pool:
            list(pool.map(lambda guest: guest.attest(requests, roots, at), guests))
    rows = [
        {"vm": each.vm.name, "key": each.key.name, "reports": each.reports, "mismatches": each.mismatches}
        for each in guests
    ]
    mismatches = sum(each.mismatches for each in guests)
    return {"held": mismatches == 0, "lock": lock, "mismatches": mismatches, "guests": rows}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=40, help="of each guest (default: %(default)s)")
    parser.add_argument("--profile", default="linux-7.2", help="which KVM (default: %(default)s)")
    parser.add_argument("--without-lock", action="store_true", help="let go before the firmware has signed")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    options = parser.parse_args()
    result = run(options.requests, profile=options.profile, lock=not options.without_lock)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for row in result["guests"]:
            print("{vm:22} {key:5} {reports:4} reports, {mismatches} mismatches".format(**row))
        print("held" if result["held"] else "did not hold: certificates and signatures of different keys")
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
