"""The attestation report. Source: AMD 56860, MSG_REPORT_REQ and ATTESTATION_REPORT.

Of a report only VMPL, REPORT_DATA, signer and signature change between requests: the rest is packed once per
guest and again when a platform variable changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp import trace
from swsnp.abi.snp_message import KeySel
from swsnp.abi.snp_report import (
    REPORT_SIZE,
    SIGNED_SIZE,
    AttestationReport,
    SignatureAlgo,
    SignerInfo,
    SigningKey,
)
from swsnp.crypto.ecdsa import SIGNATURE_SIZE

if TYPE_CHECKING:
    from swsnp.crypto import ecdsa
    from swsnp.firmware.chip import Chip, PlatformVariables
    from swsnp.firmware.context import GuestContext
    from swsnp.firmware.platform import Platform

__all__ = ["ReportTemplate", "build_report", "choose_key", "unsigned_report"]

_VMPL: Final = AttestationReport.offset_of("vmpl")
_AFTER_VMPL: Final = AttestationReport.offset_of("signature_algo")
_REPORT_DATA: Final = AttestationReport.offset_of("report_data")
_AFTER_REPORT_DATA: Final = AttestationReport.offset_of("measurement")
_PADDING: Final = bytes(REPORT_SIZE - SIGNED_SIZE - SIGNATURE_SIZE)
_NO_SIGNATURE: Final = bytes(SIGNATURE_SIZE)


@dataclass(frozen=True, slots=True)
class ReportTemplate:
    """What does not change between the reports of one guest, cut at what does; per signing key."""

    made_from: PlatformVariables
    parts: dict[SigningKey, tuple[bytes, bytes, bytes]] = field(default_factory=dict)


def choose_key(chip: Chip, key_sel: int) -> tuple[SigningKey, ecdsa.SigningKey | None]:
    """The key that signs, for a KEY_SEL that was found valid.

    0: the VLEK if one is loaded, else the VCEK; 1: the VCEK; 2: the VLEK. With MASK_CHIP_KEY there is no
    VCEK, and a report without key is not signed (SIGNING_KEY 7).
    """
    if key_sel != KeySel.VCEK and (vlek := chip.vlek_signer()) is not None:
        return SigningKey.VLEK, vlek
    if chip.variables.mask_chip_key:
        return SigningKey.NONE, None
    return SigningKey.VCEK, chip.vcek(chip.reported_tcb)


def unsigned_report(chip: Chip, guest: GuestContext, signing_key: SigningKey) -> AttestationReport:
    """The report of a guest without VMPL, REPORT_DATA and signature."""
    settings, variables = chip.settings, chip.variables
    named = settings.report_version >= 3
    mitigations = settings.tells_mitigations
    current, committed = variables.current_version, variables.committed_version
    return AttestationReport(
        version=settings.report_version,
        guest_svn=guest.id_block.guest_svn,
        policy=guest.policy,
        family_id=guest.id_block.family_id,
        image_id=guest.id_block.image_id,
        signature_algo=SignatureAlgo.ECDSA_P384_SHA384,
        current_tcb=variables.current_tcb,
        platform_info=chip.platform_info,
        signer_info=SignerInfo.of(
            author_key_en=guest.author_key_en,
            mask_chip_key=variables.mask_chip_key,
            signing_key=signing_key,
        ),
        measurement=guest.ld,
        host_data=guest.host_data,
        id_key_digest=guest.id_key_digest,
        author_key_digest=guest.author_key_digest,
        report_id=guest.report_id,
        report_id_ma=guest.report_id_ma,
        reported_tcb=variables.reported_tcb,
        cpuid_fam_id=settings.family if named else 0,
        cpuid_mod_id=settings.model if named else 0,
        cpuid_step=settings.stepping if named else 0,
        chip_id=bytes(64) if variables.mask_chip_id else chip.chip_id,
        committed_tcb=variables.committed_tcb,
        current_build=current.build,
        current_minor=current.minor,
        current_major=current.major,
        committed_build=committed.build,
        committed_minor=committed.minor,
        committed_major=committed.major,
        launch_tcb=guest.launch_tcb,
        launch_mit_vector=guest.launch_mit_vector if mitigations else 0,
        current_mit_vector=variables.mit_vector if mitigations else 0,
    )


def _parts(chip: Chip, guest: GuestContext, signing_key: SigningKey) -> tuple[bytes, bytes, bytes]:
    template = guest.report_template
    if template is None or template.made_from is not chip.variables:
        template = guest.report_template = ReportTemplate(chip.variables)
    parts = template.parts.get(signing_key)
    if parts is None:
        raw = bytes(unsigned_report(chip, guest, signing_key))
        parts = template.parts[signing_key] = (
            raw[:_VMPL],
            raw[_AFTER_VMPL:_REPORT_DATA],
            raw[_AFTER_REPORT_DATA:SIGNED_SIZE],
        )
    return parts


def build_report(
    platform: Platform, guest: GuestContext, *, vmpl: int, report_data: bytes, key_sel: int
) -> bytes:
    """A report, 4A0h bytes, for a request that was found in order.

    Args:
        platform: whose keys sign.
        guest: a running guest.
        vmpl: goes into the report as it is.
        report_data: 64 bytes.
        key_sel: KEY_SEL, 0..2, found valid.
    """
    chip = platform.chip
    signing_key, key = choose_key(chip, key_sel)
    before, middle, after = _parts(chip, guest, signing_key)
    signed = b"".join((before, vmpl.to_bytes(4, "little"), middle, report_data, after))
    signature = _NO_SIGNATURE if key is None else key.sign(signed)
    if (emit := platform.trace.emit) is not None:
        emit(
            trace.ReportSigned(
                version=chip.settings.report_version,
                signing_key=signing_key,
                tcb=chip.reported_tcb,
                vmpl=vmpl,
            )
        )
    return signed + signature + _PADDING
