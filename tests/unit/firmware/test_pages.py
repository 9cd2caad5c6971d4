"""DBG_DECRYPT, DBG_ENCRYPT, PAGE_MD_INIT, PAGE_MOVE, PAGE_SET_STATE, PAGE_UNSMASH."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, PlatformState, RangeElement, RangeListHeader
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_page_command import DebugCopy, PageMdInit, PageMove, PageSetState, PageUnsmash
from swsnp.abi.snp_report import GuestPolicy, Product
from swsnp.hardware.rmp import PageState, RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

NOWHERE = 0x7777_7777_7000
LARGE = 2 << 20
DEBUG = GuestPolicy.of(smt=1, reserved_one=1, debug=1)
FIRMWARE = RmpEntry(assigned=True, immutable=True)
PRE_GUEST = RmpEntry(assigned=True, immutable=True, asid=1, gpa=0x5000)
PRE_SWAP = replace(PRE_GUEST, validated=True)
GUEST_VALID = replace(PRE_SWAP, immutable=False)
GUEST_INVALID = replace(PRE_GUEST, immutable=False)
TEXT = b"text".ljust(4096, b"\x5a")


# --- DBG_DECRYPT, DBG_ENCRYPT ---------------------------------------------------------------------


def _debug(rig: Rig, command: int, gctx: int, source: int, target: int) -> int:
    return rig.command(command, DebugCopy(gctx_paddr=gctx, src_paddr=source, dst_paddr=target))


@pytest.mark.parametrize("entry", [PRE_GUEST, PRE_SWAP, GUEST_VALID, GUEST_INVALID])
def test_decrypt(rig: Rig, entry: RmpEntry) -> None:
    """AMD 56860: any page of the guest, into a Firmware page."""
    gctx, source, target = rig.launching(1, policy=DEBUG), rig.page(entry, TEXT), rig.page()
    assert _debug(rig, Command.SNP_DBG_DECRYPT, gctx, source, target) == S.SUCCESS
    assert rig.memory.read(target, 4096) == TEXT
    assert (rig.rmp[source], rig.rmp[target]) == (entry, FIRMWARE)


@pytest.mark.parametrize("entry", [PRE_GUEST, PRE_SWAP])
def test_encrypt(rig: Rig, entry: RmpEntry) -> None:
    """Firmware 1.55: from anywhere into a Pre-Guest or Pre-Swap page of the guest."""
    gctx, source, target = rig.launching(1, policy=DEBUG), rig.page(RmpEntry(), TEXT), rig.page(entry)
    assert _debug(rig, Command.SNP_DBG_ENCRYPT, gctx, source, target) == S.SUCCESS
    assert rig.memory.read(target, 4096) == TEXT


def test_the_guest_state_is_not_tested(rig: Rig) -> None:
    """Firmware 1.55: debugging goes on while the guest runs."""
    guest = rig.running(1, policy=DEBUG)
    assert _debug(rig, Command.SNP_DBG_DECRYPT, guest.gctx, rig.page(GUEST_VALID), rig.page()) == S.SUCCESS


@pytest.mark.parametrize(
    ("source", "target"),
    [(FIRMWARE, FIRMWARE), (RmpEntry(), FIRMWARE), (GUEST_VALID, RmpEntry()), (GUEST_VALID, PRE_GUEST)],
)
def test_decrypt_wants_the_right_states(rig: Rig, source: RmpEntry, target: RmpEntry) -> None:
    """AMD 56860: source no guest's page, or destination not Firmware: INVALID_PAGE_STATE."""
    gctx, pages = rig.launching(1, policy=DEBUG), (rig.page(source, TEXT), rig.page(target))
    assert _debug(rig, Command.SNP_DBG_DECRYPT, gctx, *pages) == S.INVALID_PAGE_STATE
    assert not any(rig.memory.read(pages[1], 4096))


@pytest.mark.parametrize("target", [FIRMWARE, RmpEntry(), GUEST_VALID, GUEST_INVALID])
def test_encrypt_wants_the_right_state(rig: Rig, target: RmpEntry) -> None:
    """Firmware 1.55: a page that the guest may be using is INVALID_PAGE_STATE."""
    gctx, pages = rig.launching(1, policy=DEBUG), (rig.page(data=TEXT), rig.page(target))
    assert _debug(rig, Command.SNP_DBG_ENCRYPT, gctx, *pages) == S.INVALID_PAGE_STATE
    assert not any(rig.memory.read(pages[1], 4096))


@pytest.mark.parametrize("encrypt", [False, True])
def test_debug_checks_in_order(rig: Rig, encrypt: bool) -> None:
    """AMD 56860: faults are taken away one by one; DBG_ENCRYPT looks at the platform state first."""
    command = Command.SNP_DBG_ENCRYPT if encrypt else Command.SNP_DBG_DECRYPT
    gctx = rig.launching(1)
    guests, plain = rig.page(replace(PRE_GUEST, asid=2)), rig.page(RmpEntry())
    pages = (plain, guests) if encrypt else (guests, plain)
    rig.platform.state = PlatformState.UNINIT
    first = S.INVALID_PLATFORM_STATE if encrypt else S.INVALID_PARAM
    assert _debug(rig, command, gctx + 1, *pages) == first
    assert _debug(rig, command, gctx, NOWHERE, pages[1]) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    for bad in ((gctx + 1, *pages), (gctx, pages[0] + 8, pages[1]), (gctx, pages[0], pages[1] + 8)):
        assert _debug(rig, command, *bad) == S.INVALID_PARAM
    assert _debug(rig, command, plain, NOWHERE, pages[1]) == S.INVALID_ADDRESS
    assert _debug(rig, command, plain, pages[0], NOWHERE) == S.INVALID_ADDRESS
    assert _debug(rig, command, plain, *pages) == S.INVALID_GUEST
    rig.rmp[plain] = FIRMWARE
    assert _debug(rig, command, gctx, *pages) == S.INVALID_PAGE_OWNER
    rig.rmp[guests] = PRE_GUEST
    assert _debug(rig, command, gctx, *pages) == S.POLICY_FAILURE


# --- PAGE_MD_INIT ---------------------------------------------------------------------------------


def _md_init(rig: Rig, gctx: int, page: int) -> int:
    return rig.command(Command.SNP_PAGE_MD_INIT, PageMdInit(gctx_paddr=gctx, page_paddr=page))


def test_md_init(rig: Rig) -> None:
    """AMD 56860: page zeroed, Firmware -> Metadata of the guest; PAGE_RECLAIM gives it back."""
    gctx, page = rig.launching(), rig.page(data=TEXT)
    assert _md_init(rig, gctx, page) == S.SUCCESS
    assert rig.rmp[page] == replace(FIRMWARE, gpa=gctx)
    assert rig.state(page) is PageState.METADATA
    assert rig.memory.read(page, 4096) == bytes(4096)


def test_md_init_checks_in_order(rig: Rig) -> None:
    """AMD 56860: faults are taken away one by one, the next one shows."""
    gctx, page = rig.create(), rig.page(RmpEntry(page_size=1))
    rig.platform.state = PlatformState.UNINIT
    assert _md_init(rig, gctx + 1, page) == _md_init(rig, gctx, page + 1) == S.INVALID_PARAM
    assert _md_init(rig, gctx, NOWHERE) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert _md_init(rig, page, NOWHERE) == S.INVALID_ADDRESS
    assert _md_init(rig, page, page) == S.INVALID_GUEST
    assert _md_init(rig, gctx, page) == S.INVALID_PAGE_STATE
    rig.rmp[page] = replace(FIRMWARE, page_size=1)
    assert _md_init(rig, gctx, page) == S.INVALID_PAGE_SIZE
    rig.rmp[page] = FIRMWARE
    assert _md_init(rig, gctx, page) == S.INVALID_GUEST_STATE


# --- PAGE_MOVE ------------------------------------------------------------------------------------


def _move(rig: Rig, gctx: int, source: int, target: int, **fields: Any) -> int:
    record = PageMove(gctx_paddr=gctx, src_paddr=source, dst_paddr=target)
    return rig.command(Command.SNP_PAGE_MOVE, record.but(**fields))


@pytest.mark.parametrize(
    ("source", "after"), [(PRE_GUEST, PageState.GUEST_INVALID), (PRE_SWAP, PageState.GUEST_VALID)]
)
def test_move(rig: Rig, source: RmpEntry, after: PageState) -> None:
    """AMD 56860: data, address, VMSA and permissions go along; what was validated stays so."""
    gctx = rig.launching(1)
    moved = replace(source, vmsa=True, permissions=(0x1F, 7, 3, 1))
    old, new = rig.page(moved, TEXT), rig.page(replace(PRE_GUEST, gpa=0x9000))
    assert _move(rig, gctx, old, new) == S.SUCCESS
    assert rig.rmp[new] == replace(moved, immutable=False)
    assert (rig.state(old), rig.state(new)) == (PageState.GUEST_INVALID, after)
    assert rig.memory.read(new, 4096) == TEXT


def test_move_of_a_large_page(rig: Rig) -> None:
    """AMD 56860: 2 MiB moves as one page."""
    gctx = rig.launching(1)
    old, new = rig.memory.allocate(LARGE), rig.memory.allocate(LARGE)
    for page in (old, new):
        rig.rmp[page] = replace(PRE_GUEST, gpa=0x20_0000, page_size=1)
    rig.memory.write(old + LARGE - 4, b"last")
    assert _move(rig, gctx, old, new) == S.INVALID_PAGE_SIZE
    assert _move(rig, gctx, old, new + 4096, page_size=1) == S.INVALID_ADDRESS
    assert _move(rig, gctx, old + 4096, new, page_size=1) == S.INVALID_ADDRESS
    assert _move(rig, gctx, old, new, page_size=1) == S.SUCCESS
    assert rig.memory.read(new + LARGE - 4, 4) == b"last"
    assert rig.state(new + 4096) is PageState.GUEST_INVALID


def test_move_of_metadata(rig: Rig) -> None:
    """AMD 56860: Metadata and Firmware change places."""
    gctx, old, new = rig.launching(1), rig.page(), rig.page()
    assert _md_init(rig, gctx, old) == S.SUCCESS
    rig.memory.write(old, TEXT)
    assert _move(rig, gctx, old, new) == S.SUCCESS
    assert (rig.state(old), rig.state(new)) == (PageState.FIRMWARE, PageState.METADATA)
    assert (rig.rmp[new].gpa, rig.memory.read(new, 4096)) == (gctx, TEXT)


@pytest.mark.parametrize(
    ("source", "target", "status"),
    [
        (GUEST_VALID, PRE_GUEST, S.INVALID_PAGE_STATE),
        (PRE_GUEST, PRE_SWAP, S.INVALID_PAGE_STATE),
        (PRE_GUEST, FIRMWARE, S.INVALID_PAGE_STATE),
        (replace(FIRMWARE, gpa=0x1000), PRE_GUEST, S.INVALID_PAGE_STATE),
        (replace(FIRMWARE, gpa=0x1000), FIRMWARE, S.INVALID_PAGE_OWNER),
        (replace(PRE_GUEST, asid=2), PRE_GUEST, S.INVALID_PAGE_OWNER),
        (PRE_GUEST, replace(PRE_GUEST, asid=2), S.INVALID_PAGE_OWNER),
    ],
)
def test_moves_that_are_refused(rig: Rig, source: RmpEntry, target: RmpEntry, status: S) -> None:
    """AMD 56860: only the listed pairs of states, only the guest's own pages."""
    gctx, old, new = rig.launching(1), rig.page(source, TEXT), rig.page(target)
    assert _move(rig, gctx, old, new) == status
    assert (rig.rmp[old], rig.rmp[new]) == (source, target)


def test_move_checks_in_order(make_rig: MakeRig) -> None:
    """AMD 56860: faults are taken away one by one; PAGE_SWAP_DISABLE refuses moving."""
    rig = make_rig(product=Product.TURIN)
    gctx, old, new = rig.create(), rig.page(RmpEntry(page_size=1)), rig.page(RmpEntry())
    rig.platform.state = PlatformState.UNINIT
    for bad in ({"page_size": 2}, {"reserved_0c": 1}, {"src_paddr": 8}, {"dst_paddr": 8}, {"gctx_paddr": 8}):
        assert _move(rig, gctx, old, NOWHERE, **bad) == S.INVALID_PARAM
    assert _move(rig, gctx, old, NOWHERE) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert _move(rig, old, old, NOWHERE) == S.INVALID_ADDRESS
    assert _move(rig, old, old, new) == S.INVALID_GUEST
    assert _move(rig, gctx, old, new) == S.INVALID_PAGE_SIZE
    rig.rmp[old] = RmpEntry()
    assert _move(rig, gctx, old, new) == S.INVALID_GUEST_STATE
    assert rig.start(gctx, policy=GuestPolicy.of(smt=1, reserved_one=1, page_swap_disable=1)) == 0
    assert _move(rig, gctx, old, new) == S.INACTIVE
    assert rig.activate(gctx, 1) == 0
    assert _move(rig, gctx, old, new) == S.POLICY_FAILURE
    rig.context(gctx).policy = GuestPolicy(0x30000)
    assert _move(rig, gctx, old, new) == S.INVALID_PAGE_STATE


# --- PAGE_SET_STATE -------------------------------------------------------------------------------


def _set_state(rig: Rig, *ranges: tuple[int, int], **fields: Any) -> int:
    elements = b"".join(bytes(RangeElement(base=base, page_count=count)) for base, count in ranges)
    page = rig.page(RmpEntry(), bytes(RangeListHeader(num_elements=len(ranges))) + elements)
    record = PageSetState(length=16, list_paddr=page).but(**fields)
    return rig.command(Command.SNP_PAGE_SET_STATE, record)


def test_set_state(rig: Rig) -> None:
    """AMD 56860: Firmware -> HV-Fixed, in several ranges, of both sizes."""
    small, large = rig.memory.allocate(4 * 4096), rig.memory.allocate(LARGE)
    for page in range(small, small + 4 * 4096, 4096):
        rig.rmp[page] = FIRMWARE
    rig.rmp[large] = replace(FIRMWARE, page_size=1)
    assert _set_state(rig, (small, 2), (small + 3 * 4096, 1), (large, 512)) == S.SUCCESS
    states = [rig.state(small + number * 4096) for number in range(4)]
    assert states == [PageState.HV_FIXED, PageState.HV_FIXED, PageState.FIRMWARE, PageState.HV_FIXED]
    assert rig.state(large + 4096) is PageState.HV_FIXED
    assert _set_state(rig) == S.SUCCESS


def test_set_state_changes_all_or_nothing(rig: Rig) -> None:
    """AMD 56860: every page of every range is checked before one is written."""
    good, bad = rig.page(), rig.page(RmpEntry())
    assert _set_state(rig, (good, 1), (bad, 1)) == S.INVALID_PAGE_STATE
    assert _set_state(rig, (bad, 1), (NOWHERE, 1)) == S.INVALID_ADDRESS
    assert rig.state(good) is PageState.FIRMWARE


@pytest.mark.parametrize(("offset", "count"), [(0, 511), (4096, 511), (4096, 1)])
def test_set_state_takes_whole_large_pages_only(rig: Rig, offset: int, count: int) -> None:
    """A 2 MiB page that is only partly in the range keeps its state."""
    large = rig.memory.allocate(LARGE)
    rig.rmp[large] = replace(FIRMWARE, page_size=1)
    assert _set_state(rig, (large + offset, count)) == S.INVALID_PAGE_STATE
    assert rig.state(large) is PageState.FIRMWARE


def test_set_state_checks_in_order(rig: Rig) -> None:
    """AMD 56860: a wrong LEN is INVALID_LENGTH in this command alone; then the usual order."""
    page = rig.page()
    rig.platform.state = PlatformState.UNINIT
    assert _set_state(rig, (page, 1), length=15, reserved_04=1) == S.INVALID_LENGTH
    assert _set_state(rig, (page, 1), reserved_04=1) == S.INVALID_PARAM
    assert _set_state(rig, (page, 1), list_paddr=page + 8) == S.INVALID_PARAM
    assert _set_state(rig, (page, 1), list_paddr=NOWHERE) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert _set_state(rig, (page, 1), list_paddr=NOWHERE) == S.INVALID_PARAM
    assert _set_state(rig, (page + 8, 1)) == S.INVALID_PARAM
    assert rig.state(page) is PageState.FIRMWARE


# --- PAGE_UNSMASH ---------------------------------------------------------------------------------


def _unsmash(rig: Rig, page: int) -> int:
    return rig.command(Command.SNP_PAGE_UNSMASH, PageUnsmash(page_paddr=page))


@pytest.fixture
def smashed(rig: Rig) -> int:
    """512 Pre-Guest entries that are one page."""
    page = rig.memory.allocate(LARGE)
    for offset in range(0, LARGE, 4096):
        rig.rmp[page + offset] = replace(PRE_GUEST, gpa=0x20_0000 + offset)
    return page


@pytest.mark.parametrize("validated", [False, True])
def test_unsmash(rig: Rig, smashed: int, validated: bool) -> None:
    """AMD 56860: 512 entries become one of 2 MiB in the same state."""
    for offset in range(0, LARGE, 4096):
        rig.rmp[smashed + offset] = replace(rig.rmp[smashed + offset], validated=validated)
    assert _unsmash(rig, smashed) == S.SUCCESS
    joined = replace(PRE_GUEST, gpa=0x20_0000, page_size=1, validated=validated)
    assert rig.rmp[smashed] == rig.rmp[smashed + 4096] == joined
    assert _unsmash(rig, smashed) == S.INVALID_PAGE_STATE


@pytest.mark.parametrize("number", [0, 1, 511])
@pytest.mark.parametrize(
    "change",
    [
        {"immutable": False},
        {"vmsa": True},
        {"asid": 0},
        {"asid": 2},
        {"gpa": 0x1000},
        {"validated": True},
        {"permissions": (0x1F, 1, 0, 0)},
        {"assigned": False},
    ],
    ids=str,
)
def test_pages_that_are_not_one(rig: Rig, smashed: int, number: int, change: dict[str, Any]) -> None:
    """AMD 56860: one entry that does not fit: INVALID_PAGE_STATE, nothing changes."""
    at = smashed + number * 4096
    rig.rmp[at] = replace(rig.rmp[at], **change)
    assert _unsmash(rig, smashed) == S.INVALID_PAGE_STATE
    assert rig.rmp[smashed].page_size == 0


@pytest.mark.parametrize(
    "change", [{"immutable": False}, {"vmsa": True}, {"asid": 0}, {"gpa": 4096}], ids=str
)
def test_pages_that_are_one_but_not_joined(rig: Rig, smashed: int, change: dict[str, Any]) -> None:
    """AMD 56860: 512 entries alike, but in use, VMSAs, nobody's, or at a guest address that is not 2 MiB."""
    shift = change.get("gpa", 0)
    for offset in range(0, LARGE, 4096):
        entry = replace(rig.rmp[smashed + offset], **change)
        rig.rmp[smashed + offset] = replace(entry, gpa=0x20_0000 + shift + offset)
    assert _unsmash(rig, smashed) == S.INVALID_PAGE_STATE
    assert rig.rmp[smashed].page_size == 0


def test_unsmash_checks_in_order(rig: Rig, smashed: int) -> None:
    """AMD 56860: alignment comes before the platform state."""
    rig.platform.state = PlatformState.UNINIT
    assert _unsmash(rig, smashed + 4096) == S.INVALID_PARAM
    assert _unsmash(rig, smashed) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert _unsmash(rig, NOWHERE & -LARGE) == S.INVALID_ADDRESS
    assert _unsmash(rig, rig.memory.allocate(4096)) == S.INVALID_ADDRESS


# --- transitions ----------------------------------------------------------------------------------


def test_a_page_through_its_life(rig: Rig) -> None:
    """AMD 56860, page states: PAGE_RECLAIM of each state that it takes, and what no longer needs it."""
    gctx, page = rig.launching(1), rig.page()
    reclaim: list[tuple[RmpEntry, PageState]] = [
        (FIRMWARE, PageState.RECLAIM),
        (replace(FIRMWARE, gpa=gctx), PageState.RECLAIM),
        (PRE_GUEST, PageState.GUEST_INVALID),
        (PRE_SWAP, PageState.GUEST_VALID),
    ]
    for before, after in reclaim:
        rig.rmp[page] = before
        assert rig.mailbox.command(Command.SNP_PAGE_RECLAIM, _buffer(rig, page)) == S.SUCCESS
        assert rig.state(page) is after
    for refused in (replace(FIRMWARE, vmsa=True), RmpEntry(immutable=True)):
        rig.rmp[page] = refused
        assert rig.mailbox.command(Command.SNP_PAGE_RECLAIM, _buffer(rig, page)) == S.INVALID_PAGE_STATE


def _buffer(rig: Rig, page: int) -> int:
    rig.memory.write(rig.buffer, page.to_bytes(8, "little"))
    return rig.buffer
