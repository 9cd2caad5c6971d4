"""What the probe says of a host, by what its KVM does with the five instructions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import ExitIo, ExitMmio
from swsnp.abi.kvm_registers import KvmRegs
from swsnp.cpu.plain_kvm import probe
from swsnp.cpu.plain_kvm.ioctls import KvmExitInternalError, KvmExitMsr
from swsnp.cpu.plain_kvm.probe import _PrivateOnly
from swsnp.hardware.exits import GuestAccessFault, NestedPageFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.plain_kvm.conftest import ScriptedKvm

    from swsnp.abi.record import Record

    Exit = Callable[[memoryview], None]


def leave(reason: int, payload: Record | None = None) -> Exit:
    def write(run: memoryview) -> None:
        run[8:12] = reason.to_bytes(4, "little")
        if payload is not None:
            run[32 : 32 + payload.SIZE] = bytes(payload)

    return write


WRMSR = leave(30, KvmExitMsr(index=0xC0010130, reason=4, data=2))
VMGEXIT = leave(2, ExitIo(direction=1, size=1, port=0xE8, count=1, data_offset=4096))
HLT = leave(5)


def at_the_instruction(kvm: ScriptedKvm) -> Exit:
    """VMGEXIT where the probe's guest has it."""

    def write(run: memoryview) -> None:
        kvm.regs = KvmRegs(rip=0x800C)
        VMGEXIT(run)

    return write


def test_usable(kvm: ScriptedKvm) -> None:
    """The MSR write reaches us, VMGEXIT and HLT leave: usable, and nothing stays open."""
    kvm.exits.extend([WRMSR, at_the_instruction(kvm), HLT])
    verdict = probe(kvm)
    assert (verdict.usable, verdict.reason, verdict.remedy) == (True, "", "")
    assert not kvm.exits
    assert not kvm.open_fds


@pytest.mark.parametrize(
    ("exits", "text"),
    [
        ([VMGEXIT, HLT], "GHCB MSR 0x0; wanted"),
        ([WRMSR, HLT, HLT], "Halt(), Halt(), GHCB MSR 0x2"),
        ([leave(17, KvmExitInternalError(suberror=1))] * 2, "KVM_EXIT_INTERNAL_ERROR"),
        ([leave(8)] * 2, "triple fault"),
        (
            [leave(6, ExitMmio(phys_addr=0xFEE00020, len=4)), HLT],
            "MmioAccess(gpa=4276092960",
        ),
        ([leave(6, ExitMmio(phys_addr=0x9000, len=4, is_write=1))], "write=True"),
    ],
)
def test_not_usable(kvm: ScriptedKvm, exits: list[Exit], text: str) -> None:
    """Anything else is told, with what the guest did instead."""
    kvm.exits.extend(exits)
    verdict = probe(kvm)
    assert not verdict.usable
    assert text in verdict.reason
    assert verdict.remedy == "another host kernel, or hardware virtualization"
    assert not kvm.exits
    assert not kvm.open_fds


def test_an_msr_write_that_is_lost(kvm: ScriptedKvm) -> None:
    """The guest leaves as it should, and the GHCB MSR does not have what it wrote."""
    kvm.exits.extend([at_the_instruction(kvm), HLT])
    verdict = probe(kvm)
    assert not verdict.usable
    assert "Vmgexit(), Halt(), GHCB MSR 0x0" in verdict.reason


@pytest.mark.parametrize("private", [True, False])
def test_probe_has_no_other_memory(private: bool) -> None:
    """The probe's guest has one slot, which KVM maps: whatever else is asked for is a nested page fault."""
    memory = _PrivateOnly()
    accesses: list[Callable[[], object]] = [
        lambda: memory.read(0x5000, 4, private=private),
        lambda: memory.write(0x5000, b"", private=private),
        lambda: memory.pvalidate(0x5000, validate=private),
        lambda: memory.rmpadjust(0x5000, vmpl=1, permissions=0, vmsa=private),
    ]
    for access in accesses:
        with pytest.raises(GuestAccessFault) as caught:
            access()
        assert isinstance(caught.value.reason, NestedPageFault)
        assert caught.value.reason.gpa == 0x5000
