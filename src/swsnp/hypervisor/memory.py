"""A VM's memory: memslots, attributes and the RMP between guest code and the machine's memory.

Private and shared memory are two planes: a page's private bytes lie in the guest_memfd, its shared bytes
in the VMM's mapping. The attribute says which of them the nested page table shows.
Source: Linux, virt/kvm/kvm_main.c (memslots, attributes), arch/x86/kvm/svm/sev.c (sev_gmem_prepare).
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from swsnp.abi.kvm import MemoryAttribute
from swsnp.hardware.exits import GuestAccessFault, NestedPageFault, Shutdown
from swsnp.hardware.memory import PAGE, BusError
from swsnp.hardware.rmp import PvalidateCode, RmpUpdate, RmpUpdateCode
from swsnp.hypervisor.attributes import AttributeMap

if TYPE_CHECKING:
    from mmap import mmap

    from swsnp.hardware.memory import SystemMemory
    from swsnp.hardware.rmp import Rmp, RmpEntry
    from swsnp.hypervisor.guest_memfd import GuestMemfd

__all__ = ["MemorySlot", "NestedPaging", "UserMemory"]

_K = TypeVar("_K")
_T = TypeVar("_T")
_OFFSET: Final = PAGE - 1
_LARGE: Final = 2 << 20
_LARGE_OFFSET: Final = _LARGE - 1
_PRIVATE: Final = int(MemoryAttribute.PRIVATE)
_CACHED_PAGES: Final = 8192


class UserMemory(Protocol):
    """The VMM's address space, as far as a memslot is resolved in it."""

    def extent(self, address: int) -> tuple[int, int] | None:
        """System address of a user address, and the bytes mapped from there on; None when unmapped."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class MemorySlot:
    """One memslot. The shared plane is resolved at the first use, since a VMM may map its memory later."""

    number: int
    flags: int
    gpa: int
    size: int
    user_address: int
    memfd: GuestMemfd | None
    memfd_offset: int
    read_only: bool
    has_memfd: bool
    """Created with a guest_memfd, which may have been closed since."""
    shared_address: int = 0
    shared_view: memoryview | None = None
    private_view: memoryview | None = None

    def private_address(self, gpa: int) -> int | None:
        """System address of the guest_memfd byte behind a GPA of this slot; None without guest_memfd."""
        if self.memfd is None:
            return None
        return self.memfd.address + self.memfd_offset + gpa - self.gpa


class NestedPaging:
    """Implements what the processor, KVM's own code and the launch commands need of a VM's memory.

    Look-ups by page are remembered until slots, attributes or the VMM's mappings change; a TLB, in a way.
    """

    def __init__(self, *, system: SystemMemory, rmp: Rmp, user: UserMemory) -> None:
        self.system = system
        self.rmp = rmp
        self.attributes = AttributeMap()
        self.asid = 0
        """The guest's ASID; 0 until KVM_SEV_INIT2, and for a VM without SNP."""
        self.generation = 0
        """Counts what changes where memory lies: slots, attributes, the VMM's mappings."""
        self._user = user
        self._lock = threading.RLock()
        self._slots: tuple[MemorySlot, ...] = ()
        self._gpas: list[int] = []
        # by guest frame: the mapping that the page lies in and where, its system address, and whether it is
        # read-only or its RMP entry when it was looked at
        self._host_pages: dict[int, tuple[mmap, int, int, bool]] = {}
        self._shared_pages: dict[int, tuple[mmap, int, int, bool]] = {}
        self._private_pages: dict[int, tuple[mmap, int, int, RmpEntry]] = {}
        # the private run that was looked at last: first and last GPA, its memslot, what makes a GPA of it a
        # system address
        self._private_run: tuple[int, int, MemorySlot | None, int] = (0, -1, None, 0)
        # by GPA and bytes: mapping and place, its pages' system addresses, whether it is read-only
        self._shared_runs: dict[tuple[int, int], tuple[mmap, int, range, bool]] = {}

    # Configuration: KVM_SET_USER_MEMORY_REGION2, KVM_SET_MEMORY_ATTRIBUTES, changes below

    def slots(self) -> tuple[MemorySlot, ...]:
        """Every memslot, by rising GPA, with both planes as they are mapped now."""
        with self._lock:
            for slot in self._slots:
                self._resolve(slot)
            return self._slots

    def slot_at(self, gpa: int) -> MemorySlot | None:
        """The memslot that holds a GPA."""
        at = bisect_right(self._gpas, gpa) - 1
        if at < 0:
            return None
        slot = self._slots[at]
        return slot if gpa < slot.gpa + slot.size else None

    def slot_numbered(self, number: int) -> MemorySlot | None:
        """The memslot with that number."""
        return next((slot for slot in self._slots if slot.number == number), None)

    def overlaps(self, gpa: int, size: int, *, besides: MemorySlot | None = None) -> bool:
        """Whether a range meets a memslot other than `besides`."""
        return any(
            slot is not besides and slot.gpa < gpa + size and gpa < slot.gpa + slot.size
            for slot in self._slots
        )

    def add_slot(self, slot: MemorySlot) -> None:
        """Insert a memslot that was checked."""
        if slot.memfd is not None:
            start = slot.memfd_offset
            slot.private_view = slot.memfd.view[start : start + slot.size]
        self._set_slots((*self._slots, slot))

    def remove_slot(self, slot: MemorySlot) -> None:
        """Delete a memslot; its guest_memfd range can be bound again."""
        if slot.memfd is not None:
            slot.memfd.unbind(slot.number)
        self._set_slots(tuple(each for each in self._slots if each is not slot))

    def _set_slots(self, slots: tuple[MemorySlot, ...]) -> None:
        with self._lock:
            self._slots = tuple(sorted(slots, key=lambda each: each.gpa))
            self._gpas = [each.gpa for each in self._slots]
            self._forget_pages()

    def set_attributes(self, gfn_start: int, gfn_end: int, value: int) -> None:
        """Give a range of frames an attribute value."""
        with self._lock:
            self.attributes.set(gfn_start, gfn_end, value)
            self._forget_pages()

    def drop_memfd(self, memfd: GuestMemfd) -> None:
        """A guest_memfd was closed: its memslots have no private memory any more."""
        with self._lock:
            for slot in self._slots:
                if slot.memfd is memfd:
                    slot.memfd = slot.private_view = None
            self._forget_pages()

    def drop_mapping(self, address: int, size: int) -> None:
        """The VMM unmapped a range of its memory."""
        with self._lock:
            for slot in self._slots:
                if slot.user_address < address + size and address < slot.user_address + slot.size:
                    slot.shared_view = None
                    self._forget_pages()

    def _forget_pages(self) -> None:
        self.generation += 1
        self._host_pages.clear()
        self._shared_pages.clear()
        self._shared_runs.clear()
        self._private_pages.clear()
        self._private_run = (0, -1, None, 0)

    def _resolve(self, slot: MemorySlot) -> memoryview | None:
        if slot.shared_view is None and (found := self._user.extent(slot.user_address)) is not None:
            slot.shared_address, mapped = found
            view = self.system.view(slot.shared_address, min(mapped, slot.size))
            slot.shared_view = view.toreadonly() if slot.read_only else view
        return slot.shared_view

    # KVM itself: through the memslot's user mapping, whatever the attributes say

    def host_read(self, gpa: int, size: int) -> bytes:
        """Copy guest memory out of the shared plane.

        Raises:
            BusError: no memslot, or one whose user address is not mapped.
        """
        start = gpa & _OFFSET
        if start + size <= PAGE:
            area, at, _, _ = self._host_pages.get(gpa >> 12) or self._host_page(gpa)
            return area[at + start : at + start + size]
        return b"".join(self.host_read(at, length) for at, length in _by_page(gpa, size))

    def host_write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy into the shared plane.

        Raises:
            BusError: as `host_read`; a read-only memslot; a page that the RMP assigns to guest or firmware.
        """
        start = gpa & _OFFSET
        size = len(data)
        if start + size > PAGE:
            for at, length in _by_page(gpa, size):
                self.host_write(at, memoryview(data)[at - gpa : at - gpa + length])
            return
        area, at, spa, read_only = self._host_pages.get(gpa >> 12) or self._host_page(gpa)
        if self.rmp[spa].assigned:
            raise BusError(f"GPA {gpa:#x}: host write to a page in state {self.rmp.state(spa).value}")
        if read_only:
            raise BusError(f"GPA {gpa:#x}: host write to a read-only memslot")
        area[at + start : at + start + size] = data

    def host_view(self, gpa: int, size: int) -> memoryview:
        """A window on a shared page or a part of it, without RMP check; BusError as `host_read`."""
        start = gpa & _OFFSET
        if start + size > PAGE:
            raise BusError(f"GPA {gpa:#x}: {size} bytes are not inside one page")
        area, at, _, read_only = self._host_pages.get(gpa >> 12) or self._host_page(gpa)
        window = memoryview(area)[at + start : at + start + size]
        return window.toreadonly() if read_only else window

    def host_page_address(self, gpa: int) -> int:
        """System address of the shared page that holds a GPA; BusError as `host_read`."""
        return (self._host_pages.get(gpa >> 12) or self._host_page(gpa))[2]

    def private_page_address(self, gpa: int) -> int:
        """System address of the guest_memfd page that holds a GPA, whatever the attribute says.

        Raises:
            BusError: no memslot, or one without guest_memfd.
        """
        slot = self.slot_at(gpa)
        spa = None if slot is None else slot.private_address(gpa & ~_OFFSET)
        if spa is None:
            raise BusError(f"GPA {gpa:#x}: no memslot with a guest_memfd")
        return spa

    def _host_page(self, gpa: int) -> tuple[mmap, int, int, bool]:
        with self._lock:
            slot = self.slot_at(gpa)
            view = None if slot is None else self._resolve(slot)
            if slot is not None and view is not None:
                start = (gpa & ~_OFFSET) - slot.gpa
                if start + PAGE <= len(view):
                    spa = slot.shared_address + start
                    found = *self.system.place(spa, PAGE), spa, slot.read_only
                    _remember(self._host_pages, gpa >> 12, found)
                    return found
        raise BusError(f"GPA {gpa:#x}: no memory")

    # Guest code: GuestPhysicalMemory

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        """Load as guest code with this C-bit.

        Raises:
            GuestAccessFault: with `NestedPageFault` where the attribute differs or no memory is, with
                `Shutdown` for a private page that the guest did not validate.
        """
        start = gpa & _OFFSET
        if start + size > PAGE:
            if not private and (run := self._shared_run(gpa, size)) is not None:
                area, at, _, _ = run
                return area[at : at + size]
            return b"".join(self.read(at, length, private=private) for at, length in _by_page(gpa, size))
        if private:
            area, at = self._private_page(gpa, write=False)
        else:
            area, at, _, _ = self._shared_pages.get(gpa >> 12) or self._shared_page(gpa, write=False)
        return area[at + start : at + start + size]

    def write(self, gpa: int, data: bytes | bytearray | memoryview, *, private: bool) -> None:
        """Store as guest code with this C-bit; faults as `read`, and on a shared page that is assigned."""
        start = gpa & _OFFSET
        size = len(data)
        if start + size > PAGE:
            if not private and (run := self._shared_run(gpa, size)) is not None:
                area, at, pages, read_only = run
                if not read_only and self.rmp.first_assigned(pages) is None:
                    area[at : at + size] = data
                    return
            for at, length in _by_page(gpa, size):
                self.write(at, memoryview(data)[at - gpa : at - gpa + length], private=private)
            return
        if private:
            area, at = self._private_page(gpa, write=True)
            area[at + start : at + start + size] = data
            return
        area, at, spa, read_only = self._shared_pages.get(gpa >> 12) or self._shared_page(gpa, write=True)
        if self.rmp[spa].assigned:
            # KVM cannot resolve an RMP fault on a shared page and lets the guest fault for ever
            raise GuestAccessFault(
                Shutdown(f"shared page {gpa & ~_OFFSET:#x} is {self.rmp.state(spa).value}")
            )
        if read_only:
            raise GuestAccessFault(NestedPageFault(gpa & ~_OFFSET, private=False, write=True))
        area[at + start : at + start + size] = data

    def pvalidate(self, gpa: int, *, validate: bool, page_size: int = 0) -> tuple[int, bool]:
        """PVALIDATE by VMPL0: EAX, and carry when nothing changed; faults as `write`.

        Args:
            gpa: aligned to 4 KiB; for 2 MiB PVALIDATE itself wants more.
            validate: the wanted state.
            page_size: 0 is 4 KiB, 1 is 2 MiB.
        """
        if gpa & (_LARGE_OFFSET if page_size else _OFFSET):
            return PvalidateCode.FAIL_INPUT, False
        spa = self._prepared(gpa, large=bool(page_size))
        done = self.rmp.pvalidate(spa, asid=self.asid, gpa=gpa, validate=validate, page_size=page_size)
        if done is None:
            raise GuestAccessFault(NestedPageFault(gpa, private=True, write=True))
        return int(done[0]), done[1]

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool, page_size: int = 0) -> int:
        """RMPADJUST by VMPL0: EAX. Faults as a private write."""
        if gpa & (_LARGE_OFFSET if page_size else _OFFSET):
            return PvalidateCode.FAIL_INPUT
        spa = self._prepared(gpa, large=bool(page_size))
        done = self.rmp.rmpadjust(
            spa,
            asid=self.asid,
            gpa=gpa,
            vmpl=vmpl,
            permissions=permissions,
            vmsa=vmsa,
            page_size=page_size,
        )
        if done is None:
            raise GuestAccessFault(NestedPageFault(gpa, private=True, write=True))
        return int(done)

    def pre_fault(self, gpa: int) -> int:
        """Map a page as the guest's first touch would: 0, -ENOENT without memslot, -EFAULT without memory."""
        with self._lock:
            if self.slot_at(gpa) is None:
                return -errno.ENOENT
            try:
                if self.attributes.get(gpa >> 12) & _PRIVATE:
                    self._find_private(gpa, write=False)
                else:
                    self._host_page(gpa)
            except (BusError, GuestAccessFault):
                return -errno.EFAULT
        return 0

    def _prepared(self, gpa: int, *, large: bool) -> int:
        """System address of a private page, with an RMP entry of the wanted size where there can be one.

        KVM assigns 2 MiB at once where all of it is private and nobody's, and splits the entry (PSMASH) when
        the guest asks for 4 KiB inside it.
        """
        with self._lock:
            slot, spa = self._private_memory(gpa, write=True)
            if large:
                self._assign_large(slot, spa, gpa)
            entry = self.rmp[spa]
            if not entry.assigned:
                self._assign(slot, spa, gpa, write=True)
            elif entry.page_size and not large:
                self.rmp.psmash(spa & ~_LARGE_OFFSET)
            return spa

    def _assign_large(self, slot: MemorySlot, spa: int, gpa: int) -> None:
        """Give the guest 2 MiB as one RMP entry; where that cannot be nothing is changed."""
        if not self.asid or gpa + _LARGE > slot.gpa + slot.size or self.rmp.has_entries(spa):
            return
        if not self.attributes.all_equal(gpa >> 12, gpa + _LARGE >> 12, _PRIVATE):
            return
        new = RmpUpdate(assigned=True, asid=self.asid, gpa=gpa, page_size=1)
        if self.rmp.rmpupdate(spa, new) == RmpUpdateCode.SUCCESS:
            self.note_assigned(slot, spa, large=True)

    def _shared_run(self, gpa: int, size: int) -> tuple[mmap, int, range, bool] | None:
        """Where a shared range of several pages in one memslot lies, as `_shared_runs` keeps it.

        None when it is not all shared memory of one slot; going page by page then finds what is wrong where.
        """
        if (hit := self._shared_runs.get((gpa, size))) is not None:
            return hit
        with self._lock:
            slot = self.slot_at(gpa)
            view = None if slot is None else self._resolve(slot)
            first, last = gpa >> 12, (gpa + size - 1) >> 12
            if slot is None or view is None or not self.attributes.all_equal(first, last + 1, 0):
                return None
            start = gpa - slot.gpa
            if start + size > len(view):
                return None
            address = slot.shared_address + (start & ~_OFFSET)
            pages = range(address, address + (last - first + 1) * PAGE, PAGE)
            found = *self.system.place(slot.shared_address + start, size), pages, slot.read_only
            _remember(self._shared_runs, (gpa, size), found)
            return found

    def _shared_page(self, gpa: int, *, write: bool) -> tuple[mmap, int, int, bool]:
        with self._lock:
            if not self.attributes.get(gpa >> 12) & _PRIVATE:
                try:
                    found = self._host_page(gpa)
                except BusError:
                    pass  # reported as a fault below
                else:
                    _remember(self._shared_pages, gpa >> 12, found)
                    return found
        raise GuestAccessFault(NestedPageFault(gpa & ~_OFFSET, private=False, write=write))

    def _private_page(self, gpa: int, *, write: bool) -> tuple[mmap, int]:
        hit = self._private_pages.get(gpa >> 12)
        if hit is None or self.rmp[hit[2]] is not hit[3]:
            with self._lock:
                hit = self._find_private(gpa, write=write)
                if self.asid:
                    self._require_valid(hit[3], gpa & ~_OFFSET)
                _remember(self._private_pages, gpa >> 12, hit)
        return hit[0], hit[1]

    def _find_private(self, gpa: int, *, write: bool) -> tuple[mmap, int, int, RmpEntry]:
        """The guest_memfd page behind a private access, assigned to the guest at the first touch."""
        page_gpa = gpa & ~_OFFSET
        with self._lock:
            slot, spa = self._private_memory(page_gpa, write=write)
            self._assign(slot, spa, page_gpa, write=write)
            return *self.system.place(spa, PAGE), spa, self.rmp[spa]

    def _private_memory(self, gpa: int, *, write: bool) -> tuple[MemorySlot, int]:
        """The memslot of a page that is private, and the page's system address in the guest_memfd."""
        first, last, slot, offset = self._private_run
        if slot is not None and first <= gpa <= last:
            return slot, gpa + offset
        slot = self.slot_at(gpa)
        start, end, value = self.attributes.run(gpa >> 12)
        if slot is not None and value & _PRIVATE and (spa := slot.private_address(gpa)) is not None:
            first, behind = max(start << 12, slot.gpa), min(end << 12, slot.gpa + slot.size)
            self._private_run = first, behind - 1, slot, spa - gpa
            return slot, spa
        raise GuestAccessFault(NestedPageFault(gpa, private=True, write=write))

    def _assign(self, slot: MemorySlot, spa: int, gpa: int, *, write: bool) -> None:
        # sev_gmem_prepare: only a page that nobody has is changed
        if not self.asid or self.rmp[spa].assigned:
            return
        new = RmpUpdate(assigned=True, asid=self.asid, gpa=gpa)
        if self.rmp.rmpupdate(spa, new) != RmpUpdateCode.SUCCESS:
            raise GuestAccessFault(NestedPageFault(gpa, private=True, write=write))
        self.note_assigned(slot, spa)

    def note_assigned(self, slot: MemorySlot, spa: int, *, large: bool = False) -> None:
        """Remember that the RMP gives a page of the slot's guest_memfd to the guest, of 4 KiB or 2 MiB."""
        if slot.memfd is not None:
            page = (spa - slot.memfd.address) // PAGE
            (slot.memfd.assigned.add_large if large else slot.memfd.assigned.add)(page)

    def _require_valid(self, entry: RmpEntry, page_gpa: int) -> None:
        inside = page_gpa & _LARGE_OFFSET if entry.page_size else 0
        if entry.asid != self.asid or entry.gpa + inside != page_gpa:
            raise GuestAccessFault(
                Shutdown(f"private page {page_gpa:#x}: RMP has ASID {entry.asid}, GPA {entry.gpa:#x}")
            )
        if entry.immutable or not entry.validated:
            # the guest's own #VC; no guest here handles it
            raise GuestAccessFault(
                Shutdown(f"private page {page_gpa:#x} is {entry.state.value}: not validated")
            )


def _by_page(gpa: int, size: int) -> list[tuple[int, int]]:
    """A range cut at page boundaries: addresses and lengths."""
    cuts = [gpa, *range((gpa | _OFFSET) + 1, gpa + size, PAGE), gpa + size]
    return [(start, end - start) for start, end in pairwise(cuts)]


def _remember(pages: dict[_K, _T], key: _K, found: _T) -> None:
    if len(pages) >= _CACHED_PAGES:
        pages.clear()
    pages[key] = found
