"""Making guest pages shared: rescind validation, then ask the host. Source: AMD 56421, page state change."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NoReturn

from swsnp.abi.ghcb import (
    PAGE,
    PSC_MAX_ENTRIES,
    ExitCode,
    GhcbField,
    MsrCode,
    PscEntry,
    PscHeader,
    PscMsrRequest,
    PscOp,
)
from swsnp.guest.ghcb_page import EsResult, es_result
from swsnp.guest.terminate import LinuxReason, ReasonSet, msr_call, terminate

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from swsnp.guest.cpu import GuestCpu
    from swsnp.guest.ghcb_page import GhcbPage

__all__ = ["share_page_by_msr", "share_pages"]

_CODE: Final = 0xFFF


def share_page_by_msr(cpu: GuestCpu, gpa: int) -> Generator[None, None, None]:
    """Make one page shared without a GHCB: the way for the GHCB page itself.

    Raises:
        GuestTerminated: PVALIDATE failed, or the host refused.
    """
    yield from _rescind(cpu, gpa)
    request = PscMsrRequest.of(code=MsrCode.PSC_REQ, gfn=gpa // PAGE, operation=PscOp.SHARED)
    reply = yield from msr_call(cpu, request)
    if reply & _CODE != MsrCode.PSC_RESP or reply >> 32:
        yield from _refused(cpu, f"page {gpa:#x}: MSR reply {reply:#x}, wanted {int(MsrCode.PSC_RESP):#x}")


def share_pages(ghcb: GhcbPage, gpas: Sequence[int]) -> Generator[None, None, None]:
    """Make pages shared through the GHCB.

    The host may resume the guest before all entries are done, and is asked again then. It may neither go
    backwards nor move the end. Like Linux, this asks without limit while the host does nothing.

    Args:
        ghcb: a registered GHCB.
        gpas: page aligned, at most 253.

    Raises:
        GuestTerminated: PVALIDATE failed, or the host refused or cheated.
    """
    for gpa in gpas:
        yield from _rescind(ghcb.cpu, gpa)
    for first in range(0, len(gpas), PSC_MAX_ENTRIES):
        yield from _change(ghcb, gpas[first : first + PSC_MAX_ENTRIES])


def _change(ghcb: GhcbPage, gpas: Sequence[int]) -> Generator[None, None, None]:
    entries = [PscEntry.of(gfn=gpa // PAGE, operation=PscOp.SHARED) for gpa in gpas]
    done, end = 0, len(entries) - 1
    ghcb.write_shared_buffer(
        bytes(PscHeader(cur_entry=done, end_entry=end)) + struct.pack(f"<{len(entries)}Q", *entries)
    )
    while done <= end:
        ghcb.ask(ExitCode.PSC, 0, 0, scratch=ghcb.gpa + GhcbField.SHARED_BUFFER)
        yield
        info1, info2 = ghcb.reply()
        header = PscHeader.parse(ghcb.read_shared_buffer(PscHeader.SIZE))
        if es_result(info1, info2) is not EsResult.OK or info2:
            yield from _refused(ghcb.cpu, f"reply info1={info1:#x} info2={info2:#x}, wanted 0 and 0")
        if header.reserved_4:
            yield from _refused(ghcb.cpu, f"header reserved: got {header.reserved_4:#x}, wanted 0")
        if header.end_entry > end or header.cur_entry < done:
            yield from _refused(
                ghcb.cpu,
                f"header: got entries {header.cur_entry}..{header.end_entry}, "
                f"wanted at least {done}, at most {end}",
            )
        done, end = header.cur_entry, header.end_entry


def _rescind(cpu: GuestCpu, gpa: int) -> Generator[None, None, None]:
    """PVALIDATE off before a page is given away.

    "Nothing changed" (carry) is fine here: a page that no firmware of the guest has accepted yet is not
    validated, and that is the state wanted. Linux, which runs on accepted memory, terminates instead.
    """
    code, _ = cpu.memory.pvalidate(gpa, validate=False)
    if code:
        yield from terminate(cpu, ReasonSet.LINUX, LinuxReason.PVALIDATE, f"page {gpa:#x}: PVALIDATE {code}")


def _refused(cpu: GuestCpu, why: str) -> Generator[None, None, NoReturn]:
    return terminate(cpu, ReasonSet.LINUX, LinuxReason.PSC, f"page state change: {why}")
