"""The reverse map table and the instructions on it.

Source: AMD 24593 and 24594 (APM volumes 2 and 3); AMD 56860, page states.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Final

__all__ = ["PageState", "PvalidateCode", "Rmp", "RmpEntry", "RmpUpdate", "RmpUpdateCode", "VMPL0_ALL"]

VMPL0_ALL: Final = (0x1F, 0, 0, 0)
"""Permissions of VMPL0..3 on a fresh entry: VMPL0 has all."""
_PAGE: Final = 4096
_LARGE: Final = 2 << 20
_LARGE_MASK: Final = _LARGE - 1
_PAGES: Final = _LARGE // _PAGE


class PageState(Enum):
    """Page states of AMD 56860."""

    HYPERVISOR = "Hypervisor"
    HV_FIXED = "HV-Fixed"
    FIRMWARE = "Firmware"
    RECLAIM = "Reclaim"
    CONTEXT = "Context"
    METADATA = "Metadata"
    PRE_GUEST = "Pre-Guest"
    PRE_SWAP = "Pre-Swap"
    GUEST_INVALID = "Guest-Invalid"
    GUEST_VALID = "Guest-Valid"


@dataclass(slots=True, kw_only=True, unsafe_hash=True)
class RmpEntry:
    """The entry of one page, 4 KiB or 2 MiB; replaced as a whole, so that readers never see half a change.

    Not frozen but Final, since the constructor of a frozen one takes three times as long, and a guest that
    boots has thousands made.
    """

    assigned: Final[bool] = False
    page_size: Final[int] = 0
    immutable: Final[bool] = False
    gpa: Final[int] = 0
    asid: Final[int] = 0
    vmsa: Final[bool] = False
    validated: Final[bool] = False
    permissions: Final[tuple[int, int, int, int]] = VMPL0_ALL
    state: PageState = field(init=False, compare=False)
    """The page state that the other fields mean; entries are read far more often than made."""

    def __post_init__(self) -> None:
        if not self.assigned:
            self.state = PageState.HV_FIXED if self.immutable else PageState.HYPERVISOR
        elif self.asid and self.immutable:
            self.state = PageState.PRE_SWAP if self.validated else PageState.PRE_GUEST
        elif self.asid:
            self.state = PageState.GUEST_VALID if self.validated else PageState.GUEST_INVALID
        elif not self.immutable:
            self.state = PageState.RECLAIM
        elif self.vmsa:
            self.state = PageState.CONTEXT
        else:
            self.state = PageState.METADATA if self.gpa else PageState.FIRMWARE


_DEFAULT: Final = RmpEntry()


@dataclass(slots=True, kw_only=True, unsafe_hash=True)
class RmpUpdate:
    """The new state that RMPUPDATE is given; not frozen but Final, as `RmpEntry`."""

    assigned: Final[bool] = False
    asid: Final[int] = 0
    gpa: Final[int] = 0
    page_size: Final[int] = 0
    immutable: Final[bool] = False


class RmpUpdateCode(IntEnum):
    """EAX after RMPUPDATE and PSMASH; FAIL_INUSE does not come: an entry is never seen locked."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4


class PvalidateCode(IntEnum):
    """EAX after PVALIDATE, RMPADJUST and RMPQUERY; PVALIDATE uses 0, 1 and 6."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_SIZEMISMATCH = 6


class Rmp:
    """The table: a page without an entry is the hypervisor's. Sparse, keyed by page frame number.

    The entry of a 2 MiB page stands at its first frame and answers for all 512; while it does, the other 511
    have none of their own. After PSMASH they get theirs when they are looked at: a guest that boots has tens
    of 2 MiB pages split, of most of which nobody asks again.
    """

    def __init__(self) -> None:
        self._entries: dict[int, RmpEntry] = {}
        self._large: dict[int, RmpEntry] = {}
        """The 2 MiB entries once more, by 2 MiB frame number."""
        self._split: dict[int, RmpEntry] = {}
        """By 2 MiB frame number: what the entries of 4 KiB there are like that were not looked at, the first
        one's. In such 2 MiB the hypervisor's pages have an entry, too, as long as any other page is there."""
        self._inside: dict[int, int] = {}
        """How many entries there are, by 2 MiB frame number, those that were not looked at among them."""
        self._owned: dict[int, int] = {}
        self._lock = threading.RLock()
        """Held while entries are written and counted; they are read without."""

    def __getitem__(self, address: int) -> RmpEntry:
        """The entry of the page at a system physical address; inside a 2 MiB page the one of its start."""
        entry = self._entries.get(address >> 12)
        if entry is not None:
            return entry
        if self._large and (entry := self._large.get(address >> 21)) is not None:
            return entry
        return self._own(address) if self._split else _DEFAULT

    def _own(self, address: int) -> RmpEntry:
        """The entry of the 4 KiB page itself, made now where PSMASH left that for later."""
        with self._lock:
            entry = self._entries.get(address >> 12)
            if entry is not None or (first := self._split.get(address >> 21)) is None:
                return entry or _DEFAULT
            # without an owner there is no guest address to count up
            inside = address & _LARGE_MASK & -_PAGE if first.asid else 0
            entry = self._entries[address >> 12] = _like(first, gpa=first.gpa + inside)
            return entry

    def __setitem__(self, address: int, entry: RmpEntry) -> None:
        """Write an entry: the firmware's privilege, and the model's of RMPUPDATE."""
        with self._lock:
            self._write(address, entry)

    def _write(self, address: int, entry: RmpEntry) -> None:
        number = address >> 12
        old = self._entries.get(number) or self._own(address)
        if old.asid != entry.asid:
            self._owned[old.asid] = self._owned.get(old.asid, 0) - 1
            self._owned[entry.asid] = self._owned.get(entry.asid, 0) + 1
        if not entry.assigned and entry == _DEFAULT:
            if old is not _DEFAULT:
                self._remove(number)
        else:
            if old is _DEFAULT:
                self._inside[number // _PAGES] = self._inside.get(number // _PAGES, 0) + 1
            self._entries[number] = entry
        if (old.page_size or entry.page_size) and not address & _LARGE_MASK:
            self._cover(address, entry)

    def _remove(self, number: int) -> None:
        large = number // _PAGES
        self._inside[large] -= 1
        if large not in self._split:
            del self._entries[number]
            return
        self._entries[number] = _DEFAULT
        if not self._inside[large]:
            self._settle(large)

    def _settle(self, large: int) -> None:
        """Make what was not made yet of split 2 MiB, and keep no entries for the hypervisor's pages."""
        numbers = range(large * _PAGES, (large + 1) * _PAGES)
        own = [(number, self._own(number << 12)) for number in numbers]
        del self._split[large]
        for number, entry in own:
            if entry is _DEFAULT:
                del self._entries[number]

    def _cover(self, address: int, entry: RmpEntry) -> None:
        if not entry.page_size:
            del self._large[address >> 21]
            return
        if address >> 21 in self._split:
            self._settle(address >> 21)
        fresh = address >> 21 not in self._large
        self._large[address >> 21] = entry
        if fresh and self._inside[address >> 21] > 1:
            first, entries = address >> 12, self._entries
            for number in [each for each in range(first + 1, first + _PAGES) if each in entries]:
                self[number << 12] = _DEFAULT

    def first_assigned(self, pages: range) -> int | None:
        """The first of these page addresses that belongs to a guest or the firmware; None when none does."""
        entries, large, split = self._entries, self._large, self._split
        for page in pages:
            entry = entries.get(page >> 12)
            if entry is None and (large or split):
                entry = large.get(page >> 21) or split.get(page >> 21)
            if entry is not None and entry.assigned:
                return page
        return None

    def has_entries(self, address: int) -> bool:
        """Whether any page of the 2 MiB around an address is something else than the hypervisor's."""
        return bool(self._inside.get(address >> 21))

    def state(self, address: int) -> PageState:
        """The state of the page at a system physical address."""
        return self[address].state

    def pages_of(self, asid: int) -> int:
        """How many entries name a guest's ASID (not 0): the counters at the start of the table."""
        return self._owned.get(asid, 0)

    def clear(self) -> None:
        """Make every page the hypervisor's: the full initialisation of SNP_INIT."""
        self._entries.clear()
        self._large.clear()
        self._split.clear()
        self._inside.clear()
        self._owned.clear()

    def rmpupdate(self, address: int, new: RmpUpdate) -> RmpUpdateCode:
        """RMPUPDATE by the hypervisor on one page.

        The immutable bit guards against the hypervisor, which can set it; only the firmware clears it.

        1. Page or guest address not aligned to the size, an ASID without ASSIGNED, or a guest address without
           an ASID: FAIL_INPUT. UNVERIFIED: the rules on the guest address.
        2. The entry is immutable: FAIL_PERMISSION.
        3. 4 KiB inside an assigned 2 MiB page, or 2 MiB over entries of 4 KiB: FAIL_OVERLAP; PSMASH, or
           taking the small pages back, comes first.

        VALIDATED and the permissions are cleared, unless nothing but IMMUTABLE changes.
        """
        misaligned = (address | new.gpa) & (_LARGE_MASK if new.page_size else _PAGE - 1)
        if misaligned or (new.asid and not new.assigned) or (new.gpa and not new.asid):
            return RmpUpdateCode.FAIL_INPUT
        old = self[address]
        if old.immutable:
            return RmpUpdateCode.FAIL_PERMISSION
        if self._overlaps(address, old, new):
            return RmpUpdateCode.FAIL_OVERLAP
        if (
            old.assigned == new.assigned
            and old.asid == new.asid
            and old.gpa == new.gpa
            and old.page_size == new.page_size
        ):
            self[address] = replace(old, immutable=new.immutable)
        elif not (new.assigned or new.immutable):
            self[address] = _DEFAULT  # the hypervisor's, of whatever size
        else:
            self[address] = RmpEntry(
                assigned=new.assigned,
                asid=new.asid,
                gpa=new.gpa,
                page_size=new.page_size,
                immutable=new.immutable,
            )
        return RmpUpdateCode.SUCCESS

    def _overlaps(self, address: int, old: RmpEntry, new: RmpUpdate) -> bool:
        if old.assigned and old.page_size != new.page_size:
            return True
        return bool(new.page_size) and not old.page_size and self.has_entries(address)

    def psmash(self, address: int) -> RmpUpdateCode:
        """PSMASH by the hypervisor: one 2 MiB entry becomes 512 of 4 KiB, in the same state.

        1. Not aligned, or no 2 MiB entry: FAIL_INPUT.
        2. The entry is immutable: FAIL_PERMISSION.

        UNVERIFIED: which code which fault has.
        """
        with self._lock:  # who comes second finds no 2 MiB entry, and all that the first one wrote
            entry = self._large.get(address >> 21)
            if address & _LARGE_MASK or entry is None:
                return RmpUpdateCode.FAIL_INPUT
            if entry.immutable:
                return RmpUpdateCode.FAIL_PERMISSION
            first = _like(entry, gpa=entry.gpa)
            # the 2 MiB entry goes last: until then it answers
            self._split[address >> 21] = self._entries[address >> 12] = first
            self._inside[address >> 21] = _PAGES
            self._owned[entry.asid] = self._owned.get(entry.asid, 0) + _PAGES - 1
            del self._large[address >> 21]
            return RmpUpdateCode.SUCCESS

    def unsmash(self, address: int) -> None:
        """512 entries of 4 KiB that the firmware found to be one page become one: SNP_PAGE_UNSMASH."""
        self[address] = replace(self[address], page_size=1)

    def _of_guest(self, address: int, asid: int, gpa: int) -> RmpEntry | None:
        """The entry that maps a guest physical address of a guest at a system address; None: it does not."""
        entry = self[address]
        inside = address & _LARGE_MASK if entry.page_size else 0
        owned = entry.assigned and entry.asid == asid and entry.gpa + inside == gpa
        return entry if owned else None

    def pvalidate(
        self, address: int, *, asid: int, gpa: int, validate: bool, page_size: int = 0
    ) -> tuple[PvalidateCode, bool] | None:
        """PVALIDATE of a page by VMPL0.

        1. 2 MiB, but not aligned: FAIL_INPUT.
        2. The page is not this guest's at this address, or immutable: None.
        3. The entry has the other size: FAIL_SIZEMISMATCH.

        Args:
            address: system physical address that the guest physical address leads to.
            asid: the guest.
            gpa: where the guest has the page.
            validate: the state that is wanted.
            page_size: 0 is 4 KiB, 1 is 2 MiB.

        Returns:
            EAX and the carry flag (True: the page already had that state); None when the processor reports a
            nested page fault instead.
        """
        if page_size and gpa & _LARGE_MASK:
            return PvalidateCode.FAIL_INPUT, False
        with self._lock:
            entry = self._of_guest(address, asid, gpa)
            if entry is None or entry.immutable:
                return None
            if entry.page_size != page_size:
                return PvalidateCode.FAIL_SIZEMISMATCH, False
            if entry.validated == validate:
                return PvalidateCode.SUCCESS, True
            entry = RmpEntry(
                assigned=True,
                page_size=page_size,
                gpa=entry.gpa,
                asid=asid,
                vmsa=entry.vmsa,
                validated=validate,
                permissions=entry.permissions,
            )
            # not by `_write`: owner and size stay, and a guest that boots does this thousands of times
            self._entries[address >> 12] = entry
            if page_size:
                self._large[address >> 21] = entry
            return PvalidateCode.SUCCESS, False

    def rmpadjust(
        self,
        address: int,
        *,
        asid: int,
        gpa: int,
        vmpl: int,
        permissions: int,
        vmsa: bool,
        page_size: int = 0,
        current_vmpl: int = 0,
    ) -> PvalidateCode | None:
        """RMPADJUST of a page.

        1. 2 MiB, but not aligned: FAIL_INPUT.
        2. The page is not this guest's at this address, or not validated: None, as `pvalidate`.
        3. Target VMPL not above the current one, or above 3: FAIL_PERMISSION.
        4. The entry has the other size: FAIL_SIZEMISMATCH.
        5. Permissions that the caller lacks, or VMSA changed from another VMPL than 0: FAIL_PERMISSION.

        UNVERIFIED: the order of 3 to 5.
        """
        if page_size and gpa & _LARGE_MASK:
            return PvalidateCode.FAIL_INPUT
        entry = self._of_guest(address, asid, gpa)
        if entry is None or not entry.validated or entry.immutable:
            return None
        if not current_vmpl < vmpl < len(entry.permissions):
            return PvalidateCode.FAIL_PERMISSION
        if entry.page_size != page_size:
            return PvalidateCode.FAIL_SIZEMISMATCH
        if permissions & ~entry.permissions[current_vmpl] or (current_vmpl and vmsa != entry.vmsa):
            return PvalidateCode.FAIL_PERMISSION
        changed = list(entry.permissions)
        changed[vmpl] = permissions
        self[address] = replace(
            entry, vmsa=vmsa, permissions=(changed[0], changed[1], changed[2], changed[3])
        )
        return PvalidateCode.SUCCESS

    def rmpquery(
        self, address: int, *, asid: int, gpa: int, vmpl: int, current_vmpl: int = 0
    ) -> tuple[PvalidateCode, int, int] | None:
        """RMPQUERY: EAX, the permissions of a VMPL, PAGE_SIZE of the entry; None as `rmpadjust`.

        A VMPL that is not above the current one, or above 3: FAIL_PERMISSION, and zeros.
        """
        entry = self._of_guest(address, asid, gpa)
        if entry is None or not entry.validated:
            return None
        if not current_vmpl < vmpl < len(entry.permissions):
            return PvalidateCode.FAIL_PERMISSION, 0, 0
        return PvalidateCode.SUCCESS, entry.permissions[vmpl], entry.page_size


def _like(entry: RmpEntry, *, gpa: int) -> RmpEntry:
    """The entry of a 4 KiB page of what was one of 2 MiB."""
    return RmpEntry(
        assigned=entry.assigned,
        gpa=gpa,
        asid=entry.asid,
        vmsa=entry.vmsa,
        validated=entry.validated,
        permissions=entry.permissions,
    )
