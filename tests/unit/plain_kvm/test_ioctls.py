"""The numbers agree with the sizes of the structures that they carry."""

from __future__ import annotations

import ctypes
import errno
import os
import termios
from typing import TYPE_CHECKING

import pytest

from swsnp.abi import kvm_registers
from swsnp.abi.kvm import Ioctl
from swsnp.cpu.plain_kvm import ioctls
from swsnp.cpu.plain_kvm.host import LinuxKvm
from swsnp.cpu.plain_kvm.ioctls import HostIoctl

if TYPE_CHECKING:
    from swsnp.abi.record import Record


@pytest.mark.parametrize(
    ("request_number", "nr", "kind"),
    [
        (HostIoctl.KVM_SET_USER_MEMORY_REGION, 0x46, ioctls.KvmUserspaceMemoryRegion),
        (Ioctl.KVM_GET_REGS, 0x81, kvm_registers.KvmRegs),
        (Ioctl.KVM_SET_REGS, 0x82, kvm_registers.KvmRegs),
        (Ioctl.KVM_GET_SREGS, 0x83, kvm_registers.KvmSregs),
        (Ioctl.KVM_SET_SREGS, 0x84, kvm_registers.KvmSregs),
        (HostIoctl.KVM_TRANSLATE, 0x85, ioctls.KvmTranslation),
    ],
)
def test_request_carries_size(request_number: int, nr: int, kind: type[Record]) -> None:
    """Linux, _IOC: bits 29:16 are the structure's size, 15:8 the type (0xAE), 7:0 the number."""
    assert (request_number >> 16 & 0x3FFF, request_number >> 8 & 0xFF) == (kind.SIZE, 0xAE)
    assert request_number & 0xFF == nr


def test_msr_filter_size() -> None:
    """Linux, struct kvm_msr_filter: 8 bytes and 16 ranges; the request carries that size."""
    size = HostIoctl.KVM_X86_SET_MSR_FILTER >> 16 & 0x3FFF
    assert size == 8 + ioctls.MSR_FILTER_RANGES * ioctls.KvmMsrFilterRange.SIZE


@pytest.mark.parametrize(
    ("kind", "field", "offset"),
    [
        (kvm_registers.KvmRegs, "rip", 128),
        (kvm_registers.KvmSegment, "unusable", 22),
        (kvm_registers.KvmSregs, "gdt", 0xC0),
        (kvm_registers.KvmSregs, "efer", 0x108),
        (ioctls.KvmExitMsr, "data", 16),
        (ioctls.KvmExitInternalError, "data", 8),
    ],
)
def test_offsets(kind: type[Record], field: str, offset: int) -> None:
    """Linux, arch/x86/include/uapi/asm/kvm.h and struct kvm_run: offsets as a C compiler gives them."""
    assert kind.offset_of(field) == offset


def test_an_address_as_argument() -> None:
    """ioctl(2) takes an unsigned long, Python's fcntl an int: larger numbers arrive, errors too."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"four")
        answer = ctypes.c_int()
        assert LinuxKvm().ioctl(reading, termios.FIONREAD, ctypes.addressof(answer)) == 0
        assert answer.value == 4
        with pytest.raises(OSError, match="Bad address"):
            LinuxKvm().ioctl(reading, termios.FIONREAD, 1 << 60)
    finally:
        os.close(reading)
        os.close(writing)


def test_kvm_run_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.14, fcntl.ioctl: tried again after EINTR, and KVM_RUN would never end; it goes another way."""

    def tries_again(*_: object) -> int:
        raise AssertionError("would not come back")

    monkeypatch.setattr("fcntl.ioctl", tries_again)
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError, match="Inappropriate ioctl") as caught:
            LinuxKvm().ioctl(reading, Ioctl.KVM_RUN)
        assert caught.value.errno == errno.ENOTTY
    finally:
        os.close(reading)
        os.close(writing)
