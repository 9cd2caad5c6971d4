"""Firmware mailbox: command ids, statuses and command buffers. Source: AMD 56860, chapter 8."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, Word, bits, blob, mbz, record, u8, u16, u32, u64
from swsnp.abi.snp_page import PageType
from swsnp.abi.snp_report import GuestPolicy, TcbVersion

__all__ = [
    "Activate",
    "ActivateEx",
    "Command",
    "Commit",
    "Config",
    "ConfigFlags",
    "DownloadFirmwareEx",
    "FeatureEcx",
    "FeatureInfo",
    "FeatureInfoOutput",
    "FirmwareStatus",
    "GctxAddress",
    "GetId",
    "GuestRequest",
    "GuestStatus",
    "GuestStatusBuffer",
    "HvReportReq",
    "InitEx",
    "InitExFlags",
    "LaunchFinish",
    "LaunchFinishFlags",
    "LaunchStart",
    "LaunchUpdate",
    "LaunchUpdateInfo",
    "PageReclaim",
    "PageType",
    "PlatformState",
    "PlatformStatus",
    "PlatformStatusBuffer",
    "RANGE_LIST_MAX",
    "RangeElement",
    "RangeListHeader",
    "ShutdownEx",
    "VlekHashstick",
    "VlekLoad",
]


class Command(IntEnum):
    """Mailbox command ids."""

    GET_ID = 0x00C
    NOP = 0x00E
    SNP_INIT = 0x081
    SNP_SHUTDOWN = 0x082
    SNP_PLATFORM_STATUS = 0x083
    SNP_DF_FLUSH = 0x084
    SNP_INIT_EX = 0x085
    SNP_SHUTDOWN_EX = 0x086
    SNP_DECOMMISSION = 0x090
    SNP_ACTIVATE = 0x091
    SNP_GUEST_STATUS = 0x092
    SNP_GCTX_CREATE = 0x093
    SNP_GUEST_REQUEST = 0x094
    SNP_ACTIVATE_EX = 0x095
    SNP_HV_REPORT_REQ = 0x096
    SNP_LAUNCH_START = 0x0A0
    SNP_LAUNCH_UPDATE = 0x0A1
    SNP_LAUNCH_FINISH = 0x0A2
    SNP_DBG_DECRYPT = 0x0B0
    SNP_DBG_ENCRYPT = 0x0B1
    SNP_VERIFY_MITIGATION = 0x0B2
    SNP_PAGE_SWAP_OUT = 0x0C0
    SNP_PAGE_SWAP_IN = 0x0C1
    SNP_PAGE_MOVE = 0x0C2
    SNP_PAGE_MD_INIT = 0x0C3
    SNP_PAGE_SET_STATE = 0x0C6
    SNP_PAGE_RECLAIM = 0x0C7
    SNP_PAGE_UNSMASH = 0x0C8
    SNP_CONFIG = 0x0C9
    SNP_DOWNLOAD_FIRMWARE_EX = 0x0CA
    SNP_COMMIT = 0x0CB
    SNP_VLEK_LOAD = 0x0CD
    SNP_FEATURE_INFO = 0x0CE


class FirmwareStatus(IntEnum):
    """Status of a mailbox command; also the STATUS of a guest message response."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LENGTH = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    WBINVD_REQUIRED = 0x0E
    DFFLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWERROR_PLATFORM = 0x13
    HWERROR_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D
    EXIT_RING_BUFFER = 0x1F
    RMP_INIT_REQUIRED = 0x20
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    SHUTDOWN_REQUIRED = 0x23
    UPDATE_FAILED = 0x24
    RESTORE_REQUIRED = 0x25
    RMP_INITIALIZATION_FAILED = 0x26
    INVALID_KEY = 0x27


class PlatformState(IntEnum):
    """STATE of SNP_PLATFORM_STATUS."""

    UNINIT = 0
    INIT = 1


class InitExFlags(Word):
    """Dword 0 of SNP_INIT_EX."""

    init_rmp = bits(0, 0)
    list_paddr_en = bits(1, 1)
    rapl_dis = bits(2, 2)
    ciphertext_hiding_en = bits(3, 3)
    tio_en = bits(4, 4)


@record(size=0x40, source="AMD 56860, SNP_INIT_EX")
class InitEx(Record):
    """Command buffer of SNP_INIT_EX."""

    flags: InitExFlags = u32(0x00, InitExFlags)
    reserved_04: int = u32(0x04)
    list_paddr: int = u64(0x08)
    max_snp_asid: int = u16(0x10)
    reserved_12: bytes = mbz(0x12, 46)


@record(size=8, source="AMD 56860, SNP_INIT_EX range list")
class RangeListHeader(Record):
    """What precedes the elements of a range list; the list is at most one page."""

    num_elements: int = u32(0)
    reserved_04: int = u32(4)


@record(size=16, source="AMD 56860, SNP_INIT_EX range list")
class RangeElement(Record):
    """One range of 4 KiB pages."""

    base: int = u64(0)
    page_count: int = u32(8)
    reserved_0c: int = u32(0xC)


RANGE_LIST_MAX: Final = 255


@record(size=8, source="AMD 56860, SNP_SHUTDOWN_EX")
class ShutdownEx(Record):
    """Command buffer of SNP_SHUTDOWN_EX."""

    length: int = u32(0)
    flags: int = u32(4)


@record(size=8, source="AMD 56860, SNP_PLATFORM_STATUS")
class PlatformStatus(Record):
    """Command buffer of SNP_PLATFORM_STATUS."""

    status_paddr: int = u64(0)


@record(size=0x20, source="AMD 56860, SNP_PLATFORM_STATUS status buffer")
class PlatformStatusBuffer(Record):
    """What SNP_PLATFORM_STATUS writes; also struct sev_user_data_snp_status of Linux."""

    api_major: int = u8(0x00)
    api_minor: int = u8(0x01)
    state: int = u8(0x02)
    rmp_flags: int = u8(0x03)
    build_id: int = u32(0x04)
    flags: int = u32(0x08)
    guest_count: int = u32(0x0C)
    current_tcb: TcbVersion = u64(0x10, TcbVersion)
    reported_tcb: TcbVersion = u64(0x18, TcbVersion)


@record(size=8, source="AMD 56860, SNP_GCTX_CREATE and SNP_DECOMMISSION")
class GctxAddress(Record):
    """Command buffer that names only a guest context page."""

    gctx_paddr: int = u64(0)


@record(size=0x10, source="AMD 56860, SNP_ACTIVATE")
class Activate(Record):
    """Command buffer of SNP_ACTIVATE."""

    gctx_paddr: int = u64(0x00)
    asid: int = u32(0x08)
    reserved_0c: int = u32(0x0C)


@record(size=0x20, source="AMD 56860, SNP_ACTIVATE_EX")
class ActivateEx(Record):
    """Command buffer of SNP_ACTIVATE_EX; IDS_PADDR names NUMIDS APIC ids of 4 bytes."""

    length: int = u32(0x00)
    reserved_04: int = u32(0x04)
    gctx_paddr: int = u64(0x08)
    asid: int = u32(0x10)
    numids: int = u32(0x14)
    ids_paddr: int = u64(0x18)


@record(size=0x10, source="AMD 56860, SNP_GUEST_STATUS")
class GuestStatus(Record):
    """Command buffer of SNP_GUEST_STATUS."""

    gctx_paddr: int = u64(0x00)
    status_paddr: int = u64(0x08)


@record(size=0x20, source="AMD 56860, SNP_GUEST_STATUS status buffer")
class GuestStatusBuffer(Record):
    """What SNP_GUEST_STATUS writes; STATE is 0 INIT, 1 LAUNCH, 2 RUNNING."""

    policy: GuestPolicy = u64(0x00, GuestPolicy)
    asid: int = u32(0x08)
    state: int = u8(0x0C)
    reserved_0d: bytes = mbz(0x0D, 3)
    vcek_dis: int = u8(0x10)
    reserved_11: bytes = mbz(0x11, 15)


@record(size=0x18, source="AMD 56860, SNP_GUEST_REQUEST")
class GuestRequest(Record):
    """Command buffer of SNP_GUEST_REQUEST."""

    gctx_paddr: int = u64(0x00)
    request_paddr: int = u64(0x08)
    response_paddr: int = u64(0x10)


@record(size=0x18, source='Linux, patch series "SEV-SNP hypervisor report request" v6')
class HvReportReq(Record):
    """Command buffer of SNP_HV_REPORT_REQ; bits 1:0 of KEY_SEL are the selection."""

    length: int = u32(0x00)
    key_sel: int = u32(0x04)
    gctx_paddr: int = u64(0x08)
    hv_report_paddr: int = u64(0x10)


class LaunchStartFlags(Word):
    """Dword 18h of SNP_LAUNCH_START."""

    ma_en = bits(0, 0)
    imi_en = bits(1, 1)


@record(size=0x30, source="AMD 56860, SNP_LAUNCH_START")
class LaunchStart(Record):
    """Command buffer of SNP_LAUNCH_START."""

    gctx_paddr: int = u64(0x00)
    policy: GuestPolicy = u64(0x08, GuestPolicy)
    ma_gctx_paddr: int = u64(0x10)
    flags: LaunchStartFlags = u32(0x18, LaunchStartFlags)
    desired_tsc_khz: int = u32(0x1C)
    gosvw: bytes = blob(0x20, 16)


class LaunchUpdateInfo(Word):
    """Dword 8 of SNP_LAUNCH_UPDATE."""

    page_size = bits(0, 0)
    page_type = bits(3, 1)
    imi_page = bits(4, 4)


@record(size=0x20, source="AMD 56860, SNP_LAUNCH_UPDATE")
class LaunchUpdate(Record):
    """Command buffer of SNP_LAUNCH_UPDATE."""

    gctx_paddr: int = u64(0x00)
    info: LaunchUpdateInfo = u32(0x08, LaunchUpdateInfo)
    reserved_0c: int = u32(0x0C)
    page_paddr: int = u64(0x10)
    reserved_18: int = u8(0x18)
    vmpl1_perms: int = u8(0x19)
    vmpl2_perms: int = u8(0x1A)
    vmpl3_perms: int = u8(0x1B)
    reserved_1c: int = u32(0x1C)


class LaunchFinishFlags(Word):
    """Quadword 18h of SNP_LAUNCH_FINISH."""

    id_block_en = bits(0, 0)
    auth_key_en = bits(1, 1)
    vcek_dis = bits(2, 2)


@record(size=0x40, source="AMD 56860, SNP_LAUNCH_FINISH")
class LaunchFinish(Record):
    """Command buffer of SNP_LAUNCH_FINISH."""

    gctx_paddr: int = u64(0x00)
    id_block_paddr: int = u64(0x08)
    id_auth_paddr: int = u64(0x10)
    flags: LaunchFinishFlags = u64(0x18, LaunchFinishFlags)
    host_data: bytes = blob(0x20, 32)


@record(size=8, source="AMD 56860, SNP_PAGE_RECLAIM")
class PageReclaim(Record):
    """Command buffer of SNP_PAGE_RECLAIM: bit 0 is the page size, bits 63:12 the page."""

    page_paddr: int = u64(0)


class ConfigFlags(Word):
    """Dword 8 of SNP_CONFIG."""

    mask_chip_id = bits(0, 0)
    mask_chip_key = bits(1, 1)


@record(size=0x40, source="AMD 56860, SNP_CONFIG")
class Config(Record):
    """Command buffer of SNP_CONFIG; also struct sev_user_data_snp_config of Linux."""

    reported_tcb: TcbVersion = u64(0x00, TcbVersion)
    flags: ConfigFlags = u32(0x08, ConfigFlags)
    reserved_0c: bytes = mbz(0x0C, 52)


@record(size=4, source="AMD 56860, SNP_COMMIT")
class Commit(Record):
    """Command buffer of SNP_COMMIT."""

    length: int = u32(0)


@record(size=0x18, source="AMD 56860, SNP_DOWNLOAD_FIRMWARE_EX")
class DownloadFirmwareEx(Record):
    """Command buffer of SNP_DOWNLOAD_FIRMWARE_EX; bit 0 of FLAGS is COMMIT."""

    length: int = u32(0x00)
    reserved_04: int = u32(0x04)
    fw_paddr: int = u64(0x08)
    fw_len: int = u32(0x10)
    flags: int = u32(0x14)


@record(size=0x10, source="AMD 56860, SNP_VLEK_LOAD")
class VlekLoad(Record):
    """Command buffer of SNP_VLEK_LOAD; also struct sev_user_data_snp_vlek_load of Linux."""

    length: int = u32(0x00)
    vlek_wrapped_version: int = u8(0x04)
    reserved_05: bytes = mbz(0x05, 3)
    vlek_wrapped_paddr: int = u64(0x08)


@record(size=432, source="AMD 56860, VLEK hashstick; sizes as in Linux, psp-sev.h")
class VlekHashstick(Record):
    """The wrapped VLEK."""

    iv: bytes = blob(0x000, 12)
    reserved_00c: int = u32(0x00C)
    wrapped: bytes = blob(0x010, 0x180)
    tcb_version: TcbVersion = u64(0x190, TcbVersion)
    reserved_198: bytes = mbz(0x198, 8)
    auth_tag: bytes = blob(0x1A0, 16)


@record(size=0x10, source="AMD 56860, SNP_FEATURE_INFO")
class FeatureInfo(Record):
    """Command buffer of SNP_FEATURE_INFO."""

    length: int = u32(0x00)
    ecx_in: int = u32(0x04)
    feature_info_paddr: int = u64(0x08)


class FeatureEcx(Word):
    """ECX of SNP_FEATURE_INFO for ECX_IN 0."""

    vlek = bits(0, 0)
    x86_snp_shutdown = bits(1, 1)
    rapl_dis = bits(2, 2)
    ciphertext_hiding = bits(3, 3)
    aes_256_xts = bits(4, 4)
    cxl_allow = bits(5, 5)
    verify_mitigation = bits(13, 13)


@record(size=0x10, source="AMD 56860, SNP_FEATURE_INFO output")
class FeatureInfoOutput(Record):
    """What SNP_FEATURE_INFO writes."""

    eax: int = u32(0x00)
    ebx: int = u32(0x04)
    ecx: int = u32(0x08)
    edx: int = u32(0x0C)


@record(size=0x10, source="AMD SEV API, GET_ID")
class GetId(Record):
    """Command buffer of GET_ID (legacy id 0Ch); 12 bytes used."""

    id_paddr: int = u64(0x00)
    length: int = u32(0x08)
    pad_0c: int = u32(0x0C)


COMMAND_BUFFER_MAX: Final = 0x40
