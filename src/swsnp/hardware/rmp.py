"""The reverse map table and the instructions on it.

Source: AMD 24593 and 24594 (APM volumes 2 and 3); AMD 56860, page states.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Final

__all__ = ["PageState", "PvalidateCode", "Rmp", "RmpEntry", "RmpUpdate", "RmpUpdateCode", "VMPL0_ALL"]

VMPL0_ALL: Final = (0x1F, 0, 0, 0)
"""Permissions of VMPL0..3 on a fresh entry: VMPL0 has all."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RmpEntry:
    """One 4 KiB page's entry; replaced as a whole, so that readers never see half a change."""

    assigned: bool = False
    page_size: int = 0
    immutable: bool = False
    gpa: int = 0
    asid: int = 0
    vmsa: bool = False
    validated: bool = False
    permissions: tuple[int, int, int, int] = VMPL0_ALL
    state: PageState = field(init=False, compare=False)
    """The page state that the other fields mean; entries are read far more often than made."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", self._state())

    def _state(self) -> PageState:
        if not self.assigned:
            return PageState.HV_FIXED if self.immutable else PageState.HYPERVISOR
        if self.asid:
            if self.immutable:
                return PageState.PRE_SWAP if self.validated else PageState.PRE_GUEST
            return PageState.GUEST_VALID if self.validated else PageState.GUEST_INVALID
        if not self.immutable:
            return PageState.RECLAIM
        if self.vmsa:
            return PageState.CONTEXT
        return PageState.METADATA if self.gpa else PageState.FIRMWARE


_DEFAULT: Final = RmpEntry()


@dataclass(frozen=True, slots=True, kw_only=True)
class RmpUpdate:
    """The new state that RMPUPDATE is given."""

    assigned: bool = False
    asid: int = 0
    gpa: int = 0
    page_size: int = 0
    immutable: bool = False


class RmpUpdateCode(IntEnum):
    """EAX after RMPUPDATE."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4


class PvalidateCode(IntEnum):
    """EAX after PVALIDATE; RMPADJUST uses 0, 1, 2 and 6."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_SIZEMISMATCH = 6


class Rmp:
    """The table: a page without an entry is the hypervisor's. Sparse, keyed by page frame number."""

    def __init__(self) -> None:
        self._entries: dict[int, RmpEntry] = {}
        self._owned: dict[int, int] = {}

    def __getitem__(self, address: int) -> RmpEntry:
        """The entry of the page at a system physical address."""
        return self._entries.get(address >> 12, _DEFAULT)

    def __setitem__(self, address: int, entry: RmpEntry) -> None:
        """Write an entry: the firmware's privilege, and the model's of RMPUPDATE."""
        old = self._entries.get(address >> 12, _DEFAULT)
        if old.asid != entry.asid:
            self._owned[old.asid] = self._owned.get(old.asid, 0) - 1
            self._owned[entry.asid] = self._owned.get(entry.asid, 0) + 1
        if entry == _DEFAULT:
            self._entries.pop(address >> 12, None)
        else:
            self._entries[address >> 12] = entry

    def state(self, address: int) -> PageState:
        """The state of the page at a system physical address."""
        return self[address].state

    def pages_of(self, asid: int) -> int:
        """How many entries name a guest's ASID (not 0): the counters at the start of the table."""
        return self._owned.get(asid, 0)

    def clear(self) -> None:
        """Make every page the hypervisor's: the full initialisation of SNP_INIT."""
        self._entries.clear()
        self._owned.clear()

    def rmpupdate(self, address: int, new: RmpUpdate) -> RmpUpdateCode:
        """RMPUPDATE by the hypervisor on one 4 KiB page.

        The immutable bit guards against the hypervisor, which can set it; only the firmware clears it.
        """
        if address & 0xFFF or (new.asid and not new.assigned) or (new.page_size and address & 0x1FFFFF):
            return RmpUpdateCode.FAIL_INPUT
        old = self[address]
        if old.immutable:
            return RmpUpdateCode.FAIL_PERMISSION
        kept = (old.assigned, old.asid, old.gpa, old.page_size) == (
            new.assigned,
            new.asid,
            new.gpa,
            new.page_size,
        )
        if kept:
            self[address] = replace(old, immutable=new.immutable)
        else:
            self[address] = RmpEntry(
                assigned=new.assigned,
                asid=new.asid,
                gpa=new.gpa,
                page_size=new.page_size,
                immutable=new.immutable,
            )
        return RmpUpdateCode.SUCCESS

    def pvalidate(
        self, address: int, *, asid: int, gpa: int, validate: bool
    ) -> tuple[PvalidateCode, bool] | None:
        """PVALIDATE of a 4 KiB page by VMPL0.

        Returns:
            EAX and the carry flag (True: the page already had that state); None when the page is not this
            guest's at this address, which the processor reports as a nested page fault.
        """
        entry = self[address]
        if not entry.assigned or entry.asid != asid or entry.gpa != gpa or entry.immutable:
            return None
        if entry.page_size:
            return PvalidateCode.FAIL_SIZEMISMATCH, False
        if entry.validated == validate:
            return PvalidateCode.SUCCESS, True
        self[address] = replace(entry, validated=validate)
        return PvalidateCode.SUCCESS, False

    def rmpadjust(
        self, address: int, *, asid: int, gpa: int, vmpl: int, permissions: int, vmsa: bool
    ) -> PvalidateCode | None:
        """RMPADJUST of a 4 KiB page by VMPL0; None as `pvalidate`."""
        entry = self[address]
        if not entry.assigned or entry.asid != asid or entry.gpa != gpa or not entry.validated:
            return None
        if not 1 <= vmpl <= 3:
            return PvalidateCode.FAIL_PERMISSION
        changed = list(entry.permissions)
        changed[vmpl] = permissions
        self[address] = replace(
            entry, vmsa=vmsa, permissions=(changed[0], changed[1], changed[2], changed[3])
        )
        return PvalidateCode.SUCCESS
