"""LAUNCH_START, LAUNCH_UPDATE, LAUNCH_FINISH: checks, their order, and what a launch leaves behind."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, LaunchUpdate, LaunchUpdateInfo, PageType, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_launch import EcdsaPublicKey, IdAuth, IdBlock, SecretsPage
from swsnp.abi.snp_report import GuestPolicy, Product
from swsnp.abi.vmsa import SevFeatures, Vmsa
from swsnp.crypto.ecdsa import SigningKey, public_key_record
from swsnp.firmware.context import GuestState
from swsnp.firmware.launch import tsc_scale
from swsnp.hardware.rmp import PageState, RmpEntry
from swsnp.measure.digest import extend_range

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.firmware.conftest import MakeRig, Rig

NOWHERE = 0x7777_7777_7000
LARGE = 2 << 20
SMT_POLICY = 0x30000
NO_SMT_POLICY = 0x20000
MIGRATE_MA = 1 << 18
SINGLE_SOCKET = 1 << 20


def _uninit(rig: Rig) -> None:
    rig.platform.state = PlatformState.UNINIT


# --- LAUNCH_START ---------------------------------------------------------------------------------


@dataclass
class Start:
    rig: Rig
    gctx: int
    policy: int = SMT_POLICY
    flags: int = 0
    ma_gctx_paddr: int = 0

    def send(self) -> int:
        return self.rig.start(
            self.gctx, policy=self.policy, flags=self.flags, ma_gctx_paddr=self.ma_gctx_paddr
        )


def _start_no_memory(case: Start) -> None:
    case.gctx = NOWHERE


def _start_no_context(case: Start) -> None:
    case.rig.rmp[case.gctx] = replace(case.rig.rmp[case.gctx], vmsa=False)


def _start_state(case: Start) -> None:
    case.rig.context(case.gctx).state = GuestState.LAUNCH


def _start_agent(case: Start) -> None:
    case.flags |= 1
    case.ma_gctx_paddr = case.rig.page()


def _start_reserved(case: Start) -> None:
    case.flags |= 4


def _start_policy(case: Start) -> None:
    case.policy = 0


START_FAULTS: list[tuple[str, S, Callable[[Start], None]]] = [
    ("1 reserved flags", S.INVALID_PARAM, _start_reserved),
    ("2 SNP not INIT", S.INVALID_PLATFORM_STATE, lambda case: _uninit(case.rig)),
    ("3 not a context", S.INVALID_GUEST, _start_no_context),
    ("4 guest state", S.INVALID_GUEST_STATE, _start_state),
    ("5 agent not a context", S.INVALID_GUEST, _start_agent),
    ("6 policy", S.POLICY_FAILURE, _start_policy),
]


@pytest.mark.parametrize(
    "faults",
    [(each,) for each in START_FAULTS] + list(combinations(START_FAULTS, 2)),
    ids=lambda faults: " + ".join(each[0] for each in faults),
)
def test_launch_start_checks_in_order(make_rig: MakeRig, faults: Any) -> None:
    """AMD 56860, SNP_LAUNCH_START: each check has its status, the first one decides."""
    rig = make_rig()
    case = Start(rig, rig.create())
    for _, _, fault in faults:
        fault(case)
    assert case.send() == faults[0][1]


def test_launch_start_of_no_memory(rig: Rig) -> None:
    """AMD 56860: a context page that no memory answers for is INVALID_ADDRESS."""
    case = Start(rig, NOWHERE)
    assert case.send() == S.INVALID_ADDRESS


@pytest.mark.parametrize("field", ["gctx", "ma_gctx_paddr"])
def test_launch_start_addresses_are_aligned(rig: Rig, field: str) -> None:
    """AMD 56860: low 12 bits of context addresses are reserved; the agent's only with MA_EN."""
    case = Start(rig, rig.create(), flags=1)
    setattr(case, field, getattr(case, field) | 8)
    assert case.send() == S.INVALID_PARAM


@pytest.mark.parametrize(
    ("policy", "changes", "status"),
    [
        (SMT_POLICY, {}, S.SUCCESS),
        (0x10000, {}, S.POLICY_FAILURE),  # bit 17 clear
        (NO_SMT_POLICY, {}, S.POLICY_FAILURE),  # SMT is on
        (NO_SMT_POLICY, {"smt_en": False}, S.SUCCESS),
        (SMT_POLICY | 0x137, {}, S.SUCCESS),  # 1.55
        (SMT_POLICY | 0x138, {}, S.POLICY_FAILURE),  # 1.56
        (SMT_POLICY | 0x0FF, {}, S.SUCCESS),  # 0.255
        (SMT_POLICY | 0x200, {}, S.POLICY_FAILURE),  # 2.0
        (SMT_POLICY | 1 << 19, {}, S.SUCCESS),  # DEBUG
        (SMT_POLICY | 1 << 20, {}, S.SUCCESS),  # SINGLE_SOCKET
        (SMT_POLICY | 1 << 21, {}, S.POLICY_FAILURE),  # not known to 1.55
        (SMT_POLICY | 1 << 25, {}, S.POLICY_FAILURE),
        (SMT_POLICY | 1 << 63, {}, S.POLICY_FAILURE),
        (SMT_POLICY | 1 << 21, {"policy_highest_bit": 25}, S.SUCCESS),  # CXL_ALLOW
        (SMT_POLICY | 1 << 25, {"policy_highest_bit": 25}, S.SUCCESS),  # PAGE_SWAP_DISABLE
        (SMT_POLICY | 1 << 26, {"policy_highest_bit": 25}, S.POLICY_FAILURE),
        (SMT_POLICY | 1 << 22, {"policy_highest_bit": 25}, S.POLICY_FAILURE),
        (SMT_POLICY | 1 << 22, {"policy_highest_bit": 25, "aes_256_xts": True}, S.SUCCESS),
        (SMT_POLICY | 1 << 23, {"policy_highest_bit": 25}, S.POLICY_FAILURE),
        (SMT_POLICY | 1 << 23, {"policy_highest_bit": 25, "rapl_dis": True}, S.SUCCESS),
        (SMT_POLICY | 1 << 24, {"policy_highest_bit": 25}, S.POLICY_FAILURE),
        (SMT_POLICY | 1 << 24, {"policy_highest_bit": 25, "ciphertext_hiding_en": True}, S.SUCCESS),
    ],
)
def test_policy(make_rig: MakeRig, policy: int, changes: dict[str, Any], status: S) -> None:
    """AMD 56860, guest policy: what LAUNCH_START refuses with POLICY_FAILURE."""
    rig = make_rig(**changes)
    gctx = rig.create()
    assert rig.start(gctx, policy=policy) == status
    launched = rig.context(gctx).state is GuestState.LAUNCH
    assert launched == (status is S.SUCCESS)


@pytest.mark.parametrize(
    ("policy", "agent_policy", "agent_has_agent", "status"),
    [
        (SMT_POLICY | MIGRATE_MA, SMT_POLICY, False, S.SUCCESS),
        (SMT_POLICY, SMT_POLICY, False, S.POLICY_FAILURE),
        (SMT_POLICY | MIGRATE_MA, SMT_POLICY | MIGRATE_MA, True, S.POLICY_FAILURE),
        (SMT_POLICY | MIGRATE_MA | SINGLE_SOCKET, SMT_POLICY, False, S.POLICY_FAILURE),
        (SMT_POLICY | MIGRATE_MA | SINGLE_SOCKET, SMT_POLICY | SINGLE_SOCKET, False, S.SUCCESS),
    ],
)
def test_migration_agent(
    rig: Rig, policy: int, agent_policy: int, agent_has_agent: bool, status: S
) -> None:  # fmt: skip
    """AMD 56860: an agent needs MIGRATE_MA, has no agent itself, is bound to one socket if its guest is."""
    first, agent, gctx = rig.create(), rig.create(), rig.create()
    assert rig.start(first) == 0
    with_agent = {"flags": 1, "ma_gctx_paddr": first} if agent_has_agent else {}
    assert rig.start(agent, policy=agent_policy, **with_agent) == 0
    assert rig.start(gctx, policy=policy, flags=1, ma_gctx_paddr=agent) == status
    if status is S.SUCCESS:
        context = rig.context(gctx)
        assert context.report_id_ma == rig.context(agent).report_id
        assert context.ma_paddr == agent


def test_launch_start_draws_what_is_random_per_guest(rig: Rig) -> None:
    """AMD 56860: OEK, VMPCK0..3, VMRK and REPORT_ID are random; REPORT_ID_MA is FFh without agent."""
    contexts = []
    for _ in range(2):
        gctx = rig.create()
        assert rig.start(gctx, gosvw=b"g" * 16, desired_tsc_khz=5) == 0
        contexts.append(rig.context(gctx))
    values = {v for c in contexts for v in (c.vek, c.oek, c.vmrk, c.report_id, *c.vmpcks)}
    assert len(values) == 16
    assert {len(value) for value in values} == {32}
    assert contexts[0].report_id_ma == b"\xff" * 32
    assert (contexts[0].gosvw, contexts[0].desired_tsc_khz) == (b"g" * 16, 5)


def test_context_withholds_its_keys(rig: Rig) -> None:
    """Secrets are never in a repr."""
    context = rig.context(rig.running())
    text = repr(context)
    for secret in (context.vek, context.oek, context.vmrk, *context.vmpcks):
        assert repr(secret) not in text
        assert secret.hex() not in text


# --- LAUNCH_UPDATE --------------------------------------------------------------------------------


@dataclass
class Update:
    rig: Rig
    gctx: int
    page: int
    info: int = PageType.NORMAL << 1
    reserved_18: int = 0

    def send(self) -> int:
        record = LaunchUpdate(
            gctx_paddr=self.gctx,
            info=LaunchUpdateInfo(self.info),
            page_paddr=self.page,
            reserved_18=self.reserved_18,
        )
        return self.rig.command(Command.SNP_LAUNCH_UPDATE, record)


def _change_entry(**changes: Any) -> Callable[[Update], None]:
    def change(case: Update) -> None:
        case.rig.rmp[case.page] = replace(case.rig.rmp[case.page], **changes)

    return change


def _change_context(**changes: Any) -> Callable[[Update], None]:
    def change(case: Update) -> None:
        for name, value in changes.items():
            setattr(case.rig.context(case.gctx), name, value)

    return change


def _update_reserved(case: Update) -> None:
    case.reserved_18 = 1


def _update_no_context(case: Update) -> None:
    case.rig.rmp[case.gctx] = replace(case.rig.rmp[case.gctx], vmsa=False)


def _update_size(case: Update) -> None:
    case.info |= 1


def _update_large_misaligned(case: Update) -> None:
    _change_entry(page_size=1)(case)
    case.info |= 1


def _update_type(value: int) -> Callable[[Update], None]:
    def change(case: Update) -> None:
        case.info = case.info & ~0xE | value << 1

    return change


UPDATE_FAULTS: list[tuple[str, S, Callable[[Update], None]]] = [
    ("1 reserved", S.INVALID_PARAM, _update_reserved),
    ("2 SNP not INIT", S.INVALID_PLATFORM_STATE, lambda case: _uninit(case.rig)),
    ("3 not a context", S.INVALID_GUEST, _update_no_context),
    ("4 page not Pre-Guest", S.INVALID_PAGE_STATE, _change_entry(immutable=False)),
    ("5 page size", S.INVALID_PAGE_SIZE, _update_size),
    ("6 2 MiB not aligned", S.INVALID_ADDRESS, _update_large_misaligned),
    ("7 page type 0", S.INVALID_PARAM, _update_type(0)),
    ("9 guest state", S.INVALID_GUEST_STATE, _change_context(state=GuestState.RUNNING)),
    ("10 inactive", S.INACTIVE, _change_context(asid=0)),
    ("11 another guest's page", S.INVALID_PAGE_OWNER, _change_entry(asid=9)),
    ("12 IMI page", S.INVALID_PARAM, _change_context(imi_en=True)),
]
# 5 and 6 exclude each other: one wants sizes to differ, the other to agree
UPDATE_PAIRS = [p for p in combinations(UPDATE_FAULTS, 2) if (p[0][0][0], p[1][0][0]) != ("5", "6")]


@pytest.mark.parametrize(
    "faults",
    [*((each,) for each in UPDATE_FAULTS), *UPDATE_PAIRS],
    ids=lambda faults: " + ".join(each[0] for each in faults),
)
def test_launch_update_checks_in_order(make_rig: MakeRig, faults: Any) -> None:
    """AMD 56860, SNP_LAUNCH_UPDATE: each check has its status, the first one decides; nothing is measured."""
    rig = make_rig()
    gctx = rig.launching()
    rig.memory.allocate_page()
    case = Update(rig, gctx, rig.guest_page(1, 0x1000))
    assert case.page % LARGE
    for _, _, fault in faults:
        fault(case)
    assert case.send() == faults[0][1]
    assert rig.context(gctx).ld == bytes(48)


@pytest.mark.parametrize("page_type", [0, 7])
def test_page_types_that_do_not_exist(rig: Rig, page_type: int) -> None:
    """AMD 56860: PAGE_TYPE 0 and 7 are reserved."""
    gctx = rig.launching()
    assert rig.update(gctx, rig.guest_page(1, 0x1000), page_type) == S.INVALID_PARAM


@pytest.mark.parametrize("page_type", [PageType.VMSA, PageType.SECRETS, PageType.CPUID])
def test_types_for_4k_only(rig: Rig, page_type: int) -> None:
    """AMD 56860: VMSA, SECRETS and CPUID pages have 4 KiB; a 2 MiB one is INVALID_PAGE_SIZE."""
    gctx = rig.launching()
    page = rig.memory.allocate(LARGE)
    rig.rmp[page] = RmpEntry(assigned=True, immutable=True, asid=1, gpa=LARGE, page_size=1)
    assert rig.update(gctx, page, page_type, info={"page_size": 1}) == S.INVALID_PAGE_SIZE


@pytest.mark.parametrize("fields", [{"reserved_0c": 1}, {"reserved_1c": 1}, {"info": LaunchUpdateInfo(0x22)}])
def test_launch_update_reserved(rig: Rig, fields: dict[str, Any]) -> None:
    """AMD 56860: every reserved range of the command buffer is checked."""
    gctx, page = rig.launching(), rig.guest_page(1, 0x1000)
    record = LaunchUpdate(gctx_paddr=gctx, page_paddr=page, info=LaunchUpdateInfo(2)).but(**fields)
    assert rig.command(Command.SNP_LAUNCH_UPDATE, record) == S.INVALID_PARAM


@pytest.mark.parametrize("field", ["gctx_paddr", "page_paddr"])
def test_launch_update_of_no_memory(rig: Rig, field: str) -> None:
    """AMD 56860: a page that no memory answers for is INVALID_ADDRESS; low bits are reserved."""
    gctx, page = rig.launching(), rig.guest_page(1, 0x1000)
    record = LaunchUpdate(gctx_paddr=gctx, page_paddr=page, info=LaunchUpdateInfo(2))
    assert rig.command(Command.SNP_LAUNCH_UPDATE, record.but(**{field: NOWHERE})) == S.INVALID_ADDRESS
    low = record.but(**{field: getattr(record, field) | 0x20})
    assert rig.command(Command.SNP_LAUNCH_UPDATE, low) == S.INVALID_PARAM


@pytest.mark.parametrize(
    ("page_type", "gpa"),
    [
        (PageType.NORMAL, 0x1000),
        (PageType.VMSA, 0xFFFF_FFFF_F000),
        (PageType.ZERO, 0x3000),
        (PageType.UNMEASURED, 0x4000),
        (PageType.SECRETS, 0x80D000),
        (PageType.CPUID, 0x80E000),
    ],
)
def test_what_a_page_leaves_behind(rig: Rig, page_type: PageType, gpa: int) -> None:
    """AMD 56860: digest, RMP entry (Pre-Guest to Guest-Valid, permissions, VMSA) and content by type."""
    gctx = rig.launching()
    data = bytes(4096) if page_type is PageType.CPUID else bytes(range(256)) * 15 + bytes(256)
    if page_type is PageType.VMSA:
        data = bytes(Vmsa(rip=0xFFF0, guest_tsc_scale=77))
    page = rig.guest_page(1, gpa, data)
    status = rig.update(gctx, page, page_type, vmpl1_perms=1, vmpl2_perms=3, vmpl3_perms=7)
    assert status == S.SUCCESS
    wanted = extend_range(bytes(48), data, page_type=page_type, gpa=gpa, permissions=(1, 3, 7))
    assert rig.context(gctx).ld == wanted
    entry = rig.rmp[page]
    assert entry.state is PageState.GUEST_VALID
    assert (entry.asid, entry.gpa, entry.vmsa) == (1, gpa, page_type is PageType.VMSA)
    assert entry.permissions[1:] == (1, 3, 7)
    after = rig.memory.read(page, 4096)
    if page_type is PageType.ZERO:
        assert after == bytes(4096)
    elif page_type is PageType.SECRETS:
        assert after != data
    else:
        assert after == data


def test_large_pages(rig: Rig) -> None:
    """AMD 56860: a 2 MiB page is 512 measurements."""
    gctx = rig.launching()
    page = rig.memory.allocate(LARGE)
    data = bytes(range(256)) * (LARGE // 256)
    rig.memory.write(page, data)
    rig.rmp[page] = RmpEntry(assigned=True, immutable=True, asid=1, gpa=4 * LARGE, page_size=1)
    assert rig.update(gctx, page, info={"page_size": 1}) == S.SUCCESS
    wanted = extend_range(bytes(48), data, page_type=PageType.NORMAL, gpa=4 * LARGE)
    assert rig.context(gctx).ld == wanted
    assert rig.state(page) is PageState.GUEST_VALID


@pytest.mark.parametrize("large", [False, True])
def test_imi_pages_extend_both_digests(rig: Rig, large: bool) -> None:
    """AMD 56860: with IMI_PAGE the digest of the initial migration image is extended as well."""
    gctx = rig.launching(flags=2)
    page = rig.memory.allocate(LARGE)
    rig.rmp[page] = RmpEntry(assigned=True, immutable=True, asid=1, gpa=LARGE, page_size=large)
    assert rig.update(gctx, page, info={"page_size": large, "imi_page": 1}) == S.SUCCESS
    size = LARGE if large else 4096
    wanted = extend_range(bytes(48), bytes(size), page_type=PageType.NORMAL, gpa=LARGE, imi_page=True)
    context = rig.context(gctx)
    assert (context.ld, context.imd) == (wanted, wanted)


@pytest.mark.parametrize(
    ("product", "fms"), [(Product.MILAN, 0xA00F11), (Product.GENOA, 0xA10F11), (Product.TURIN, 0xB00F21)]
)
def test_secrets_page(make_rig: MakeRig, product: Product, fms: int) -> None:
    """AMD 56860, secrets page version 3: FMS as CPUID Fn1 EAX, GOSVW, VMPCK0..3, TSC_FACTOR, else zero."""
    rig = make_rig(product=product)
    gctx = rig.launching(gosvw=b"w" * 16)
    page = rig.guest_page(1, 0x2000, b"\xff" * 4096)
    assert rig.update(gctx, page, PageType.SECRETS) == S.SUCCESS
    keys = rig.context(gctx).vmpcks
    assert SecretsPage.parse(rig.memory.read(page, 4096)) == SecretsPage(
        version=3,
        fms=fms,
        gosvw=b"w" * 16,
        vmpck0=keys[0],
        vmpck1=keys[1],
        vmpck2=keys[2],
        vmpck3=keys[3],
        tsc_factor=200,
        launch_mit_vector=0x3F if product is Product.TURIN else 0,
    )


@pytest.mark.parametrize(("report_version", "told"), [(2, 0), (3, 0), (5, 9)])
def test_secrets_page_and_mitigations(make_rig: MakeRig, report_version: int, told: int) -> None:
    """AMD 56860 1.58: LAUNCH_MIT_VECTOR, which MSG_KEY_REQ may bind a key to, where reports have it too."""
    rig = make_rig(report_version=report_version, mit_vector=1, mit_supported=8)
    rig.chip.verify_mitigation(8)
    gctx = rig.launching()
    page = rig.guest_page(1, 0x2000)
    assert rig.update(gctx, page, PageType.SECRETS) == S.SUCCESS
    assert SecretsPage.parse(rig.memory.read(page, 4096)).launch_mit_vector == told


@pytest.mark.parametrize(("khz", "scale"), [(2_000_000, 0x140A42B182), (2_400_000, 0x180C500836), (0, 0)])
def test_tsc_scale_known_answers(khz: int, scale: int) -> None:
    """Known answers, firmware 1.55 for Genoa: 8.32 fixed point of kHz / 99800, fraction rounded up."""
    assert tsc_scale(khz) == scale


def test_secure_tsc_is_filled_into_the_vmsa(rig: Rig) -> None:
    """AMD 56860: with SecureTsc in SEV_FEATURES the firmware sets GUEST_TSC_SCALE and GUEST_TSC_OFFSET."""
    gctx = rig.launching(desired_tsc_khz=2_000_000)
    vmsa = Vmsa(sev_features=SevFeatures.of(snp_active=1, secure_tsc=1), guest_tsc_offset=5, rip=1)
    page = rig.guest_page(1, 0xFFFF_FFFF_F000, bytes(vmsa))
    assert rig.update(gctx, page, PageType.VMSA) == S.SUCCESS
    after = Vmsa.parse(rig.memory.read(page, 4096))
    assert after == vmsa.but(guest_tsc_scale=0x140A42B182, guest_tsc_offset=0)


# --- LAUNCH_FINISH --------------------------------------------------------------------------------

ID_KEY = SigningKey.from_scalar(1001, deterministic=True)
AUTHOR_KEY = SigningKey.from_scalar(2002, deterministic=True)


def _key_bytes(key: SigningKey) -> bytes:
    return bytes(public_key_record(*key.public_point))


class Finish:
    """A LAUNCH_FINISH with ID block and author key that would succeed."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.gctx = rig.launching()
        assert rig.update(self.gctx, rig.guest_page(1, 0x1000, b"code")) == 0
        self.flags = 3
        self.ld = rig.context(self.gctx).ld
        self.policy = SMT_POLICY
        self.version = 1
        self.algos = (1, 1)
        self.curve = 2
        self.break_id_signature = False
        self.break_author_signature = False
        self.addresses: dict[str, int] = {}

    def block(self) -> IdBlock:
        return IdBlock(
            ld=self.ld,
            family_id=b"family-id-16byte",
            image_id=b"image-id--16byte",
            version=self.version,
            guest_svn=7,
            policy=GuestPolicy(self.policy),
        )

    def id_key(self) -> bytes:
        return bytes(EcdsaPublicKey.parse(_key_bytes(ID_KEY)).but(curve=self.curve))

    def auth(self) -> IdAuth:
        block_sig = ID_KEY.sign(bytes(self.block()) + b"x" * self.break_id_signature)
        key_sig = AUTHOR_KEY.sign(self.id_key() + b"x" * self.break_author_signature)
        return IdAuth(
            id_key_algo=self.algos[0],
            auth_key_algo=self.algos[1],
            id_block_sig=block_sig.ljust(0x200, b"\0"),
            id_key=self.id_key(),
            id_key_sig=key_sig.ljust(0x200, b"\0"),
            author_key=_key_bytes(AUTHOR_KEY),
        )

    def send(self) -> int:
        # neither structure has to start a page
        page = self.rig.page(RmpEntry(), b"\xff" * 0x10 + bytes(self.block()))
        auth = self.rig.memory.allocate(0x2000)
        self.rig.memory.write(auth + 0x20, bytes(self.auth()))
        addresses = {"id_block_paddr": page + 0x10, "id_auth_paddr": auth + 0x20} | self.addresses
        return self.rig.finish(self.gctx, flags=self.flags, host_data=b"h" * 32, **addresses)


def _finish(**changes: Any) -> Callable[[Finish], None]:
    return lambda case: case.__dict__.update(changes)


def _finish_context(**changes: Any) -> Callable[[Finish], None]:
    def change(case: Finish) -> None:
        for name, value in changes.items():
            setattr(case.rig.context(case.gctx), name, value)

    return change


def _finish_no_context(case: Finish) -> None:
    case.rig.rmp[case.gctx] = replace(case.rig.rmp[case.gctx], vmsa=False)


FINISH_FAULTS: list[tuple[str, S, Callable[[Finish], None]]] = [
    ("1 reserved", S.INVALID_PARAM, _finish(flags=0xB)),
    ("2 SNP not INIT", S.INVALID_PLATFORM_STATE, lambda case: _uninit(case.rig)),
    ("3 not a context", S.INVALID_GUEST, _finish_no_context),
    ("4 guest state", S.INVALID_GUEST_STATE, _finish_context(state=GuestState.RUNNING)),
    ("5 inactive", S.INACTIVE, _finish_context(asid=0)),
    ("6.1 LD", S.BAD_MEASUREMENT, _finish(ld=b"\x01" * 48)),
    ("6.2 POLICY", S.POLICY_FAILURE, _finish(policy=0x30001)),
    ("6.3 algorithm", S.INVALID_PARAM, _finish(algos=(2, 1))),
    ("6.4 ID key", S.BAD_SIGNATURE, _finish(break_id_signature=True)),
    ("6.6 author key", S.BAD_SIGNATURE, _finish(break_author_signature=True)),
]


@pytest.mark.parametrize(
    "faults",
    [(each,) for each in FINISH_FAULTS] + list(combinations(FINISH_FAULTS, 2)),
    ids=lambda faults: " + ".join(each[0] for each in faults),
)
def test_launch_finish_checks_in_order(make_rig: MakeRig, faults: Any) -> None:
    """AMD 56860, SNP_LAUNCH_FINISH: each check has its status, the first one decides; the guest stays."""
    case = Finish(make_rig())
    for _, _, fault in faults:
        fault(case)
    before = case.rig.context(case.gctx).state
    assert case.send() == faults[0][1]
    assert case.rig.context(case.gctx).state is before


def test_launch_finish_with_id_block_and_author_key(rig: Rig) -> None:
    """AMD 56860: digests are taken over the 404h-byte structures; HOST_DATA and flags are kept."""
    case = Finish(rig)
    case.flags = 7
    assert case.send() == S.SUCCESS
    context = rig.context(case.gctx)
    assert context.state is GuestState.RUNNING
    assert context.active
    assert context.id_key_digest == hashlib.sha384(_key_bytes(ID_KEY)).digest()
    assert context.author_key_digest == hashlib.sha384(_key_bytes(AUTHOR_KEY)).digest()
    assert context.id_block == case.block()
    assert (context.id_block_en, context.author_key_en, context.vcek_dis) == (True, True, True)
    assert context.host_data == b"h" * 32


def test_launch_finish_may_be_repeated_after_a_failure(rig: Rig) -> None:
    """AMD 56860: after a failure the guest is still in LAUNCH; without ID block nothing of one is left."""
    case = Finish(rig)
    case.break_author_signature = True
    assert case.send() == S.BAD_SIGNATURE
    case.flags = 0
    assert case.send() == S.SUCCESS
    context = rig.context(case.gctx)
    assert (context.id_key_digest, context.author_key_digest) == (bytes(48), bytes(48))
    assert context.id_block == IdBlock()


def test_launch_finish_twice(rig: Rig) -> None:
    """AMD 56860: a running guest is not finished again."""
    guest = rig.running()
    assert rig.finish(guest.gctx) == S.INVALID_GUEST_STATE


def test_launch_finish_of_an_imi_guest(rig: Rig) -> None:
    """AMD 56860: a guest with IMI_EN becomes RUNNING by MSG_ABSORB only."""
    assert rig.finish(rig.launching(flags=2)) == S.INVALID_GUEST_STATE


def test_without_author_key_its_algorithm_does_not_matter(rig: Rig) -> None:
    """AMD 56860: AUTH_KEY_ALGO counts with AUTH_KEY_EN only."""
    case = Finish(rig)
    case.flags, case.algos = 1, (1, 0)
    assert case.send() == S.SUCCESS
    assert rig.context(case.gctx).author_key_digest == bytes(48)


def test_author_key_algorithm(rig: Rig) -> None:
    """AMD 56860: with AUTH_KEY_EN, AUTH_KEY_ALGO is 1."""
    case = Finish(rig)
    case.algos = (1, 0)
    assert case.send() == S.INVALID_PARAM


@pytest.mark.parametrize("curve", [0, 1, 3])
def test_id_key_of_another_curve(rig: Rig, curve: int) -> None:
    """AMD 56860: an ID key that is not on P-384 is BAD_SIGNATURE."""
    case = Finish(rig)
    case.curve = curve
    assert case.send() == S.BAD_SIGNATURE


def test_id_block_version_counts_when_strict(make_rig: MakeRig) -> None:
    """AMD 56860 prints VERSION 1; firmware 1.55 does not check it: a switch."""
    lenient, strict = Finish(make_rig()), Finish(make_rig(strict_id_block_version=True))
    lenient.version = strict.version = 2
    assert lenient.send() == S.SUCCESS
    assert strict.send() == S.INVALID_PARAM
    strict.version = 1
    assert strict.send() == S.SUCCESS


def test_author_key_flag_without_id_block(rig: Rig) -> None:
    """Firmware 1.55 accepts AUTH_KEY_EN without ID_BLOCK_EN; the digests are zero then."""
    case = Finish(rig)
    case.flags = 2
    assert case.send() == S.SUCCESS
    context = rig.context(case.gctx)
    assert (context.author_key_en, context.author_key_digest) == (True, bytes(48))


@pytest.mark.parametrize("field", ["id_block_paddr", "id_auth_paddr"])
def test_id_structures_in_no_memory(rig: Rig, field: str) -> None:
    """AMD 56860: addresses count only with ID_BLOCK_EN, then they are read."""
    case = Finish(rig)
    case.addresses = {field: NOWHERE}
    assert case.send() == S.INVALID_ADDRESS
    case.flags = 0
    assert case.send() == S.SUCCESS


def test_launch_finish_of_a_misaligned_context(rig: Rig) -> None:
    """AMD 56860: low bits of GCTX_PADDR are reserved."""
    assert rig.finish(rig.launching() | 1) == S.INVALID_PARAM
