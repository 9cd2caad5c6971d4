"""Kernel-facing layouts and numbers held against the system's C headers by compiling offsetof and sizeof.

Headers are taken from `build/kernel-headers` (see `.ci/run`), else from the system.
A structure that the headers are too old to know is skipped with the remedy; in CI that is a failure, since CI
provides recent headers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import pytest

from swsnp.abi import kvm, kvm_registers, psp_sev, sev_guest, snp_command
from swsnp.abi.kvm import Capability, ExitReason, Ioctl, SevCommand

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.record import Record

ROOT = Path(__file__).resolve().parents[2]
FETCHED = ROOT / "build" / "kernel-headers" / "usr" / "include"
SYSTEM = Path("/usr/include")
MULTIARCH = "x86_64-linux-gnu"
NEWER = "run tools/debian-package sid linux-libc-dev build/kernel-headers"


class Held(NamedTuple):
    """A record, its C structure, and the members whose names differ; `skip` has no member of its own in C."""

    kind: type[Record]
    struct: str
    header: str
    names: dict[str, str] = {}
    skip: frozenset[str] = frozenset()
    base: str = ""


HELD = [
    Held(
        kvm.KvmRunPage,
        "kvm_run",
        "kvm.h",
        {"immediate_exit": "immediate_exit__unsafe", "exit": "hw", "s": "s"},
    ),
    Held(kvm.ExitIo, "kvm_run", "kvm.h", base="io"),
    Held(kvm.ExitMmio, "kvm_run", "kvm.h", skip=frozenset({"pad"}), base="mmio"),
    Held(kvm.ExitHypercall, "kvm_run", "kvm.h", base="hypercall"),
    Held(kvm.ExitMemoryFault, "kvm_run", "kvm.h", base="memory_fault"),
    Held(kvm.ExitSystemEvent, "kvm_run", "kvm.h", base="system_event"),
    Held(kvm.ExitSnpReqCerts, "kvm_exit_snp_req_certs", "kvm.h"),
    Held(kvm.KvmEnableCap, "kvm_enable_cap", "kvm.h"),
    Held(kvm.KvmDeviceAttr, "kvm_device_attr", "kvm.h"),
    Held(kvm.KvmSevCmd, "kvm_sev_cmd", "kvm.h", {"pad": "pad0"}),
    Held(kvm.KvmSevInit, "kvm_sev_init", "kvm.h"),
    Held(kvm.KvmSevSnpLaunchStart, "kvm_sev_snp_launch_start", "kvm.h"),
    Held(kvm.KvmSevSnpLaunchUpdate, "kvm_sev_snp_launch_update", "kvm.h"),
    Held(kvm.KvmSevSnpLaunchFinish, "kvm_sev_snp_launch_finish", "kvm.h"),
    Held(kvm.KvmCreateGuestMemfd, "kvm_create_guest_memfd", "kvm.h"),
    Held(kvm.KvmUserspaceMemoryRegion2, "kvm_userspace_memory_region2", "kvm.h"),
    Held(kvm.KvmMemoryAttributes, "kvm_memory_attributes", "kvm.h"),
    Held(kvm.KvmPreFaultMemory, "kvm_pre_fault_memory", "kvm.h"),
    Held(kvm.KvmMpState, "kvm_mp_state", "kvm.h"),
    Held(kvm_registers.KvmRegs, "kvm_regs", "kvm.h", skip=frozenset({"r8_to_r15"})),  # eight members in C
    Held(kvm_registers.KvmSegment, "kvm_segment", "kvm.h"),
    Held(kvm_registers.KvmDtable, "kvm_dtable", "kvm.h"),
    Held(kvm_registers.KvmSregs, "kvm_sregs", "kvm.h"),
    Held(
        sev_guest.SnpGuestRequestIoctl, "snp_guest_request_ioctl", "sev-guest.h", skip=frozenset({"pad_01"})
    ),
    Held(sev_guest.SnpReportReq, "snp_report_req", "sev-guest.h"),
    Held(sev_guest.SnpReportResp, "snp_report_resp", "sev-guest.h"),
    Held(sev_guest.SnpDerivedKeyReq, "snp_derived_key_req", "sev-guest.h"),
    Held(sev_guest.SnpDerivedKeyResp, "snp_derived_key_resp", "sev-guest.h"),
    Held(
        sev_guest.SnpExtReportReq,
        "snp_ext_report_req",
        "sev-guest.h",
        {"user_data": "data.user_data", "vmpl": "data.vmpl", "rsvd": "data.rsvd"},
        frozenset({"pad_6c"}),
    ),
    Held(psp_sev.SevIssueCmd, "sev_issue_cmd", "psp-sev.h"),
    Held(psp_sev.SevUserDataGetId2, "sev_user_data_get_id2", "psp-sev.h"),
    Held(
        snp_command.PlatformStatusBuffer,
        "sev_user_data_snp_status",
        "psp-sev.h",
        {"current_tcb": "current_tcb_version", "reported_tcb": "reported_tcb_version"},
        frozenset({"rmp_flags", "flags"}),  # bit fields: their members have no address in C
    ),
    Held(
        snp_command.Config,
        "sev_user_data_snp_config",
        "psp-sev.h",
        {"reserved_0c": "rsvd1"},
        frozenset({"flags"}),
    ),
    Held(
        snp_command.VlekLoad,
        "sev_user_data_snp_vlek_load",
        "psp-sev.h",
        {"length": "len", "reserved_05": "rsvd", "vlek_wrapped_paddr": "vlek_wrapped_address"},
    ),
]

NUMBERS: dict[str, tuple[str, int]] = {
    **{f"{each.name}": ("kvm.h", each.value) for each in Ioctl},
    **{
        f"KVM_CAP_{each.name}": ("kvm.h", each.value)
        for each in Capability
        if each is not Capability.EXIT_COCO
    },
    **{f"KVM_EXIT_{each.name}": ("kvm.h", each.value) for each in ExitReason if each is not ExitReason.COCO},
    "KVM_SEV_INIT2": ("kvm.h", SevCommand.SEV_INIT2),
    **{
        f"KVM_SEV_{each.name}": ("kvm.h", each.value)
        for each in SevCommand
        if each is not SevCommand.SEV_INIT2
    },
    "KVM_X86_SNP_VM": ("kvm.h", kvm.VmType.SNP),
    "KVM_X86_GRP_SEV": ("kvm.h", 1),
    "KVM_X86_SEV_VMSA_FEATURES": ("kvm.h", kvm.DeviceAttr.SEV_VMSA_FEATURES),
    "KVM_X86_SNP_POLICY_BITS": ("kvm.h", kvm.DeviceAttr.SNP_POLICY_BITS),
    "KVM_X86_SEV_SNP_REQ_CERTS": ("kvm.h", kvm.DeviceAttr.SEV_SNP_REQ_CERTS),
    "KVM_MEM_GUEST_MEMFD": ("kvm.h", kvm.GUEST_MEMFD_SLOT),
    "KVM_MEMORY_ATTRIBUTE_PRIVATE": ("kvm.h", kvm.MemoryAttribute.PRIVATE),
    "KVM_SYSTEM_EVENT_SEV_TERM": ("kvm.h", kvm.SystemEvent.SEV_TERM),
    "KVM_MP_STATE_RUNNABLE": ("kvm.h", kvm.MpState.RUNNABLE),
    "KVM_MP_STATE_UNINITIALIZED": ("kvm.h", kvm.MpState.UNINITIALIZED),
    "KVM_MP_STATE_HALTED": ("kvm.h", kvm.MpState.HALTED),
    "KVM_HC_MAP_GPA_RANGE": ("kvm_para.h", kvm.MAP_GPA_RANGE),
    "SNP_GET_REPORT": ("sev-guest.h", sev_guest.SNP_GET_REPORT),
    "SNP_GET_DERIVED_KEY": ("sev-guest.h", sev_guest.SNP_GET_DERIVED_KEY),
    "SNP_GET_EXT_REPORT": ("sev-guest.h", sev_guest.SNP_GET_EXT_REPORT),
    "SEV_ISSUE_CMD": ("psp-sev.h", psp_sev.SEV_ISSUE_CMD),
}


def _include() -> Path:
    return FETCHED if FETCHED.is_dir() else SYSTEM


def _text(header: str) -> str:
    folder = _include()
    places = [folder / "linux" / header, folder / MULTIARCH / "asm" / header, folder / "asm" / header]
    return "\n".join(place.read_text() for place in places if place.is_file())


class MemberUnknown(Exception):
    """The headers here have the structure, but not that member yet."""


def _run_c(tmp_path: Path, body: str) -> list[int]:
    source = tmp_path / "probe.c"
    includes = "".join(
        f"#include <linux/{name}>\n" for name in ("kvm.h", "kvm_para.h", "sev-guest.h", "psp-sev.h")
    )
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n"
        f"{includes}int main(void) {{\n{body}}}\n"
    )
    program = tmp_path / "probe"
    folder = _include()
    command = [
        "gcc",
        "-Wall",
        f"-isystem{folder / MULTIARCH}",
        f"-isystem{folder}",
        "-o",
        str(program),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if unknown := re.search(r"has no member named .(\w+)", done.stderr):
        raise MemberUnknown(unknown.group(1))
    assert done.returncode == 0, done.stderr
    out = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    return [int(line) for line in out.split()]


@pytest.fixture(autouse=True)
def _compiler(cannot_run: Callable[..., None]) -> None:
    if shutil.which("gcc") is None:
        cannot_run("no C compiler", "install gcc and libc6-dev")
    if not (SYSTEM / "linux" / "kvm.h").is_file() and not FETCHED.is_dir():
        cannot_run("no kernel headers", "install linux-libc-dev")


@pytest.mark.parametrize(
    "held", HELD, ids=lambda held: f"{held.struct}.{held.base}" if held.base else held.struct
)
def test_offsets_and_sizes(held: Held, tmp_path: Path, cannot_run: Callable[..., NoReturn]) -> None:
    """Every field lies where the kernel's header puts it, with the header's size."""
    text = _text(held.header)
    if not re.search(rf"struct {held.struct} \{{", text) or (held.base and f"}} {held.base};" not in text):
        cannot_run(f"{held.header} here does not know {held.base or held.struct}", NEWER)
    prefix = f"{held.base}." if held.base else ""
    shift = kvm.EXIT_UNION if held.base else 0
    renamed = dict(held.names)
    if "immediate_exit__unsafe" in renamed.values() and "immediate_exit__unsafe" not in text:
        renamed.pop("immediate_exit")
    rows = [(name, offset, size) for name, offset, size in held.kind.layout() if name not in held.skip]
    body = ""
    wanted = []
    for name, offset, size in rows:
        member = prefix + renamed.get(name, name)
        body += f'printf("%zu\\n", offsetof(struct {held.struct}, {member}));\n'
        wanted.append(offset + shift)
        if name not in {"exit", "s"} and "." not in member.removeprefix(prefix):
            body += f'printf("%zu\\n", sizeof(((struct {held.struct} *)0)->{member}));\n'
            wanted.append(size)
    if not held.base:
        body += f'printf("%zu\\n", sizeof(struct {held.struct}));\n'
        wanted.append(held.kind.SIZE)
    try:
        found = _run_c(tmp_path, body)
    except MemberUnknown as member:
        cannot_run(f"{held.struct} in {held.header} here does not know {member}", NEWER)
    assert found == wanted


def test_numbers(tmp_path: Path, cannot_run: Callable[..., None]) -> None:
    """Ioctl numbers, exit reasons, capabilities and command ids are the header's."""
    known = {
        name: value for name, (header, value) in NUMBERS.items() if re.search(rf"\b{name}\b", _text(header))
    }
    body = "".join(f'printf("%llu\\n", (unsigned long long){name});\n' for name in known)
    found = dict(zip(known, _run_c(tmp_path, body), strict=True))
    differing = {name for name, value in found.items() if value & 0xFFFFFFFF != known[name]}
    assert differing == set()
    missing = sorted(set(NUMBERS) - set(known))
    if missing:
        cannot_run(
            f"headers here do not know {', '.join(missing[:4])} and {len(missing)} names in all", NEWER
        )
