"""INIT, SHUTDOWN, DF_FLUSH, PLATFORM_STATUS, CONFIG, COMMIT, GET_ID."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import (
    Command,
    Commit,
    Config,
    ConfigFlags,
    GetId,
    InitEx,
    InitExFlags,
    PlatformState,
    PlatformStatus,
    PlatformStatusBuffer,
    RangeElement,
    RangeListHeader,
    ShutdownEx,
)
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.firmware.chip import ApiVersion
from swsnp.firmware.keys import vlek_key
from swsnp.firmware.platform import _fix
from swsnp.hardware.rmp import PageState, RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

NOWHERE = 0x7777_7777_7000
FIRMWARE = RmpEntry(assigned=True, immutable=True)


# --- INIT ---------------------------------------------------------------------


def test_init_makes_every_asid_dirty(make_rig: MakeRig) -> None:
    """AMD 56860: after SNP_INIT an ASID is usable only after DF_FLUSH."""
    rig = make_rig(init=False)
    assert rig.command(Command.SNP_INIT) == S.SUCCESS
    gctx = rig.create()
    assert rig.start(gctx) == 0
    assert rig.activate(gctx, 1) == S.DFFLUSH_REQUIRED
    assert rig.command(Command.SNP_DF_FLUSH) == 0
    assert rig.activate(gctx, 1) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"flags": InitExFlags(0x21)},
        {"flags": InitExFlags(0x8000_0001)},
        {"flags": InitExFlags.of(init_rmp=1, tio_en=1)},
        {"flags": InitExFlags.of(init_rmp=1, ciphertext_hiding_en=1)},
        {"reserved_04": 1},
        {"reserved_12": bytes(45) + b"\x01"},
    ],
    ids=str,
)
def test_init_reserved(make_rig: MakeRig, change: dict[str, Any]) -> None:
    """AMD 56860: reserved bits, and features that the part lacks, are INVALID_PARAM."""
    rig = make_rig(init=False)
    record = InitEx(flags=InitExFlags.of(init_rmp=1)).but(**change)
    assert rig.command(Command.SNP_INIT_EX, record) == S.INVALID_PARAM
    assert rig.platform.state is PlatformState.UNINIT


def test_init_checks_in_order(make_rig: MakeRig) -> None:
    """AMD 56860: reserved, state, RMP, range list without full initialisation, hardware configuration."""
    rig = make_rig(hardware_configuration_ok=False, init=False)
    rig.platform.state = PlatformState.INIT
    assert rig.init(init_rmp=0, list_paddr_en=1, tio_en=1) == S.INVALID_PARAM
    assert rig.init(init_rmp=0, list_paddr_en=1) == S.INVALID_PLATFORM_STATE
    rig.platform.state = PlatformState.UNINIT
    assert rig.init(init_rmp=0, list_paddr_en=1) == S.RMP_INIT_REQUIRED
    rig.platform.rmp_initialised_for = rig.chip.variables.current_tcb
    assert rig.init(init_rmp=0, list_paddr_en=1) == S.INVALID_PARAM
    assert rig.init(init_rmp=0) == S.INVALID_CONFIG
    assert rig.init() == S.INVALID_CONFIG


def test_init_without_rmp_needs_the_same_tcb(rig: Rig) -> None:
    """AMD 56860: an RMP that other firmware or microcode initialised is not taken over."""
    assert rig.command(Command.SNP_SHUTDOWN) == 0
    assert rig.init(init_rmp=0) == S.SUCCESS
    assert rig.command(Command.SNP_DF_FLUSH) == 0
    assert rig.command(Command.SNP_SHUTDOWN) == 0
    newer = TcbVersion.encode(Product.GENOA, boot_loader=0x0A, snp=0x18, microcode=0x54)
    rig.chip.update(current_tcb=newer, current_version=ApiVersion(major=1, minor=55, build=26))
    assert rig.init(init_rmp=0) == S.RMP_INIT_REQUIRED
    assert rig.init() == S.SUCCESS


def _list_page(rig: Rig, header: RangeListHeader, *elements: RangeElement) -> int:
    return rig.page(RmpEntry(), bytes(header) + b"".join(map(bytes, elements)))


def test_full_init_clears_the_rmp_and_fixes_the_list(make_rig: MakeRig) -> None:
    """AMD 56860: full initialisation clears the RMP; ranges of the list become HV-Fixed, holes aside."""
    rig = make_rig(init=False)
    old = rig.page()
    base = rig.memory.allocate(2 << 20)
    page = _list_page(
        rig,
        RangeListHeader(num_elements=2),
        RangeElement(base=base + 0x1000, page_count=2),
        RangeElement(base=0xFD_0000_0000, page_count=0x30_0000),
    )
    record = InitEx(flags=InitExFlags.of(init_rmp=1, list_paddr_en=1), list_paddr=page)
    assert rig.command(Command.SNP_INIT_EX, record) == S.SUCCESS
    assert rig.state(old) is PageState.HYPERVISOR
    states = [rig.state(base + at * 0x1000) for at in range(4)]
    fixed, free = PageState.HV_FIXED, PageState.HYPERVISOR
    assert states == [free, fixed, fixed, free]


@pytest.mark.parametrize(
    ("header", "element"),
    [
        (RangeListHeader(num_elements=256), RangeElement()),
        (RangeListHeader(num_elements=1, reserved_04=1), RangeElement()),
        (RangeListHeader(num_elements=1), RangeElement(reserved_0c=1)),
        (RangeListHeader(num_elements=1), RangeElement(base=0x1001)),
    ],
)
def test_bad_range_lists(make_rig: MakeRig, header: RangeListHeader, element: RangeElement) -> None:
    """AMD 56860: at most 255 elements, reserved fields zero, pages aligned."""
    rig = make_rig(init=False)
    page = _list_page(rig, header, element)
    for list_paddr in (page, NOWHERE):
        record = InitEx(flags=InitExFlags.of(init_rmp=1, list_paddr_en=1), list_paddr=list_paddr)
        assert rig.command(Command.SNP_INIT_EX, record) == S.INVALID_PARAM


def test_the_longest_range_list(make_rig: MakeRig) -> None:
    """AMD 56860: 255 elements fill the list's page."""
    rig = make_rig(init=False)
    pages = [rig.memory.allocate_page() for _ in range(255)]
    page = _list_page(
        rig, RangeListHeader(num_elements=255), *(RangeElement(base=each, page_count=1) for each in pages)
    )
    record = InitEx(flags=InitExFlags.of(init_rmp=1, list_paddr_en=1), list_paddr=page)
    assert rig.command(Command.SNP_INIT_EX, record) == S.SUCCESS
    assert {rig.state(each) for each in pages} == {PageState.HV_FIXED}


def test_ciphertext_hiding_caps_the_asids(make_rig: MakeRig) -> None:
    """AMD 56860: MAX_SNP_ASID caps SNP ASIDs when ciphertext hiding is asked for."""
    rig = make_rig(init=False, ciphertext_hiding_cap=True)
    flags = InitExFlags.of(init_rmp=1, ciphertext_hiding_en=1, rapl_dis=1)
    assert rig.command(Command.SNP_INIT_EX, InitEx(flags=flags, max_snp_asid=3)) == S.SUCCESS
    assert sorted(rig.platform.asids) == [1, 2, 3]
    assert rig.chip.platform_info.ciphertext_hiding_dram_en
    assert rig.chip.platform_info.rapl_dis


# --- SHUTDOWN -----------------------------------------------------------------


def test_shutdown_forgets_guests_and_vlek(rig: Rig) -> None:
    """AMD 56860: state UNINIT, guests forgotten, VLEK wiped; pages keep their state."""
    gctx = rig.create()
    context = rig.context(gctx)
    rig.chip.load_vlek(vlek_key(bytes(32), Product.GENOA, "csp", rig.chip.reported_tcb))
    assert rig.command(Command.SNP_SHUTDOWN) == S.SUCCESS
    assert rig.platform.state is PlatformState.UNINIT
    assert rig.state(gctx) is PageState.CONTEXT
    assert (rig.platform.guests, rig.chip.variables.vlek, rig.chip.vlek_signer()) == ({}, None, None)
    assert context.vek == b""
    assert rig.init(init_rmp=0) == 0
    assert rig.start(gctx) == S.INVALID_GUEST


@pytest.mark.parametrize("command", [Command.SNP_SHUTDOWN, Command.SNP_SHUTDOWN_EX])
def test_shutdown_order(rig: Rig, command: int) -> None:
    """AMD 56860: nothing to do when UNINIT, whatever the buffer says; an ASID that is not clean first."""
    good, bad = ShutdownEx(length=8), ShutdownEx(length=7, flags=8)
    gctx = rig.launching()
    assert rig.command(command, bad) == S.DFFLUSH_REQUIRED
    assert rig.platform.guests.keys() == {gctx}
    rig.platform.asids[1] = rig.platform.asids[2]
    assert rig.command(command, good) == S.SUCCESS
    assert rig.command(command, bad) == S.SUCCESS


@pytest.mark.parametrize("command", [Command.SNP_SHUTDOWN, Command.SNP_SHUTDOWN_EX])
def test_shutdown_when_uninitialised_changes_nothing(make_rig: MakeRig, command: int) -> None:
    """AMD 56860: SUCCESS at once; a VLEK that was loaded before SNP_INIT stays."""
    rig = make_rig(init=False)
    rig.chip.load_vlek(vlek_key(bytes(32), Product.GENOA, "csp", rig.chip.reported_tcb))
    before = rig.chip.variables
    assert rig.command(command, ShutdownEx(length=8)) == S.SUCCESS
    assert rig.chip.variables is before


@pytest.mark.parametrize(
    ("length", "flags", "status"),
    [
        (7, 0, S.INVALID_PARAM),
        (8, 4, S.INVALID_PARAM),
        (8, 2, S.INVALID_PARAM),
        (8, 0, S.SUCCESS),
        (8, 1, S.SUCCESS),
        (8, 3, S.SUCCESS),
    ],
)
def test_shutdown_ex(rig: Rig, length: int, flags: int, status: S) -> None:
    """AMD 56860: LEN 8, bits 1:0, X86 not without IOMMU; with IOMMU the RMP has to be initialised again."""
    assert rig.command(Command.SNP_SHUTDOWN_EX, ShutdownEx(length=length, flags=flags)) == status
    if status is S.SUCCESS:
        wanted = S.RMP_INIT_REQUIRED if flags & 1 else S.SUCCESS
        assert rig.init(init_rmp=0) == wanted


def test_df_flush_wants_wbinvd(rig: Rig) -> None:
    """AMD 56860: WBINVD missing on a core is WBINVD_REQUIRED."""
    rig.platform.wbinvd_done = False
    assert rig.command(Command.SNP_DF_FLUSH) == S.WBINVD_REQUIRED


# --- PLATFORM_STATUS ----------------------------------------------------------


def _status(rig: Rig, address: int) -> int:
    return rig.command(Command.SNP_PLATFORM_STATUS, PlatformStatus(status_paddr=address))


def test_platform_status_content(make_rig: MakeRig) -> None:
    """AMD 56860: versions, state, masks, guest count, TCBs; guests count from LAUNCH_START on."""
    rig = make_rig(product=Product.MILAN, ciphertext_hiding_cap=True)
    rig.create()
    rig.launching()
    older = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x17, microcode=0xDB)
    rig.chip.configure(reported_tcb=older, mask_chip_id=True)
    rig.chip.load_vlek(vlek_key(bytes(32), Product.MILAN, "csp", older))
    page = rig.page()
    assert _status(rig, page + 0xFE0) == S.SUCCESS
    assert PlatformStatusBuffer.parse(rig.memory.read(page + 0xFE0, 0x20)) == PlatformStatusBuffer(
        api_major=1,
        api_minor=55,
        state=1,
        rmp_flags=3,
        build_id=29,
        flags=0b101101,
        guest_count=1,
        current_tcb=TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDB),
        reported_tcb=older,
    )
    assert rig.state(page) is PageState.FIRMWARE


def test_platform_status_checks_in_order(make_rig: MakeRig) -> None:
    """AMD 56860: crossing a page, no memory: INVALID_PARAM; while INIT a page that is not Firmware."""
    rig = make_rig(init=False)
    page = rig.page(RmpEntry())
    assert _status(rig, NOWHERE + 0xFE1) == S.INVALID_PARAM
    assert _status(rig, NOWHERE) == S.INVALID_PARAM
    assert _status(rig, page) == S.SUCCESS
    assert rig.memory.read(page, 4)[2:] == b"\0\0"
    assert rig.init() == 0
    assert _status(rig, page + 0xFE1) == S.INVALID_PARAM
    assert _status(rig, page) == S.INVALID_PAGE_STATE


# --- CONFIG, COMMIT -----------------------------------------------------------


def _config(rig: Rig, tcb: int, flags: int = 0, **changes: Any) -> int:
    record = Config(reported_tcb=TcbVersion(tcb), flags=ConfigFlags(flags)).but(**changes)
    return rig.command(Command.SNP_CONFIG, record)


@pytest.mark.parametrize("change", [{"flags": ConfigFlags(4)}, {"reserved_0c": bytes(51) + b"\x01"}])
def test_config_reserved(rig: Rig, change: dict[str, Any]) -> None:
    """AMD 56860: reserved bits of SNP_CONFIG."""
    assert _config(rig, 0, **change) == S.INVALID_PARAM


@pytest.mark.parametrize(
    ("product", "component"), [(p, name) for p in Product for name in TcbVersion.byte_order(p)]
)
def test_config_may_only_lower_each_component(make_rig: MakeRig, product: Product, component: str) -> None:
    """AMD 56860: a component above the committed TCB is refused even when another one is lower."""
    rig = make_rig(product=product)
    levels = rig.chip.variables.committed_tcb.decode(product)
    lower = {name: level // 2 for name, level in levels.items()}
    assert _config(rig, TcbVersion.encode(product, **lower)) == S.SUCCESS
    raised = lower | {component: levels[component] + 1}
    assert _config(rig, TcbVersion.encode(product, **raised)) == S.INVALID_PARAM
    assert rig.chip.reported_tcb == TcbVersion.encode(product, **lower)


def test_config_reserved_tcb_bytes(rig: Rig) -> None:
    """AMD 56860: bytes of TCB_VERSION without a component are zero."""
    assert _config(rig, rig.chip.reported_tcb | 1 << 24) == S.INVALID_PARAM


def test_config_with_tcb_zero_fixes_the_committed_one(rig: Rig) -> None:
    """Firmware 1.55: REPORTED_TCB 0 stores the committed TCB of that moment."""
    committed = rig.chip.variables.committed_tcb
    assert _config(rig, 0, flags=3) == S.SUCCESS
    variables = rig.chip.variables
    assert variables.reported_override == committed
    assert (variables.mask_chip_id, variables.mask_chip_key) == (True, True)


def test_config_and_commit_work_without_init(make_rig: MakeRig) -> None:
    """Firmware 1.55: SNP_CONFIG and SNP_COMMIT do not ask for the platform state."""
    rig = make_rig(init=False)
    assert _config(rig, 0) == S.SUCCESS
    assert rig.command(Command.SNP_COMMIT, Commit(length=4)) == S.SUCCESS


def test_commit(rig: Rig) -> None:
    """AMD 56860: committed := current; firmware 1.55 also forgets the override of SNP_CONFIG."""
    newer = TcbVersion.encode(Product.GENOA, boot_loader=0x0B, snp=0x18, microcode=0x55)
    version = ApiVersion(major=1, minor=55, build=40)
    committed = rig.chip.variables.committed_tcb
    assert _config(rig, 0) == 0
    rig.chip.update(current_tcb=newer, current_version=version)
    assert rig.chip.reported_tcb == committed
    assert rig.command(Command.SNP_COMMIT, Commit(length=4)) == S.SUCCESS
    variables = rig.chip.variables
    assert (variables.committed_tcb, variables.committed_version) == (newer, version)
    assert (variables.reported_override, rig.chip.reported_tcb) == (0, newer)


@pytest.mark.parametrize("length", [0, 3, 5])
def test_commit_length(rig: Rig, length: int) -> None:
    """AMD 56860: LEN of SNP_COMMIT is 4."""
    assert rig.command(Command.SNP_COMMIT, Commit(length=length)) == S.INVALID_PARAM


# --- GET_ID -------------------------------------------------------------------


def _get_id(rig: Rig, target: int, length: int) -> tuple[int, int]:
    rig.memory.write(rig.buffer, bytes(GetId(id_paddr=target, length=length)))
    rig.rmp[rig.buffer] = FIRMWARE
    status = rig.mailbox.command(Command.GET_ID, rig.buffer)
    return status, GetId.parse(rig.memory.read(rig.buffer, GetId.SIZE)).length


@pytest.mark.parametrize("sockets", [1, 2])
def test_get_id(make_rig: MakeRig, sockets: int) -> None:
    """AMD SEV API, GET_ID: 40h bytes per socket, LEN as written; socket 0 is the chip id of reports."""
    rig = make_rig(sockets=sockets)
    target = rig.page()
    assert _get_id(rig, target, 0x80) == (S.SUCCESS, 0x40 * sockets)
    assert rig.memory.read(target, 0x40) == rig.chip.chip_id
    second = rig.memory.read(target + 0x40, 0x40)
    assert second == (bytes(0x40) if sockets == 1 else rig.chip.chip_ids[1])
    assert second[:4] == (b"SWSN" if sockets == 2 else bytes(4))
    assert second != rig.chip.chip_id


@pytest.mark.parametrize("length", [0, 0x3F])
def test_get_id_too_short(rig: Rig, length: int) -> None:
    """AMD SEV API: LEN below 40h becomes 40h, INVALID_LENGTH; the buffer goes back on that failure too."""
    assert _get_id(rig, rig.page(), length) == (S.INVALID_LENGTH, 0x40)


def test_get_id_writes_its_buffer_only_in_firmware_pages(make_rig: MakeRig) -> None:
    """AMD 56860: while INIT the pages of a buffer that is written back are Firmware, then Reclaim."""
    rig = make_rig()
    target = rig.page()
    assert rig.command(Command.GET_ID, GetId(id_paddr=target, length=0x40)) == S.INVALID_PAGE_STATE
    assert _get_id(rig, target, 0x40) == (S.SUCCESS, 0x40)
    assert rig.state(rig.buffer) is PageState.RECLAIM
    fresh = make_rig(init=False)
    target = fresh.page(RmpEntry())
    assert fresh.command(Command.GET_ID, GetId(id_paddr=target, length=0x40)) == S.SUCCESS
    assert fresh.memory.read(target, 0x40) == fresh.chip.chip_id
    assert fresh.state(fresh.buffer) is PageState.HYPERVISOR


def test_get_id_checks_every_page_of_its_buffer(rig: Rig) -> None:
    """AMD 56860: a buffer that crosses a page is checked on both sides."""
    base = rig.memory.allocate(0x2000)
    address = base + 0xFF8
    rig.memory.write(address, bytes(GetId(id_paddr=rig.page(), length=0x40)))
    rig.rmp[base] = FIRMWARE
    assert rig.mailbox.command(Command.GET_ID, address) == S.INVALID_PAGE_STATE
    rig.rmp[base + 0x1000] = FIRMWARE
    assert rig.mailbox.command(Command.GET_ID, address) == S.SUCCESS
    assert [rig.state(base), rig.state(base + 0x1000)] == [PageState.RECLAIM] * 2


@pytest.mark.parametrize("validated", [False, True])
def test_get_id_never_writes_a_guests_page(rig: Rig, validated: bool) -> None:
    """AMD 56860: while INIT the ids go to a Firmware page only; a guest's page is refused."""
    target = rig.page(RmpEntry(assigned=True, asid=7, gpa=0x5000, validated=validated))
    rig.memory.write(target, b"the guest's own")
    assert _get_id(rig, target, 0x40)[0] == S.INVALID_PAGE_STATE
    assert rig.memory.read(target, 15) == b"the guest's own"


def test_a_huge_range_list_is_quick(make_rig: MakeRig) -> None:
    """AMD 56860, SNP_INIT_EX: ranges are the host's word; holes cost nothing, memory in them is HV-Fixed."""
    rig = make_rig(init=False)
    page = rig.memory.allocate(2 * 0x1000)
    _fix(rig.mailbox.platform, RangeElement(base=0, page_count=0xFFFF_FFFF))
    assert [rig.state(page), rig.state(page + 0x1000)] == [PageState.HV_FIXED] * 2
    _fix(rig.mailbox.platform, RangeElement(base=page + 0x2000, page_count=1))


def test_get_id_into_no_memory(rig: Rig) -> None:
    """AMD SEV API: an address that no memory answers for."""
    assert _get_id(rig, NOWHERE, 0x40)[0] == S.INVALID_ADDRESS


def test_rmp_counts_pages_per_asid(rig: Rig) -> None:
    """AMD 56860: the table counts the pages of each ASID, whoever changes an entry."""
    page = rig.guest_page(77, 0x1000)
    assert rig.rmp.pages_of(77) == 1
    rig.rmp[page] = replace(rig.rmp[page], immutable=False)
    assert rig.rmp.pages_of(77) == 1
    rig.rmp[page] = RmpEntry()
    assert rig.rmp.pages_of(77) == 0
