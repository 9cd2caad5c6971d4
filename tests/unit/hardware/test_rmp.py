"""RMP: page states, RMPUPDATE, PVALIDATE, RMPADJUST."""

from __future__ import annotations

import pytest

from swsnp.hardware.rmp import PageState, PvalidateCode, Rmp, RmpEntry, RmpUpdate, RmpUpdateCode

PAGE = 0x1_0000_0000


@pytest.mark.parametrize(
    ("entry", "state"),
    [
        (RmpEntry(), PageState.HYPERVISOR),
        (RmpEntry(immutable=True), PageState.HV_FIXED),
        (RmpEntry(assigned=True, immutable=True), PageState.FIRMWARE),
        (RmpEntry(assigned=True), PageState.RECLAIM),
        (RmpEntry(assigned=True, immutable=True, vmsa=True), PageState.CONTEXT),
        (RmpEntry(assigned=True, immutable=True, gpa=0x1000), PageState.METADATA),
        (RmpEntry(assigned=True, asid=1, immutable=True), PageState.PRE_GUEST),
        (RmpEntry(assigned=True, asid=1, immutable=True, validated=True), PageState.PRE_SWAP),
        (RmpEntry(assigned=True, asid=1), PageState.GUEST_INVALID),
        (RmpEntry(assigned=True, asid=1, validated=True), PageState.GUEST_VALID),
    ],
)
def test_states(entry: RmpEntry, state: PageState) -> None:
    """AMD 56860, page states: the fields decide the state."""
    rmp = Rmp()
    rmp[PAGE] = entry
    assert rmp.state(PAGE) is state


@pytest.mark.parametrize(
    ("update", "address", "code"),
    [
        (RmpUpdate(assigned=True, asid=1), PAGE + 1, RmpUpdateCode.FAIL_INPUT),
        (RmpUpdate(asid=1), PAGE, RmpUpdateCode.FAIL_INPUT),
        (RmpUpdate(assigned=True, gpa=0x1000, immutable=True), PAGE, RmpUpdateCode.FAIL_INPUT),
        (RmpUpdate(assigned=True, asid=1, gpa=0x1800), PAGE, RmpUpdateCode.FAIL_INPUT),
        (RmpUpdate(assigned=True, asid=1, gpa=0x1000, page_size=1), PAGE, RmpUpdateCode.FAIL_INPUT),
        (RmpUpdate(assigned=True, asid=1, page_size=1), PAGE + 0x1000, RmpUpdateCode.FAIL_INPUT),
    ],
)
def test_rmpupdate_refuses_bad_input(update: RmpUpdate, address: int, code: RmpUpdateCode) -> None:
    """RMPUPDATE: alignment, and who may have an ASID or a guest address."""
    assert Rmp().rmpupdate(address, update) is code


def test_rmpupdate_cannot_touch_an_immutable_page() -> None:
    """RMPUPDATE on an immutable entry fails; only the firmware takes that bit away."""
    rmp = Rmp()
    assert rmp.rmpupdate(PAGE, RmpUpdate(assigned=True, immutable=True)) is RmpUpdateCode.SUCCESS
    assert rmp.state(PAGE) is PageState.FIRMWARE
    assert rmp.rmpupdate(PAGE, RmpUpdate()) is RmpUpdateCode.FAIL_PERMISSION
    assert rmp.state(PAGE) is PageState.FIRMWARE


def test_rmpupdate_clears_validated_unless_only_immutable_changes() -> None:
    """Guest-Valid to Pre-Swap keeps VALIDATED; a change of owner or address does not."""
    rmp = Rmp()
    rmp[PAGE] = RmpEntry(assigned=True, asid=3, gpa=0x5000, validated=True)
    rmp.rmpupdate(PAGE, RmpUpdate(assigned=True, asid=3, gpa=0x5000, immutable=True))
    assert rmp.state(PAGE) is PageState.PRE_SWAP
    rmp[PAGE] = RmpEntry(assigned=True, asid=3, gpa=0x5000, validated=True)
    rmp.rmpupdate(PAGE, RmpUpdate(assigned=True, asid=4, gpa=0x5000))
    assert rmp.state(PAGE) is PageState.GUEST_INVALID


def test_pvalidate() -> None:
    """PVALIDATE: carry means no change; another guest's page, another address or a launch page faults."""
    rmp = Rmp()
    rmp[PAGE] = RmpEntry(assigned=True, asid=3, gpa=0x5000)
    assert rmp.pvalidate(PAGE, asid=3, gpa=0x5000, validate=True) == (PvalidateCode.SUCCESS, False)
    assert rmp.state(PAGE) is PageState.GUEST_VALID
    assert rmp.pvalidate(PAGE, asid=3, gpa=0x5000, validate=True) == (PvalidateCode.SUCCESS, True)
    assert rmp.pvalidate(PAGE, asid=4, gpa=0x5000, validate=True) is None
    assert rmp.pvalidate(PAGE, asid=3, gpa=0x6000, validate=True) is None
    assert rmp.pvalidate(PAGE + 0x1000, asid=3, gpa=0x6000, validate=True) is None
    rmp[PAGE] = RmpEntry(assigned=True, asid=3, gpa=0x5000, page_size=1)
    assert rmp.pvalidate(PAGE, asid=3, gpa=0x5000, validate=True) == (PvalidateCode.FAIL_SIZEMISMATCH, False)
    rmp[PAGE] = RmpEntry(assigned=True, asid=3, gpa=0x5000, immutable=True)
    assert rmp.pvalidate(PAGE, asid=3, gpa=0x5000, validate=True) is None


def test_rmpadjust() -> None:
    """RMPADJUST: only a validated page of the guest, only a VMPL below the caller's."""
    rmp = Rmp()
    rmp[PAGE] = RmpEntry(assigned=True, asid=3, gpa=0x5000)
    assert rmp.rmpadjust(PAGE, asid=3, gpa=0x5000, vmpl=1, permissions=1, vmsa=True) is None
    rmp[PAGE] = RmpEntry(assigned=True, asid=3, gpa=0x5000, validated=True, immutable=True)  # Pre-Swap
    assert rmp.rmpadjust(PAGE, asid=3, gpa=0x5000, vmpl=1, permissions=1, vmsa=True) is None
    rmp[PAGE] = RmpEntry(assigned=True, asid=3, gpa=0x5000, validated=True)
    adjusted = rmp.rmpadjust(PAGE, asid=3, gpa=0x5000, vmpl=1, permissions=3, vmsa=True)
    assert adjusted is PvalidateCode.SUCCESS
    assert rmp[PAGE].vmsa
    assert rmp[PAGE].permissions == (0x1F, 3, 0, 0)
    for vmpl in (0, 4):
        refused = rmp.rmpadjust(PAGE, asid=3, gpa=0x5000, vmpl=vmpl, permissions=3, vmsa=True)
        assert refused is PvalidateCode.FAIL_PERMISSION


def test_default_entry_takes_no_room() -> None:
    """A page back in the hypervisor's hands leaves no entry behind."""
    rmp = Rmp()
    rmp.rmpupdate(PAGE, RmpUpdate(assigned=True, asid=1, gpa=0))
    rmp.rmpupdate(PAGE, RmpUpdate())
    assert rmp[PAGE] == RmpEntry()
    assert not rmp._entries
