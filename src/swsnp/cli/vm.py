"""`swsnp vm …`: a VM with QEMU's options, whose guest asks for reports."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsnp.cli import BAD_VERDICT, GOOD, common

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from swsnp.machine import ExtendedReport
    from swsnp.trace import TraceEvent

__all__ = ["run"]

_QEMU_HELP = """QEMU's options, as on its command line: -smp, -cpu, -machine, -object, -accel, -m, -name,
-bios, -kernel, -initrd, -append, -serial, -no-reboot, -nographic; with -kernel and no -bios also
-drive and -blockdev (raw files), -snapshot, -chardev (null, stdio, file, socket, pty, pipe), -nic and
-netdev (user, stream), -device virtio-blk-device, virtio-net-device, virtio-rng-device,
virtio-serial-device, virtserialport, virtconsole and vhost-user-fs-device (a shared folder).
The firmware of -bios is launched and measured page by page, and not executed: the built-in guest
stands in for it. With -kernel and no -bios the kernel really runs, as an SNP guest on the host's
/dev/kvm; its memory is neither encrypted nor hidden from the host.
Examples:
  swsnp vm -kernel vmlinuz -initrd initrd.img -append console=ttyS0 -m 512M -no-reboot
  swsnp vm -kernel vmlinuz -m 512M --modules /lib/modules/6.12.0 --exec ./client --nonce 00
  swsnp vm -kernel vmlinuz -m 512M --modules /lib/modules/6.12.0
    -drive file=root.img,format=raw,if=virtio -append "console=ttyS0 root=/dev/vda rw"
  swsnp vm -smp 4 -cpu EPYC-Milan-v2
    -machine q35,confidential-guest-support=sev0,memory-backend=ram1
    -object memory-backend-memfd,id=ram1,size=4G,share=true,reserve=false
    -object sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,certs-path=certs.blob"""


def run(arguments: Sequence[str]) -> int:
    """The verb: exit code 0 when every report was answered."""
    ours, qemu = _options(arguments)
    from swsnp.cli.qemu_options import parse_qemu_options

    options = parse_qemu_options(qemu)
    if options.kernel is not None and options.bios is None:
        from swsnp.cli.vm_kernel import run_kernel

        return run_kernel(ours, options)
    shown = _attest(ours, options)
    if ours.json:
        print(json.dumps(shown, indent=2))
    else:
        print("\n".join(_as_lines(shown)))
    return GOOD if all(each["status"] == 0 for each in shown["reports"]) else BAD_VERDICT


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    command = common.parser("vm", epilog=_QEMU_HELP)
    common.add_profile(command)
    common.add_seed(command)
    command.add_argument(
        "--count", type=common.positive, default=1, metavar="N", help="reports to ask for (default: 1)"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
    _add_kernel_options(command)
    return command.parse_known_args(arguments)


def _attest(ours: argparse.Namespace, options: Any) -> dict[str, Any]:
    from swsnp.cli.vm_firmware import plan_of
    from swsnp.machine import Machine
    from swsnp.trace import CertsWanted

    plan = plan_of(options)
    events: list[TraceEvent] = []
    machine = Machine(product=options.product, profile=ours.profile, seed=common.seed_of(ours))
    with machine.create_vm(config=options.vm_config(), plan=plan) as vm:
        vm.boot()
        with machine.trace.listen(events.append):
            nonces = (hashlib.sha512(b"swsnp vm report %d" % number).digest() for number in range(ours.count))
            answers = [vm.extended_report(nonce) for nonce in nonces]
        vcpus = len(vm.vcpus)
    exits = [event.exit_reason for event in events if isinstance(event, CertsWanted)]
    return {
        "profile": ours.profile,
        "product": options.product.value,
        "vcpus": vcpus,
        "firmware": None if plan is None else _firmware(options, answers[0]),
        "exit_reason": exits[0] if exits else None,
        "certs_sha256": _digest(events, answers),
        "reports": [{"status": each.status, "report": each.report.hex()} for each in answers],
    }


def _firmware(options: Any, answer: ExtendedReport) -> dict[str, Any]:
    """What became of -bios and -kernel; without a report nothing tells the measurement."""
    from swsnp.abi.snp_report import AttestationReport
    from swsnp.cli.vm_firmware import NOT_EXECUTED

    kernel = "none"
    if options.kernel is not None:
        kernel = NOT_EXECUTED if options.snp.kernel_hashes else "neither measured nor executed"
    return {
        "bios": str(options.bios),
        "status": NOT_EXECUTED,
        "executed": False,
        "kernel": kernel,
        "measurement": None if answer.status else AttestationReport.parse(answer.report).measurement.hex(),
    }


def _digest(events: Sequence[TraceEvent], answers: Sequence[ExtendedReport]) -> str | None:
    """SHA-256 of the blob as the guest received it, without its buffer's padding; None: an empty table."""
    from swsnp.trace import CertsRead

    sizes = [event.size for event in events if isinstance(event, CertsRead)]
    return hashlib.sha256(answers[-1].certs[: sizes[-1]]).hexdigest() if sizes else None


def _as_lines(shown: dict[str, Any]) -> list[str]:
    asked = f"certificate exit {shown['exit_reason']}" if shown["exit_reason"] else "no certificate exit"
    certs = f"sha256 {shown['certs_sha256']}" if shown["certs_sha256"] else "an empty table"
    lines = [
        f"{shown['product']} on {shown['profile']}: {shown['vcpus']} vCPU(s), {asked}",
        f"certificates: {certs}",
    ]
    if (firmware := shown["firmware"]) is not None:
        lines.append(f"firmware {firmware['bios']}: {firmware['status']}; the built-in guest runs instead")
        if firmware["kernel"] != "none":
            lines.append(f"kernel: {firmware['kernel']}")
        lines.append(f"measurement: {firmware['measurement'] or 'not told, since there is no report'}")
    for number, each in enumerate(shown["reports"], 1):
        lines.append(f"report {number}: status {each['status']:#x}, {len(each['report']) // 2} bytes")
    return lines


def _add_kernel_options(command: argparse.ArgumentParser) -> None:
    """What `swsnp vm` takes beside QEMU's options when it starts a kernel."""
    group = command.add_argument_group("with -kernel and without -bios")
    group.add_argument("--timeout", type=float, metavar="S", help="stop the guest after so many seconds")
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="every exit with RIP, one a line; - is stderr"
    )
    group.add_argument("--system-map", type=Path, metavar="FILE", help="the kernel's, for names in the trace")
    group.add_argument(
        "--kernel-config",
        type=Path,
        metavar="FILE",
        help="the kernel's configuration, where it is neither inside the kernel nor beside it",
    )
    group.add_argument("--stats", type=Path, metavar="FILE", help="how it ended and what it took, as JSON")
    _add_program_options(command)
    group.add_argument("--save-root", type=Path, metavar="FILE", help="write the machine's root, DER")


def _add_program_options(command: argparse.ArgumentParser) -> None:
    """What makes the guest run one program and end with it."""
    from argparse import REMAINDER

    group = command.add_argument_group(
        "run one program in the guest, or go on in a disk's root file system, with -kernel and without -bios"
    )
    group.add_argument(
        "--exec",
        nargs=REMAINDER,
        metavar="PROGRAM ARGS",
        help="PROGRAM ARGS: a static program of this host, or a path in --exec-dir; all that follows is its. "
        "Its standard output and exit status become this command's, console and errors go to stderr; "
        "standard input is its where a virtserialport has -chardev stdio",
    )
    group.add_argument("--exec-dir", type=Path, metavar="DIR", help="becomes the guest's root directory")
    group.add_argument(
        "--modules",
        type=Path,
        metavar="DIR",
        help="the kernel's modules, as its package holds them; without --exec the guest loads some, mounts "
        "root= of -append and goes on there",
    )
    group.add_argument(
        "--module",
        action="append",
        metavar="NAME",
        help="load it with what it depends on; may be given again (default: for sev-guest, devices and root)",
    )
