"""The digests of SEV and SEV-ES guests, which are SHA-256 over everything that the VMM loads.

The launch measure that their firmware reports is an HMAC over this digest, with a key that only guest owner
and firmware share; it is not made here.

Source: AMD 55766 (SEV API), LAUNCH_MEASURE; sev-snp-measure 0.0.13, bit for bit.
"""

from __future__ import annotations

from hashlib import sha256

from swsnp.errors import UsageError
from swsnp.measure.launch_plan import vmsa_regions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from swsnp.measure.firmware_volume import FirmwareVolume
    from swsnp.measure.kernel_hashes import KernelHashes
    from swsnp.measure.launch_plan import LaunchConfig, Region

__all__ = ["sev_digest", "sev_es_digest"]


def sev_digest(firmware: FirmwareVolume, hashes: KernelHashes | None = None) -> bytes:
    """SHA-256 of the firmware and, with a kernel, of the table of hashes: 32 bytes.

    Raises:
        UsageError: a kernel for a firmware that does not look for hashes.
        LayoutError: tables that cannot be read.
    """
    return _hash(firmware, hashes, ())


def sev_es_digest(config: LaunchConfig) -> bytes:
    """As `sev_digest`, and of every VMSA page after it; SEV_FEATURES of a SEV-ES guest is 0.

    Raises:
        UsageError: as `sev_digest`, or SEV_FEATURES other than 0.
        LayoutError: as `sev_digest`.
    """
    if config.features:
        raise UsageError(f"SEV_FEATURES: got {config.features:#x}, wanted 0 for a SEV-ES guest")
    return _hash(config.firmware, config.hashes, vmsa_regions(config))


def _hash(firmware: FirmwareVolume, hashes: KernelHashes | None, vmsas: Iterable[Region]) -> bytes:
    digest = sha256(firmware.image)
    if hashes is not None:
        firmware.hash_table_gpa()
        digest.update(hashes.table())
    for region in vmsas:
        for number in range(region.npages):
            digest.update(region.page(number))
    return digest.digest()
