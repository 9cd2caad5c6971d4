"""A VM between two machines: what is taken along, and how the chip's part of it is exchanged.

Linux moves no SNP guest, and AMD's own way needs a migration agent. This is the model's: the destination
launches a VM through KVM's whole interface, with the guest's pages unmeasured, and then puts the saved guest
context in place of the one that this launch made. What the guest can see is what a migration would show it:
its memory, its keys, its counters and its REPORT_ID go on, while chip, TCB and certificates are other ones.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import PAGE
from swsnp.abi.kvm import MemoryAttribute
from swsnp.abi.snp_command import Command, GctxAddress, PageType
from swsnp.errors import UsageError
from swsnp.hardware.rmp import PageState
from swsnp.vmm.config import LaunchImage, LaunchPage, VmConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.abi.snp_report import Product
    from swsnp.firmware.mailbox import Mailbox
    from swsnp.guest.boot import GuestLayout
    from swsnp.guest.driver import DriverGeneration
    from swsnp.hardware.turn import Turn
    from swsnp.hypervisor.memory import MemorySlot, NestedPaging
    from swsnp.hypervisor.psp_driver import PspDriver

__all__ = ["GuestContexts", "SavedMemory", "SavedVm", "save_memory"]

_EMPTY_PAGE: Final = bytes(PAGE)
_VALID: Final = PageState.GUEST_VALID
_PRIVATE: Final = int(MemoryAttribute.PRIVATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedMemory:
    """Both planes of a guest's memory, as far as the guest could have put something there.

    Attributes:
        private: the pages that the guest had validated, by GPA.
        shared: the shared pages that are not zero, by GPA.
        shared_ranges: what was shared: first GPA and number of pages.
    """

    private: dict[int, bytes] = field(repr=False)
    shared: dict[int, bytes] = field(repr=False)
    shared_ranges: tuple[tuple[int, int], ...]

    def image(self) -> LaunchImage:
        """The private pages as a launch takes them without measuring: the measurement was the source's."""
        return tuple(LaunchPage(PageType.UNMEASURED, gpa, page) for gpa, page in sorted(self.private.items()))


@dataclass(slots=True, kw_only=True)
class SavedVm:
    """A VM that `VirtualMachine.save` took off its machine; `Machine.restore_vm` continues it, once.

    It holds the guest's keys. A guest that went on in two places would seal two messages under one key and
    one number, so a second restore is refused.

    Attributes:
        product: the source's; TCB_VERSION has another form in another product line.
        config: as it was created, without its certificates: those are the host's, and stay there.
        ghcb_version: the protocol version that the guest had negotiated.
        generation: which sev-guest driver the guest has.
        vmpck_id: the driver's module parameter.
        layout: where the guest keeps its pages, and the VMSA pages of its APs.
        memory: both planes.
        context: the firmware's; see `firmware.migration.SavedGuest`.
    """

    product: Product
    config: VmConfig
    ghcb_version: int
    generation: DriverGeneration
    vmpck_id: int
    layout: tuple[GuestLayout, tuple[int, ...]]
    memory: SavedMemory = field(repr=False)
    context: bytes = field(repr=False)
    _claim: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def restored(self) -> bool:
        """Whether it goes on somewhere already, or is about to."""
        return self._claim.locked()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Restore it in this block; an exception gives it back.

        Raises:
            UsageError: it was restored before.
        """
        if not self._claim.acquire(blocking=False):
            raise UsageError(f"{self.config.name}: this saved VM was restored before; a guest runs once")
        try:
            yield
        except BaseException:
            self._claim.release()
            raise


class GuestContexts:
    """Guest contexts in and out of a chip, outside AMD's protocol.

    Args:
        mailbox: the chip's.
        driver: of the host kernel, for the commands that make room.
        turn: held while the chip works; no command runs beside an exchange.
    """

    def __init__(self, mailbox: Mailbox, driver: PspDriver, turn: Turn) -> None:
        self._mailbox, self._driver, self._turn = mailbox, driver, turn

    def save(self, asid: int) -> bytes:
        """The context of the guest with this ASID; no request of it may be under way."""
        with self._turn:
            return self._mailbox.save_guest(self._page_of(asid))

    def replace(self, asid: int, context: bytes) -> None:
        """Put a saved context in the place of the one that a launch has just made.

        Page and ASID stay: KVM knows the guest by them. The launched guest is decommissioned and its ASID
        flushed, as the firmware asks before an ASID is used again.
        """
        with self._turn:
            page = self._page_of(asid)
        for command, buffer in (
            (Command.SNP_DECOMMISSION, bytes(GctxAddress(gctx_paddr=page))),
            (Command.SNP_DF_FLUSH, b""),
        ):
            result = self._driver.issue(command, buffer)
            if result.ret:
                raise UsageError(f"restored guest: {command.name} gave {result.ret}, status {result.fw:#x}")
        with self._turn:
            self._mailbox.restore_guest(page, context, asid=asid)

    def _page_of(self, asid: int) -> int:
        for page, guest in self._mailbox.platform.guests.items():
            if guest.asid == asid:
                return page
        raise UsageError(f"guest context: no guest has ASID {asid}")


def save_memory(memory: NestedPaging) -> SavedMemory:
    """Copy what a guest has in memory; none of its vCPUs may run.

    A private page that the guest never validated has nothing in it that the guest could read, and a shared
    page of zeros is what the destination has anyway: neither is copied.
    """
    private: dict[int, bytes] = {}
    shared: dict[int, bytes] = {}
    ranges: list[tuple[int, int]] = []
    for slot in memory.slots():
        private.update(_validated(memory, slot))
        for gpa, npages in _shared_ranges(memory, slot):
            ranges.append((gpa, npages))
            shared.update(_not_zero(slot, gpa, npages))
    return SavedMemory(private=private, shared=shared, shared_ranges=tuple(ranges))


def _validated(memory: NestedPaging, slot: MemorySlot) -> Iterator[tuple[int, bytes]]:
    """Pages that are private and validated; what was shared since may still be in the file."""
    if slot.memfd is None or slot.private_view is None:
        return
    for page in slot.memfd.assigned:
        start = page * PAGE - slot.memfd_offset
        if not 0 <= start < slot.size or not memory.attributes.get((slot.gpa + start) // PAGE) & _PRIVATE:
            continue
        if memory.rmp.state(slot.memfd.address + page * PAGE) is _VALID:
            yield slot.gpa + start, bytes(slot.private_view[start : start + PAGE])


def _shared_ranges(memory: NestedPaging, slot: MemorySlot) -> Iterator[tuple[int, int]]:
    gfn, end = slot.gpa // PAGE, (slot.gpa + slot.size) // PAGE
    while gfn < end:
        _, run_end, attributes = memory.attributes.run(gfn)
        upto = min(run_end, end)
        if not attributes & _PRIVATE:
            yield gfn * PAGE, upto - gfn
        gfn = upto


def _not_zero(slot: MemorySlot, gpa: int, npages: int) -> Iterator[tuple[int, bytes]]:
    if slot.shared_view is None:
        return
    for at in range(gpa, gpa + npages * PAGE, PAGE):
        page = bytes(slot.shared_view[at - slot.gpa : at - slot.gpa + PAGE])
        if page != _EMPTY_PAGE:
            yield at, page
