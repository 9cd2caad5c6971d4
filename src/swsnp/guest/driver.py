"""The sev-guest driver: what `/dev/sev-guest` answers. Source: Linux, drivers/virt/coco/sev-guest."""

from __future__ import annotations

import errno
import struct
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.sev_guest import (
    EXITINFO2_UNSET,
    EXT_GUEST_DATA_MAX,
    SNP_GET_DERIVED_KEY,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    SnpDerivedKeyReq,
    SnpDerivedKeyResp,
    SnpExtReportReq,
    SnpGuestRequestIoctl,
    SnpReportReq,
    SnpReportResp,
)
from swsnp.abi.snp_message import AUTHTAG_SIZE, MessageType
from swsnp.errors import SwsnpError
from swsnp.guest.caller import CallerFault, CallerMemory
from swsnp.guest.channel import Channel, KeyWiped
from swsnp.guest.exchange import INVALID_LEN, Clock, Exchange, Failed, Message
from swsnp.guest.generation import K_A, K_B, K_C, DriverGeneration
from swsnp.trace import IoctlCalled, IoctlReturned, Trace

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    from swsnp.guest.boot import BootedGuest
    from swsnp.guest.cpu import GuestCpu

__all__ = [
    "CallerFault",
    "CallerMemory",
    "Clock",
    "DriverGeneration",
    "K_A",
    "K_B",
    "K_C",
    "OWN_VMPL",
    "ProbeError",
    "SecretsNotMapped",
    "SevGuestDriver",
    "VmpckEmpty",
    "VmpckIdOutOfRange",
]

OWN_VMPL: Final = -1
"""Default of the module parameter `vmpck_id`: the key of the guest's own privilege level."""
USER_SPACE_END: Final = 0x7FFF_FFFF_F000
"""First address that access_ok refuses, with four-level page tables."""

_ARGUMENT: Final = struct.Struct("<B7xQQ8x")
_EXITINFO2: Final = struct.Struct("<Q")
_EXITINFO2_AT: Final = SnpGuestRequestIoctl.offset_of("exitinfo2")
_CERTS: Final = struct.Struct("<QI")
_CERTS_AT: Final = SnpExtReportReq.offset_of("certs_address")
_CERTS_LEN: Final = struct.Struct("<I")
_CERTS_LEN_AT: Final = SnpExtReportReq.offset_of("certs_len")
_NO_CERTS: Final = memoryview(bytes(EXT_GUEST_DATA_MAX))
_PAGE_SHIFT: Final = 12
_PAGE_MASK: Final = (1 << _PAGE_SHIFT) - 1


class ProbeError(SwsnpError):
    """The driver does not bind: there is no device then.

    Attributes:
        errno: what the kernel's probe returns.
    """

    errno = errno.ENODEV


class SecretsNotMapped(ProbeError):
    """There is no secrets page."""


class VmpckIdOutOfRange(ProbeError):
    """`vmpck_id` names no key."""

    errno = errno.EINVAL


class VmpckEmpty(ProbeError):
    """The chosen key is all zero: never given to this guest, or wiped."""

    errno = errno.EINVAL


class _Ioctl(NamedTuple):
    """The argument's pointers, and whose they are."""

    msg_version: int
    req_data: int
    resp_data: int
    caller: CallerMemory


class _Command(NamedTuple):
    """What a command without certificates moves."""

    msg_type: int
    req_size: int
    resp_size: int


_REPORT: Final = _Command(int(MessageType.REPORT_REQ), SnpReportReq.SIZE, SnpReportResp.SIZE)
_KEY: Final = _Command(int(MessageType.KEY_REQ), SnpDerivedKeyReq.SIZE, SnpDerivedKeyResp.SIZE)
_PLAIN_COMMANDS: Final = {SNP_GET_REPORT: _REPORT, SNP_GET_DERIVED_KEY: _KEY}

# result of the ioctl, exitinfo2
_Result = tuple[int, int]
_REFUSED_EINVAL: Final = (-errno.EINVAL, EXITINFO2_UNSET)
_REFUSED_EFAULT: Final = (-errno.EFAULT, EXITINFO2_UNSET)
_UNKNOWN_COMMAND: Final = (-errno.ENOTTY, EXITINFO2_UNSET)
_DONE: Final = (0, 0)
_LOST: Final = (-errno.EFAULT, 0)
"""The firmware answered, the caller's memory did not take it: number used, key kept."""


class SevGuestDriver:
    """The driver of one guest, bound to one VMPCK.

    Args:
        guest: as `boot` left it.
        vmpck_id: the module's parameter; `OWN_VMPL` or 0..3.
        generation: `K_A`, `K_B` or `K_C`.
        clock: for the pauses after BUSY.
        trace: told of every call and message.
        vm: name of the machine in trace events.
        mutex: held over a call; one of Python's threads by default.

    Raises:
        ProbeError: the driver would not bind; `errno` tells with what.
    """

    def __init__(
        self,
        guest: BootedGuest,
        *,
        vmpck_id: int = OWN_VMPL,
        generation: DriverGeneration = K_C,
        clock: Clock = time,
        trace: Trace | None = None,
        vm: str = "",
        mutex: AbstractContextManager[object] | None = None,
    ) -> None:
        self._guest = guest
        self._generation = generation
        self._trace = trace or Trace()
        self._vm = vm
        self._mutex = threading.Lock() if mutex is None else mutex
        self._channel = _probe(guest, vmpck_id, self._trace)
        self._exchange = Exchange(self._channel, guest.layout, clock=clock, generation=generation)

    @property
    def vmpck_id(self) -> int:
        """The key in use; also the floor of configfs-tsm's privilege level."""
        return self._channel.vmpck_id

    @property
    def usable(self) -> bool:
        """Whether the key is still there."""
        return self._channel.usable()

    def ioctl(
        self, cpu: GuestCpu, command: int, argument: int, caller: CallerMemory
    ) -> Generator[None, None, int]:
        """Answer one ioctl; a guest program, so `yield` is VMGEXIT.

        In this order:

        1. the 32 bytes at `argument` are read: EFAULT;
        2. msg_version 0: EINVAL;
        3. `K_A` only, VMPCK empty: ENOTTY;
        4. unknown command: ENOTTY, exitinfo2 FFh is written back;
        5. the command;
        6. exitinfo2 other than 0: the whole structure is written back; EFAULT.

        So the caller's structure is untouched on success. Calls are serialised by one mutex per guest, held
        over VMGEXIT: programs of two vCPUs belong into two threads.

        Args:
            cpu: the vCPU that runs this.
            command: ioctl number.
            argument: address of struct snp_guest_request_ioctl.
            caller: the calling program's memory.

        Returns:
            0, -errno, or 2 or 4 when the host's reply was no answer at all.
        """
        try:
            raw = caller.read(argument, SnpGuestRequestIoctl.SIZE)
        except CallerFault:
            return self._returned(command, -errno.EFAULT, EXITINFO2_UNSET)
        msg_version, req_data, resp_data = _ARGUMENT.unpack(raw)
        if (emit := self._trace.emit) is not None:
            emit(IoctlCalled(vm=self._vm, command=command, msg_version=msg_version))
        if not msg_version:
            return self._returned(command, -errno.EINVAL, EXITINFO2_UNSET)
        with self._mutex:
            if self._generation.key_before_command and not self._channel.usable():
                return self._returned(command, -errno.ENOTTY, EXITINFO2_UNSET)
            call = _Ioctl(msg_version, req_data, resp_data, caller)
            result, exitinfo2 = yield from self._command(cpu, command, call)
        if exitinfo2:
            try:
                caller.write(argument, raw[:_EXITINFO2_AT] + _EXITINFO2.pack(exitinfo2))
            except CallerFault:
                result = -errno.EFAULT
        return self._returned(command, result, exitinfo2)

    def _returned(self, command: int, result: int, exitinfo2: int) -> int:
        if (emit := self._trace.emit) is not None:
            emit(IoctlReturned(vm=self._vm, command=command, result=result, exitinfo2=exitinfo2))
        return result

    def _command(self, cpu: GuestCpu, command: int, call: _Ioctl) -> Generator[None, None, _Result]:
        if (plain := _PLAIN_COMMANDS.get(command)) is not None:
            return self._plain(cpu, plain, call)
        if command == SNP_GET_EXT_REPORT:
            return self._ext_report(cpu, call)
        return _immediately(_UNKNOWN_COMMAND)

    def _plain(self, cpu: GuestCpu, command: _Command, call: _Ioctl) -> Generator[None, None, _Result]:
        """SNP_GET_REPORT and SNP_GET_DERIVED_KEY."""
        if not call.req_data or not call.resp_data:
            return _REFUSED_EINVAL
        try:
            payload = call.caller.read(call.req_data, command.req_size)
        except CallerFault:
            return _REFUSED_EFAULT
        limit = command.resp_size + AUTHTAG_SIZE
        message = Message(command.msg_type, call.msg_version, payload, limit)
        outcome = yield from self._exchange.run(cpu, self._guest.ghcb_of(cpu), message)
        if isinstance(outcome, Failed):
            return outcome.result, outcome.exitinfo2
        try:
            call.caller.write(call.resp_data, outcome.payload.ljust(command.resp_size, b"\0"))
        except CallerFault:
            return _LOST
        return _DONE

    def _ext_report(self, cpu: GuestCpu, call: _Ioctl) -> Generator[None, None, _Result]:
        """SNP_GET_EXT_REPORT."""
        if not call.req_data or not call.resp_data:
            return _REFUSED_EINVAL
        try:
            raw = call.caller.read(call.req_data, SnpExtReportReq.SIZE)
        except CallerFault:
            return _REFUSED_EFAULT
        certs_address, certs_len = _CERTS.unpack_from(raw, _CERTS_AT)
        if not certs_address:
            certs_len = 0
        if certs_len > EXT_GUEST_DATA_MAX or certs_len & _PAGE_MASK:
            return _REFUSED_EINVAL
        if certs_len and certs_address + certs_len > USER_SPACE_END:
            return _REFUSED_EFAULT
        if certs_len:  # a host without certificates may write nothing: the caller then finds zeros
            cpu.memory.write(self._guest.layout.certs_buffer, _NO_CERTS[:certs_len], private=False)
        message = Message(
            _REPORT.msg_type,
            call.msg_version,
            raw[: _REPORT.req_size],
            _REPORT.resp_size + AUTHTAG_SIZE,
            certs_len >> _PAGE_SHIFT,
        )
        outcome = yield from self._exchange.run(cpu, self._guest.ghcb_of(cpu), message)
        if isinstance(outcome, Failed):
            return _ext_failed(call, raw, outcome)
        try:
            if certs_len:
                certs = cpu.memory.read(self._guest.layout.certs_buffer, certs_len, private=False)
                call.caller.write(certs_address, certs)
            call.caller.write(call.resp_data, outcome.payload.ljust(_REPORT.resp_size, b"\0"))
        except CallerFault:
            return _LOST
        return _DONE


def _probe(guest: BootedGuest, vmpck_id: int, trace: Trace) -> Channel:
    if not guest.secrets.gpa:
        raise SecretsNotMapped("secrets page: no address, wanted one (Linux, sev_guest_probe)")
    chosen = guest.vmpl if vmpck_id == OWN_VMPL else vmpck_id
    if not 0 <= chosen <= 3:
        raise VmpckIdOutOfRange(f"vmpck_id: got {vmpck_id}, wanted 0..3 (Linux, sev_guest_probe)")
    try:
        return Channel(guest.secrets.slot(chosen), trace=trace)
    except KeyWiped as error:
        raise VmpckEmpty(str(error)) from None


def _immediately(result: _Result) -> Generator[None, None, _Result]:
    yield from ()
    return result


def _ext_failed(call: _Ioctl, raw: bytes, outcome: Failed) -> _Result:
    """Tell the caller how large the certificate buffer has to be, if that is what the host said."""
    result = outcome.result
    if outcome.exitinfo2 >> 32 == INVALID_LEN >> 32:
        certs_len = _CERTS_LEN.pack(outcome.npages << _PAGE_SHIFT & 0xFFFF_FFFF)
        changed = raw[:_CERTS_LEN_AT] + certs_len + raw[_CERTS_LEN_AT + _CERTS_LEN.size :]
        try:
            call.caller.write(call.req_data, changed)
        except CallerFault:
            result = -errno.EFAULT
    return result, outcome.exitinfo2
