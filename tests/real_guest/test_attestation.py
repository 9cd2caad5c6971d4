"""Unmodified Debian kernels as SNP guests: what their own drivers get, judged by our verifier."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.real_guest.guests import CLIENT, COMMAND_LINE, FOUR, KERNELS, MEMORY, PROFILES
from tests.real_guest.place import BUILD

from swsnp.abi.snp_report import AttestationReport
from swsnp.verify import Roots, verify
from swsnp.vmm.initramfs import REPORT_CRYPTO, REPORT_MODULES, prepare_program
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    from pathlib import Path

    from tests.real_guest.conftest import Answers
    from tests.real_guest.guests import Guest
    from tests.real_guest.said import Said

    from swsnp.machine import Machine
    from swsnp.verify import Verification

REPORTS = ("report-1", "report-2", "report-3", "extended")
NONCES = {"report-1": b"1", "report-2": b"2", "report-3": b"3", "extended": b"E", "tsm-outblob": b"T"}
PAGE = 4096


def judge(machine: Machine, said: Said, name: str) -> Verification:
    """By the machine's root; the certificates are those that the guest got, see `test_certificates`."""
    return verify(
        said.blob(name),
        table=machine.certificate_table(),
        roots=Roots.of(machine.root_certificate),
        at=machine.now(),
        report_data=NONCES[name] * 64,
    )


def pages_of(machine: Machine) -> int:
    """What the machine's certificates need, in bytes: whole pages."""
    return -(-len(machine.certificate_table()) // PAGE) * PAGE


def test_kernel_says_that_it_is_an_snp_guest(said: Said) -> None:
    """Linux, arch/x86/mm/mem_encrypt.c prints what SEV_STATUS says."""
    assert said.lines["features"] == "AMD SEV SEV-ES SEV-SNP"


def test_processors(said: Said, guest: Guest) -> None:
    """All are online; the second starts from a VMSA that the kernel made. Source: GHCB, AP Creation."""
    assert said.lines["cpus"] == str(guest.cpus)


def test_four_processors(answers: Answers) -> None:
    """Every vCPU of four comes online. Source: GHCB, AP Creation.

    With nested emulation a boot may be lost, and is tried again; on a host's own KVM neither happens.
    """
    ended = answers.of(FOUR)
    if ended.err.count("the guest was stopped"):
        print("\nfour vCPUs: the first boot did not come to its end")
    assert (ended.status, ended.out) == (0, b"0-3\n"), ended
    stats = json.loads((answers.folder / f"{FOUR}.json").read_text())
    assert len(stats["vcpus"]) == 4


@pytest.mark.parametrize("name", REPORTS)
def test_report(said: Said, real_machine: Machine, name: str) -> None:
    """Each is genuine under the machine's root, answers its own nonce, and comes from VMPL 0."""
    verdict = judge(real_machine, said, name)
    assert verdict.passed, verdict.failures
    assert verdict.report is not None
    assert verdict.report.vmpl == 0


def test_reports_are_of_one_guest(said: Said) -> None:
    """One launch: same measurement and REPORT_ID; another signature each."""
    reports = [AttestationReport.parse(said.blob(name)) for name in REPORTS]
    assert len({each.measurement for each in reports}) == 1
    assert any(reports[0].measurement)
    assert len({each.report_id for each in reports}) == 1
    assert len({bytes(each) for each in reports}) == len(reports)


def test_measurement(said: Said, guest: Guest, answers: Answers, tmp_path: Path) -> None:
    """`swsnp measure kernel` on this side says what every report says. Source: AMD 56860, launch digest."""
    stats = json.loads((answers.folder / f"{guest.name}.json").read_text())
    modules = find_modules(BUILD / guest.kernel, REPORT_MODULES, if_there=REPORT_CRYPTO)
    program = prepare_program(CLIENT, tree=answers.folder / "root", modules=modules)
    (tmp_path / "initrd").write_bytes(program.initramfs)
    line = [sys.executable, "-m", "swsnp", "measure", "kernel", "--cbitpos", str(stats["cbitpos"])]
    line += ["-kernel", str(guest.image), "-initrd", str(tmp_path / "initrd"), "-m", MEMORY]
    line += ["-append", f"{program.cmdline} {COMMAND_LINE}", "-smp", str(guest.cpus)]
    measured = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    assert measured == stats["measurement"]
    for name in REPORTS:
        assert AttestationReport.parse(said.blob(name)).measurement.hex() == measured


def test_certificates_that_do_not_fit(said: Said, real_machine: Machine) -> None:
    """Room for none: EIO, exit info 2 with INVALID_LEN in its high half, and the length that is needed.

    Source: Linux, Documentation/virt/coco/sev-guest.rst, SNP_GET_EXT_REPORT.
    """
    assert said.lines["without-room"] == f"-1 5 0x100000000 {pages_of(real_machine)}"


def test_certificates(said: Said, real_machine: Machine) -> None:
    """Byte for byte what `certs-path` names, and zeros behind it."""
    assert said.lines["certs"] == f"{pages_of(real_machine)} same"


def test_derived_key(said: Said) -> None:
    """The same for the same selection of fields, another for another. Source: AMD 56860, MSG_KEY_REQ."""
    assert said.blob("key") == said.blob("key-again")
    assert said.blob("key") != said.blob("other-key")
    assert any(said.blob("key"))


def test_configfs_tsm(said: Said, guest: Guest, real_machine: Machine) -> None:
    """Where the kernel has it (6.7): provider, report, the certificates as auxblob, one write counted."""
    if guest.kernel == "debian-12":
        assert said.lines["tsm"] == "none"
        return
    assert said.lines["tsm-provider"] == "sev_guest"
    assert judge(real_machine, said, "tsm-outblob").passed
    assert said.lines["tsm-auxblob"] == f"{len(real_machine.certificate_table())} same"
    assert said.lines["tsm-generation"] == "1"
    assert said.lines["tsm"] == "done"


def test_machine_ended_as_the_guest_wished(answers: Answers, guest: Guest) -> None:
    """The exit status is the guest's own, and the statistics say what it took."""
    assert answers.of(guest.name).status == 0
    stats = json.loads((answers.folder / f"{guest.name}.json").read_text())
    assert (stats["stop"], stats["status"]) == ("PoweredOff", 0)
    assert stats["ghcb_events"] > 0


def test_every_kernel_and_profile(answers: Answers) -> None:
    """None was left out."""
    assert {f"{kernel}.{profile}.smp-1" for kernel in KERNELS for profile in PROFILES} <= set(answers.ended)
