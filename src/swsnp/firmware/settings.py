"""What a model of chip and firmware is set to: versions, TCB, features, strictness. Source: AMD 56860."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import Product, TcbVersion

if TYPE_CHECKING:
    from swsnp.abi.snp_launch import CpuidFunction

__all__ = ["ApiVersion", "ChipSettings", "fms_eax", "preset"]


_MITIGATIONS_SINCE: Final = 5
"""Report version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiVersion:
    """A firmware version: API major and minor, build."""

    major: int
    minor: int
    build: int

    @property
    def api(self) -> tuple[int, int]:
        """API version: major, minor."""
        return self.major, self.minor


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipSettings:
    """Everything about a part that its identity does not say; `preset` has sensible ones per product.

    Families and models are the combined ones of CPUID Fn1 (19h, 11h). TCBs and versions are what the part
    starts with: SNP_CONFIG, SNP_COMMIT and updates change them later.
    """

    report_version: int
    family: int
    model: int
    stepping: int
    current_version: ApiVersion
    committed_version: ApiVersion
    current_tcb: TcbVersion
    committed_tcb: TcbVersion
    smt_en: bool = True
    tsme_en: bool = False
    ecc_en: bool = False
    rapl_dis: bool = False
    ciphertext_hiding_cap: bool = False
    ciphertext_hiding_en: bool = False
    aes_256_xts: bool = False
    alias_check_complete: bool = False
    platform_info_more: int = 0
    """Bits of PLATFORM_INFO set beside the named ones."""
    policy_highest_bit: int = 20
    """Highest bit of POLICY that this firmware knows; those above must be zero. 25 since 1.58."""
    feature_info_more: int = 0
    """Bits of SNP_FEATURE_INFO's ECX (ECX_IN 0) set beside those that follow from the other settings."""
    key_req_version: int = 1
    """Highest MSG_VERSION of MSG_KEY_REQ. 2 since 1.58."""
    max_asid: int = 1006
    sockets: int = 1
    threads_per_socket: int = 256
    """APIC ids of a socket; the first socket has those from 0 on."""
    mit_vector: int = 0
    """CURRENT_MIT_VECTOR at the start; guests launched under it carry it as LAUNCH_MIT_VECTOR."""
    mit_supported: int = 0
    """Mitigations beside those of `mit_vector` that SNP_VERIFY_MITIGATION brings into force."""
    mit_needs_no_guests: int = 0
    """Those of them that cannot come into force while there are guests."""
    host_cpuid: tuple[CpuidFunction, ...] = ()
    """What the host's CPU shows (`cpuid_host.parse_dump`): the most that a guest's CPUID page may claim.

    Empty: Genoa has the table of firmware 1.55; the leaves of Milan and Turin pass, their tables are unknown.
    """
    tsc_factor: int = 200
    hardware_configuration_ok: bool = True
    """Off: SNP_INIT fails with INVALID_CONFIG, as on a host whose cores are not set up for SNP."""
    strict_id_block_version: bool = False
    """On: LAUNCH_FINISH refuses an ID block whose VERSION is not 1."""
    strict_msg_size: bool = False
    """On: a guest message shorter than its type is refused instead of read as if zeros followed."""
    strict_vmpl: bool = True
    """On: a requested VMPL above 3 is refused, as AMD 56860 prints; firmware 1.55 does not test it."""

    @property
    def tells_mitigations(self) -> bool:
        """Whether reports, and secrets pages, carry mitigation vectors."""
        return self.report_version >= _MITIGATIONS_SINCE


def fms_eax(settings: ChipSettings) -> int:
    """Family, model and stepping in the form of CPUID Fn1 EAX.

    Source: AMD 24594, CPUID Fn0000_0001_EAX: families from 0Fh on count from there in the extended field.
    """
    family, extended = min(settings.family, 0xF), max(settings.family - 0xF, 0)
    return (
        extended << 20
        | (settings.model >> 4) << 16
        | family << 8
        | (settings.model & 0xF) << 4
        | settings.stepping
    )


_MILAN_TCB: Final = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDB)
_GENOA_TCB: Final = TcbVersion.encode(Product.GENOA, boot_loader=0x0A, snp=0x17, microcode=0x54)
_TURIN_TCB: Final = TcbVersion.encode(
    Product.TURIN, fmc=1, boot_loader=1, tee=1, snp=4, microcode=0x51
)  # fmt: skip
_MILAN_VERSION: Final = ApiVersion(major=1, minor=55, build=29)
_GENOA_VERSION: Final = ApiVersion(major=1, minor=55, build=25)
_TURIN_VERSION: Final = ApiVersion(major=1, minor=55, build=65)

# Versions, TCBs of Milan and Turin and their PLATFORM_INFO are those of genuine reports.
_PRESETS: Final = {
    Product.MILAN: ChipSettings(
        report_version=3,
        family=0x19,
        model=0x01,
        stepping=1,
        current_version=_MILAN_VERSION,
        committed_version=_MILAN_VERSION,
        current_tcb=_MILAN_TCB,
        committed_tcb=_MILAN_TCB,
        ecc_en=True,
        alias_check_complete=True,
    ),
    Product.GENOA: ChipSettings(
        report_version=2,
        family=0x19,
        model=0x11,
        stepping=1,
        current_version=_GENOA_VERSION,
        committed_version=_GENOA_VERSION,
        current_tcb=_GENOA_TCB,
        committed_tcb=_GENOA_TCB,
    ),
    # UNVERIFIED: which policy bits Turin's 1.55.65 knows
    Product.TURIN: ChipSettings(
        report_version=5,
        family=0x1A,
        model=0x02,
        stepping=1,
        current_version=_TURIN_VERSION,
        committed_version=_TURIN_VERSION,
        current_tcb=_TURIN_TCB,
        committed_tcb=_TURIN_TCB,
        ecc_en=True,
        alias_check_complete=True,
        policy_highest_bit=25,
        mit_vector=0x3F,
    ),
}


def preset(product: Product) -> ChipSettings:
    """A part of the product line with firmware seen in the field; `dataclasses.replace` changes details."""
    return _PRESETS[product]
