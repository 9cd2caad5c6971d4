"""SNP_LAUNCH_START, SNP_LAUNCH_UPDATE, SNP_LAUNCH_FINISH: from a context to a running, measured guest.

Source: AMD 56860, commands A0h..A2h, guest policy, ID block, secrets page. Checks stand in the order of
firmware 1.55 as observed; where two fail, the first decides.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from swsnp.abi.record import Record
from swsnp.abi.snp_command import (
    FirmwareStatus,
    LaunchFinish,
    LaunchStart,
    LaunchUpdate,
    PageType,
)
from swsnp.abi.snp_launch import CpuidPage, EcdsaPublicKey, IdAuth, IdBlock, SecretsPage
from swsnp.abi.vmsa import Vmsa
from swsnp.crypto import ecdsa
from swsnp.errors import LayoutError
from swsnp.firmware.context import GuestContext, GuestState
from swsnp.firmware.cpuid import check_page
from swsnp.firmware.faults import FirmwareFault, require
from swsnp.firmware.platform import AsidState
from swsnp.hardware.memory import PAGE, BusError
from swsnp.hardware.rmp import PageState, RmpEntry
from swsnp.measure.digest import extend, extend_range, page_contents

if TYPE_CHECKING:
    from swsnp.abi.snp_report import GuestPolicy
    from swsnp.firmware.platform import Platform

__all__ = ["launch_finish", "launch_start", "launch_update", "tsc_scale"]

_R = TypeVar("_R", bound=Record)
_PAGE_MASK: Final = PAGE - 1
_LARGE: Final = 2 << 20
_SECRETS_VERSION: Final = 3
_ID_BLOCK_VERSION: Final = 1
_ALGO_ECDSA_P384_SHA384: Final = 1
_ONLY_4K: Final = {PageType.VMSA, PageType.SECRETS, PageType.CPUID}
_TSC_REFERENCE_KHZ: Final = 99_800  # UNVERIFIED for Milan and Turin


def launch_start(platform: Platform, buffer: LaunchStart) -> None:
    """SNP_LAUNCH_START: INIT -> LAUNCH.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No guest context: INVALID_GUEST.
    4. Guest not in INIT: INVALID_GUEST_STATE.
    5. MA_EN and the agent is no guest context: INVALID_GUEST.
    6. The policy, or what it asks of platform or agent: POLICY_FAILURE.
    """
    flags = buffer.flags
    misaligned = (buffer.gctx_paddr | (buffer.ma_gctx_paddr if flags.ma_en else 0)) & _PAGE_MASK
    require(not (flags.unnamed() or misaligned), FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    guest = platform.guest(buffer.gctx_paddr)
    require(guest.state is GuestState.INIT, FirmwareStatus.INVALID_GUEST_STATE)
    agent = platform.guest(buffer.ma_gctx_paddr) if flags.ma_en else None
    require(_policy_holds(platform, buffer.policy, agent), FirmwareStatus.POLICY_FAILURE)
    guest.draw_secrets(platform.chip.entropy)
    if agent is not None:
        guest.ma_paddr, guest.report_id_ma = agent.gctx_paddr, agent.report_id
    guest.policy = buffer.policy
    guest.imi_en = bool(flags.imi_en)
    guest.gosvw = buffer.gosvw
    guest.desired_tsc_khz = buffer.desired_tsc_khz
    guest.launch_mit_vector = platform.chip.variables.mit_vector
    guest.state = GuestState.LAUNCH


def _policy_holds(platform: Platform, policy: GuestPolicy, agent: GuestContext | None) -> bool:
    settings, variables = platform.chip.settings, platform.chip.variables
    version = variables.current_version.api
    if agent is not None and not _agent_fits(policy, agent):
        return False
    return bool(
        policy.reserved_one
        and (policy.smt or not settings.smt_en)
        and (policy.abi_major, policy.abi_minor) <= version
        and not policy >> (settings.policy_highest_bit + 1)
        and (settings.aes_256_xts or not policy.mem_aes_256_xts)
        and (variables.rapl_dis or not policy.rapl_dis)
        and (variables.ciphertext_hiding_en or not policy.ciphertext_hiding_dram)
    )


def _agent_fits(policy: GuestPolicy, agent: GuestContext) -> bool:
    return bool(
        policy.migrate_ma
        and not agent.has_migration_agent
        and (agent.policy.single_socket or not policy.single_socket)
    )


def launch_update(platform: Platform, buffer: LaunchUpdate) -> None:
    """SNP_LAUNCH_UPDATE: measure a page and give it to the guest; Pre-Guest -> Guest-Valid.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No guest context: INVALID_GUEST.
    4. Page not Pre-Guest: INVALID_PAGE_STATE.
    5. PAGE_SIZE other than the entry's: INVALID_PAGE_SIZE.
    6. 2 MiB, but not aligned: INVALID_ADDRESS.
    7. PAGE_TYPE 0 or 7: INVALID_PARAM.
    8. 2 MiB of a type that has 4 KiB only: INVALID_PAGE_SIZE.
    9. Guest not in LAUNCH: INVALID_GUEST_STATE.
    10. No ASID: INACTIVE.
    11. The page is another guest's: INVALID_PAGE_OWNER.
    12. Guest with IMI_EN, page without IMI_PAGE: INVALID_PARAM.
    13. CPUID page refused: INVALID_PARAM. The corrected page is written back in plaintext; digest and page
        state stay as they were.
    """
    guest, entry = _update_checks(platform, buffer)
    page_type, large = PageType(buffer.info.page_type), buffer.info.page_size
    data = platform.memory.read(buffer.page_paddr, _LARGE if large else PAGE)
    if page_type is PageType.CPUID:
        _check_cpuid(platform, buffer.page_paddr, data)
    _measure(guest, buffer, entry, data)
    platform.memory.write(buffer.page_paddr, _installed(platform, guest, page_type, data))
    platform.rmp[buffer.page_paddr] = replace(
        entry,
        immutable=False,
        validated=True,
        vmsa=page_type is PageType.VMSA,
        permissions=(entry.permissions[0], buffer.vmpl1_perms, buffer.vmpl2_perms, buffer.vmpl3_perms),
    )


def _update_checks(platform: Platform, buffer: LaunchUpdate) -> tuple[GuestContext, RmpEntry]:
    info, page = buffer.info, buffer.page_paddr
    reserved = info.unnamed() or buffer.reserved_0c or buffer.reserved_18 or buffer.reserved_1c
    misaligned = (buffer.gctx_paddr | page) & _PAGE_MASK
    require(not (reserved or misaligned), FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    entry = platform.look_up(page)
    guest = platform.guest(buffer.gctx_paddr)
    require(entry.state is PageState.PRE_GUEST, FirmwareStatus.INVALID_PAGE_STATE)
    require(entry.page_size == info.page_size, FirmwareStatus.INVALID_PAGE_SIZE)
    require(not (info.page_size and page % _LARGE), FirmwareStatus.INVALID_ADDRESS)
    require(info.page_type in PageType.__members__.values(), FirmwareStatus.INVALID_PARAM)
    require(not (info.page_size and info.page_type in _ONLY_4K), FirmwareStatus.INVALID_PAGE_SIZE)
    require(guest.state is GuestState.LAUNCH, FirmwareStatus.INVALID_GUEST_STATE)
    require(guest.asid != 0, FirmwareStatus.INACTIVE)
    require(entry.asid == guest.asid, FirmwareStatus.INVALID_PAGE_OWNER)
    require(bool(info.imi_page) or not guest.imi_en, FirmwareStatus.INVALID_PARAM)
    return guest, entry


def _check_cpuid(platform: Platform, page_paddr: int, data: bytes) -> None:
    checked = check_page(CpuidPage.parse(data), platform.chip)
    if not checked.accepted:
        platform.memory.write(page_paddr, bytes(checked.page))
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM)


def _measure(guest: GuestContext, buffer: LaunchUpdate, entry: RmpEntry, data: bytes) -> None:
    page_type = PageType(buffer.info.page_type)
    permissions = (buffer.vmpl1_perms, buffer.vmpl2_perms, buffer.vmpl3_perms)
    imi_page = bool(buffer.info.imi_page)
    if len(data) == PAGE:
        contents = page_contents(page_type, data)
        guest.ld = extend(
            guest.ld, contents, page_type=page_type, gpa=entry.gpa, imi_page=imi_page, permissions=permissions
        )
        if imi_page:
            guest.imd = extend(
                guest.imd,
                contents,
                page_type=page_type,
                gpa=entry.gpa,
                imi_page=True,
                permissions=permissions,
            )
        return
    guest.ld = extend_range(
        guest.ld, data, page_type=page_type, gpa=entry.gpa, imi_page=imi_page, permissions=permissions
    )
    if imi_page:
        guest.imd = extend_range(
            guest.imd, data, page_type=page_type, gpa=entry.gpa, imi_page=True, permissions=permissions
        )


def _installed(platform: Platform, guest: GuestContext, page_type: PageType, data: bytes) -> bytes:
    """What the guest finds in the page."""
    match page_type:
        case PageType.ZERO:
            return bytes(len(data))
        case PageType.SECRETS:
            return bytes(_secrets_page(platform, guest))
        case PageType.VMSA:
            return _with_tsc(guest, data)
        case _:
            return data


def _secrets_page(platform: Platform, guest: GuestContext) -> SecretsPage:
    vmpck0, vmpck1, vmpck2, vmpck3 = guest.vmpcks
    return SecretsPage(
        version=_SECRETS_VERSION,
        flags=guest.imi_en,
        fms=platform.chip.fms,
        gosvw=guest.gosvw,
        vmpck0=vmpck0,
        vmpck1=vmpck1,
        vmpck2=vmpck2,
        vmpck3=vmpck3,
        tsc_factor=platform.chip.settings.tsc_factor,
        launch_mit_vector=guest.launch_mit_vector if platform.chip.settings.tells_mitigations else 0,
    )


def _with_tsc(guest: GuestContext, data: bytes) -> bytes:
    vmsa = Vmsa.parse(data)
    if not vmsa.sev_features.secure_tsc:
        return data
    scale = tsc_scale(guest.desired_tsc_khz)
    return bytes(vmsa.but(guest_tsc_scale=scale, guest_tsc_offset=guest.psp_tsc_offset))


def tsc_scale(khz: int) -> int:
    """GUEST_TSC_SCALE, 8.32 fixed point, for a wanted frequency; the fraction is rounded up."""
    whole, rest = divmod(khz, _TSC_REFERENCE_KHZ)
    return (whole & 0xFF) << 32 | -(-(rest << 32) // _TSC_REFERENCE_KHZ)


def launch_finish(platform: Platform, buffer: LaunchFinish) -> None:
    """SNP_LAUNCH_FINISH: LAUNCH -> RUNNING.

    1. Reserved bits: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No guest context: INVALID_GUEST.
    4. Guest not in LAUNCH, or with IMI_EN: INVALID_GUEST_STATE.
    5. No ASID: INACTIVE.
    6. The ID block, if there is one: see `_check_id_block`.

    After a failure the guest is still in LAUNCH and the command may be repeated.
    """
    flags = buffer.flags
    require(not (flags.unnamed() or buffer.gctx_paddr & _PAGE_MASK), FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    platform.look_up(buffer.gctx_paddr)
    block = _read(platform, buffer.id_block_paddr, IdBlock) if flags.id_block_en else IdBlock()
    auth = _read(platform, buffer.id_auth_paddr, IdAuth) if flags.id_block_en else IdAuth()
    guest = platform.guest(buffer.gctx_paddr)
    launching = guest.state is GuestState.LAUNCH and not guest.imi_en
    require(launching, FirmwareStatus.INVALID_GUEST_STATE)
    require(guest.asid != 0, FirmwareStatus.INACTIVE)
    digests = (bytes(48), bytes(48))
    if flags.id_block_en:
        digests = _check_id_block(platform, guest, block, auth, bool(flags.auth_key_en))
    guest.id_block_en = bool(flags.id_block_en)
    guest.id_block = block
    guest.id_key_digest, guest.author_key_digest = digests
    guest.author_key_en = bool(flags.auth_key_en)  # also without an ID block, as firmware 1.55 does
    guest.vcek_dis = bool(flags.vcek_dis)
    guest.host_data = buffer.host_data
    guest.active = True
    platform.asids[guest.asid] = AsidState.IN_USE
    guest.state = GuestState.RUNNING


def _read(platform: Platform, address: int, kind: type[_R]) -> _R:
    try:
        return kind.parse(platform.memory.read(address, kind.SIZE))
    except BusError:
        raise FirmwareFault(FirmwareStatus.INVALID_ADDRESS) from None


def _check_id_block(
    platform: Platform, guest: GuestContext, block: IdBlock, auth: IdAuth, auth_key_en: bool
) -> tuple[bytes, bytes]:
    """Check an ID block; returns ID_KEY_DIGEST and AUTHOR_KEY_DIGEST.

    1. LD is the launch digest: BAD_MEASUREMENT.
    2. POLICY is the guest's: POLICY_FAILURE. VERSION is 1, when the chip is set to be strict: INVALID_PARAM.
    3. Algorithms: INVALID_PARAM.
    4. The ID key and its signature over the block: BAD_SIGNATURE.
    5. ID_KEY_DIGEST is taken over the structure as it came.
    6. The author key and its signature over the ID key structure: BAD_SIGNATURE.
    """
    require(block.ld == guest.ld, FirmwareStatus.BAD_MEASUREMENT)
    require(block.policy == guest.policy, FirmwareStatus.POLICY_FAILURE)
    strict = platform.chip.settings.strict_id_block_version
    require(block.version == _ID_BLOCK_VERSION or not strict, FirmwareStatus.INVALID_PARAM)
    require(auth.id_key_algo == _ALGO_ECDSA_P384_SHA384, FirmwareStatus.INVALID_PARAM)
    author_algo_known = auth.auth_key_algo == _ALGO_ECDSA_P384_SHA384
    require(author_algo_known or not auth_key_en, FirmwareStatus.INVALID_PARAM)
    require(_signed(bytes(block), auth.id_block_sig, auth.id_key), FirmwareStatus.BAD_SIGNATURE)
    id_key_digest = hashlib.sha384(auth.id_key).digest()
    if not auth_key_en:
        return id_key_digest, bytes(48)
    require(_signed(auth.id_key, auth.id_key_sig, auth.author_key), FirmwareStatus.BAD_SIGNATURE)
    return id_key_digest, hashlib.sha384(auth.author_key).digest()


def _signed(data: bytes, signature: bytes, key: bytes) -> bool:
    try:
        x, y = ecdsa.public_key_point(EcdsaPublicKey.parse(key))
    except LayoutError:  # another curve, or a coordinate that does not fit this one
        return False
    return ecdsa.verify(data, signature, x=x, y=y)
