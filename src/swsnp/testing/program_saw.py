"""One request by a program in the guest, and everything that it can see of the result.

Source: Linux, drivers/virt/coco/sev-guest: what is written back, and when.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import ErrorWord
from swsnp.abi.sev_guest import (
    EXT_GUEST_DATA_MAX,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    SnpExtReportReq,
    SnpGuestRequestIoctl,
    SnpReportReq,
    SnpReportResp,
)
from swsnp.guest.caller import BufferMemory
from swsnp.testing.seen import Answer

if TYPE_CHECKING:
    from swsnp.machine.virtual_machine import VirtualMachine

__all__ = ["ProgramSaw", "ask_report", "served"]

_NONCE: Final = b"hostile neighbours".ljust(64, b"\0")
_INITIAL: Final = 0x5A5A_5A5A_5A5A_5A5A
_FILL: Final = b"\xee"
_REPORT_DATA: Final = slice(0x20 + 0x50, 0x20 + 0x50 + 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSaw:
    """The end of SNP_GET_REPORT or SNP_GET_EXT_REPORT.

    Attributes:
        result: 0, a positive value, or -errno.
        exitinfo2: as written back; None: the caller's structure was not touched.
        key_kept: whether the driver can still talk to the firmware.
        answer: the response buffer; `Answer.OPENED` is a report with the nonce that was asked for.
        certs_len: as written back; None: the caller's request was not touched.
        certs: the certificate buffer; None: it was not touched, or none was offered.
    """

    result: int
    exitinfo2: int | None = None
    key_kept: bool = True
    answer: Answer = Answer.NONE
    certs_len: int | None = None
    certs: bytes | None = field(default=None, repr=False)


def served(certs: bytes | None = None, *, size: int = EXT_GUEST_DATA_MAX) -> ProgramSaw:
    """A report, and these certificates in a buffer of `size` bytes; None: no certificates were asked for."""
    return ProgramSaw(
        result=0, answer=Answer.OPENED, certs=None if certs is None else certs.ljust(size, b"\0")
    )


def ask_report(vm: VirtualMachine, *, certs_size: int | None = None) -> ProgramSaw:
    """Ask a booted VM for a report as a C program would, and look at every byte that may have changed.

    Args:
        vm: booted.
        certs_size: bytes of certificate buffer for SNP_GET_EXT_REPORT; None: SNP_GET_REPORT.

    Raises:
        GuestStopped: the guest ended.
        StillRunning: a `HostileHost` used up its budget.
    """
    caller = BufferMemory()
    response = bytearray(_FILL * SnpReportResp.SIZE)
    certs = bytearray(_FILL * (certs_size or 0))
    plain = SnpReportReq(user_data=_NONCE)
    request = bytearray(bytes(plain))
    if certs_size is not None:
        address = caller.place(certs) if certs_size else 0
        request[:] = bytes(SnpExtReportReq(user_data=_NONCE, certs_address=address, certs_len=certs_size))
    argument = bytearray(
        bytes(
            SnpGuestRequestIoctl(
                msg_version=1,
                req_data=caller.place(request),
                resp_data=caller.place(response),
                exitinfo2=ErrorWord(_INITIAL),
            )
        )
    )
    sent = bytes(request)
    command = SNP_GET_REPORT if certs_size is None else SNP_GET_EXT_REPORT
    result = vm.ioctl(command, caller.place(argument), caller)
    exitinfo2 = int(SnpGuestRequestIoctl.parse(argument).exitinfo2)
    return ProgramSaw(
        result=result,
        exitinfo2=None if exitinfo2 == _INITIAL else exitinfo2,
        key_kept=vm.driver is not None and vm.driver.usable,
        answer=_judge(response),
        certs_len=None if request == sent else SnpExtReportReq.parse(request).certs_len,
        certs=None if certs == _FILL * len(certs) else bytes(certs),
    )


def _judge(response: bytearray) -> Answer:
    if response == _FILL * len(response):
        return Answer.NONE
    return Answer.OPENED if response[_REPORT_DATA] == _NONCE else Answer.GARBAGE
