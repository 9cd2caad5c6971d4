"""The RMP against the table of page states: instructions of hypervisor and guest, writes of the firmware."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from tests.property.steps import CountedMachine, machine_test

from swsnp.hardware.rmp import PvalidateCode, Rmp, RmpEntry, RmpUpdate, RmpUpdateCode

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE = 2 << 20
BASE = 0x1_0000_0000  # 2 MiB aligned, the others are not
PAGES = [BASE + 0x1000 * n for n in range(5)]
ASIDS = (1, 2, 3)
ALL = (0x1F, 0, 0, 0)
IMMUTABLE = {"HV-Fixed", "Firmware", "Context", "Metadata", "Pre-Guest", "Pre-Swap"}

page = st.sampled_from(PAGES)
asid = st.sampled_from(ASIDS)
gpa = st.sampled_from([0, 0x1000, 0x7FFF_F000])


@dataclass(frozen=True)
class Page:
    """A page as the table of AMD 56860 names it."""

    state: str = "Hypervisor"
    asid: int = 0
    gpa: int = 0
    size: int = 0
    vmsa: bool = False
    permissions: tuple[int, int, int, int] = ALL


# What the firmware does to a page (AMD 56860, page states): the state it starts from, the one it ends in, and
# the change of the entry that makes it so.
FIRMWARE: dict[str, tuple[str, str, Callable[[RmpEntry], RmpEntry]]] = {
    "GCTX_CREATE": ("Firmware", "Context", lambda e: replace(e, vmsa=True)),
    "DECOMMISSION": ("Context", "Firmware", lambda e: replace(e, vmsa=False)),
    "PAGE_MD_INIT": ("Firmware", "Metadata", lambda e: replace(e, gpa=0x5000)),
    "metadata out": ("Metadata", "Firmware", lambda e: replace(e, gpa=0)),
    "PAGE_SET_STATE": ("Firmware", "HV-Fixed", lambda _: RmpEntry(immutable=True)),
    "reclaim firmware": ("Firmware", "Reclaim", lambda e: replace(e, immutable=False)),
    "reclaim metadata": ("Metadata", "Reclaim", lambda e: replace(e, immutable=False)),
    "reclaim pre-guest": ("Pre-Guest", "Guest-Invalid", lambda e: replace(e, immutable=False)),
    "reclaim pre-swap": ("Pre-Swap", "Guest-Valid", lambda e: replace(e, immutable=False)),
    "LAUNCH_UPDATE": ("Pre-Guest", "Guest-Valid", lambda e: replace(e, immutable=False, validated=True)),
    "PAGE_SWAP_IN": ("Pre-Guest", "Pre-Swap", lambda e: replace(e, validated=True)),
    "PAGE_SWAP_OUT": ("Pre-Swap", "Pre-Guest", lambda e: replace(e, validated=False)),
}


class RmpMachine(CountedMachine):
    """Every entry is what the reference says, after every instruction and every write.

    `large` is the one entry of 2 MiB that answers for all pages, when there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rmp = Rmp()
        self.small = dict.fromkeys(PAGES, Page())
        self.large: Page | None = None

    def at(self, address: int) -> Page:
        return self.large or self.small[address]

    def put(self, address: int, new: Page) -> None:
        if self.large is None:
            self.small[address] = new
        else:
            self.large = new

    def gpa_of(self, address: int) -> int:
        """Where the page's guest has it."""
        return self.at(address).gpa + (address - BASE if self.large else 0)

    # the hypervisor

    @rule(
        at=page,
        kind=st.sampled_from(["Hypervisor", "HV-Fixed", "Firmware", "Reclaim", "Pre-Guest", "Guest-Invalid"]),
        asid=asid,
        gpa=gpa,
        offset=st.sampled_from([0] * 15 + [0x10]),
    )
    def rmpupdate(self, at: int, kind: str, asid: int, gpa: int, offset: int) -> None:
        """RMPUPDATE of 4 KiB: refused on immutable pages and inside a large one.

        VALIDATED and the permissions survive a change of IMMUTABLE alone.
        """
        new = self.wanted(kind, asid, gpa)
        code = self.rmp.rmpupdate(at + offset, new)
        old = self.at(at)
        if offset:
            assert code == RmpUpdateCode.FAIL_INPUT
        elif old.state in IMMUTABLE:
            assert code == RmpUpdateCode.FAIL_PERMISSION
        elif self.large is not None:
            assert code == RmpUpdateCode.FAIL_OVERLAP
        else:
            assert code == RmpUpdateCode.SUCCESS
            self.small[at] = self.updated(old, kind, new)

    @rule(
        at=st.sampled_from([BASE] * 7 + PAGES[1:2]),
        kind=st.sampled_from(["Hypervisor", "Pre-Guest", "Guest-Invalid"]),
        asid=asid,
        gpa=st.sampled_from([0, LARGE]),
    )
    def rmpupdate_large(self, at: int, kind: str, asid: int, gpa: int) -> None:
        """RMPUPDATE of 2 MiB: aligned, and not over entries of 4 KiB."""
        new = self.wanted(kind, asid, gpa, page_size=1)
        code = self.rmp.rmpupdate(at, new)
        old = self.at(at)
        if at != BASE:
            assert code == RmpUpdateCode.FAIL_INPUT
        elif old.state in IMMUTABLE:
            assert code == RmpUpdateCode.FAIL_PERMISSION
        elif self.large is None and any(each != Page() for each in self.small.values()):
            assert code == RmpUpdateCode.FAIL_OVERLAP
        else:
            assert code == RmpUpdateCode.SUCCESS
            self.large = None if kind == "Hypervisor" else self.updated(old, kind, new)

    @staticmethod
    def wanted(kind: str, asid: int, gpa: int, page_size: int = 0) -> RmpUpdate:
        guests = kind in ("Pre-Guest", "Guest-Invalid")
        return RmpUpdate(
            assigned=kind not in ("Hypervisor", "HV-Fixed"),
            immutable=kind in ("HV-Fixed", "Firmware", "Pre-Guest"),
            asid=asid if guests else 0,
            gpa=gpa if guests else 0,  # KVM gives no address to pages without a guest
            page_size=page_size,
        )

    @staticmethod
    def updated(old: Page, kind: str, new: RmpUpdate) -> Page:
        was_assigned = old.state not in ("Hypervisor", "HV-Fixed")
        before = (was_assigned, old.asid, old.gpa, old.size)
        if before != (new.assigned, new.asid, new.gpa, new.page_size):
            return Page(kind, new.asid, new.gpa, new.page_size)
        if old.state == "Guest-Valid":
            kind = {"Pre-Guest": "Pre-Swap", "Guest-Invalid": "Guest-Valid"}[kind]
        return replace(old, state=kind)

    @rule(at=page, asid=asid, gpa=gpa)
    def rmpupdate_without_assigned(self, at: int, asid: int, gpa: int) -> None:
        """An ASID on a page that is nobody's: FAIL_INPUT."""
        assert self.rmp.rmpupdate(at, RmpUpdate(asid=asid, gpa=gpa)) == RmpUpdateCode.FAIL_INPUT

    @rule(at=st.sampled_from([BASE] * 3 + PAGES[1:2]))
    def psmash(self, at: int) -> None:
        """PSMASH: 512 entries of 4 KiB in the same state. Those that nobody looks at here are given back."""
        code = self.rmp.psmash(at)
        if self.large is None or at != BASE:
            assert code == RmpUpdateCode.FAIL_INPUT
        elif self.large.state in IMMUTABLE:
            assert code == RmpUpdateCode.FAIL_PERMISSION
        else:
            assert code == RmpUpdateCode.SUCCESS
            self.small = {
                each: replace(self.large, size=0, gpa=self.large.gpa + each - BASE) for each in PAGES
            }
            self.large = None
            for rest in range(PAGES[-1] + 0x1000, BASE + LARGE, 0x1000):
                assert self.rmp.rmpupdate(rest, RmpUpdate()) == RmpUpdateCode.SUCCESS

    # the guests

    @rule(
        at=page,
        validate=st.booleans(),
        wrong=st.sampled_from(["", "", "", "asid", "gpa", "size"]),
        other=st.integers(1, 4),
    )
    def pvalidate(self, at: int, validate: bool, wrong: str, other: int) -> None:
        """PVALIDATE: only the owner, at the page's own address; CF tells that nothing changed."""
        old, gpa = self.at(at), self.gpa_of(at)
        asid, at_gpa = (other if wrong == "asid" else old.asid or 1, 0x3000 if wrong == "gpa" else gpa)
        size = old.size ^ (wrong == "size")
        result = self.rmp.pvalidate(at, asid=asid, gpa=at_gpa, validate=validate, page_size=size)
        owned = old.state in ("Guest-Valid", "Guest-Invalid") and (old.asid, gpa) == (asid, at_gpa)
        wanted = "Guest-Valid" if validate else "Guest-Invalid"
        if size and at_gpa % LARGE:
            assert result == (PvalidateCode.FAIL_INPUT, False)
        elif not owned:
            assert result is None
        elif old.size != size:
            assert result == (PvalidateCode.FAIL_SIZEMISMATCH, False)
        else:
            assert result == (PvalidateCode.SUCCESS, old.state == wanted)
            self.put(at, replace(old, state=wanted))

    @rule(
        at=page,
        wrong=st.sampled_from(["", "", "", "asid", "gpa"]),
        vmpl=st.integers(0, 4),
        permissions=st.integers(0, 0x1F),
        vmsa=st.booleans(),
    )
    def rmpadjust(self, at: int, wrong: str, vmpl: int, permissions: int, vmsa: bool) -> None:
        """RMPADJUST by VMPL0: only the owner of a valid page, only for a lower privilege."""
        old, gpa = self.at(at), self.gpa_of(at)
        if old.state == "Pre-Swap":
            return  # what a guest finds on a page that is being swapped is UNVERIFIED
        asid, at_gpa = (7 if wrong == "asid" else old.asid or 1, 0x3000 if wrong == "gpa" else gpa)
        code = self.rmp.rmpadjust(at, asid=asid, gpa=at_gpa, vmpl=vmpl, permissions=permissions, vmsa=vmsa)
        if old.state != "Guest-Valid" or (old.asid, gpa) != (asid, at_gpa):
            assert code is None
        elif vmpl not in (1, 2, 3):
            assert code == PvalidateCode.FAIL_PERMISSION
        elif old.size:
            assert code == PvalidateCode.FAIL_SIZEMISMATCH
        else:
            assert code == PvalidateCode.SUCCESS
            changed = list(old.permissions)
            changed[vmpl] = permissions
            self.put(at, replace(old, vmsa=vmsa, permissions=(0x1F, changed[1], changed[2], changed[3])))

    # the firmware

    @rule(at=page, command=st.sampled_from(sorted(FIRMWARE)))
    def firmware(self, at: int, command: str) -> None:
        """The firmware's own transitions."""
        start, end, change = FIRMWARE[command]
        if self.at(at).state == start and (self.large is None or at == BASE):
            entry = change(self.rmp[at])
            self.rmp[at] = entry
            self.put(at, Page(end, entry.asid, entry.gpa, entry.page_size, entry.vmsa, entry.permissions))

    @rule(sure=st.integers(0, 30))
    def initialise(self, sure: int) -> None:
        """The full initialisation gives every page to the hypervisor; seldom."""
        if sure == 0:
            self.rmp.clear()
            self.small, self.large = dict.fromkeys(PAGES, Page()), None

    # always

    @invariant()
    def entries_are_what_the_table_says(self) -> None:
        for at in PAGES:
            entry, wanted = self.rmp[at], self.at(at)
            got = (entry.state.value, entry.asid, entry.gpa, entry.page_size, entry.vmsa, entry.permissions)
            assert got == astuple(wanted), hex(at)

    @invariant()
    def entries_are_counted_by_owner(self) -> None:
        entries = [self.large] if self.large else self.small.values()
        for each in ASIDS:
            assert self.rmp.pages_of(each) == sum(one.asid == each for one in entries)

    @invariant()
    def guests_own_what_is_assigned_to_them(self) -> None:
        """Whoever has an ASID is in a guest's state, and nobody else is."""
        for at in PAGES:
            entry = self.rmp[at]
            guests = entry.state.value in ("Pre-Guest", "Pre-Swap", "Guest-Valid", "Guest-Invalid")
            assert (entry.asid != 0) == guests


TestRmp = machine_test(RmpMachine, steps=32_000)
