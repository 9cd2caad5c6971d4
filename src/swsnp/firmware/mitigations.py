"""SNP_VERIFY_MITIGATION: mitigations asked for while the platform runs. Firmware 1.58 and later.

Source: AMD 56860 1.58 by way of Linux, patch "crypto/ccp: Introduce SNP_VERIFY_MITIGATION command" v4. What a
bit means, what it needs and why it fails is different for each vulnerability and published with it; here
the settings of the part say which bits there are and which of them need a platform without guests.
UNVERIFIED: the order of the checks, their statuses, and the numbers of FAILURE_STATUS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import FirmwareStatus
from swsnp.abi.snp_mitigation import MitigationCommand, MitigationStatus, VerifyMitigation
from swsnp.firmware.faults import require
from swsnp.hardware.memory import PAGE

if TYPE_CHECKING:
    from swsnp.firmware.platform import Platform

__all__ = ["GUESTS_EXIST", "VERIFY_MITIGATION_SINCE", "verify_mitigation"]

VERIFY_MITIGATION_SINCE: Final = (1, 58)
"""The firmware's API version (major, minor) from which on the command exists."""
GUESTS_EXIST: Final = 1
"""FAILURE_STATUS: this mitigation wants a platform without guests (this model's own number)."""
_PAGE_MASK: Final = PAGE - 1


def verify_mitigation(platform: Platform, buffer: VerifyMitigation) -> None:
    """SNP_VERIFY_MITIGATION: which mitigations are supported and in force; VERIFY brings one into force.

    Reports of every guest carry it from then on in CURRENT_MIT_VECTOR, guests launched later in
    LAUNCH_MIT_VECTOR too.

    1. LEN, reserved bits, a SUBCOMMAND above 1, a result that crosses a page: INVALID_PARAM.
    2. SNP not INIT: INVALID_PLATFORM_STATE.
    3. No memory at an address that counts: INVALID_ADDRESS. No mitigation here looks at SRC_PADDR.
    4. The result's page is not Firmware: INVALID_PAGE_STATE.
    5. VERIFY with a VECTOR that is not one supported mitigation: INVALID_PARAM.

    A verification that fails is SUCCESS with FAILURE_STATUS in the result.
    """
    flags, vector = buffer.flags, buffer.vector
    reserved = buffer.reserved_06 or flags.unnamed() or buffer.reserved_14 or any(buffer.reserved_28)
    crosses = flags.dst_paddr_en and (buffer.dst_paddr & _PAGE_MASK) + MitigationStatus.SIZE > PAGE
    require(buffer.length == VerifyMitigation.SIZE, FirmwareStatus.INVALID_PARAM)
    require(not (reserved or crosses), FirmwareStatus.INVALID_PARAM)
    known = buffer.subcommand in MitigationCommand.__members__.values()
    require(known, FirmwareStatus.INVALID_PARAM)
    platform.require_init()
    if flags.src_paddr_en:
        platform.look_up(buffer.src_paddr)
    if flags.dst_paddr_en:
        entry = platform.look_up(buffer.dst_paddr)
        platform.require_output(buffer.dst_paddr, MitigationStatus.SIZE, entry)
    failure = 0
    if buffer.subcommand == MitigationCommand.VERIFY:
        supported = bool(vector & platform.chip.supported_mitigations)
        require(supported and vector.bit_count() == 1, FirmwareStatus.INVALID_PARAM)
        failure = _verify(platform, vector)
    if flags.dst_paddr_en:
        platform.memory.write(buffer.dst_paddr, bytes(_status(platform, failure)))


def _verify(platform: Platform, mitigation: int) -> int:
    """Bring one mitigation into force; 0, or why not."""
    chip = platform.chip
    if mitigation & chip.settings.mit_needs_no_guests & ~chip.variables.mit_vector and platform.guests:
        return GUESTS_EXIST
    chip.verify_mitigation(mitigation)
    return 0


def _status(platform: Platform, failure: int) -> MitigationStatus:
    chip = platform.chip
    return MitigationStatus(
        verified_vector=chip.variables.mit_vector,
        supported_vector=chip.supported_mitigations,
        failure_status=failure,
    )
