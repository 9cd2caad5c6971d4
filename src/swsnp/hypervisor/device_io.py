"""Port and memory-mapped IO that a guest relays: to userspace, since no device lies in this KVM.

Source: AMD 56421 (GHCB 2.0), IOIO and MMIO events; Linux, arch/x86/kvm/svm/svm.c (io_interception),
arch/x86/kvm/x86.c (kvm_fast_pio, kvm_sev_es_string_io, kvm_sev_es_mmio_read).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import ExitCode, GhcbError, IoioInfo
from swsnp.hypervisor.outcomes import RESUMED, MmioWanted, PortIoWanted, VmmErrno
from swsnp.hypervisor.scratch import ghcb_version, scratch_area

if TYPE_CHECKING:
    from swsnp.hypervisor.outcomes import Outcome
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.hypervisor.vmgexit import GhcbEvent

__all__ = ["complete_mmio", "complete_port_io", "mmio", "port_io"]

_PAGE: Final = 4096
_INT_MAX: Final = (1 << 31) - 1
_MMIO_PIECE: Final = 8
_ADDRESS_MASK: Final = (1 << 64) - 1


# Ports


def port_io(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Serve an IOIO event; exit info 1 describes it, exit info 2 counts the items of the string form."""
    info = IoioInfo(event.info1 & 0xFFFFFFFF)
    if not info.size:
        return RESUMED
    read = bool(info.read)
    if info.string:
        return _string_io(vcpu, event, info)
    data = b"" if read else (event.rax & _ADDRESS_MASK).to_bytes(8, "little")[: info.size]
    return PortIoWanted(read, info.size, info.port, 1, data, event)


def _string_io(vcpu: Vcpu, event: GhcbEvent, info: IoioInfo) -> Outcome:
    count, size = event.info2, int(info.size)
    if count * size > _INT_MAX:
        return VmmErrno(-errno.EINVAL)
    if not count:
        return RESUMED
    buffer = scratch_area(vcpu, event, count * size, write_back=bool(info.read))
    if not isinstance(buffer, memoryview):
        return buffer
    return _next_items(PortIoWanted(bool(info.read), size, info.port, 0, b"", event), buffer[: count * size])


def _next_items(last: PortIoWanted, buffer: memoryview) -> Outcome:
    """Ask for the items in `buffer`, as many as the page between KVM and userspace holds."""
    if not buffer:
        return RESUMED
    count = min(_PAGE // last.size, len(buffer) // last.size)
    data = b"" if last.read else bytes(buffer[: count * last.size])
    return PortIoWanted(last.read, last.size, last.port, count, data, last.event, buffer)


def complete_port_io(vcpu: Vcpu, asked: PortIoWanted) -> Outcome:
    """Go on after userspace has served the port: what it read goes to RAX, or to the scratch area."""
    length = asked.count * asked.size
    if asked.buffer is not None:
        if asked.read:
            asked.buffer[:length] = vcpu.run.pio_data(length)
        return _next_items(asked, asked.buffer[length:])
    if asked.read:
        event = asked.event
        # one and two bytes are merged into RAX, four replace it
        kept = event.rax if length < 4 else 0
        event.rax = kept >> 8 * length << 8 * length | int.from_bytes(vcpu.run.pio_data(length), "little")
    return RESUMED


# Memory


def mmio(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Serve MMIO_READ or MMIO_WRITE: exit info 1 is the address, exit info 2 the length in bytes."""
    length, write = event.info2, event.code == ExitCode.MMIO_WRITE
    if not length:
        return RESUMED
    if length > _MMIO_PIECE and ghcb_version(vcpu) >= 2:
        return event.refuse(GhcbError.INVALID_INPUT)
    buffer = scratch_area(vcpu, event, length, write_back=not write)
    if not isinstance(buffer, memoryview):
        return buffer
    return MmioWanted(event.info1, write, buffer[:length], event)


def complete_mmio(vcpu: Vcpu, asked: MmioWanted) -> Outcome:
    """Go on after userspace has served up to 8 bytes; protocol version 1 allows more, piece by piece."""
    length = asked.length
    if not asked.write:
        asked.buffer[:length] = vcpu.run.mmio_data(length)
    rest = asked.buffer[length:]
    if not rest:
        return RESUMED
    return MmioWanted((asked.gpa + length) & _ADDRESS_MASK, asked.write, rest, asked.event)
