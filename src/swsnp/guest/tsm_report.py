"""What the sev-guest driver does for configfs-tsm: one report with its certificates.

Source: Linux, drivers/virt/coco/sev-guest (sev_report_new, sev_report_attr_visible).

Reports of a service (an SVSM's) are absent: no SVSM with an attestation protocol is modelled. Asking for one
ends as it does on a guest whose SVSM does not know the protocol: EINVAL.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from swsnp.abi.ghcb import PAGE, CertTableEntry
from swsnp.abi.sev_guest import (
    EXT_GUEST_DATA_MAX,
    SNP_GET_EXT_REPORT,
    SnpExtReportReq,
    SnpGuestRequestIoctl,
    SnpReportResp,
)
from swsnp.abi.snp_command import FirmwareStatus
from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.guest.caller import BufferMemory, CallerMemory
from swsnp.guest.tsm_text import NULL_GUID, TsmError

__all__ = [
    "INBLOB_SIZE",
    "Blobs",
    "ExtReport",
    "GetExtReport",
    "ReportInput",
    "SevGuestIoctl",
    "SevGuestProvider",
    "TsmProvider",
    "certs_size",
    "ext_report_through",
]

INBLOB_SIZE: Final = 64
_REPORT_BUFFER: Final = PAGE
_U32: Final = 0xFFFF_FFFF
_MSG_VERSION: Final = 1
_REFUSED_INPUT: Final = (FirmwareStatus.INVALID_PARAM, FirmwareStatus.INVALID_KEY)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInput:
    """What programs wrote into an entry.

    Attributes:
        inblob: as stored, up to 64 bytes.
        privlevel: 0 to 3.
        service_provider: None when never written.
        service_guid: 16 bytes.
        service_manifest_version: 32 bits.
    """

    inblob: bytes = b""
    privlevel: int = 0
    service_provider: bytes | None = None
    service_guid: bytes = NULL_GUID
    service_manifest_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blobs:
    """What a provider made of it; an `outblob` of None is read as empty and asked for again."""

    outblob: bytes | None = None
    auxblob: bytes = b""
    manifestblob: bytes = b""


class TsmProvider(Protocol):
    """What serves the entries: struct tsm_report_ops.

    Attributes:
        name: what `provider` shows.
        privlevel_floor: the lowest privilege level that may be written.
        services: whether the attributes about services exist.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def privlevel_floor(self) -> int: ...  # noqa: D102
    @property
    def services(self) -> bool: ...  # noqa: D102

    def report_new(self, given: ReportInput) -> Blobs:
        """Make the blobs; raises TsmError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtReport:
    """How an extended report request of the kernel itself ended.

    Attributes:
        result: 0, -errno, or 2 or 4 when the host's reply was no answer.
        response: MSG_REPORT_RSP, 4,000 bytes; zeros unless `result` is 0.
        certs: the certificate buffer, 16 KiB; zeros when the host had no table.
    """

    result: int
    response: bytes
    certs: bytes = field(repr=False)


GetExtReport: TypeAlias = Callable[[bytes, int], ExtReport]
"""Runs the driver's extended request on a vCPU: 64 bytes of user data, privilege level."""


class SevGuestIoctl(Protocol):
    """The driver of a running guest, with a vCPU to run on: the machine's."""

    def ioctl(self, command: int, argument: int, caller: CallerMemory) -> int:
        """`SevGuestDriver.ioctl`, run to its end."""


def ext_report_through(device: SevGuestIoctl) -> GetExtReport:
    """The extended request as the driver makes it for itself, with buffers of its own.

    Linux takes the same way: the handler of SNP_GET_EXT_REPORT, called with kernel memory.
    """

    def get_ext_report(user_data: bytes, privlevel: int) -> ExtReport:
        memory = BufferMemory()
        response, certs = bytearray(SnpReportResp.SIZE), bytearray(EXT_GUEST_DATA_MAX)
        request = SnpExtReportReq(
            user_data=user_data, vmpl=privlevel, certs_address=memory.place(certs), certs_len=len(certs)
        )
        argument = SnpGuestRequestIoctl(
            msg_version=_MSG_VERSION,
            req_data=memory.place(bytes(request)),
            resp_data=memory.place(response),
        )
        result = device.ioctl(SNP_GET_EXT_REPORT, memory.place(bytes(argument)), memory)
        return ExtReport(result=result, response=bytes(response), certs=bytes(certs))

    return get_ext_report


@dataclass(frozen=True, slots=True)
class SevGuestProvider:
    """The provider `sev_guest`.

    Attributes:
        get_ext_report: the driver's request, with message version 1 and four pages for certificates.
        privlevel_floor: number of the VMPCK in use.
        services: whether the guest runs below VMPL0, that is, under an SVSM.
    """

    get_ext_report: GetExtReport
    privlevel_floor: int = 0
    services: bool = False
    name: str = "sev_guest"

    def report_new(self, given: ReportInput) -> Blobs:
        """Ask the firmware.

        1. user data of 64 bytes: EINVAL;
        2. no service: EINVAL (absent, see the module's text);
        3. the request: its errno. A positive result counts as success without blobs, as in Linux;
        4. status INVALID_PARAM and INVALID_KEY: EINVAL; others: ENXIO;
        5. report and header within one page: ENOMEM.

        Raises:
            TsmError: in this order.
        """
        if len(given.inblob) != INBLOB_SIZE or given.service_provider is not None:
            raise TsmError(errno.EINVAL)
        answer = self.get_ext_report(given.inblob, given.privlevel)
        if answer.result < 0:
            raise TsmError(-answer.result)
        if answer.result:
            return Blobs()
        header = MsgReportRspHeader.parse_at(answer.response, 0)
        if header.status in _REFUSED_INPUT:
            raise TsmError(errno.EINVAL)
        if header.status:
            raise TsmError(errno.ENXIO)
        end = header.SIZE + header.report_size
        if end > _REPORT_BUFFER:
            raise TsmError(errno.ENOMEM)
        outblob = answer.response.ljust(_REPORT_BUFFER, b"\0")[header.SIZE : end]
        return Blobs(outblob=outblob, auxblob=answer.certs[: certs_size(answer.certs)])


def certs_size(table: bytes) -> int:
    """Where a certificate table's last certificate ends, by its entries alone; 0 when it has none.

    Neither offsets nor lengths are checked, sums wrap at 32 bits, and a table without end goes on to the end
    of the buffer: what a program gets is cut at 16 KiB and otherwise as the host wrote it.

    Args:
        table: the whole buffer.
    """
    size = 0
    for at in range(0, min(len(table), EXT_GUEST_DATA_MAX) - CertTableEntry.SIZE + 1, CertTableEntry.SIZE):
        entry = CertTableEntry.parse_at(table, at)
        if entry.guid == NULL_GUID and not entry.offset and not entry.length:
            break
        size = max(size, entry.offset + entry.length & _U32)
    return min(size, EXT_GUEST_DATA_MAX)
