"""Page state change requests, both forms.

KVM itself changes nothing: it asks userspace, range by range, with KVM_HC_MAP_GPA_RANGE.
Source: AMD 56421 (GHCB 2.0), page state change; Linux, arch/x86/kvm/svm/sev.c, snp_begin_psc.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import (
    PSC_ERROR_GENERIC,
    PSC_ERROR_INVALID_ENTRY,
    PSC_ERROR_INVALID_HEADER,
    MsrCode,
    PscEntry,
    PscHeader,
    PscMsrRequest,
    PscOp,
)
from swsnp.abi.kvm import MAP_GPA_RANGE
from swsnp.hypervisor.outcomes import RESUMED, MapGpaRange, VmmErrno
from swsnp.hypervisor.scratch import scratch_area

if TYPE_CHECKING:
    from swsnp.hypervisor.outcomes import Outcome
    from swsnp.hypervisor.vcpu import Vcpu
    from swsnp.hypervisor.vmgexit import GhcbEvent

__all__ = ["MSR_ERROR", "PageStateChange", "begin", "begin_msr", "complete"]

MSR_ERROR: Final = 1 << 63 | MsrCode.PSC_RESP
"""The reply to a refused request in the MSR."""

_PAGE: Final = 4096
_LARGE: Final = 512
_OPERATIONS: Final = (PscOp.PRIVATE, PscOp.SHARED)
_U16: Final = struct.Struct("<H")
_U64: Final = struct.Struct("<Q")
_HEADER: Final = struct.Struct("<HH")
# A list has up to 253 entries: what is done for each takes the whole words, not their named parts.
_NAMED: Final = PscEntry.named()
_CUR_PAGE, _GFN, _PAGESIZE = (PscEntry.ranges()[name].mask for name in ("cur_page", "gfn", "pagesize"))
_GFN_BIT: Final = PscEntry.ranges()["gfn"].low
_REFUSALS: Final = frozenset({errno.EINVAL, errno.EAGAIN})
"""Answers of userspace that are errors for the guest in every profile."""


# The request in the MSR: one page of 4 KiB


def begin_msr(vcpu: Vcpu, msr: int) -> Outcome:
    """Take a page state change request from the MSR."""
    request = PscMsrRequest(msr)
    if request.operation not in _OPERATIONS or not _userspace_takes(vcpu):
        vcpu.answer_msr(msr, MSR_ERROR)
        return RESUMED
    private = request.operation == PscOp.PRIVATE
    return MapGpaRange(request.gfn * _PAGE, 1, private, _PAGE)


def complete(vcpu: Vcpu, asked: MapGpaRange, ret: int) -> Outcome:
    """Go on after userspace has answered `ret`, read from `kvm_run` once."""
    if ret and ret not in _REFUSALS and (error := vcpu.vm.profile.map_gpa_other_result_errno) is not None:
        return VmmErrno(error)
    change = asked.change
    if change is None:
        reply = MSR_ERROR if ret else int(MsrCode.PSC_RESP)
        vcpu.answer_msr(vcpu.processor.ghcb_msr, reply)
        return RESUMED
    if ret:
        return _finish(change.event, PSC_ERROR_GENERIC)
    change.mark_done()
    return _next_range(vcpu, change)


def _userspace_takes(vcpu: Vcpu) -> bool:
    return bool(vcpu.vm.exit_hypercall_mask & 1 << MAP_GPA_RANGE)


# The request in the page: a list of entries


@dataclass(slots=True)
class PageStateChange:
    """A request being worked on.

    `buffer` is the guest's memory from the scratch address on. `index` and `count` say which entries
    userspace is being asked for; `start` is where the search for the next range begins; `event` takes
    the result.
    """

    event: GhcbEvent
    buffer: memoryview
    start: int = 0
    end: int = 0
    index: int = 0
    count: int = 0

    @property
    def limit(self) -> int:
        """How many entries fit into the buffer."""
        return (len(self.buffer) - PscHeader.SIZE) // 8

    def read_header(self) -> None:
        """Take cur_entry and end_entry from the guest's memory."""
        self.start, self.end = _HEADER.unpack_from(self.buffer, 0)

    def word(self, index: int) -> int:
        """A copy of one entry: the guest may change it meanwhile."""
        value: int = _U64.unpack_from(self.buffer, PscHeader.SIZE + 8 * index)[0]
        return value

    def skip(self) -> None:
        """Tell the guest that one entry more is done."""
        (current,) = _U16.unpack_from(self.buffer, 0)
        _U16.pack_into(self.buffer, 0, (current + 1) & 0xFFFF)

    def mark_done(self) -> None:
        """Write the progress of the entries that userspace has converted, and go behind them."""
        for index in range(self.index, self.index + self.count):
            entry = self.word(index)
            done = entry & ~_CUR_PAGE | (_LARGE if entry & _PAGESIZE else 1)
            _U64.pack_into(self.buffer, PscHeader.SIZE + 8 * index, done)
        self.start = self.index + self.count
        self.count = 0
        _U16.pack_into(self.buffer, 0, self.start)


def begin(vcpu: Vcpu, event: GhcbEvent) -> Outcome:
    """Take a page state change request from the GHCB page."""
    buffer = scratch_area(vcpu, event, PscHeader.SIZE, write_back=True)
    if not isinstance(buffer, memoryview):
        return buffer
    if not _userspace_takes(vcpu):
        return _finish(event, PSC_ERROR_GENERIC)
    change = PageStateChange(event, buffer)
    change.read_header()
    return _next_range(vcpu, change)


def _next_range(vcpu: Vcpu, change: PageStateChange) -> Outcome:
    """Find what userspace is to be asked next, or end the request."""
    event, reread = change.event, vcpu.vm.profile.psc_rereads_header
    while True:
        if reread:
            change.read_header()
        if change.end >= change.limit:
            return _finish(event, PSC_ERROR_INVALID_HEADER)
        for index in range(change.start, change.end + 1):
            first = PscEntry(change.word(index))
            whole = _LARGE if first.pagesize else 1
            if first.cur_page > whole or first.gfn % whole:
                return _finish(event, PSC_ERROR_INVALID_ENTRY)
            if first.cur_page < whole:
                break
            change.skip()
        else:
            return _finish(event, 0)
        change.index, change.count = index, 1
        npages = _merge(change, first)
        if first.operation in _OPERATIONS:
            return MapGpaRange(
                (first.gfn + first.cur_page) * _PAGE,
                npages,
                first.operation == PscOp.PRIVATE,
                _LARGE * _PAGE if first.pagesize else _PAGE,
                change,
            )
        change.mark_done()  # other operations count as done without asking anyone


def _merge(change: PageStateChange, first: PscEntry) -> int:
    """Count following entries that continue `first` into the range; returns its 4 KiB pages.

    The rest of a 2 MiB entry that is partly done counts as 4 KiB pages, and neighbours are looked for
    behind its first frame plus that rest, as KVM does.
    """
    large = bool(first.pagesize) and not first.cur_page
    npages: int = (_LARGE if first.pagesize else 1) - first.cur_page
    gfn, alike = int(first.gfn), PscEntry.of(operation=first.operation, pagesize=large)
    for index in range(change.index + 1, change.end + 1):
        entry = change.word(index)
        if entry & _GFN != gfn + npages << _GFN_BIT or entry & _NAMED & ~_GFN != alike:
            break
        change.count += 1
        npages += _LARGE if large else 1
    return npages


def _finish(event: GhcbEvent, result: int) -> Outcome:
    event.answer(result)
    return RESUMED
