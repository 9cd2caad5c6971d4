"""Many VMs on one chip: what they share is the chip and nothing else, and they fit one process."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

import pytest

from swsnp import Machine, Product
from swsnp.abi.snp_command import Command
from swsnp.abi.snp_report import SIGNED_SIZE, AttestationReport
from swsnp.crypto.ecdsa import SigningKey, verify
from swsnp.firmware.settings import preset
from swsnp.trace import FirmwareCommand, MessageSealed, TraceEvent
from swsnp.vmm.launch import LaunchError

_THOUSAND: Final = """
import json, os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from contextlib import ExitStack
from swsnp import Machine
from swsnp.vmm.config import VmConfig

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1024

machine, nonce = Machine(), bytes(64)
with ExitStack() as stack:
    vms = []
    for number in range(1000):
        config = VmConfig(name=f"vm{number}", memory_size=4 << 30)
        vms.append(stack.enter_context(machine.create_vm(config=config)))
        vms[-1].boot()
        if number == 0:
            one = resident()
    all_of_them = resident()
    asids = sorted(guest.asid for guest in machine.mailbox.platform.guests.values())
    reports = {vm.report(nonce).report[0x140:0x160] for vm in vms}
    files = len(os.listdir("/proc/self/fd"))
entries = len(machine.mailbox.platform.guests)
print(json.dumps({
    "one": one, "further": (all_of_them - one) / 999, "report_ids": len(reports), "files": files,
    "distinct_asids": asids == list(range(1, 1001)), "left": entries,
}))
"""


def _machine(**settings: Any) -> Machine:
    return Machine(settings=replace(preset(Product.MILAN), **settings))


@pytest.fixture(scope="module")
def thousand() -> dict[str, Any]:
    """1,000 VMs of 4 GiB in a process that may open 1,024 files."""
    done = subprocess.run(
        [sys.executable, "-c", _THOUSAND], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_thousand_vms_on_one_chip(thousand: dict[str, Any]) -> None:
    """Each has an ASID and a REPORT_ID of its own, and all end; the host's files do not grow with them."""
    assert thousand["distinct_asids"]
    assert thousand["report_ids"] == 1000
    assert thousand["files"] < 20
    assert thousand["left"] == 0


def test_what_a_vm_costs_in_memory(thousand: dict[str, Any]) -> None:
    """One VM: at most 60 MiB of the process; each further idle one of 4 GiB: at most 2 MiB resident."""
    assert thousand["one"] <= 60
    assert thousand["further"] <= 2


def test_asids_are_as_many_as_the_chip_has() -> None:
    """KVM_SEV_INIT2: -EBUSY when every ASID is taken (Linux, arch/x86/kvm/svm/sev.c, sev_asid_new)."""
    machine = _machine(max_asid=3)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(machine.create_vm(certs=None))
        with pytest.raises(LaunchError) as refused:
            machine.create_vm(certs=None)
    assert (refused.value.command, refused.value.errno) == ("SEV_INIT2", errno.EBUSY)


def test_the_end_of_a_vm_gives_its_asid_back() -> None:
    """The ASID is used again after SNP_DF_FLUSH, and only when no clean one is left."""
    machine = _machine(max_asid=2)
    flushes: list[TraceEvent] = []
    with machine.create_vm(certs=None), ExitStack() as second, machine.trace.listen(flushes.append):
        second.enter_context(machine.create_vm(certs=None))
        taken = {guest.asid for guest in machine.mailbox.platform.guests.values()}
        second.close()
        with machine.create_vm(certs=None):
            assert {guest.asid for guest in machine.mailbox.platform.guests.values()} == taken == {1, 2}
    flush = FirmwareCommand(command=Command.SNP_DF_FLUSH, status=0)
    assert flushes.count(flush) == 1


def test_the_end_of_a_vm_gives_its_memory_back() -> None:
    """After as many VMs as one likes nothing is left: no region, no RMP entry, no page that was lost."""
    machine = _machine(max_asid=2)
    memory = machine.kernel.memory

    def left() -> tuple[int, int, int]:
        return len(memory._areas), len(memory._pages), len(machine.kernel.rmp._entries)

    with machine.create_vm(certs=None) as vm:
        vm.boot()
    before = left()
    for _ in range(20):
        with machine.create_vm(certs=None, vcpus=2) as vm:
            vm.boot()
            vm.report(bytes(64))
    assert left() == before
    assert machine.kernel.driver.leaked == []


def test_a_refused_launch_keeps_nothing() -> None:
    """A VM that found no ASID leaves the machine as it was: the next one starts when another ends."""
    machine = _machine(max_asid=1)
    with machine.create_vm("a", certs=None), pytest.raises(LaunchError):
        machine.create_vm("b", certs=None)
    with machine.create_vm("b", certs=None) as vm:
        vm.boot()
        assert vm.report(bytes(64)).status == 0


def test_64_vcpus_of_16_vms_attest_at_once() -> None:
    """All are answered, with their own nonce, in their own VM; every signature is the chip's."""
    machine = Machine()
    each = 4
    with ExitStack() as stack:
        vms = [stack.enter_context(machine.create_vm(certs=None, vcpus=4)) for _ in range(16)]
        for vm in vms:
            vm.boot()
        start = threading.Barrier(64)

        def attest(worker: int) -> list[tuple[int, bytes, bytes]]:
            start.wait()
            nonces = [bytes([worker, turn]) * 32 for turn in range(each)]
            return [(worker // 4, nonce, vms[worker // 4].report(nonce).report) for nonce in nonces]

        with ThreadPoolExecutor(64) as pool:
            answers = [answer for got in pool.map(attest, range(64)) for answer in got]
        counts = [guest.message_counts[0] for guest in machine.mailbox.platform.guests.values()]
    assert len(answers) == 64 * each
    x, y = machine.chip.vcek_public_point(machine.chip.reported_tcb)
    owners: dict[bytes, set[int]] = {}
    for vm_number, nonce, raw in answers:
        report = AttestationReport.parse(raw)
        assert report.report_data == nonce
        owners.setdefault(report.report_id, set()).add(vm_number)
        assert verify(raw[:SIGNED_SIZE], raw[SIGNED_SIZE:], x=x, y=y)
    assert sorted(owners.values(), key=min) == [{number} for number in range(16)]
    assert counts == [2 * 4 * each] * 16  # every message has used exactly two numbers


def test_one_vm_is_served_while_the_report_of_another_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chip does one thing at a time, but for signatures: a second VM is answered during the first's."""
    machine = Machine()
    genuine = SigningKey.sign
    order: list[str] = []
    with machine.create_vm("first", certs=None) as first, machine.create_vm("second", certs=None) as second:
        first.boot()
        second.boot()
        answered = threading.Event()

        def sign(key: SigningKey, data: bytes) -> bytes:
            if threading.current_thread() is slow:
                assert answered.wait(20)
            return genuine(key, data)

        def ask_first() -> None:
            first.report(b"1" * 64)
            order.append("first")

        slow = threading.Thread(target=ask_first)
        monkeypatch.setattr(SigningKey, "sign", sign)
        slow.start()
        second.report(b"2" * 64)
        order.append("second")
        answered.set()
        slow.join(20)
    assert order == ["second", "first"]


def test_a_vm_can_be_launched_and_ended_while_another_ones_report_is_signed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SNP_GCTX_CREATE to SNP_DECOMMISSION of others change nothing: one signature, the right report."""
    machine = Machine(seed=b"scale")
    genuine = SigningKey.sign
    signed: list[bytes] = []
    with machine.create_vm("first", certs=None) as vm:
        vm.boot()

        def sign(key: SigningKey, data: bytes) -> bytes:
            signed.append(data)
            with machine.create_vm("other", certs=None) as other:
                other.boot()
            return genuine(key, data)

        monkeypatch.setattr(SigningKey, "sign", sign)
        answer = vm.report(b"n" * 64)
    assert signed == [answer.report[:SIGNED_SIZE]]


def test_a_seeded_machine_with_many_vms_repeats_every_byte() -> None:
    """The lock that is let go takes nothing from a seed: the same calls give the same bytes."""

    def run() -> list[bytes]:
        machine = Machine(seed=b"many")
        sealed: list[TraceEvent] = []
        with ExitStack() as stack, machine.trace.listen(sealed.append):
            vms = [stack.enter_context(machine.create_vm(certs=None)) for _ in range(4)]
            for vm in vms:
                vm.boot()
            reports = [vm.report(bytes([turn]) * 64).report for turn in range(3) for vm in vms]
        by_firmware = [
            event for event in sealed if isinstance(event, MessageSealed) and event.by == "firmware"
        ]
        assert len(by_firmware) == 12
        return reports

    assert run() == run()
