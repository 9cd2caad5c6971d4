"""SNP_PAGE_SWAP_OUT and SNP_PAGE_SWAP_IN."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_migration import MetadataEntry
from swsnp.abi.snp_page_command import PageMdInit, PageSwap, SwapFlags
from swsnp.abi.snp_report import GuestPolicy, Product
from swsnp.crypto.aead import open_bytes
from swsnp.firmware.swap import IV_COUNT_MAX
from swsnp.hardware.rmp import PageState, RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

NOWHERE = 0x7777_7777_7000
LARGE = 2 << 20
FIRMWARE = RmpEntry(assigned=True, immutable=True)
PRE_GUEST = RmpEntry(assigned=True, immutable=True, asid=1, gpa=0x5000)
PRE_SWAP = replace(PRE_GUEST, validated=True, permissions=(0x1F, 7, 3, 1))
TEXT = b"text".ljust(4096, b"\x5a")
DATA, METADATA, VMSA = 0, 1, 2


class Swap:
    """A guest with a metadata page, and one page to swap."""

    def __init__(self, rig: Rig, entry: RmpEntry = PRE_SWAP) -> None:
        self.rig = rig
        self.gctx = rig.launching(1)
        self.mdata = rig.page()
        record = PageMdInit(gctx_paddr=self.gctx, page_paddr=self.mdata)
        assert rig.command(Command.SNP_PAGE_MD_INIT, record) == 0
        self.source, self.target = rig.page(entry, TEXT), rig.page()

    def _do(
        self, command: int, source: int, target: int, flags: dict[str, int], fields: dict[str, Any]
    ) -> int:
        record = PageSwap(gctx_paddr=self.gctx, src_paddr=source, dst_paddr=target, mdata_paddr=self.mdata)
        return self.rig.command(command, record.but(flags=SwapFlags.of(**flags), **fields))

    def out(self, flags: dict[str, int] | None = None, **fields: Any) -> int:
        return self._do(Command.SNP_PAGE_SWAP_OUT, self.source, self.target, flags or {}, fields)

    def back(self, flags: dict[str, int] | None = None, **fields: Any) -> int:
        """SWAP_IN of the ciphertext to where the page was."""
        return self._do(Command.SNP_PAGE_SWAP_IN, self.target, self.source, flags or {}, fields)

    @property
    def entry(self) -> MetadataEntry:
        return MetadataEntry.parse(self.rig.memory.read(self.mdata, 64))

    def write_entry(self, entry: MetadataEntry) -> None:
        self.rig.memory.write(self.mdata, bytes(entry))


@pytest.mark.parametrize(
    ("entry", "page_type", "left", "back"),
    [
        (PRE_SWAP, DATA, PageState.PRE_GUEST, PageState.PRE_SWAP),
        (PRE_GUEST, DATA, PageState.PRE_GUEST, PageState.PRE_GUEST),
        (replace(PRE_SWAP, vmsa=True), VMSA, PageState.PRE_GUEST, PageState.PRE_SWAP),
    ],
)
def test_out_and_back(rig: Rig, entry: RmpEntry, page_type: int, left: PageState, back: PageState) -> None:
    """AMD 56860: encrypted under the OEK, and back with address, VMSA bit and permissions."""
    swap = Swap(rig, entry)
    assert swap.out({"page_type": page_type}, software_data=77) == S.SUCCESS
    kept = swap.entry
    assert (kept.software_data, kept.iv, kept.page.valid, kept.page.gfn) == (77, 1, 1, 5)
    data = rig.memory.read(swap.target, 4096)
    oek = rig.context(swap.gctx).oek
    assert open_bytes(oek, b"\1" + bytes(11), data, kept.auth_tag) == TEXT != data
    assert (rig.state(swap.source), rig.state(swap.target)) == (left, PageState.FIRMWARE)
    rig.rmp[swap.source] = RmpEntry(assigned=True, immutable=True, asid=1)
    rig.memory.write(swap.source, bytes(4096))
    assert swap.back({"page_type": page_type}) == S.SUCCESS
    assert rig.rmp[swap.source] == entry
    assert rig.state(swap.source) is back
    assert rig.memory.read(swap.source, 4096) == TEXT
    assert swap.back({"page_type": page_type}) == S.INVALID_MDATA_ENTRY  # once only


def test_the_iv_never_repeats(rig: Rig) -> None:
    """AMD 56860: every page that leaves has an IV of its own; at 2^64-2 there are no more: AEAD_OFLOW."""
    swap = Swap(rig)
    assert swap.out() == swap.out() == S.SUCCESS
    assert swap.entry.iv == 2
    rig.context(swap.gctx).oek_iv_count = IV_COUNT_MAX
    assert swap.out() == S.AEAD_OFLOW
    assert swap.entry.iv == 2


def test_in_place(rig: Rig) -> None:
    """AMD 56860: SWAP_IN_PLACE decrypts where the page lies."""
    swap = Swap(rig)
    assert swap.out() == S.SUCCESS
    rig.memory.write(swap.source, rig.memory.read(swap.target, 4096))
    assert swap.back({"swap_in_place": 1}) == S.INVALID_ADDRESS
    assert swap.back({"swap_in_place": 1}, src_paddr=swap.source) == S.SUCCESS
    assert rig.memory.read(swap.source, 4096) == TEXT


def test_metadata_pages_and_the_root(rig: Rig) -> None:
    """AMD 56860: metadata pages are swapped too; the last entry lives in the guest context."""
    swap = Swap(rig)
    assert swap.out() == S.SUCCESS
    kept = swap.entry
    swap.source, swap.target = swap.mdata, rig.page()
    root = {"page_type": METADATA, "root_mdata_en": 1}
    assert swap.out(root) == S.SUCCESS
    assert rig.state(swap.mdata) is PageState.FIRMWARE
    entry = rig.context(swap.gctx).root_md_entry
    assert (entry.page.valid, entry.page.metadata, entry.page.gfn) == (1, 1, 0)
    rig.memory.write(swap.mdata, bytes(4096))
    assert swap.back(root | {"swap_in_place": 1}) == S.INVALID_PARAM
    assert swap.back(root) == S.SUCCESS
    assert rig.rmp[swap.mdata] == replace(FIRMWARE, gpa=swap.gctx)
    assert swap.entry == kept
    assert not rig.context(swap.gctx).root_md_entry.page.valid


def test_a_large_page(rig: Rig) -> None:
    """AMD 56860: 2 MiB under one entry; a VMSA is never that large."""
    swap = Swap(rig)
    swap.source, swap.target = rig.memory.allocate(LARGE), rig.memory.allocate(LARGE)
    rig.rmp[swap.source] = replace(PRE_SWAP, page_size=1, gpa=LARGE)
    rig.rmp[swap.target] = replace(FIRMWARE, page_size=1)
    rig.memory.write(swap.source + LARGE - 4, b"last")
    size = {"page_size": 1}
    assert swap.out() == S.INVALID_PAGE_SIZE
    assert swap.out(size, dst_paddr=swap.target + 4096) == S.INVALID_PAGE_SIZE
    assert swap.out(size, src_paddr=swap.source + 4096) == S.INVALID_PAGE_SIZE
    assert swap.out(size) == S.SUCCESS
    rig.memory.write(swap.source + LARGE - 4, bytes(4))
    assert swap.back() == S.INVALID_PAGE_SIZE
    assert swap.back(size) == S.SUCCESS
    assert rig.memory.read(swap.source + LARGE - 4, 4) == b"last"
    swap.write_entry(swap.entry.but(page=swap.entry.page.but(valid=1, vmsa=1)))
    assert swap.back({"page_size": 1, "page_type": VMSA}) == S.INVALID_PAGE_SIZE


@pytest.mark.parametrize("command", [Command.SNP_PAGE_SWAP_OUT, Command.SNP_PAGE_SWAP_IN])
@pytest.mark.parametrize("bit", [5, 31])
def test_unnamed_flags_are_reserved(rig: Rig, command: int, bit: int) -> None:
    """AMD 56860: flags above ROOT_MDATA_EN must be zero: INVALID_PARAM, before the platform state."""
    swap = Swap(rig)
    rig.platform.state = PlatformState.UNINIT
    record = PageSwap(gctx_paddr=swap.gctx, src_paddr=swap.source, dst_paddr=swap.target)
    assert rig.command(command, record.but(flags=SwapFlags(1 << bit))) == S.INVALID_PARAM
    assert rig.command(command, record) == S.INVALID_PLATFORM_STATE


@pytest.mark.parametrize("command", ["out", "back"])
def test_common_checks_in_order(make_rig: MakeRig, command: str) -> None:
    """AMD 56860: what both commands begin with; faults are taken away one by one."""
    rig = make_rig(product=Product.TURIN)
    swap = Swap(rig)
    if command == "back":
        assert swap.out() == 0
    do = getattr(swap, command)
    context = rig.context(swap.gctx)
    kept_policy, kept_state = context.policy, context.state
    rig.platform.state = PlatformState.UNINIT
    reserved: dict[str, Any] = {"flags": {"swap_in_place": 1}} if command == "out" else {"software_data": 1}
    for bad in ({"gctx_paddr": 8}, {"src_paddr": 8}, {"dst_paddr": 8}, reserved):
        assert do(**bad) == S.INVALID_PARAM
    assert do(mdata_paddr=NOWHERE) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.INIT
    assert do(mdata_paddr=NOWHERE, gctx_paddr=swap.target) == S.INVALID_ADDRESS
    assert do(mdata_paddr=swap.target + 8, gctx_paddr=swap.target) == S.INVALID_GUEST
    other = rig.page()
    for bad_entry in (other + 8, swap.source, swap.target + 64):
        assert do(mdata_paddr=bad_entry) == S.INVALID_PARAM
    assert do(mdata_paddr=other) == S.INVALID_PAGE_STATE
    rig.rmp[other] = replace(FIRMWARE, gpa=other)
    assert do(mdata_paddr=other) == S.INVALID_PAGE_OWNER
    context.policy = GuestPolicy.of(page_swap_disable=1)
    context.state, context.asid = type(kept_state)(0), 0
    if command == "out":
        assert do({"page_size": 1}) == S.INVALID_PAGE_SIZE
    assert do() == S.INVALID_GUEST_STATE
    context.state = kept_state
    assert do() == S.INACTIVE
    context.asid = 1
    assert do() == S.POLICY_FAILURE
    context.policy = kept_policy
    assert do() == S.SUCCESS


@pytest.mark.parametrize(
    ("source", "target", "page_type", "status"),
    [
        (replace(PRE_GUEST, asid=2), FIRMWARE, 3, S.INVALID_PAGE_STATE),
        (FIRMWARE, FIRMWARE, DATA, S.INVALID_PAGE_STATE),
        (replace(PRE_SWAP, immutable=False), FIRMWARE, DATA, S.INVALID_PAGE_STATE),
        (replace(PRE_GUEST, asid=2), RmpEntry(), VMSA, S.INVALID_PAGE_STATE),
        (replace(PRE_GUEST, asid=2), FIRMWARE, DATA, S.INVALID_PAGE_OWNER),
        (PRE_SWAP, FIRMWARE, METADATA, S.INVALID_PAGE_STATE),
        (replace(FIRMWARE, gpa=0x1000), FIRMWARE, METADATA, S.INVALID_PAGE_OWNER),
    ],
)
def test_out_is_refused(rig: Rig, source: RmpEntry, target: RmpEntry, page_type: int, status: S) -> None:
    """AMD 56860: page type and states, then the owner, then the counter."""
    swap = Swap(rig, source)
    rig.rmp[swap.target] = target
    rig.context(swap.gctx).oek_iv_count = IV_COUNT_MAX
    assert swap.out({"page_type": page_type}) == status
    assert swap.entry == MetadataEntry()


@pytest.mark.parametrize(
    ("entry", "flags", "target", "status"),
    [
        ({"valid": 0}, {}, PRE_GUEST, S.INVALID_MDATA_ENTRY),
        ({"metadata": 1, "vmsa": 1}, {}, PRE_GUEST, S.INVALID_MDATA_ENTRY),
        ({"vmsa": 1}, {}, PRE_GUEST, S.INVALID_MDATA_ENTRY),
        ({"metadata": 1}, {"page_type": VMSA}, FIRMWARE, S.INVALID_MDATA_ENTRY),
        ({}, {"page_type": 3}, PRE_GUEST, S.INVALID_MDATA_ENTRY),
        ({"page_size": 1}, {}, FIRMWARE, S.INVALID_PAGE_SIZE),
        ({}, {}, replace(PRE_GUEST, page_size=1), S.INVALID_PAGE_SIZE),
        ({}, {"swap_in_place": 1}, PRE_SWAP, S.INVALID_PAGE_STATE),
        ({}, {}, replace(PRE_GUEST, asid=2), S.INVALID_PAGE_OWNER),
        ({"metadata": 1}, {"page_type": METADATA}, PRE_GUEST, S.INVALID_PAGE_STATE),
        ({"vmsa": 1}, {"page_type": VMSA, "swap_in_place": 1}, FIRMWARE, S.INVALID_PARAM),
        ({"vmsa": 1}, {"page_type": VMSA}, FIRMWARE, S.INVALID_PAGE_STATE),
    ],
)
def test_in_is_refused(
    rig: Rig, entry: dict[str, int], flags: dict[str, int], target: RmpEntry, status: S
) -> None:
    """AMD 56860: the entry, sizes, the target; the tag comes last. Nothing changes."""
    swap = Swap(rig)
    assert swap.out() == 0
    rig.memory.write(swap.target, bytes(4096))
    swap.write_entry(swap.entry.but(page=swap.entry.page.but(**entry)))
    before = swap.entry
    rig.rmp[swap.source] = target
    assert swap.back(flags) == status
    assert (swap.entry, rig.rmp[swap.source]) == (before, target)


@pytest.mark.parametrize("what", ["data", "iv", "tag", "oek"])
def test_what_was_changed_does_not_come_back(rig: Rig, what: str) -> None:
    """AMD 56860: ciphertext, IV, tag and key belong together: BAD_MEASUREMENT."""
    swap = Swap(rig)
    assert swap.out() == 0
    match what:
        case "data":
            rig.memory.write(swap.target + 4095, b"\0")
        case "iv":
            swap.write_entry(swap.entry.but(iv=2))
        case "tag":
            swap.write_entry(swap.entry.but(auth_tag=bytes(16)))
        case _:
            rig.context(swap.gctx).oek = bytes(32)
    assert swap.back() == S.BAD_MEASUREMENT
    assert swap.entry.page.valid
    assert rig.state(swap.source) is PageState.PRE_GUEST
