"""Where KVM's side writes in `struct kvm_run`, against the host's own <linux/kvm.h>."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import (
    EXIT_UNION,
    PIO_PAGE_OFFSET,
    ExitHypercall,
    ExitIo,
    ExitMmio,
    ExitReason,
    ExitSystemEvent,
    InternalErrorCode,
    Ioctl,
    KvmMpState,
    KvmRunPage,
    MpState,
    RunOffset,
    SystemEvent,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip

HYPERCALL, EVENT = ExitHypercall.offset_of, ExitSystemEvent.offset_of
IO, MMIO = ExitIo.offset_of, ExitMmio.offset_of
WANTED: dict[str, int] = {
    "sizeof(struct kvm_run)": KvmRunPage.SIZE,
    "offsetof(struct kvm_run, immediate_exit)": RunOffset.IMMEDIATE_EXIT,
    "offsetof(struct kvm_run, exit_reason)": RunOffset.EXIT_REASON,
    "offsetof(struct kvm_run, flags)": RunOffset.FLAGS,
    "offsetof(struct kvm_run, hw)": EXIT_UNION,
    "offsetof(struct kvm_run, hypercall.nr)": EXIT_UNION + HYPERCALL("nr"),
    "offsetof(struct kvm_run, hypercall.args)": EXIT_UNION + HYPERCALL("args"),
    "offsetof(struct kvm_run, hypercall.ret)": RunOffset.HYPERCALL_RET,
    "offsetof(struct kvm_run, hypercall.longmode)": EXIT_UNION + HYPERCALL("flags"),
    "offsetof(struct kvm_run, io.direction)": EXIT_UNION + IO("direction"),
    "offsetof(struct kvm_run, io.size)": EXIT_UNION + IO("size"),
    "offsetof(struct kvm_run, io.port)": EXIT_UNION + IO("port"),
    "offsetof(struct kvm_run, io.count)": EXIT_UNION + IO("count"),
    "offsetof(struct kvm_run, io.data_offset)": EXIT_UNION + IO("data_offset"),
    "offsetof(struct kvm_run, mmio.phys_addr)": EXIT_UNION + MMIO("phys_addr"),
    "offsetof(struct kvm_run, mmio.data)": EXIT_UNION + MMIO("data"),
    "offsetof(struct kvm_run, mmio.len)": EXIT_UNION + MMIO("len"),
    "offsetof(struct kvm_run, mmio.is_write)": EXIT_UNION + MMIO("is_write"),
    "sizeof(((struct kvm_run *)0)->mmio)": ExitMmio.SIZE,
    "offsetof(struct kvm_run, internal.data)": EXIT_UNION + 8,
    "KVM_PIO_PAGE_OFFSET * 4096": PIO_PAGE_OFFSET,
    "offsetof(struct kvm_run, fail_entry.hardware_entry_failure_reason)": EXIT_UNION,
    "offsetof(struct kvm_run, fail_entry.cpu)": EXIT_UNION + 8,
    "offsetof(struct kvm_run, internal.suberror)": EXIT_UNION,
    "offsetof(struct kvm_run, internal.ndata)": EXIT_UNION + 4,
    "offsetof(struct kvm_run, system_event.type)": EXIT_UNION + EVENT("type"),
    "offsetof(struct kvm_run, system_event.ndata)": EXIT_UNION + EVENT("ndata"),
    "offsetof(struct kvm_run, system_event.data)": EXIT_UNION + EVENT("data"),
    "offsetof(struct kvm_run, kvm_valid_regs)": RunOffset.VALID_REGS,
    "offsetof(struct kvm_run, kvm_dirty_regs)": RunOffset.DIRTY_REGS,
    "sizeof(struct kvm_mp_state)": KvmMpState.SIZE,
    "KVM_RUN": Ioctl.KVM_RUN,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": Ioctl.KVM_SET_MP_STATE,
    "KVM_EXIT_IO": ExitReason.IO,
    "KVM_EXIT_IO_OUT": 1,
    "KVM_EXIT_MMIO": ExitReason.MMIO,
    "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON": InternalErrorCode.UNEXPECTED_EXIT_REASON,
    "KVM_EXIT_HYPERCALL": ExitReason.HYPERCALL,
    "KVM_EXIT_SHUTDOWN": ExitReason.SHUTDOWN,
    "KVM_EXIT_FAIL_ENTRY": ExitReason.FAIL_ENTRY,
    "KVM_EXIT_INTR": ExitReason.INTR,
    "KVM_EXIT_INTERNAL_ERROR": ExitReason.INTERNAL_ERROR,
    "KVM_EXIT_SYSTEM_EVENT": ExitReason.SYSTEM_EVENT,
    "KVM_SYSTEM_EVENT_SEV_TERM": SystemEvent.SEV_TERM,
    "KVM_MP_STATE_RUNNABLE": MpState.RUNNABLE,
    "KVM_MP_STATE_UNINITIALIZED": MpState.UNINITIALIZED,
    "KVM_MP_STATE_HALTED": MpState.HALTED,
    "KVM_MP_STATE_INIT_RECEIVED": MpState.INIT_RECEIVED,
    "KVM_MP_STATE_SIPI_RECEIVED": MpState.SIPI_RECEIVED,
    "KVM_MP_STATE_AP_RESET_HOLD": MpState.AP_RESET_HOLD,
}


@pytest.fixture(scope="module")
def host_values(tmp_path_factory: pytest.TempPathFactory, cannot_run: Skip) -> dict[str, int]:
    """Every expression of `WANTED` as the host's compiler and headers have it."""
    gcc = shutil.which("gcc")
    if gcc is None:
        cannot_run("no C compiler", "install gcc and linux-libc-dev")
    folder: Path = tmp_path_factory.mktemp("kvm")
    lines = "".join(f'  printf("%llu\\n", (unsigned long long)({each}));\n' for each in WANTED)
    source = folder / "offsets.c"
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {{\n{lines}}}\n"
    )
    built = subprocess.run([gcc, source, "-o", folder / "offsets"], check=False, capture_output=True)
    if built.returncode:
        cannot_run("<linux/kvm.h> is missing or too old", "install linux-libc-dev 6.1 or newer")
    printed = subprocess.run([folder / "offsets"], check=True, capture_output=True, text=True).stdout
    return dict(zip(WANTED, map(int, printed.split()), strict=True))


@pytest.mark.parametrize("expression", WANTED)
def test_offset(host_values: dict[str, int], expression: str) -> None:
    """Offsets and numbers are those of include/uapi/linux/kvm.h."""
    assert host_values[expression] == WANTED[expression]
